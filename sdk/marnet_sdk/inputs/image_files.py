"""Image files of strangers: which decoder opens one, and whether all of its picture is there.

Metadata that pixels do not depend on is removed from JPEG and PNG files before Pillow sees them: it
is the larger part of the attack surface, and Pillow's warnings about damaged metadata cannot be
silenced for one thread only.

A picture is whole when all of its rows were decoded. Pillow does not tell: it fills the rows that
are missing from a JPEG with grey and those of a PNG or TIFF with zeros. So where a picture ends
like one that was filled, it is looked into. What follows the last row, an end marker or a
checksum, may be missing.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from marnet_sdk.errors import ImageError, ImageTooLarge, InvalidInput, brief
from marnet_sdk.process import lock_free_in_children

Box = tuple[int, int, int, int]  # left, upper, right, lower
Size = tuple[int, int]  # width, height
_LYING = (5, 6, 7, 8)  # EXIF orientations whose rows are columns of the upright picture


@dataclass(frozen=True)
class Limits:
    """The largest untrusted image that is accepted.

    A decoded image takes 4 bytes of memory per pixel, and up to 20 while it is converted. Pillow
    keeps a limit of its own for GIF, TIFF and WebP (`PIL.Image.MAX_IMAGE_PIXELS`, twice over).
    """

    max_bytes: int = 64 * 2**20  # of the encoded file
    max_pixels: int = 89_478_485  # width x height, also after resizing; Pillow's own threshold

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{name}: got {brief(value)}; expected a positive integer")


def check_pixels(width: int, height: int, source: str, limits: Limits) -> None:
    """Refuse an image that is too large.

    Raises:
        ImageTooLarge: more pixels than `limits` allow.
    """
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            source,
            f"got {width} x {height} pixels; at most {limits.max_pixels} are accepted: send a "
            "smaller image, or raise Limits.max_pixels if its origin is trusted",
        )


# Pillow's registry is not asked, so that its other formats stay out of reach.
_PLUGINS: dict[bytes, type[ImageFile]] = {
    rb"\xff\xd8\xff": JpegImageFile,  # also for MPO, whose first picture is a plain JPEG
    rb"\x89PNG\r\n\x1a\n": PngImageFile,
    rb"(?s)RIFF....WEBP": WebPImageFile,
    rb"GIF8[79]a": GifImageFile,
    rb"BM": BmpImageFile,
    rb"II\*\0|MM\0\*": TiffImageFile,  # not BigTIFF, which starts at 4 GB
}
_SCANS = 40  # of a JPEG at full size; encoders write about 10, phones add a picture or two


class _Bytes(io.BytesIO):
    """A file in memory that refuses two things which Pillow bears with.

    Headers that take very many reads: before version 13, Pillow copies bytes that TIFF tags share
    once for each tag, and joins the comment blocks of a GIF in quadratic time.
    Pixels that are missing: a host may have set `ImageFile.LOAD_TRUNCATED_IMAGES`, with which
    Pillow takes an empty read for the end of the image and fills the rest with grey.
    """

    header_read = False
    cost = 0  # of the header: its bytes, and 1000 for each read

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.cost += 1000 + len(data)
        if not self.header_read and self.cost > 4 * len(self.getbuffer()) + 20_000_000:
            raise ValueError("its header takes too many reads")  # TIFF survives an OSError
        if self.header_read and not data and size != 0:
            raise ValueError("the file ends before its image")
        return data


@dataclass(frozen=True)
class Opened:
    """An image file that is not decoded yet."""

    image: ImageFile
    data: bytes  # what the decoder reads
    exif: bytes = b""  # the block that was taken out of the file, if any
    sound: bool = True  # whether end markers are there and checksums right
    covered: Box | None = None  # what the first frame of an animated WebP covers of its canvas

    def load(self, at_least: Size | None = None) -> None:
        """Decode all rows.

        Args:
            at_least: width and height of the upright picture. A JPEG is decoded at a half, a
                quarter or an eighth of its size where it stays at least so large. None: every
                file is decoded at its own size.

        Raises:
            ValueError, OSError, ...: some are missing.
        """
        if at_least is not None and exif_tags(self.exif).get(274) in _LYING:
            at_least = at_least[1], at_least[0]
        _scale(self.image, at_least)
        self.image.load()
        if isinstance(self.image, JpegImageFile):
            _check_jpeg(self, at_least)
        elif isinstance(self.image, PngImageFile):
            _check_png(self)


def _scale(image: ImageFile, at_least: Size | None) -> None:
    """Let libjpeg compute fewer pixels of each block of 8 x 8, from its lowest frequencies.

    Pillow takes the smallest of 1/8, 1/4, 1/2 and 1 with which both sides stay long enough.
    """
    if at_least is not None and isinstance(image, JpegImageFile):
        image.draft(None, at_least)


def open_file(data: bytes, source: str, limits: Limits) -> Opened:
    """Read the header of an image file.

    Raises:
        ImageError: too many bytes, or not a format that is read.
        ValueError, OSError, ...: its header is damaged.
    """
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            source,
            f"got more than {limits.max_bytes} bytes; send a smaller file, or raise "
            "Limits.max_bytes if its origin is trusted",
        )
    plugin = next((p for magic, p in _PLUGINS.items() if re.match(magic, data)), None)
    if plugin is None:
        got = f"a file that starts with {data[:12]!r}" if data else "0 bytes"
        raise ImageError(
            source, f"got {got}; expected a JPEG, PNG, WebP, GIF, BMP or TIFF image: convert it"
        )
    exif, sound, covered = b"", True, None
    if plugin is JpegImageFile:
        data, exif, sound = _strip_jpeg(data)
    elif plugin is PngImageFile:
        data, exif, sound = _strip_png(data)
    elif plugin is WebPImageFile:
        data, exif, covered = _strip_webp(data)
    elif plugin is TiffImageFile:
        tags = exif_tags(data)
        # TileWidth x TileLength may be more than the image, and libtiff allocates it whole.
        check_pixels(tags.get(322, 1), tags.get(323, 1), source, limits)
    with quiet(plugin):
        image = _header(plugin, data)
    if isinstance(image, TiffImageFile):
        image.is_animated = True  # else loading reads nested directories, which may share as much
        check_tiff(image)
    if image.tile and image.tile[0][0] in Image.DECODERS:  # written in Python: minutes of work
        raise ValueError(f"the {image.tile[0][0]} variant decodes too slowly")
    if plugin is JpegImageFile:
        scans = data.count(b"\xff\xda")  # each walks over every pixel, however few its bytes
        if scans * image.width * image.height > _SCANS * limits.max_pixels:
            size = f"{image.width} x {image.height} pixels"
            raise ValueError(f"{scans} scans of {size} are many times the work of an ordinary file")
    return Opened(image, data, exif, sound, covered)


def _header(plugin: type[ImageFile], data: bytes) -> ImageFile:
    file = _Bytes(data)
    image = plugin(file)
    file.header_read = True
    return image


_warning_filters = lock_free_in_children()


@contextmanager
def quiet(plugin: type[Image.Image] = TiffImageFile) -> Iterator[None]:
    """Silence Pillow's warnings about odd TIFF tags and large GIF frames.

    `catch_warnings` swaps a process-wide list and swaps it back on leaving. Two threads leaving
    in the wrong order would make our filter permanent, hence one such image at a time.
    """
    if not issubclass(plugin, (TiffImageFile, GifImageFile)):
        yield
        return
    with _warning_filters, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def exif_tags(tiff: bytes) -> dict[int, int]:
    """The numbers in the first directory of a TIFF file or EXIF block, as far as it is readable.

    Damaged metadata does not make the pixels unusable, and viewers ignore it too.
    """
    tiff = tiff.removeprefix(b"Exif\0\0")
    tags: dict[int, int] = {}
    with suppress(KeyError, struct.error):
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            short = kind in (3, 8)
            (value,) = struct.unpack_from(order + ("H" if short else "I"), tiff, at + 8)
            tags.setdefault(tag, value)  # of repeated tags libtiff, too, takes the first
    return tags


# --- JPEG (ITU T.81, annex B) -------------------------------------------------------------------

_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")  # libjpeg, too, skips fill bytes and junk
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}  # TEM, RST0-7, SOI: markers without a payload
_JPEG_DROPPED = {0xFE, *range(0xE1, 0xEE), 0xEF}  # COM, APP1-13, APP15; colour needs APP0 and 14
_JPEG_END = b"\xff\xd9"
_NO_JPEG_END = "the JPEG file ends before its image"
# More than the blocks that are decoded together can take, with each restart marker in turn.
_JPEG_BLOCKS = bytes(i * 37 % 251 for i in range(10 * 64 * 27 // 8))  # of at most 27 bits a value
_JPEG_PAD = _JPEG_BLOCKS + b"".join(bytes((0xFF, 0xD0 + n)) + _JPEG_BLOCKS for n in range(8))


def _strip_jpeg(data: bytes) -> tuple[bytes, bytes, bool]:
    """The file without its metadata, its EXIF block, and whether it had an end marker."""
    kept, exif, at, restarts = [data[:2]], b"", 2, False
    while found := _JPEG_MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker in _JPEG_BARE:
            continue
        if marker == 0xDA:  # start of the first scan: entropy-coded data follows
            end = _jpeg_end(data, at, restarts=restarts)
            sound = data.startswith(_JPEG_END, end)
            scans = data[at - 2 : end].removesuffix(b"\xff")  # half of an end marker
            return b"".join([*kept, scans, _JPEG_END]), exif, sound
        end = at + max(2, int.from_bytes(data[at : at + 2], "big"))
        if marker == 0xE1 and data.startswith(b"Exif\0\0", at + 2):
            exif = exif or data[at + 8 : end]
        restarts |= marker == 0xDD
        if marker not in _JPEG_DROPPED:
            kept += (found[0], data[at:end])
        at = end
    raise ValueError(_NO_JPEG_END)


def _jpeg_end(data: bytes, at: int, *, restarts: bool) -> int:
    """Find where the data of the last scan ends; the header of the first begins at `at`.

    At a marker, which may be the start of another image or a stray one, or with the file.

    Args:
        restarts: whether the file announced restart markers, which stand within the data.
    """
    at += int.from_bytes(data[at : at + 2], "big")
    end, tables = None, False
    while found := _JPEG_MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if restarts and 0xD0 <= marker < 0xD8:
            continue
        end = found.start() if end is None else end
        if marker in (0xD8, 0xD9):
            break
        if marker not in _JPEG_BARE:
            at += int.from_bytes(data[at : at + 2], "big")
        tables = marker in (0xC4, 0xDB)
        if marker == 0xDA:
            end = None  # a further scan
    if tables:  # those of a scan that is not there
        raise ValueError(_NO_JPEG_END)
    return len(data) if end is None else end


def _check_jpeg(opened: Opened, at_least: Size | None) -> None:
    """Refuse a JPEG whose last blocks are made up.

    libjpeg fills what is missing with mid-grey. If the last pixel is of that grey, or the end
    marker is missing, the image is decoded once more with bytes behind its data: they change
    nothing if no more was needed.
    """
    image = opened.image
    last = image.getpixel((image.width - 1, image.height - 1))
    values = last if isinstance(last, tuple) else (last,)
    is_grey = all(value in (127, 128) for value in values)
    if opened.sound and not is_grey:
        return
    again = _header(JpegImageFile, opened.data[:-2] + _JPEG_PAD + _JPEG_END)
    _scale(again, at_least)
    again.load()
    if again.tobytes() != image.tobytes():
        raise ValueError(_NO_JPEG_END)


# --- PNG (PNG specification, section 5) -----------------------------------------------------------


def _strip_png(data: bytes) -> tuple[bytes, bytes, bool]:
    """The file without its metadata, its EXIF block, and whether the checksums of pixels are right.

    Dropping the animation chunks leaves the still image that every viewer shows. The last bytes of
    the pixel stream are a checksum, too: in a chunk of their own they are read only if there are
    too few rows without them.
    """
    kept, exif, pixels, sound = [data[:8]], b"", [], True
    for kind, payload, good in _png_chunks(data):
        if kind == b"eXIf":
            exif = exif or payload
        elif kind == b"IDAT":
            pixels.append(payload)
            sound &= good
        elif kind == b"tRNS" or not kind[:1].islower():  # a capital marks a critical chunk
            if not good:
                raise ValueError(f"wrong checksum in PNG chunk {kind!r}")
            kept.append(_png_chunk(kind, payload if kind != b"tRNS" else _png_key(kept, payload)))
    stream = b"".join(pixels)
    parts = ((b"IDAT", stream[:-4]), (b"IDAT", stream[-4:]), (b"IEND", b""))
    return b"".join([*kept, *(_png_chunk(*part) for part in parts)]), exif, sound


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Yield kind, payload and whether its checksum is right, up to the end of the image or file."""
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        payload = data[at + 8 : at + 8 + length]
        checksum = data[at + 8 + length : at + 12 + length]
        at += 12 + length
        if kind == b"IEND":
            return
        # A checksum that the file's end has cut off says nothing.
        yield kind, payload, len(checksum) < 4 or _crc(kind + payload) == checksum


def _png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + _crc(kind + payload)


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


def _png_key(kept: list[bytes], key: bytes) -> bytes:
    """The transparent grey level as Pillow needs it: it scales samples of 2 and 4 bits to 8."""
    bits, colour = kept[1][16:18]  # of the header
    if colour != 0 or bits not in (2, 4) or len(key) != 2:
        return key
    most = (1 << bits) - 1
    return struct.pack(">H", (key[1] & most) * 255 // most)


_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip - first column and row of each pass, and its steps


def _check_png(opened: Opened) -> None:
    """Refuse a PNG with too few rows, which Pillow leaves 0, or with damaged pixels.

    Of the two checksums that pixels have, of their chunks and of their stream, one must be right.
    """
    image = opened.image
    width, height = image.size
    bits, colour, *_, interlaced = opened.data[24:29]
    filled = interlaced or not any(image.crop((0, height - 1, width, height)).tobytes())
    if opened.sound and not filled:
        return
    depth = bits * {2: 3, 4: 2, 6: 4}.get(colour, 1)  # of a pixel
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-((x - width) // dx), -((y - height) // dy)) for x, y, dx, dy in passes]
    needed = sum(rows * (1 + (columns * depth + 7) // 8) for columns, rows in sizes if columns)
    size, whole = _inflate(opened.data, needed)
    if size < needed:
        raise ValueError("the PNG file ends before its image")
    if not (opened.sound or whole):
        raise ValueError("wrong checksum in PNG chunk b'IDAT'")


def _inflate(png: bytes, enough: int) -> tuple[int, bool]:
    """Count the bytes of rows, at least if below `enough`, and tell whether they are all."""
    stream = b"".join(payload for kind, payload, _ in _png_chunks(png) if kind == b"IDAT")
    inflated, size = zlib.decompressobj(), 0
    with suppress(zlib.error):
        for part in (stream[:-4], stream[-4:]):  # a wrong checksum costs no rows
            while part and not inflated.eof and size <= enough:
                size += len(inflated.decompress(part, 1 << 20))
                part = inflated.unconsumed_tail
    return size, inflated.eof


# --- TIFF and WebP --------------------------------------------------------------------------------


def check_tiff(image: TiffImageFile) -> None:
    """Refuse a TIFF that Pillow reads as something else than its tags say.

    Raises:
        ValueError: says what.
    """
    tags = image.tag_v2
    separate = tags.get(284, 1) == 2  # planes of red, green and blue
    if 262 not in tags and tags.get(259) != 6:  # old JPEG is always YCbCr
        raise ValueError("it has no PhotometricInterpretation, which says whether 0 is black")
    if image.mode == "L" and set(tags.get(339, (1,))) != {1}:
        raise ValueError("its samples have a sign")
    if image.mode == "CMYK" and tags.get(332, 1) != 1:
        raise ValueError("its inks are not cyan, magenta, yellow and black")
    if tags.get(317, 1) != 1 and tags.get(259, 1) in (1, 32773):  # libtiff passes over it
        raise ValueError("its samples are differences, and its compression has no Predictor")
    if separate and image.mode in ("LA", "La", "PA"):
        raise ValueError("its alpha channel is in a plane of its own")
    if separate and not image.use_load_libtiff and tags.get(258, (1,))[0] == 16:
        raise ValueError("its 16-bit samples are in separate planes without compression")
    if image.tile and not image.use_load_libtiff:  # libtiff finds missing strips itself
        planes = len(image.getbands()) if separate else 1
        boxes = [tile.extents or (0, 0, 0, 0) for tile in image.tile]
        area = sum((right - left) * (lower - upper) for left, upper, right, lower in boxes)
        if area < planes * tags[256] * tags[257]:
            raise ValueError("the TIFF file has fewer strips than its image")


_WEBP_IMAGE = {b"ALPH", b"VP8 ", b"VP8L", b"ANIM"}


def _strip_webp(data: bytes) -> tuple[bytes, bytes, Box | None]:
    """The image or the first frame without metadata, its EXIF block, and what the frame covers.

    What is kept is whole or refused by libwebp, whatever the file says of its length.
    """
    kept, exif, covered = [], b"", None
    for kind, payload in _webp_chunks(data):
        if kind == b"EXIF":
            exif = payload
        elif kind == b"VP8X":  # its flags, of which alpha and animation are left, and the size
            kept.append(_webp_chunk(kind, bytes((payload[0] & 0x12,)) + payload[1:]))
        elif kind == b"ANMF" and covered is None:
            covered = _webp_box(payload)
            kept.append(_webp_chunk(kind, payload))
        elif kind in _WEBP_IMAGE:
            kept.append(_webp_chunk(kind, payload))
    if data[12:16] == b"VP8X" and data[20] & 8 and not exif:
        raise ValueError("the file ends before its EXIF block, which may say how it is turned")
    return _webp_chunk(b"RIFF", b"WEBP" + b"".join(kept)), exif, covered


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and payload of every chunk that is whole."""
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length <= len(data):
            yield kind, data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _webp_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack("<4sI", kind, len(payload)) + payload + bytes(len(payload) % 2)


def _webp_box(frame: bytes) -> Box:
    """The place of a frame on the canvas."""
    left, upper, width, height = (int.from_bytes(frame[i : i + 3], "little") for i in (0, 3, 6, 9))
    return 2 * left, 2 * upper, 2 * left + width + 1, 2 * upper + height + 1
