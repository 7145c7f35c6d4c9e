"""The script that measures memory for images which do not fit into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_scripts import load_script

from marnet_train.data import pixels


@pytest.mark.parametrize("limit", [0, pixels.KEPT_LIMIT])
def test_a_run_says_what_was_read_and_how_much_memory_there_was(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script("scripts/image_memory.py")
    monkeypatch.setattr(pixels, "KEPT_LIMIT", limit)
    found = script.read(script.write_pictures(tmp_path, 3, 32), 130, 32)
    assert (found["images"], found["kept"]) == (130, limit > 0)
    assert 0 < found["resident_before_mib"] <= found["resident_peak_mib"]
