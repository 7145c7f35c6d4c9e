"""Tests of OpenVINO's products in bf16, which not every processor has."""

from __future__ import annotations

import pytest

from marnet_sdk.backends.openvino import load_openvino

bf16_only = pytest.mark.skipif(
    "BF16" not in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="this CPU has no bf16 arithmetic",
)
