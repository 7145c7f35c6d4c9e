"""Image files of strangers: which decoder opens one, and whether all of its picture is there.

A picture is whole when all of its rows were decoded. Pillow does not tell: it fills the rows that
are missing from a JPEG with grey and those of a PNG or TIFF with zeros. So where a picture ends
like one that was filled, it is looked into. What follows the last row, an end marker or a
checksum, may be missing.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from marnet_sdk.inputs.containers import (
    NO_JPEG_END,
    Box,
    exif_tags,
    padded_jpeg,
    png_rows,
    strip_jpeg,
    strip_png,
    strip_webp,
)
from marnet_sdk.process import lock_free_in_children

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
        data, exif, sound = strip_jpeg(data)
    elif plugin is PngImageFile:
        data, exif, sound = strip_png(data)
    elif plugin is WebPImageFile:
        data, exif, covered = strip_webp(data)
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
    again = _header(JpegImageFile, padded_jpeg(opened.data))
    _scale(again, at_least)
    again.load()
    if again.tobytes() != image.tobytes():
        raise ValueError(NO_JPEG_END)


def _check_png(opened: Opened) -> None:
    """Refuse a PNG with too few rows, which Pillow leaves 0, or with damaged pixels.

    Of the two checksums that pixels have, of their chunks and of their stream, one must be right.
    """
    image = opened.image
    width, height = image.size
    interlaced = opened.data[28]
    filled = interlaced or not any(image.crop((0, height - 1, width, height)).tobytes())
    if opened.sound and not filled:
        return
    complete, right = png_rows(opened.data, width, height)
    if not complete:
        raise ValueError("the PNG file ends before its image")
    if not (opened.sound or right):
        raise ValueError("wrong checksum in PNG chunk b'IDAT'")


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
