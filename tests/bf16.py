"""Tests of OpenVINO's products in bf16, which not every processor has."""

from __future__ import annotations

import pytest

from marnet_sdk.backends.openvino import load_openvino

HAS_BF16 = "BF16" in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
bf16_only = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 arithmetic")
