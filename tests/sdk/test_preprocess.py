"""The array is the one of transformers, bit for bit; a configuration it cannot follow is refused.

Comparisons are for equality: bytes are looked up in a table that is rounded where transformers
rounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, make_picture, to_array
from PIL import Image

from marnet_sdk.errors import ImageError, ImageTooLarge, InvalidInput
from marnet_sdk.inputs.images import Limits, decode
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.inputs.processors import PreprocessError

VIT = Preprocess(size=(224, 224))
CLIP = Preprocess(shortest_edge=224, crop_size=(224, 224), resample=Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photograph(photographs: list[Path]) -> Image.Image:
    return decode(photographs[0])


# --- resizing and normalising ---------------------------------------------------------------------

CROPS = [  # left, top, right, bottom: odd sizes, extreme shapes, smaller than the output
    (0, 0, 640, 427), (3, 5, 104, 306), (0, 0, 639, 33), (10, 10, 11, 11), (0, 0, 223, 225),
    (0, 0, 225, 223), (0, 0, 224, 224), (0, 0, 7, 400), (100, 0, 400, 200),
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    {"do_rescale": False},
    {"do_normalize": False},
    {"rescale_factor": 1 / 127.5},
    {"resample": Image.Resampling.LANCZOS},
    {"resample": Image.Resampling.NEAREST},
    {"do_center_crop": True, "crop_size": {"height": 301, "width": 97}},
    {
        "size": {"shortest_edge": 33},
        "do_center_crop": True,
        "crop_size": {"height": 13, "width": 96},
    },
]


PLAIN = ("ViT", "CLIP", "DeiT", "Siglip", "Bit", "ChineseCLIP", "Blip", "Beit", "Segformer", "Pvt",
         "MobileNetV1", "MobileNetV2", "ConvNext", "PoolFormer", "Levit")  # fmt: skip
SPECIAL: list[tuple[str, dict[str, Any]]] = [
    ("EfficientNet", {"include_top": False}),
    ("EfficientNet", {"include_top": False, "do_center_crop": True}),
    ("EfficientNet", {"include_top": False, "rescale_offset": True, "do_rescale": False}),
    ("EfficientNet", {"image_std": [1.0, 1.0, 1.0], "rescale_factor": 1 / 127.5}),
    ("MobileNetV2", {"do_reduce_labels": True}),
    ("Beit", {"do_center_crop": True, "size": {"height": 256, "width": 256}}),
    ("ConvNext", {"size": {"shortest_edge": 224}}),
    ("ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.95}),
    ("ConvNext", {"size": {"shortest_edge": 383}, "crop_pct": 1.0}),
    ("ConvNext", {"size": {"shortest_edge": 384}, "crop_pct": 0.5}),
    ("ConvNext", {"size": 400, "do_center_crop": True, "crop_size": 384}),
    ("PoolFormer", {"crop_pct": 0.95}),
    ("PoolFormer", {"size": {"height": 200, "width": 200}}),
    ("Levit", {"size": {"height": 230, "width": 240}}),
    ("Levit", {"size": {"shortest_edge": 129}, "crop_size": {"height": 128, "width": 130}}),
]
MODULES = {"ChineseCLIP": "chinese_clip", "MobileNetV1": "mobilenet_v1",
           "MobileNetV2": "mobilenet_v2"}  # fmt: skip


def _processor(name: str, **options: Any) -> Any:
    folder = MODULES.get(name, name.lower())
    module = f"transformers.models.{folder}.image_processing_pil_{folder}"
    reason = "the comparison needs transformers 5"
    return getattr(pytest.importorskip(module, reason=reason), f"{name}ImageProcessorPil")(
        **options
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in PLAIN]
    + SPECIAL
    + [(name, options) for name in ("ViT", "CLIP") for options in OPTIONS],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "default",
)
def test_equals_the_image_processors_of_transformers(
    name: str, options: dict[str, Any], photograph: Image.Image
) -> None:
    processor = _processor(name, **options)
    preprocess = Preprocess.from_dict(processor.to_dict())
    for box in CROPS:
        image = photograph.crop(box)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        got = preprocess(image)
        assert got.dtype == np.float32
        assert got.shape == preprocess.output_shape
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", [*PLAIN, "EfficientNet"])
@pytest.mark.parametrize("suffix", ["ImageProcessor", "ImageProcessorFast", "FeatureExtractor"])
def test_absent_keys_mean_what_they_mean_in_transformers(name: str, suffix: str) -> None:
    settings = {"include_top": False} if name == "EfficientNet" else {}
    complete = Preprocess.from_dict(_processor(name, **settings).to_dict())
    assert Preprocess.from_dict({"image_processor_type": name + suffix, **settings}) == complete
    assert Preprocess.from_dict(complete.to_dict()) == complete


@pytest.mark.parametrize(
    "preprocess", [VIT, CLIP, Preprocess(size=(256, 256), crop_size=(224, 200))]
)
def test_transformers_loads_what_we_write(
    preprocess: Preprocess, tmp_path: Path, photograph: Image.Image
) -> None:
    transformers = pytest.importorskip("transformers")
    import json

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocess.to_dict()))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = processor(photograph, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(preprocess(photograph), expected)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert Preprocess.from_dict(saved) == preprocess


def test_transparent_images_become_the_same_rgb_as_in_transformers() -> None:
    processor = _processor("CLIP")
    alpha = Image.linear_gradient("L").resize((48, 32))
    image = make_picture()
    image.putalpha(alpha)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    preprocess = Preprocess.from_dict(processor.to_dict())
    np.testing.assert_array_equal(preprocess(decode(image)), expected)


@given(
    height=st.integers(1, 60), width=st.integers(1, 60), crop=st.tuples(*[st.integers(1, 60)] * 2)
)
def test_centre_crops_equal_those_of_transformers(
    height: int, width: int, crop: tuple[int, int]
) -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    image = make_picture(width, height)
    preprocess = Preprocess(size=(height, width), crop_size=crop)
    expected = transforms.center_crop(to_array(image), crop, input_data_format="channels_last")
    np.testing.assert_array_equal(preprocess.resized_uint8(image), expected)


@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    edge=st.integers(1, 40),
    crop=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_the_output_size_never_depends_on_the_image(
    width: int, height: int, edge: int, crop: tuple[int, int]
) -> None:
    image = make_picture(width, height)
    for preprocess in (
        Preprocess(shortest_edge=edge, crop_size=crop),
        Preprocess(size=crop),
        Preprocess(size=(edge, edge), crop_size=crop),
    ):
        assert preprocess.output_shape == (3, *crop)
        assert preprocess(image).shape == (3, *crop)
        assert preprocess.resized_uint8(image).shape == (*crop, 3)


@pytest.mark.parametrize("preprocess", [VIT, CLIP])
def test_cached_bytes_give_the_same_as_the_image(preprocess: Preprocess) -> None:
    images = [make_picture(60, 40), make_picture(33, 70)]
    cached = np.stack([preprocess.resized_uint8(image) for image in images])  # [B, H, W, 3]
    assert cached.dtype == np.uint8
    expected = np.stack([preprocess(image) for image in images])
    np.testing.assert_array_equal(preprocess.normalize(cached), expected)


def test_pixels_are_written_where_asked() -> None:
    out = np.zeros((2, 3, 224, 224), np.float32)
    assert VIT(make_picture(), out=out[1]).base is out
    assert not out[0].any()
    np.testing.assert_array_equal(out[1], VIT(make_picture()))
    wrongs: list[Any] = [np.zeros((3, 224, 225), np.float32), np.zeros((3, 224, 224))]
    for wrong in wrongs:
        with pytest.raises(InvalidInput, match=r"expected \[\.\.\., H, W, 3\] into float32"):
            VIT(make_picture(), out=wrong)


def test_a_batch_is_its_images_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    make_picture(70, 50).save(path)
    images: list[Any] = [
        path,
        encode(make_picture(), "JPEG"),
        to_array(make_picture(9, 9)),
        make_picture(),
    ]
    batch = CLIP.pixels(images)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    assert batch.shape == (4, 3, 224, 224)
    for row, image in zip(batch, images, strict=True):
        np.testing.assert_array_equal(row, CLIP(decode(image)))
    assert CLIP.pixels([]).shape == (0, 3, 224, 224)


def test_a_bad_image_in_a_batch_is_named() -> None:
    images: list[Any] = [make_picture(), b"no image"]
    with pytest.raises(ImageError, match=r"^image 1: got a file that starts with b'no image'"):
        VIT.pixels(images)
    with pytest.raises(ImageError, match=r"^gone\.jpg: cannot be read"):
        VIT.pixels(["gone.jpg"])
    with pytest.raises(ImageError, match=r"^second: got a file"):
        VIT.pixels(images, names=["first", "second"])
    with pytest.raises(InvalidInput, match="got 1 names for 2 images"):
        VIT.pixels(images, names=["first"])
    with pytest.raises(ImageTooLarge, match=r"^image 0: got 48 x 32 pixels"):
        VIT.pixels(images, limits=Limits(max_pixels=100))


def test_an_elongated_image_cannot_grow_without_bound() -> None:
    data = encode(Image.new("RGB", (60_000, 1)), "JPEG")
    message = r"^image 0: got 60000 x 1 pixels, which .* would be 13440000 x 224.*crop it"
    with pytest.raises(ImageTooLarge, match=message):
        CLIP.pixels([data])
    assert VIT.pixels([data]).shape == (1, 3, 224, 224)


def test_an_image_that_cannot_be_resized_is_an_error_of_that_image() -> None:
    endless = Preprocess(shortest_edge=40_000, crop_size=(8, 8))  # 2.4 billion pixels wide
    limits = Limits(max_pixels=10**15)
    message = r"^image 0: got 60000 x 1 pixels, which cannot be resized to 2400000000 x 40000 \("
    with pytest.raises(ImageError, match=message):
        endless.pixels([Image.new("RGB", (60_000, 1))], limits=limits)


def test_only_rgb_images_are_resized() -> None:
    with pytest.raises(ImageError, match=r"got PIL mode L; expected RGB: use decode\(\) first"):
        VIT(Image.new("L", (4, 4)))


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # as in google/vit-base-patch16-224
        ({"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
          "size": 224}, VIT),
        # as in openai/clip-vit-base-patch32
        ({"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
          "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.5, 0.5, 0.5],
          "image_std": [0.5, 0.5, 0.5], "resample": 3, "size": 224}, CLIP),
        ({"image_processor_type": "ViTImageProcessorFast"}, VIT),
        ({"image_processor_type": "ViTImageProcessor", "size": [224, 224], "resample": None}, VIT),
        ({"image_processor_type": "DeiTImageProcessor"},
         Preprocess(size=(256, 256), crop_size=(224, 224), resample=3)),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False,
          "size": {"height": 336, "width": 336}, "do_normalize": False, "do_rescale": False},
         Preprocess(size=(336, 336), resample=3, rescale_factor=1, mean=(0, 0, 0), std=(1, 1, 1))),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": 0.4, "image_std": 0.2},
         Preprocess(size=(224, 224), mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))),
    ],
)  # fmt: skip
def test_configurations_in_use_are_read(config: dict[str, Any], expected: Preprocess) -> None:
    assert Preprocess.from_dict(config) == expected
    assert Preprocess.from_dict(expected.to_dict()) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False},
         "shortest_edge=224 without a centre crop.*could not share a batch; set crop_size"),
        ({"do_resize": False}, "do_resize is false"),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"image_processor_type": "MobileViTImageProcessor"},  # B, G, R
         "got 'MobileViTImageProcessor'; its rules may differ .*ViT, DeiT, Siglip, CLIP, Bit"),
        # as in google/efficientnet-b0
        ({"image_processor_type": "EfficientNetImageProcessor", "include_top": True,
          "image_std": [0.5, 0.5, 0.25]},
         r"include_top is true .*\[0.5, 0.5, 0.25\] once more; .* \[0.25, 0.25, 0.0625\]"),
        ({"image_processor_type": "EfficientNetImageProcessor"}, "include_top is true"),
        ({"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True,
          "include_top": False}, "rescale_offset is true, .*add 1 to each number of image_mean"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 8, "width": 8}},
         'size: got .* has {"shortest_edge"} alone: .*as ViTImageProcessor'),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 224, "do_center_crop": True,
          "crop_size": 200}, "below 384 a ConvNext processor crops to 224 x 224 anyway; leave"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 224, "crop_pct": 0},
         "crop_pct: got 0; expected a positive number, such as 0.875"),
        ({"image_processor_type": "PoolFormerImageProcessor", "crop_pct": "0.9"}, "crop_pct: got"),
        ({"image_processor_type": "PoolFormerImageProcessor", "size": [200, 100]},
         "a PoolFormer processor with crop_pct needs a square"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": "224"}},
         "size: got .*'224'.*; expected"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "got 'Siglip2ImageProcessor'"),
        ({"size": 224, "do_center_crop": True, "crop_size": 224}, "without image_processor_type"),
        ({"size": {"shortest_edge": 4, "longest_edge": 300}}, 'size: got .* or {"shortest_edge"}'),
        ({"size": {"max_height": 224, "max_width": 300}}, "size: got"),
        ({"size": "224"}, "size: got '224'; expected"),
        ({"size": {"shortest_edge": [4, 4]}}, r"size: got .*\[4, 4\].*; expected"),
        ({"crop_size": {"shortest_edge": 224}, "do_center_crop": True, "size": [4, 4]},
         'crop_size: got .*; expected {"height", "width"}$'),
        ({"size": 0}, r"got edges \[0, 0, 1\]; expected positive integers"),
        ({"size": [2.5, 3]}, "expected positive integers"),
        ({"resample": 9}, "resample: got 9; expected one of 0 nearest, 1 lanczos, 2 bilinear"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean: got \[0.5, 0.5\]; expected three numbers"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean: got .*; expected three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "expected finite numbers, three for mean and three non-z"),
        ({"rescale_factor": float("nan")}, "rescale_factor=nan"),
        ({"rescale_factor": "1/255"}, "rescale_factor=1/255.*expected finite numbers"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_reproduced_are_refused(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(PreprocessError, match=message):
        Preprocess.from_dict(config)


TIMM = {"image_processor_type": "TimmWrapperImageProcessor"}


@pytest.mark.parametrize("spare", range(8))
def test_timm_rounds_half_a_spare_pixel_to_an_even_number(spare: int) -> None:
    """Half of an odd number goes to an even one, as in torchvision; transformers cuts it off."""
    config = {"input_size": [3, 8, 8], "crop_pct": 8 / (8.5 + spare), "crop_mode": "squash"}
    preprocess = Preprocess.from_dict({**TIMM, "pretrained_cfg": config})
    assert (preprocess.size, preprocess.crop_size) == ((8 + spare,) * 2, (8, 8))
    image = make_picture(8 + spare, 8 + spare)
    first = [0, 0, 1, 2, 2, 2, 3, 4][spare]
    expected = to_array(image)[first : first + 8, first : first + 8]
    np.testing.assert_array_equal(preprocess.resized_uint8(image), expected)
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess


def test_what_a_configuration_of_timm_leaves_out_has_its_defaults() -> None:
    expected = Preprocess(
        shortest_edge=256,
        crop_size=(224, 224),
        resample=Image.Resampling.BICUBIC,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_pct=0.875,
    )
    empty = {"crop_pct": None, "crop_mode": "", "mean": None, "url": "unused"}
    for config in ({}, empty):
        assert Preprocess.from_dict({**TIMM, "pretrained_cfg": config}) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"crop_mode": "border"}, "crop_mode: got 'border' .*expected 'squash', or 'center' of a"),
        ({"input_size": [3, 224, 112]}, r"crop_mode: got 'center' of \(224, 112\)"),
        ({"input_size": [1, 28, 28]}, r"input_size: got \[1, 28, 28\]; expected \[3, height"),
        ({"input_size": 224}, "input_size: got 224"),
        ({"input_size": [3, "a", 4]}, "input_size: got"),
        ({"interpolation": "random"}, "interpolation: got 'random'; expected one of nearest"),
        ({"interpolation": ["bicubic"]}, "interpolation: got"),
        ({"crop_pct": 1.1}, "crop_pct: got 1.1, with which timm adds a border; expected at most 1"),
        ({"crop_pct": "0.9"}, "crop_pct: got '0.9'; expected a positive number"),
        ({"mean": [0.5]}, r"mean: got \[0.5\]; expected three numbers"),
        (None, "pretrained_cfg: got None; expected what the config.json of a timm model has"),
    ],
)
def test_configurations_of_timm_that_cannot_be_reproduced_are_refused(
    config: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(PreprocessError, match=message):
        Preprocess.from_dict({**TIMM, "pretrained_cfg": config})


def test_a_share_that_timm_crops_differently_is_refused() -> None:
    with pytest.raises(PreprocessError, match=r"other values of shortest_edge than .*leave"):
        Preprocess(shortest_edge=250, crop_size=(224, 224), crop_pct=0.875)


def test_size_and_shortest_edge_exclude_each_other() -> None:
    for sizes in ({}, {"size": (4, 4), "shortest_edge": 4}):
        with pytest.raises(PreprocessError, match="expected one of them"):
            Preprocess(**sizes)


def test_mean_and_std_have_a_value_for_each_channel() -> None:
    values: dict[str, Any] = {"mean": (0.5, 0.5), "std": (0.5, 0.5, 0.5, 0.5)}
    with pytest.raises(PreprocessError, match="three for mean and three non-zero ones for std"):
        Preprocess(size=(4, 4), **values)
