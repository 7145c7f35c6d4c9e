"""The encoders that are written here go the whole way, through every backend of a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quick import kept
from whole_way import CPU_BACKENDS, export_and_ask, train_two_steps

RESNET = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1],
          "layer_type": "basic"}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "repmlpnet": {"image_size": 16, "hidden_sizes": [8, 16], "depths": [1, 1],
                  "share_sets": [2, 4]},
    "wiser": {"image_size": 16, "slices": 6, "hidden_size": 12, "trunk": RESNET},
}  # fmt: skip
CASES = [(name, backend) for name in OWN for backend in CPU_BACKENDS]
QUICK = [(name, "torchscript") for name in OWN]


@pytest.mark.parametrize(("name", "backend"), kept(CASES, QUICK, many=True))
def test_an_encoder_goes_the_whole_way(
    name: str, backend: str, few_digits: Path, shared: Any, tmp_path: Path
) -> None:
    vision = {"model_type": name, **OWN[name]}
    image = {"size": {"height": 16, "width": 16}}
    trained = shared(f"own-{name}", lambda out: train_two_steps(vision, few_digits, out, image))
    export_and_ask(trained, backend, tmp_path / "bundle")
