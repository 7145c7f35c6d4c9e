"""What users hand in becomes the pixels they expect, or an error that says what to do."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, make_picture, to_array
from PIL import Image, ImageFile, ImageOps
from tolerances import COLOUR_ENGINE

from marnet_sdk.errors import ImageError, ImageTooLarge, InvalidInput
from marnet_sdk.inputs.images import Limits, decode

LOSSLESS: dict[str, Callable[[Image.Image], bytes]] = {
    "PNG": lambda image: encode(image, "PNG"),
    "BMP": lambda image: encode(image, "BMP"),
    "TIFF": lambda image: encode(image, "TIFF"),
    "TIFF, deflate": lambda image: encode(image, "TIFF", compression="tiff_adobe_deflate"),
    "WEBP": lambda image: encode(image, "WEBP", lossless=True),
}
ENCODERS: dict[str, Callable[[Image.Image], bytes]] = {
    **LOSSLESS,
    "JPEG": lambda image: encode(image, "JPEG", exif=_exif(6)),
    "JPEG, progressive": lambda image: encode(image, "JPEG", progressive=True),
    "JPEG, CMYK": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "GIF": lambda image: encode(image, "GIF"),
    "GIF, animated": lambda image: encode(image, "GIF", save_all=True, append_images=[image]),
    "PNG, palette": lambda image: encode(image.quantize(16), "PNG", transparency=3),
    "PNG, animated": lambda image: encode(image, "PNG", save_all=True, append_images=[image]),
    "WEBP, lossy": lambda image: encode(image, "WEBP", exif=_exif(3)),
    "TIFF, EXIF": lambda image: encode(image, "TIFF", exif=_exif(5)),
    "MPO": lambda image: encode(image, "MPO", save_all=True, append_images=[image]),
}


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker, whose name is stored outside the directory"
    return exif.tobytes()


# --- what is accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_buffer_is_the_content_of_one_file(kind: Callable[[bytes], Any]) -> None:
    expected = decode(encode(make_picture(), "PNG"))
    assert decode(kind(encode(make_picture(), "PNG"))).tobytes() == expected.tobytes()
    every_other = memoryview(bytes(2 * byte for byte in b"no image"))[::2]
    with pytest.raises(ImageError, match="got a file that starts with"):
        decode(every_other)


def test_an_open_file_is_read_from_where_it_stands(tmp_path: Path) -> None:
    data = encode(make_picture(), "PNG")
    (tmp_path / "a.bin").write_bytes(b"header" + data)
    expected = to_array(decode(data))
    with (tmp_path / "a.bin").open("rb") as file:
        file.seek(6)
        assert np.array_equal(to_array(decode(file)), expected)
    assert np.array_equal(to_array(decode(io.BytesIO(data))), expected)
    with tempfile.SpooledTemporaryFile() as file:  # as web frameworks hand uploads over
        file.write(data)
        file.seek(0)
        assert np.array_equal(to_array(decode(file)), expected)


def test_an_open_file_of_too_many_bytes_is_not_read_whole() -> None:
    file = io.BytesIO(bytes(1000))
    with pytest.raises(ImageTooLarge, match="99"):
        decode(file, limits=Limits(max_bytes=99))
    assert file.tell() == 100


class Upload:
    """A file of an asynchronous framework."""

    async def read(self, size: int = -1) -> bytes:
        return b""


def test_an_open_file_that_gives_no_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no picture")
    with (
        (tmp_path / "a.txt").open() as file,
        pytest.raises(
            ImageError,
            match=r"read\(\) of the TextIOWrapper gave str, expected bytes: open it in binary",
        ),
    ):
        decode(file)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ImageError, match=r"read\(\) of the Upload gave coroutine, .*or await"):
        decode(Upload())  # pyright: ignore[reportArgumentType]


def test_every_kind_of_input_gives_the_same_pixels(tmp_path: Path) -> None:
    picture = make_picture()
    path = tmp_path / "picture.png"
    picture.save(path)
    with Image.open(path) as lazy:
        inputs: list[Any] = [str(path), path, path.read_bytes(), picture, lazy, to_array(picture)]
        inputs.append(np.asfortranarray(to_array(picture)))
        for image in inputs:
            decoded = decode(image)
            assert decoded.mode == "RGB"
            np.testing.assert_array_equal(to_array(decoded), to_array(picture))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    picture = make_picture()
    np.testing.assert_array_equal(to_array(decode(LOSSLESS[kind](picture))), to_array(picture))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_decodes_as_pillow_decodes_it(options: dict[str, Any]) -> None:
    data = encode(make_picture(), "JPEG", comment=b"x" * 500, icc_profile=b"y" * 70_000, **options)
    with Image.open(io.BytesIO(data)) as expected:
        np.testing.assert_array_equal(to_array(decode(data)), to_array(expected))


@pytest.mark.parametrize("space", ["CMYK", "L"])
def test_other_jpeg_colour_spaces_decode_as_pillow_decodes_them(space: str) -> None:
    data = encode(make_picture().convert(space), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(to_array(decode(data)), to_array(image.convert("RGB")))


def test_a_jpeg_with_fill_bytes_bare_markers_and_junk_between_segments_is_read() -> None:
    data = encode(make_picture(), "JPEG")
    padded = data[:2] + b"\xff\xff\xff" + data[3:20] + b"junk\xff\xd0" + data[20:]
    np.testing.assert_array_equal(to_array(decode(padded)), to_array(decode(data)))


PIXELS: list[tuple[str, Any, tuple[int, int, int]]] = [
    ("1", 1, (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("LA", (100, 0), (100, 100, 100)),
    ("LA", (100, 51), (224, 224, 224)),
    ("La", (40, 51), (244, 244, 244)),  # 40 is 200 premultiplied by 51/255
    ("P", 9, (9, 9, 9)),
    ("PA", (9, 0), (9, 9, 9)),
    ("RGB", (1, 2, 3), (1, 2, 3)),
    ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
    ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
    ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
    ("RGBA", (0, 100, 255, 51), (204, 224, 255)),
    ("RGBa", (0, 20, 51, 51), (204, 224, 255)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("YCbCr", (128, 128, 128), (128, 128, 128)),
    ("HSV", (0, 255, 255), (255, 0, 0)),
    ("LAB", (128, 0, 0), (119, 119, 119)),
    ("I;16", 0xABCD, (0xAB, 0xAB, 0xAB)),
    ("I;16L", 0xABCD, (0xAB, 0xAB, 0xAB)),
    ("I;16B", 0xABCD, (0xAB, 0xAB, 0xAB)),
]


@pytest.mark.parametrize(("mode", "value", "expected"), PIXELS)
def test_every_mode_becomes_rgb(mode: str, value: Any, expected: tuple[int, int, int]) -> None:
    if mode == "P":
        image = Image.new("P", (3, 2))
        image.putpalette([i // 3 for i in range(768)])
        image.paste(value, (0, 0, 3, 2))
    elif mode in ("La", "RGBa", "LAB", "PA", "HSV"):
        image = Image.frombytes(mode, (3, 2), bytes(value) * 6)
        if mode == "PA":
            image.putpalette([i // 3 for i in range(768)])
    else:
        image = Image.new(mode, (3, 2), value)
    decoded = decode(image)
    assert decoded.mode == "RGB"
    assert decoded.size == (3, 2)
    error = np.abs(to_array(decoded).astype(int) - expected).max()
    assert error <= (COLOUR_ENGINE if mode == "LAB" else 0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_modes_are_refused(mode: str) -> None:
    with pytest.raises(
        ImageError, match=rf"32-bit or signed pixels \(PIL mode {mode}\).*scale to 0 \.\. 255"
    ):
        decode(Image.new(mode, (3, 2), 5), name="image 3")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_files_keep_the_high_byte(kind: str) -> None:
    wide = (np.arange(12, dtype=np.uint16).reshape(3, 4) * 5461).astype(np.uint16)
    decoded = to_array(decode(encode(Image.fromarray(wide), kind)))
    np.testing.assert_array_equal(decoded, np.repeat((wide >> 8)[..., None], 3, axis=-1))


def test_16_bit_grey_and_16_bit_colour_agree() -> None:
    def png(channels: int, samples: bytes) -> bytes:
        header = struct.pack(">IIBBBBB", 2, 1, 16, 0 if channels == 1 else 2, 0, 0, 0)
        return _png((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + samples)), (b"IEND", b""))

    values = (0x12F0, 0xFEDC)
    grey = decode(png(1, struct.pack(">2H", *values)))
    colour = decode(png(3, b"".join(struct.pack(">H", v) * 3 for v in values)))
    np.testing.assert_array_equal(to_array(grey), to_array(colour))


def test_a_transparent_16_bit_grey_is_white() -> None:
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(">2H", 0x1200, 0x1201))
    transparent = (b"tRNS", struct.pack(">H", 0x1201))
    data = _png((b"IHDR", header), transparent, (b"IDAT", pixels), (b"IEND", b""))
    assert to_array(decode(data))[0].tolist() == [[0x12] * 3, [255] * 3]


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    framed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_colour_is_white(kind: str) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 10] + [0] * 762)
    image.paste(2, (0, 0, 2, 4))
    decoded = decode(encode(image, kind, transparency=2))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((3, 3)) == (200, 10, 10)


def test_a_palette_with_an_alpha_for_each_colour_is_composited_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 0] + [0] * 762)
    image.putpixel((1, 0), 1)
    decoded = decode(encode(image, "PNG", transparency=bytes([255, 51])))
    assert to_array(decoded)[0].tolist() == [[0] * 3, [204] * 3]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_colour_key_is_white(mode: str) -> None:
    image = Image.new(mode, (2, 1), 7)
    key = image.getpixel((0, 0))
    image.putpixel((1, 0), 9 if mode == "L" else (9, 9, 9))
    decoded = decode(encode(image, "PNG", transparency=key))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (9, 9, 9)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getpixel((3, 2)) == (255, 0, 0)


def test_of_a_multi_picture_jpeg_the_first_is_taken() -> None:
    pictures = [make_picture(), Image.new("RGB", (8, 8))]
    data = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    with Image.open(io.BytesIO(data)) as expected:
        assert expected.format == "MPO"
        np.testing.assert_array_equal(to_array(decode(data)), to_array(expected))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_arrays_of_one_three_and_four_channels(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 90, np.uint8)
    if shape[2:] == (4,):
        array[..., 3] = 255
    np.testing.assert_array_equal(to_array(decode(array)), np.full((5, 7, 3), 90))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_a_pipe_or_a_device_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes to it
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ImageError, match="not a file but a pipe or a device; pass its bytes"):
            decode(path)


def test_what_is_not_one_of_our_inputs_gets_a_way_to_make_it_one() -> None:
    row = {"image": make_picture(), "label": 3}
    with pytest.raises(ImageError, match=r"got dict; expected a path, .*such as row\['image'\]"):
        decode(row)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ImageError, match=r"got Tensor; expected a path, .*permute\(1, 2, 0\)"):
        decode(torch.zeros(3, 8, 8))  # pyright: ignore[reportArgumentType]


def test_a_data_uri_is_recognised_and_no_message_repeats_it_whole() -> None:
    uri = "data:image/png;base64," + "A" * 100_000
    with pytest.raises(ImageError, match=r"data URI: pass base64\.b64decode\(\)") as refused:
        decode(uri)
    assert len(str(refused.value)) < 500
    with pytest.raises(ImageError) as refused:
        decode("/no/such/" + "x" * 100_000)
    assert len(str(refused.value)) < 500


def test_decoding_leaves_the_callers_image_as_it_was() -> None:
    image = make_picture().convert("RGBA")
    image.info["comment"] = "mine"
    before = image.copy()
    decode(image).putpixel((0, 0), (9, 9, 9))
    assert image.info["comment"] == "mine"
    np.testing.assert_array_equal(to_array(image), to_array(before))


# --- orientation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF, deflate"])
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    options = {"compression": "tiff_adobe_deflate"} if kind.endswith("deflate") else {}
    data = encode(make_picture(), kind.split(",")[0], exif=_exif(orientation), **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = to_array(ImageOps.exif_transpose(image).convert("RGB"))
    decoded = decode(data)
    assert decoded.size == ((32, 48) if orientation >= 5 else (48, 32))
    np.testing.assert_array_equal(to_array(decoded), expected)
    np.testing.assert_array_equal(to_array(decode(decoded)), expected)  # not turned again
    with Image.open(io.BytesIO(data)) as lazy:
        np.testing.assert_array_equal(to_array(decode(lazy)), expected)


def test_a_pil_image_is_turned_as_it_says_itself() -> None:
    data = encode(make_picture(), "JPEG", exif=_exif(6))
    expected = to_array(decode(data))
    with Image.open(io.BytesIO(data)) as image:
        by_hand = image.transpose(Image.Transpose.ROTATE_270)
        by_hand.getexif()[0x0112] = 1  # the block in `info` still says 6
        for upright in (image.copy(), ImageOps.exif_transpose(image), by_hand):
            np.testing.assert_array_equal(to_array(decode(upright)), expected)
    plain = make_picture()
    plain.getexif()[0x0112] = 6
    assert decode(plain).size == (32, 48)


@pytest.mark.parametrize("exif", [b"Exif\0\0XX", _exif(6)[:-40], b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_a_pil_image_with_unreadable_exif_is_read(exif: bytes) -> None:
    image = make_picture()
    image.info["exif"] = exif
    with recorded_warnings() as warned:
        assert set(decode(image).size) == {32, 48}
    assert not warned


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "width"), [(3, "H"), (4, "I")])
def test_exif_of_either_byte_order_and_width_is_read(order: str, kind: int, width: str) -> None:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    entry = struct.pack(order + "HHI" + width, 0x0112, kind, 1, 6).ljust(12, b"\0")
    exif = b"Exif\0\0" + head + entry + bytes(4)
    assert decode(encode(make_picture(), "JPEG", exif=exif)).size == (32, 48)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0XX*\0\x08\0\0\0\x01\0" + bytes(12),
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(30),
        _exif(1)[:-40],
        _exif(9),
        _exif(0),
    ],
)
def test_unreadable_exif_is_ignored(exif: bytes) -> None:
    data = encode(make_picture(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    with recorded_warnings() as warned:
        decoded = decode(data[:2] + segment + data[2:])
    assert not warned
    np.testing.assert_array_equal(to_array(decoded), to_array(decode(data)))


def test_damaged_png_metadata_is_ignored() -> None:
    data = encode(make_picture(), "PNG")
    animation = _png((b"acTL", bytes(8)), (b"iTXt", b"\xff"))[8:]
    with recorded_warnings() as warned:
        decoded = decode(data[:33] + animation + data[33:])
    assert not warned
    np.testing.assert_array_equal(to_array(decoded), to_array(make_picture()))


# --- what is refused ------------------------------------------------------------------------------


@contextmanager
def recorded_warnings() -> Iterator[list[warnings.WarningMessage]]:
    # The suite turns warnings into errors, which `decode` would report as ImageError; a user has
    # the default filters, and there a warning would be printed.
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield warned


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", r"image: got 0 bytes; expected a JPEG, PNG, WebP, GIF, BMP or TIFF"),
        (b"<!DOCTYPE html><html>", r"image: got a file that starts with b'<!DOCTYPE ht'"),
        (b"%PDF-1.7", "image: got a file that starts with b'%PDF-1.7'"),
        ("missing.jpg", r"missing\.jpg: cannot be read: No such file or directory"),
        ("https://example.com/a.jpg", "URLs are not fetched: download it and pass its bytes"),
        ("nul\0byte.jpg", "cannot be read: .*null"),
        (Path(), "cannot be read: Is a directory"),
        (17, "image: got int; expected a path, bytes, a file opened in binary mode, a PIL image"),
        (None, "image: got NoneType; expected a path"),
        (
            np.zeros((4, 4, 3)),
            r"image: got an array of float64; expected uint8 .*astype\(np.uint8",
        ),
        (np.zeros((4, 4, 3), np.uint16), "image: got an array of uint16; expected uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\); expected .*transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 2), np.uint8), r"image: got an array of shape \(8, 8, 2\); expected"),
        (np.zeros((0, 8, 3), np.uint8), r"image: got an array of shape \(0, 8, 3\); expected"),
        (np.zeros(8, np.uint8), r"image: got an array of shape \(8,\); expected"),
    ],
)
def test_what_is_not_an_image_is_refused_with_advice(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(image)


def test_errors_name_the_input_as_the_caller_does() -> None:
    with pytest.raises(ImageError, match=r"^image 3: got 0 bytes") as caught:
        decode(b"", name="image 3")
    assert caught.value.source == "image 3"


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("lenient_host", [False, True])
def test_truncated_files_are_refused(
    kind: str, lenient_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many a host process sets this flag; Pillow then fills what is missing with grey.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient_host)
    data = ENCODERS[kind](make_picture())
    decode(data)
    if kind in ("MPO", "GIF, animated", "PNG, animated"):
        data = data[: len(data) // 2]  # the second picture is not needed
    data = data.partition(b"EXIF")[0] if kind.startswith("WEBP") else data.partition(b"IEND")[0]
    for part in (0.05, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError):
            decode(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_file_above_the_byte_limit_is_refused(kind: str, tmp_path: Path) -> None:
    data = ENCODERS[kind](make_picture())
    path = tmp_path / "file"
    path.write_bytes(data)
    decode(data, limits=Limits(max_bytes=len(data)))
    for image in (data, path):
        message = (
            rf"more than {len(data) - 1} bytes; send a smaller file, or raise Limits.max_bytes"
        )
        with pytest.raises(ImageTooLarge, match=message):
            decode(image, limits=Limits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("kind", [*LOSSLESS, "JPEG", "GIF"])
def test_an_image_above_the_pixel_limit_is_refused(kind: str) -> None:
    data = ENCODERS[kind](make_picture())
    decode(data, limits=Limits(max_pixels=48 * 32))
    with pytest.raises(ImageTooLarge, match=r"48 x 32 pixels; at most 1535 are accepted"):
        decode(data, limits=Limits(max_pixels=48 * 32 - 1))


@pytest.mark.parametrize("convert", [to_array, lambda image: image], ids=["array", "PIL"])
def test_the_pixel_limit_holds_for_decoded_images(convert: Callable[[Image.Image], Any]) -> None:
    with pytest.raises(ImageTooLarge, match="48 x 32 pixels"):
        decode(convert(make_picture()), limits=Limits(max_pixels=1535))


def _gif_frame(width: int, height: int) -> bytes:
    """A GIF of 1 x 1 pixel by its header, whose first frame is larger."""
    frame = b"," + struct.pack("<4H", 0, 0, width, height) + b"\0\x02\x02\x4c\x01\0"
    return b"GIF89a" + struct.pack("<HH", 1, 1) + bytes(3) + b"!\xfe\x03abc\x00" + frame + b";"


def _tiff(*tags: tuple[int, int, int]) -> bytes:
    """A little-endian TIFF of one grey pixel, with more tags: (tag, count, value) as LONG."""
    entries = sorted([(256, 1, 1), (257, 1, 1), (258, 1, 8), (259, 1, 8), (262, 1, 1), *tags])
    packed = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(100)


def _rle_bmp() -> bytes:
    palette = bytes(range(64)) * 16
    data = b"\x04\x07\x00\x00\x04\x09\x00\x01"  # four pixels of 7, end of line, four of 9, end
    header = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, 8, 1, len(data), 0, 0, 256, 0)
    offset = 14 + len(header) + len(palette)
    return struct.pack("<2sIII", b"BM", offset + len(data), 0, offset) + header + palette + data


def _many_scans(count: int) -> bytes:
    """A progressive JPEG of 1600 x 1600 whose last scan is repeated."""
    data = encode(Image.new("RGB", (1600, 1600)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda"))  # with its Huffman table
    return data[:-2] + data[last:-2] * count + data[-2:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_png((b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")), "50000 x 50000 pixels"),
        (_gif_frame(10_000, 10_000), "10000 x 10000 pixels"),
        (_gif_frame(60_000, 60_000), r"3600000000 pixels\) exceeds limit"),
        (_tiff((322, 1, 30_000), (323, 1, 30_000), (324, 1, 150)), "30000 x 30000 pixels"),
        (_many_scans(1400), r"14\d\d scans of 1600 x 1600 pixels are many times the work"),
        (_rle_bmp(), "the bmp_rle variant decodes too slowly"),
        (b"\xff\xd8" + b"\xff" * 900_000, "the JPEG file ends before its image"),
        (b"GIF89a" + bytes(7) + b"!\xfe" + b"\1a" * 400_000, "header takes too many reads"),
    ],
    ids=["png", "gif", "gif, huge", "tiff tile", "jpeg scans", "bmp", "jpeg fill", "gif comment"],
)  # fmt: skip
def test_small_files_that_ask_for_much_work_are_refused_at_once(data: bytes, message: str) -> None:
    with recorded_warnings() as warned, pytest.raises(ImageError, match=message):
        decode(data)
    assert not warned


def test_nested_directories_of_a_tiff_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # Before version 13 of Pillow, a file of 1 MB could make it read 40 GB of them.
    data = encode(
        make_picture(), "TIFF", tiffinfo={0x8769: 8}
    )  # EXIF, at the first directory itself
    monkeypatch.setattr(Image.Exif, "get_ifd", lambda *_: pytest.fail("was read"))
    np.testing.assert_array_equal(to_array(decode(data)), to_array(make_picture()))


def test_a_lower_limit_of_pillow_is_reported_as_one_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = _gif_frame(48, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with recorded_warnings() as warned, pytest.raises(ImageTooLarge, match="exceeds limit of 200"):
        decode(data)
    assert not warned


@pytest.mark.parametrize("value", [0, -1, 1.5, None])
@pytest.mark.parametrize("name", ["max_bytes", "max_pixels"])
def test_limits_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"{name}: got {value}; expected a positive integer"):
        Limits(**{name: value})


# --- hostile bytes --------------------------------------------------------------------------------

SAMPLES = {kind: encode(make_picture(24, 16)) for kind, encode in ENCODERS.items()}


def _image_or_refusal(data: bytes) -> Image.Image | None:
    """Decode; anything but an RGB image or an ImageError, and any warning, fails the test."""
    with recorded_warnings() as warned:
        try:
            image = decode(data, limits=Limits(max_bytes=10**6, max_pixels=10**6))
        except ImageError:
            image = None
    assert not warned, [str(w.message) for w in warned]
    assert image is None or (image.mode == "RGB" and min(image.size) > 0)
    return image


@given(st.binary(max_size=300))
def test_random_bytes_never_escape(data: bytes) -> None:
    _image_or_refusal(data)


@given(kind=st.sampled_from(sorted(SAMPLES)), keep=st.integers(2, 40), data=st.binary(max_size=300))
def test_random_bytes_after_a_good_start_never_escape(kind: str, keep: int, data: bytes) -> None:
    _image_or_refusal(SAMPLES[kind][:keep] + data)


@given(kind=st.sampled_from(sorted(SAMPLES)), part=st.floats(0, 1))
def test_truncations_never_escape(kind: str, part: float) -> None:
    data = SAMPLES[kind]
    _image_or_refusal(data[: int(len(data) * part)])


@given(kind=st.sampled_from(sorted(SAMPLES)), data=st.data())
def test_bit_flips_never_escape(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(SAMPLES[kind])
    # Half of the flips go to the first 200 bytes: headers break in more ways than pixels.
    places = st.integers(0, min(1600, 8 * len(damaged)) - 1) | st.integers(0, 8 * len(damaged) - 1)
    for bit in data.draw(st.lists(places, min_size=1, max_size=8)):
        damaged[bit // 8] ^= 1 << bit % 8
    _image_or_refusal(bytes(damaged))


def test_threads_that_decode_odd_tiffs_leave_the_warning_filters_alone() -> None:
    odd = encode(make_picture(), "TIFF", tiffinfo={258: (8, 8, 8), 270: "x" * 50})
    odd = odd.replace(b"x" * 40, b"x" * 39 + b"\0")
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [_silently(odd[:-n]) for n in range(1, 60)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def _silently(data: bytes) -> None:
    with suppress(ImageError):
        decode(data)
