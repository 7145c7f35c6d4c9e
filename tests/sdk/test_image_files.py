"""A picture is read as its file says, whole, or refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, make_picture, to_array
from PIL import Image, ImageFile

from marnet_sdk.errors import ImageError
from marnet_sdk.inputs.images import decode

WIDTH, HEIGHT = 32, 8
RAMP = np.tile(np.arange(WIDTH) * 255 // (WIDTH - 1), (HEIGHT, 1))  # [H, W], 0 .. 255


def grey(image: bytes | Image.Image) -> np.ndarray:
    """[H, W] of an image whose three channels must be alike."""
    array = to_array(decode(image)).astype(int)
    assert (np.ptp(array, axis=-1) == 0).all()
    return array[..., 0]


@pytest.fixture(params=[False, True], ids=["strict host", "lenient host"])
def any_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many a host process sets this flag; Pillow then fills what is missing.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)


# --- TIFF -----------------------------------------------------------------------------------------

_WIDTHS = {3: "H", 4: "I"}


def tiff(
    strips: Sequence[bytes],
    photometric: int | None,
    bits: Sequence[int],
    *,
    order: str = "<",
    deflate: bool = False,
    more: Mapping[int, Sequence[int]] = {},
) -> bytes:
    """A TIFF of WIDTH x HEIGHT pixels. All tags are SHORT but the places of strips."""
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    planes = 1 if more.get(284) != [2] else len(bits)
    tags: dict[int, Sequence[int]] = {
        256: [WIDTH], 257: [HEIGHT], 258: bits, 259: [8 if deflate else 1], 277: [len(bits)],
        278: [HEIGHT * planes // len(strips)], 273: [0] * len(strips),
        279: [len(strip) for strip in strips], **more,
    }  # fmt: skip
    if photometric is not None:
        tags[262] = [photometric]
    at = len(_tiff_head(tags, order))
    tags[273] = [at + sum(map(len, strips[:i])) for i in range(len(strips))]
    return _tiff_head(tags, order) + b"".join(strips)


def _tiff_head(tags: Mapping[int, Sequence[int]], order: str) -> bytes:
    entries, extra, at = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        kind = 4 if tag in (273, 279) else 3
        value = struct.pack(f"{order}{len(values)}{_WIDTHS[kind]}", *values)
        if len(value) > 4:
            value, extra = struct.pack(order + "I", at + len(extra)), extra + value
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4) + extra


def packed(values: np.ndarray, bits: int) -> bytes:
    """Samples of any depth, the first in the high bits, rows ending on a byte."""
    digits = "".join(f"{value:0{bits}b}" for value in values.ravel())
    return int(digits, 2).to_bytes(len(digits) // 8, "big")


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_any_depth_is_as_bright_as_its_file_says(
    bits: int, white: int, deflate: bool
) -> None:
    most = 2**bits - 1
    levels = RAMP * most // 255
    stored = levels if white else most - levels
    samples = stored.astype("<u2").tobytes() if bits == 16 else packed(stored, bits)
    error = grey(tiff([samples], white, [bits], deflate=deflate)) - levels * 255 // most
    assert np.abs(error).max() <= 1  # of 16 bits, the high byte


@pytest.mark.parametrize("deflate", [False, True])
def test_12_bit_grey_fills_the_range(deflate: bool) -> None:
    data = tiff([packed(RAMP * 4095 // 255, 12)], 1, [12], deflate=deflate)
    np.testing.assert_array_equal(grey(data), RAMP)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_that_hold_only_12_are_refused_and_not_black(order: str) -> None:
    samples = (RAMP * 4095 // 255).astype(order + "u2")
    png = Image.fromarray(samples.astype(np.uint16))
    for data in (tiff([samples.tobytes()], 1, [16], order=order), encode(png, "PNG")):
        with pytest.raises(ImageError, match=r"from 0 to 4095 of 65535, .*scale them to 0 \.\. 6"):
            decode(data)
    black = np.zeros((HEIGHT, WIDTH), order + "u2")
    assert not grey(tiff([black.tobytes()], 1, [16], order=order)).any()


RGB = np.repeat(RAMP[..., None], 3, axis=-1)
EMPTY_ALPHA = np.concatenate([RGB, np.zeros((HEIGHT, WIDTH, 1), int)], axis=-1)


def raw(values: np.ndarray, kind: str = "u1") -> bytes:
    return values.astype(kind).tobytes()


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("strips", "photometric", "bits", "more", "message"),
    [
        ([raw(RAMP - 128, "i1")], 1, [8], {339: [2]}, "its samples have a sign"),
        ([raw(RAMP * 257 - 32768, "<i2")], 1, [16], {339: [2]}, "32-bit or signed pixels"),
        ([raw(RAMP / 255, "<f4")], 1, [32], {339: [3]}, "32-bit or signed pixels"),
        ([raw(RAMP / 255, "<f2")], 1, [16], {339: [3]}, "unknown pixel mode"),
        ([raw(RGB / 255, "<f4")], 2, [32] * 3, {339: [3] * 3}, "unknown pixel mode"),
        ([raw(RAMP)], None, [8], {}, "no PhotometricInterpretation"),
        ([raw(RGB)], 9, [8] * 3, {}, "unknown pixel mode"),  # ICC L*a*b*
        ([raw(EMPTY_ALPHA)], 5, [8] * 4, {332: [2]}, "its inks are not cyan"),
        ([raw(RAMP)] * 2, 1, [8] * 2, {338: [2], 284: [2]}, "alpha channel is in a plane"),
        ([raw(EMPTY_ALPHA)], 2, [8] * 4, {338: [1]}, "alpha channel is 0 everywhere, and so"),
    ],
)  # fmt: skip
def test_a_tiff_whose_range_is_unknown_or_misread_is_refused(
    strips: list[bytes],
    photometric: int | None,
    bits: list[int],
    more: dict[int, list[int]],
    message: str,
    order: str,
    deflate: bool,
) -> None:
    data = tiff(strips, photometric, bits, order=order, deflate=deflate, more=more)
    with pytest.raises(ImageError, match=message):
        decode(data)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("most", [255, 65535])
def test_a_palette_of_8_bits_in_16_is_not_black(most: int, deflate: bool) -> None:
    colours = [i * most // 255 for i in range(256)] * 3
    data = tiff([raw(RAMP)], 3, [8], deflate=deflate, more={320: colours})
    np.testing.assert_array_equal(grey(data), RAMP)


def test_planes_of_16_bits_are_read_if_compressed_and_else_refused() -> None:
    plane = raw(RAMP * 257, "<u2")
    np.testing.assert_array_equal(
        grey(tiff([plane] * 3, 2, [16] * 3, deflate=True, more={284: [2]})), RAMP
    )
    with pytest.raises(ImageError, match="16-bit samples are in separate planes"):
        decode(tiff([plane] * 3, 2, [16] * 3, more={284: [2]}))


def test_differences_are_added_up_where_the_data_are_compressed_and_else_refused() -> None:
    rows = np.diff(RAMP, axis=1, prepend=0)
    np.testing.assert_array_equal(
        grey(tiff([raw(rows)], 1, [8], deflate=True, more={317: [2]})), RAMP
    )
    packbits = b"".join(bytes([WIDTH - 1]) + raw(row) for row in rows)
    for more, data in (({}, raw(rows)), ({259: [32773]}, packbits)):
        with pytest.raises(ImageError, match="its samples are differences"):
            decode(tiff([data], 1, [8], more={317: [2], **more}))


def test_a_tiff_without_all_of_its_strips_is_refused() -> None:
    rows = [raw(RAMP[i : i + 2]) for i in range(0, HEIGHT, 2)]
    np.testing.assert_array_equal(grey(tiff(rows, 1, [8])), RAMP)
    with pytest.raises(ImageError, match="fewer strips than its image"):
        decode(tiff(rows[:3], 1, [8], more={278: [2]}))
    with pytest.raises(ImageError, match="fewer strips than its image"):
        decode(tiff([raw(RAMP)] * 2, 2, [8] * 3, more={284: [2], 278: [HEIGHT]}))


def test_a_tiff_that_pillow_opened_is_judged_like_its_bytes() -> None:
    samples = raw(65535 - RAMP * 257, "<u2")
    with Image.open(io.BytesIO(tiff([samples], 0, [16]))) as image:
        assert np.abs(grey(image) - RAMP).max() <= 1
    signed = tiff([raw(RAMP - 128, "i1")], 1, [8], more={339: [2]})
    with Image.open(io.BytesIO(signed)) as image, pytest.raises(ImageError, match="have a sign"):
        decode(image)


# --- alpha ----------------------------------------------------------------------------------------


def bitmap(header: int, alpha: int) -> bytes:
    """A 32-bit BMP with one of the headers that have a mask for alpha."""
    pixels = np.concatenate([RGB, np.full((HEIGHT, WIDTH, 1), alpha)], axis=-1)
    data = raw(pixels[::-1])
    fields = (header, WIDTH, HEIGHT, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = (struct.pack("<IiiHHIIiiII", *fields) + masks).ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + header + len(data), 0, 0, 14 + header) + head + data


@pytest.mark.parametrize("header", [56, 108, 124])
@pytest.mark.parametrize("alpha", [0, 255])
def test_alpha_that_is_0_everywhere_is_no_transparency(header: int, alpha: int) -> None:
    np.testing.assert_array_equal(grey(bitmap(header, alpha)), RAMP)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_so_it_is_in_other_formats(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = Image.fromarray(EMPTY_ALPHA.astype(np.uint8))
    np.testing.assert_array_equal(grey(encode(image, kind, **options)), RAMP)
    np.testing.assert_array_equal(grey(image), RAMP)
    image.putpixel((3, 3), (9, 9, 9, 255))
    seen = grey(encode(image, kind, **options))
    assert seen[3, 3] == 9
    assert (np.delete(seen.ravel(), 3 * WIDTH + 3) == 255).all()


# --- JPEG -----------------------------------------------------------------------------------------

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
JPEGS = {
    "baseline": encode(NOISE.resize((160, 120)), "JPEG"),
    "grey": encode(NOISE.resize((160, 120)).convert("L"), "JPEG"),
    "CMYK": encode(NOISE.resize((160, 120)).convert("CMYK"), "JPEG"),
    "restarts": encode(NOISE.resize((160, 120)), "JPEG", restart_marker_rows=1),
    "progressive": encode(NOISE.resize((160, 120)), "JPEG", progressive=True),
    "ends mid-grey": encode(Image.new("RGB", (50, 50), (128, 128, 128)), "JPEG"),
}


@pytest.mark.usefixtures("any_host")
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_with_all_of_its_rows_needs_no_end_marker(kind: str) -> None:
    data = JPEGS[kind]
    with Image.open(io.BytesIO(data)) as image:
        expected = to_array(image.convert("RGB"))
    for whole in (data, data[:-1], data[:-2], data + b"junk", data[:-2] + data):
        np.testing.assert_array_equal(to_array(decode(whole)), expected)


@pytest.mark.usefixtures("any_host")
@pytest.mark.parametrize("kind", [kind for kind in JPEGS if kind != "ends mid-grey"])
@pytest.mark.parametrize("part", [0.4, 0.7, 0.95])
def test_a_jpeg_that_lacks_rows_is_refused_whatever_follows(kind: str, part: float) -> None:
    data = JPEGS[kind]
    scan = data.index(b"\xff\xda")
    cut = data[: scan + 14 + int((len(data) - scan - 14) * part)]
    ends = [b"", data] if kind == "progressive" else [b"", data, b"\xff\xd9", b"\xff"]
    for end in ends:  # a progressive one with an end marker has all rows, if coarse ones
        with pytest.raises(ImageError, match=r"ends before its image.*send all of it"):
            decode(cut + end)


@pytest.mark.usefixtures("any_host")
def test_a_jpeg_that_ends_at_a_restart_marker_is_refused() -> None:
    data = JPEGS["restarts"]
    at = data.rindex(b"\xff\xd1")
    for cut in (data[:at], data[: at + 2]):
        for end in (b"", b"\xff\xd9"):
            with pytest.raises(ImageError, match="the JPEG file ends before its image"):
                decode(cut + end)


# --- PNG ------------------------------------------------------------------------------------------


def png(stream: bytes, *, bits: int = 8, interlaced: int = 0, key: int | None = None) -> bytes:
    """A grey PNG of WIDTH x HEIGHT pixels."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 0, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", stream), (b"IEND", b"")]
    if key is not None:
        chunks.insert(1, (b"tRNS", struct.pack(">H", key)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


ROWS = b"".join(b"\0" + raw(row) for row in RAMP)
STREAM = zlib.compress(ROWS)


@pytest.mark.usefixtures("any_host")
@pytest.mark.parametrize(
    "data",
    [
        png(STREAM)[:-12],
        png(STREAM)[:-1],
        png(STREAM)[:-14],
        png(STREAM)[:-16],
        png(STREAM)[:-20],
        png(STREAM[:-4]),
        png(STREAM[:-4] + b"abcd"),
        png(STREAM).replace(STREAM[-4:], STREAM[-4:] + b"\0\0\0\0", 1)[:-20] + bytes(4),
        png(zlib.compress(ROWS + b"more")),
        png(STREAM) + b"junk",
    ],
    ids=["no IEND", "IEND cut", "checksum cut", "no checksum", "no checksums", "no Adler",
         "wrong Adler", "wrong CRC", "too many rows", "junk"],
)  # fmt: skip
def test_a_png_with_all_of_its_rows_needs_no_more(data: bytes) -> None:
    np.testing.assert_array_equal(grey(data), RAMP)


@pytest.mark.usefixtures("any_host")
@pytest.mark.parametrize("black", [False, True])
@pytest.mark.parametrize("missing", [1, WIDTH, WIDTH + 1, 3 * WIDTH])
def test_a_png_that_lacks_rows_is_refused(missing: int, black: bool) -> None:
    rows = bytes(len(ROWS)) if black else ROWS
    assert grey(png(zlib.compress(rows))).any() != black
    for stream in (zlib.compress(rows[:-missing]), zlib.compress(rows[:-missing], 0)[:-4]):
        with pytest.raises(ImageError, match=r"ends before its image|broken data|truncated"):
            decode(png(stream))


@pytest.mark.usefixtures("any_host")
def test_an_interlaced_png_that_lacks_its_last_pass_is_refused() -> None:
    # Passes 1 to 6 have the even rows, of which each is stored in several parts; 7 has the others.
    last = HEIGHT // 2 * (1 + WIDTH)
    passes = [(4, 1), (4, 1), (8, 1), (8, 2), (16, 2), (16, 4)]  # columns and rows
    first = sum((1 + columns) * rows for columns, rows in passes)
    whole = decode(png(zlib.compress(bytes(first + last)), interlaced=1))
    assert whole.size == (WIDTH, HEIGHT)
    with pytest.raises(ImageError, match=r"ends before its image|truncated"):
        decode(png(zlib.compress(bytes(first + last - 1)), interlaced=1))


@pytest.mark.usefixtures("any_host")
def test_damaged_png_pixels_are_refused() -> None:
    data = bytearray(png(zlib.compress(ROWS, 0)))  # stored as they are, so all rows are there
    data[data.index(b"IDAT") + 40] ^= 1
    with pytest.raises(ImageError, match=r"wrong checksum in PNG chunk b'IDAT'.*re-encode"):
        decode(bytes(data))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("part", [0, 0.4, 1])
def test_a_transparent_grey_level_of_any_depth_is_white(bits: int, part: float) -> None:
    most = 2**bits - 1
    levels, key = RAMP * most // 255, RAMP[0, int(part * (WIDTH - 1))] * most // 255
    stored = [b"\0" + (raw(row, ">u2") if bits == 16 else packed(row, bits)) for row in levels]
    seen = grey(png(zlib.compress(b"".join(stored)), bits=bits, key=key))
    expected = np.where(levels == key, 255, levels * 255 // most)
    np.testing.assert_array_equal(seen, expected)


# --- animations -----------------------------------------------------------------------------------

SMALL = Image.fromarray(RGB[:4, :16].astype(np.uint8))
ON_PAGE = np.full((HEIGHT, WIDTH), 255)
ON_PAGE[2:6, 8:24] = RAMP[:4, :16]


def uncovering_gif() -> bytes:
    data = bytearray(encode(SMALL.convert("L"), "GIF"))
    data[6:10] = struct.pack("<HH", WIDTH, HEIGHT)
    at = data.index(b"\x2c\0\0\0\0")
    data[at + 1 : at + 5] = struct.pack("<HH", 8, 2)
    return bytes(data)


def uncovering_webp(background: bytes, *, alpha: bool) -> bytes:
    def chunk(kind: bytes, payload: bytes) -> bytes:
        return struct.pack("<4sI", kind, len(payload)) + payload

    def u24(*values: int) -> bytes:
        return b"".join(value.to_bytes(3, "little") for value in values)

    still = encode(SMALL, "WEBP", lossless=True)[12:]
    place = u24(8 // 2, 2 // 2, SMALL.width - 1, SMALL.height - 1, 100)
    body = (
        chunk(b"VP8X", struct.pack("<I", 0x12 if alpha else 0x02) + u24(WIDTH - 1, HEIGHT - 1))
        + chunk(b"ANIM", background + b"\0\0")
        + chunk(b"ANMF", place + b"\0" + still)
    )
    return chunk(b"RIFF", b"WEBP" + body)


def test_what_the_first_frame_of_a_gif_leaves_uncovered_is_page() -> None:
    np.testing.assert_array_equal(grey(uncovering_gif()), ON_PAGE)
    with Image.open(io.BytesIO(uncovering_gif())) as image:
        np.testing.assert_array_equal(grey(image), ON_PAGE)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("background", [bytes(4), b"\0\0\xff\xff"])
def test_what_the_first_frame_of_a_webp_leaves_uncovered_is_page(
    background: bytes, alpha: bool
) -> None:
    np.testing.assert_array_equal(grey(uncovering_webp(background, alpha=alpha)), ON_PAGE)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_a_first_frame_that_is_empty_is_page(kind: str) -> None:
    frames = [Image.new("RGBA", (8, 8)), Image.new("RGBA", (8, 8), "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (grey(data) == 255).all()


def test_a_webp_needs_nothing_behind_its_picture_but_its_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(make_picture(), "WEBP", lossless=True, exif=exif, xmp=b"<x>" * 99)
    expected = to_array(decode(data))
    assert expected.shape == (48, 32, 3)
    np.testing.assert_array_equal(to_array(decode(data[:-40])), expected)
    with pytest.raises(ImageError, match="ends before its EXIF block, which may say how it is"):
        decode(data[: data.index(b"EXIF") + 12])


def test_of_an_animated_webp_the_first_frame_is_enough() -> None:
    frames = [make_picture(), Image.new("RGB", (48, 32), "red")]
    data = encode(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(to_array(decode(data[:-9])), to_array(frames[0]))


# --- hostile bytes --------------------------------------------------------------------------------


@given(
    part=st.floats(0, 1),
    kind=st.sampled_from([kind for kind in JPEGS if kind != "progressive"]),
    end=st.binary(max_size=40),
)
def test_a_jpeg_is_whole_or_refused(part: float, kind: str, end: bytes) -> None:
    data = JPEGS[kind]
    try:
        decoded = decode(data[: int(len(data) * part)] + end)
    except ImageError:
        return
    # A handful of blocks at the very end may be made up of what follows.
    same = to_array(decoded) == to_array(decode(data))
    assert same[:-16].mean() > 0.97
