"""Images are prepared as timm's own transform for evaluation prepares them, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import make_picture
from PIL import Image
from tiny_training import TINY
from transformers import TimmWrapperImageProcessor

from marnet_sdk.inputs.images import decode
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.inputs.processors import PreprocessError
from marnet_train.assemble import make_preprocess

timm = pytest.importorskip("timm", reason="needs timm and torchvision: make test-timm")
CONFIGS: list[dict[str, Any]] = [
    {},
    {"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic"},
    {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bilinear",
     "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    {"input_size": [3, 96, 96], "crop_pct": 1.0, "crop_mode": "squash"},
    {"input_size": [3, 96, 64], "crop_pct": 0.93, "crop_mode": "squash",
     "interpolation": "lanczos"},
    {"input_size": [3, 33, 33], "crop_pct": 0.7, "interpolation": "nearest", "mean": [0, 0, 0],
     "std": [1, 1, 1]},
    {"crop_mode": None, "crop_pct": None, "mean": None, "interpolation": ""},
]  # fmt: skip


def preprocess_of(config: dict[str, Any]) -> Preprocess:
    name = "TimmWrapperImageProcessor"
    return Preprocess.from_dict({"image_processor_type": name, "pretrained_cfg": config})


def transform_of(config: dict[str, Any]) -> Any:
    found = timm.data.resolve_data_config(pretrained_cfg=config or {"url": "none"})
    return timm.data.create_transform(**found, is_training=False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: ",".join(c) or "defaults")
@pytest.mark.parametrize("box", [(0, 0, 640, 427), (3, 5, 104, 306), (0, 0, 223, 225),
                                 (0, 0, 300, 301), (0, 0, 300, 302), (0, 0, 300, 303),
                                 (10, 10, 11, 11)])  # fmt: skip
def test_equals_the_transform_of_timm(
    config: dict[str, Any], box: tuple[int, ...], photographs: list[Path]
) -> None:
    image = decode(photographs[0]).crop(box)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(preprocess_of(config)(image), transform_of(config)(image).numpy())


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    edge=st.integers(1, 48),
    pct=st.floats(0.3, 1),
    mode=st.sampled_from(["center", "squash"]),
)
def test_equals_it_at_any_size(width: int, height: int, edge: int, pct: float, mode: str) -> None:
    if max(width, height) > 20 * min(width, height):
        return
    config = {"input_size": [3, edge, edge], "crop_pct": pct, "crop_mode": mode}
    image = make_picture(width, height)
    np.testing.assert_array_equal(preprocess_of(config)(image), transform_of(config)(image).numpy())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: ",".join(c) or "defaults")
def test_transformers_reads_what_we_write(config: dict[str, Any], photographs: list[Path]) -> None:
    preprocess = preprocess_of(config)
    content = json.loads(json.dumps(preprocess.to_dict()))
    assert Preprocess.from_dict(content) == preprocess
    image = decode(photographs[0])
    theirs = TimmWrapperImageProcessor.from_dict(content)(image)["pixel_values"][0]
    np.testing.assert_array_equal(preprocess(image), theirs.numpy())


def test_every_model_of_timm_is_read_or_refused_for_a_reason() -> None:
    """Those whose images have another size than a plain resize and crop makes are refused."""
    read, refused = 0, set()
    for name in timm.list_pretrained():
        config = timm.models.get_pretrained_cfg(name).to_dict()
        try:
            preprocess_of(config)
            read += 1
        except PreprocessError as error:
            refused.add(str(error).split(":")[0])
    assert read > 1000
    assert refused <= {"crop_mode", "input_size", "interpolation", "crop_pct"}


def test_a_pretrained_model_brings_its_own(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=0)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    preprocess = make_preprocess(replace(TINY, vision={"pretrained": str(tmp_path)}, image=None))
    expected = preprocess_of(model.pretrained_cfg)
    assert preprocess == expected
    image = Image.effect_noise((301, 250), 60).convert("RGB")
    wanted = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model), is_training=False
    )(image)
    np.testing.assert_array_equal(preprocess(image), wanted.numpy())
