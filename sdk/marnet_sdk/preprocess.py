"""From image to the array that the model takes: the one definition.

Training, export and serving all decode, orient, resize, crop and normalise here, so that they
cannot disagree. `Preprocess` gives the same numbers, bit for bit, as the PIL image processors of
transformers 5 for the same `preprocessor_config.json`.

What `decode` makes of an image (no colour management: ICC profiles and gamma are ignored):

    EXIF orientation            applied
    animated (GIF, PNG, WebP)   first frame; of several TIFF pages or MPO pictures, the first
    alpha, transparent colour   composited on white
    palette, 1 bit, grey        converted to RGB
    CMYK, YCCK, YCbCr, LAB      converted to RGB by Pillow
    16-bit grey                 high byte, v >> 8, which is what Pillow makes of 16-bit colour
    32-bit integer, float       refused: nothing says what white is
    truncated                   refused

Images come from strangers. Bytes are counted before they are read and pixels before they are
decoded. Metadata that pixels do not depend on is removed from JPEG and PNG files before Pillow
sees them: it is the larger part of the attack surface, and Pillow warns about damaged metadata
through Python's process-wide warning filters, which cannot be silenced per thread.

Axes: B batch, H height, W width; channels are R, G, B.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from marnet_sdk.errors import ImageError, ImageTooLarge, InvalidInput, MarnetError

ImageInput = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]


class PreprocessError(MarnetError):
    """A preprocessing configuration that is incomplete, or does something this file does not."""

    exit_code = 2


@dataclass(frozen=True)
class Limits:
    """How large an untrusted image may be.

    A decoded image takes 4 bytes of memory per pixel, and up to 16 while it is converted. Pillow
    keeps a limit of its own for GIF, TIFF and WebP (`PIL.Image.MAX_IMAGE_PIXELS`, twice over).
    """

    max_bytes: int = 64 * 2**20  # of the encoded file
    max_pixels: int = 89_478_485  # width x height, also after resizing; Pillow's own threshold

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{name}: got {value!r}; expected a positive integer")


DEFAULT_LIMITS = Limits()

# --- decoding -----------------------------------------------------------------------------------


def decode(
    image: ImageInput, *, name: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Image.Image:
    """Decode, orient and convert one image to RGB, by the table at the top of this file.

    An upright RGB image from PIL is returned as it is, not copied.

    Args:
        image: a path, the bytes of a file, a PIL image, or a uint8 array: [H, W] grey,
            [H, W, 3] RGB or [H, W, 4] RGBA.
        name: how errors call this input, for example "image 3"; by default its path or kind.
        limits: refused beyond these, before any pixel is decoded.

    Raises:
        ImageTooLarge: more bytes or pixels than `limits` allow.
        ImageError: anything else that is not a usable image.
    """
    source = name if name is not None else _describe(image)
    try:
        opened, exif = _open(image, source, limits)
        return _load(opened, exif, source, limits)
    except ImageError:
        raise
    except _Truncated as error:
        raise ImageError(source, f"{error}; send the whole file") from error
    except Image.DecompressionBombError as error:  # a host that set Pillow's limit below ours
        raise ImageTooLarge(source, f"{error} Send a smaller image") from error
    except Exception as error:
        # Hostile files make Pillow raise nearly anything: OSError, SyntaxError, ValueError,
        # struct.error, IndexError, MemoryError, ... They all mean the same to the caller.
        raise ImageError(
            source,
            f"not a decodable image ({type(error).__name__}: {error}); the file is damaged or "
            "uses an unsupported variant of its format: re-encode it as JPEG or PNG",
        ) from error


def _open(image: ImageInput, source: str, limits: Limits) -> tuple[Image.Image, bytes]:
    """The image, not decoded yet, and the EXIF block that was taken out of its file, if any."""
    if isinstance(image, np.ndarray):
        return _open_array(image, source, limits), b""
    if isinstance(image, Image.Image):
        return image, b""
    if isinstance(image, bytes):
        return _open_bytes(image, source, limits)
    if isinstance(image, (str, os.PathLike)):
        return _open_bytes(_read(image, source, limits), source, limits)
    raise ImageError(
        source,
        f"got {type(image).__name__}; expected a path, bytes, a PIL image or a uint8 array "
        "[H, W, 3]",
    )


def _describe(image: object) -> str:
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    if isinstance(image, bytes):
        return "bytes"
    return "array" if isinstance(image, np.ndarray) else "image"


def _read(path: str | os.PathLike[str], source: str, limits: Limits) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size or limits.max_bytes  # 0 for a pipe
            return file.read(min(size, limits.max_bytes) + 1)  # one more than allowed tells
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        hint = ""
        if re.match(r"[a-z]+://", os.fsdecode(path)):
            hint = "; URLs are not fetched: download it and pass its bytes"
        raise ImageError(source, f"cannot be read: {reason}{hint}") from error


def _open_array(array: NDArray[Any], source: str, limits: Limits) -> Image.Image:
    expected = "expected uint8 [H, W, 3], [H, W, 4] (RGBA) or [H, W] (grey)"
    if array.dtype != np.uint8:
        hint = "; scale to 0 .. 255 and use .astype(np.uint8)" if array.dtype.kind == "f" else ""
        raise ImageError(source, f"got an array of {array.dtype}; {expected}{hint}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = "; move the channels last: array.transpose(1, 2, 0)" if channels_first else ""
        raise ImageError(source, f"got an array of shape {array.shape}; {expected}{hint}")
    _check_count(array.shape[1], array.shape[0], source, limits)
    return Image.fromarray(np.ascontiguousarray(array))


class _Format(NamedTuple):
    """One accepted file format. Pillow's registry is not asked: other formats stay out of reach."""

    magic: re.Pattern[bytes]
    plugin: type[ImageFile]


_FORMATS = (
    # Only the first picture of an MPO is wanted, and that is a plain JPEG.
    _Format(re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    _Format(re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    _Format(re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    _Format(re.compile(rb"GIF8[79]a"), GifImageFile),
    _Format(re.compile(rb"BM"), BmpImageFile),
    _Format(re.compile(rb"II\*\0|MM\0\*"), TiffImageFile),  # BigTIFF starts at 4 GB
    # The whole header: Pillow reads it, comments included, byte by byte.
    _Format(re.compile(rb"P[1-6](?:(?:\s|#[^\r\n]*[\r\n])+\d+){2,3}\s"), PpmImageFile),
)


class _Truncated(Exception):
    """The file ended before the image did."""


class _Bytes(io.BytesIO):
    """A file in memory. Once `strict`, reading at its end is an error.

    A host process may have set `ImageFile.LOAD_TRUNCATED_IMAGES`, with which Pillow takes an
    empty read for the end of the image and fills the rest with grey.
    """

    strict = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.strict and not data and size != 0:
            raise _Truncated("the file ends before the image does")
        return data


def _open_bytes(data: bytes, source: str, limits: Limits) -> tuple[ImageFile, bytes]:
    """Parse the header of an encoded image."""
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            source,
            f"got more than {limits.max_bytes} bytes; send a smaller file, or raise "
            "Limits.max_bytes if its origin is trusted",
        )
    plugin = next((f.plugin for f in _FORMATS if f.magic.match(data, 0, 4096)), None)
    if plugin is None:
        got = f"a file that starts with {data[:12]!r}" if data else "0 bytes"
        raise ImageError(
            source,
            f"got {got}; expected a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image: convert it",
        )
    exif = b""
    if plugin is JpegImageFile:
        data, exif = _strip_jpeg(data)
    elif plugin is PngImageFile:
        data, exif = _strip_png(data)
    elif plugin is GifImageFile:
        _check_gif(data, source, limits)
    elif plugin is TiffImageFile:
        _check_tiff(data, source, limits)
    file = _Bytes(data)
    with _quiet(plugin):
        image = plugin(file)
    if plugin is JpegImageFile:
        _check_scans(data, image, source, limits)
    file.strict = True
    return image, exif


_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")  # libjpeg, too, skips fill bytes and junk
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}  # TEM, RST0-7, SOI: markers without a payload
_JPEG_DROPPED = {0xFE, *range(0xE1, 0xEE), 0xEF}  # COM, APP1-13, APP15; colour needs APP0 and 14

# Far more than any encoder writes; each costs about a microsecond in the loops below.
_MAX_SEGMENTS = 10_000  # before the first scan of a JPEG
_MAX_CHUNKS = 100_000  # of a PNG (64 MiB in chunks of 700 bytes), or before a GIF's first frame
_MAX_STRIPS = 1_000_000  # of a TIFF: Pillow spends about 300 bytes of memory on each


def _strip_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """The file without its metadata, and its EXIF block (ITU T.81, annex B)."""
    kept, exif, at = [data[:2]], b"", 2
    for _ in range(_MAX_SEGMENTS):
        found = _JPEG_MARKER.search(data, at)
        if found is None:
            break
        marker, at = found[1][0], found.end()
        if marker == 0xDA:  # start of the first scan: entropy-coded data follows
            if data.rfind(b"\xff\xd9", at) < 0:  # from the end, where it is
                break
            return b"".join([*kept, b"\xff\xda", data[at:]]), exif
        if marker == 0xD9:
            raise ValueError("a JPEG file without an image")
        if marker in _JPEG_BARE:
            continue
        end = at + max(2, int.from_bytes(data[at : at + 2], "big"))
        if marker == 0xE1 and data.startswith(b"Exif\0\0", at + 2):
            exif = exif or data[at + 2 : end]
        if marker not in _JPEG_DROPPED:
            kept += (bytes((0xFF, marker)), data[at:end])
        at = end
    else:
        raise ValueError(f"a JPEG header of more than {_MAX_SEGMENTS} segments")
    raise _Truncated("the JPEG file ends before its image does")


def _strip_png(data: bytes) -> tuple[bytes, bytes]:
    """The file without its metadata, and its EXIF block (PNG specification, section 5).

    Dropping the animation chunks leaves the still image that every viewer shows.
    """
    kept, exif, at = [data[:8]], b"", 8
    for _ in range(_MAX_CHUNKS):
        if at + 12 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length  # length, kind, payload, checksum
        if end > len(data):
            break
        chunk = data[at:end]
        at = end
        if kind == b"eXIf":
            exif = exif or chunk[8:-4]
        elif not kind[:1].islower() or kind == b"tRNS":  # a capital marks a critical chunk
            if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
                raise ValueError(f"wrong checksum in PNG chunk {kind!r}")
            kept.append(chunk)
        if kind == b"IEND":
            return b"".join(kept), exif
    else:
        raise ValueError(f"a PNG file of more than {_MAX_CHUNKS} chunks")
    raise _Truncated("the PNG file ends before its IEND chunk")


def _check_gif(data: bytes, source: str, limits: Limits) -> None:
    """Refuse by the first frame, which may reach beyond the size that the header states."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)  # after the global palette
    in_extension = False
    for _ in range(_MAX_CHUNKS):
        if at >= len(data):
            raise _Truncated("the GIF file ends before its first frame")
        if in_extension:  # a chain of sub-blocks, each with its length, ended by an empty one
            in_extension = data[at] > 0
            at += data[at] + 1
        elif data[at] == 0x2C:  # image descriptor
            left, top, frame_width, frame_height = struct.unpack_from("<4H", data, at + 1)
            far = max(width, left + frame_width), max(height, top + frame_height)
            return _check_count(*far, source, limits)
        else:  # an extension, or junk, which Pillow skips
            in_extension = data[at] == 0x21
            at += 2 if in_extension else 1
    raise ValueError(f"a GIF file of more than {_MAX_CHUNKS} blocks before its first frame")


def _first_directory(tiff: bytes) -> Iterator[tuple[int, int, int]]:
    """(tag, count, value) of each entry of the first directory of a TIFF file or EXIF block.

    The value is meaningful for one SHORT or LONG. Stops where the bytes do not make sense.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, at)
            (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, at + 8)
            yield tag, count, value
    except struct.error:
        return


def _check_tiff(data: bytes, source: str, limits: Limits) -> None:
    edges = {322: 1, 323: 1}  # TileWidth, TileLength
    for tag, count, value in _first_directory(data):
        if tag in (273, 324) and count > _MAX_STRIPS:  # StripOffsets, TileOffsets
            raise ImageTooLarge(source, f"got a TIFF of {count} strips or tiles; re-encode as PNG")
        edges[tag] = value
    # A tile may be larger than its image, and libtiff allocates it whole.
    _check_count(edges[322], edges[323], source, limits)


# A scan may be a few bytes long and still walk over every pixel, so a small progressive JPEG can
# ask for hours. Encoders write about 10; phones store one or two more pictures behind the first.
_SCANS_AT_FULL_SIZE = 40
_JPEG_SCAN = re.compile(rb"\xff\xda")

# Decoders that Pillow has in Python: about a microsecond per sample.
_SLOW_DECODERS = {"ppm_plain", "ppm", "bmp_rle"}
_SLOW_SHARE = 20  # such images may have this many times fewer pixels


def _check_scans(data: bytes, image: ImageFile, source: str, limits: Limits) -> None:
    allowed = _SCANS_AT_FULL_SIZE * limits.max_pixels // (image.width * image.height)
    if len(data) // 10 <= allowed:  # the header of a scan alone takes 10 bytes
        return
    scans = sum(1 for _ in _JPEG_SCAN.finditer(data))  # three times as fast as bytes.count
    if scans > allowed:
        raise ImageTooLarge(
            source,
            f"got a JPEG of {image.width} x {image.height} pixels in {scans} scans, many times "
            "the work of an ordinary file; re-encode it",
        )


def _check_pixels(image: Image.Image, source: str, limits: Limits) -> None:
    _check_count(image.width, image.height, source, limits)
    tiles = getattr(image, "tile", None) or []  # absent once loaded
    if any(tile[0] in _SLOW_DECODERS for tile in tiles):
        allowed = max(1, limits.max_pixels // _SLOW_SHARE)
        if image.width * image.height > allowed:
            raise ImageTooLarge(
                source,
                f"got {image.width} x {image.height} pixels in a variant of its format that "
                f"decodes slowly; at most {allowed} pixels of it are accepted: re-encode as PNG",
            )


def _check_count(width: int, height: int, source: str, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            source,
            f"got {width} x {height} pixels; at most {limits.max_pixels} are accepted: send a "
            "smaller image, or raise Limits.max_pixels if its origin is trusted",
        )


def _load(image: Image.Image, exif: bytes, source: str, limits: Limits) -> Image.Image:
    """Decode the pixels, then convert and orient them."""
    _check_pixels(image, source, limits)
    with _quiet(type(image)):
        image.load()
    rgb = _to_rgb(image, source)
    # Read after loading: only then has Pillow seen all of a PNG, and turned a TIFF by itself.
    method = _TRANSPOSE.get(_orientation(exif or image.info.get("exif")))
    if method is not None:
        rgb = rgb.transpose(method)
    if rgb is not image:
        rgb.info = {}  # an EXIF block left here would turn the image again when decoded again
    return rgb


def _to_rgb(image: Image.Image, source: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    # PGM files, and PNG files in older Pillow, hold 16-bit grey in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _grey16_to_rgb(image)
    if image.mode in ("I", "F"):
        raise ImageError(
            source,
            f"got 32-bit pixels (PIL mode {image.mode}), whose range is unknown; expected 8 or "
            "16 bits: scale to 0 .. 255 and convert to mode L or RGB",
        )
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow converts premultiplied grey to nothing else
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    wide = np.asarray(image)  # [H, W] of 16-bit values, in int32 for mode I
    grey = (wide >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[wide == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


_TRANSPOSE = {  # EXIF 2.3, tag 0x0112: what brings row 0 to the top and column 0 to the left
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(exif: object) -> int:
    """EXIF tag 0x0112; 1 (upright) where absent or unreadable.

    Unreadable metadata does not make the pixels unusable, and viewers ignore it too.
    """
    if not isinstance(exif, bytes):
        return 1
    directory = _first_directory(exif.removeprefix(b"Exif\0\0"))
    return next((value for tag, _, value in directory if tag == 0x0112), 1)


_warning_filters = threading.Lock()


@contextmanager
def _quiet(kind: type[Image.Image]) -> Iterator[None]:
    """Silence Pillow's warnings about odd TIFF tags; for other formats do nothing.

    `catch_warnings` swaps a process-wide list and swaps it back on leaving. Two threads leaving
    in the wrong order would make our filter permanent, hence one TIFF at a time.
    """
    if not issubclass(kind, TiffImageFile):
        yield
        return
    with _warning_filters, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


# --- resizing and normalising --------------------------------------------------------------------


class _Family(NamedTuple):
    """What transformers assumes for keys that an old `preprocessor_config.json` leaves out."""

    resample: int
    size: Mapping[str, int]
    square: bool  # a bare number for `size` is a square, else the shortest edge
    crop_size: Mapping[str, int] | None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


_SQUARE = {"height": 224, "width": 224}
_CLIP = _Family(
    resample=Image.Resampling.BICUBIC,
    size={"shortest_edge": 224},
    square=False,
    crop_size=_SQUARE,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
_FAMILIES = {
    "ViT": _Family(Image.Resampling.BILINEAR, _SQUARE, square=True, crop_size=None),
    "DeiT": _Family(
        Image.Resampling.BICUBIC, {"height": 256, "width": 256}, square=True, crop_size=_SQUARE
    ),
    "Siglip": _Family(Image.Resampling.BICUBIC, _SQUARE, square=False, crop_size=None),
    "CLIP": _CLIP,
    "Bit": _CLIP,  # DINOv2
}


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalise, as transformers' image processors describe it.

    Exactly one of `size` and `shortest_edge` is set. The output has one static size, because
    images of a batch share an array: with `shortest_edge`, `crop_size` is needed.

    Raises:
        PreprocessError: a combination without a static size, or a value out of range.
    """

    size: tuple[int, int] | None = None  # (height, width), aspect ratio not kept
    shortest_edge: int | None = None  # pixels, aspect ratio kept
    crop_size: tuple[int, int] | None = None  # (height, width), padded with black where smaller
    resample: int = Image.Resampling.BILINEAR  # code of PIL.Image.Resampling
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if (self.size is None) == (self.shortest_edge is None):
            raise PreprocessError(
                f"got size={self.size} and shortest_edge={self.shortest_edge}; expected one of them"
            )
        if self.size is None and self.crop_size is None:
            raise PreprocessError(
                f"got shortest_edge={self.shortest_edge} without a centre crop, so every aspect "
                "ratio would give another size and images could not share a batch; set crop_size, "
                "or give an exact height and width"
            )
        edges = [*(self.size or ()), *(self.crop_size or ()), self.shortest_edge or 1]
        if not all(isinstance(edge, int) and edge > 0 for edge in edges):
            raise PreprocessError(f"got edges {edges}; expected positive integers, in pixels")
        if self.resample not in list(Image.Resampling):
            choices = ", ".join(f"{r.value} {r.name.lower()}" for r in sorted(Image.Resampling))
            raise PreprocessError(f"resample: got {self.resample!r}; expected one of {choices}")
        numbers = (self.rescale_factor, *self.mean, *self.std)
        finite = all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
        if not finite or len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise PreprocessError(
                f"got rescale_factor={self.rescale_factor}, mean={self.mean}, std={self.std}; "
                "expected finite numbers, three for mean and three non-zero ones for std"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocess:
        """Read a `preprocessor_config.json`, with transformers' defaults for absent keys.

        Without `image_processor_type` those of ViT are meant, as in Google's ViT checkpoints.

        Raises:
            PreprocessError: a processor or an option that this class cannot reproduce.
        """
        given = {key: value for key, value in config.items() if value is not None}
        family = _family(given)
        if not given.get("do_resize", True):
            raise PreprocessError("do_resize is false; images of a batch need one size, set it")
        if given.get("do_pad"):
            raise PreprocessError("do_pad is not supported; use a centre crop (do_center_crop)")
        crop = given.get("do_center_crop", family.crop_size is not None)
        size = _edges("size", given.get("size", family.size), square=family.square)
        crop_size = _edges("crop_size", given.get("crop_size", family.crop_size)) if crop else None
        rescale = given.get("do_rescale", True)
        normalize = given.get("do_normalize", True)
        return cls(
            size=size if isinstance(size, tuple) else None,
            shortest_edge=None if isinstance(size, tuple) else size,
            crop_size=crop_size if isinstance(crop_size, tuple) else None,
            resample=given.get("resample", family.resample),
            rescale_factor=given.get("rescale_factor", 1 / 255) if rescale else 1.0,
            mean=_channels("image_mean", given.get("image_mean", family.mean) if normalize else 0),
            std=_channels("image_std", given.get("image_std", family.std) if normalize else 1),
        )

    def to_dict(self) -> dict[str, Any]:
        """A `preprocessor_config.json` that transformers and `from_dict` read back the same."""
        edges = ("height", "width")
        config: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor" if self.size else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": (
                dict(zip(edges, self.size, strict=True))
                if self.size
                else {"shortest_edge": self.shortest_edge}
            ),
            "resample": int(self.resample),
            "do_center_crop": self.crop_size is not None,
            "do_rescale": True,
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.crop_size is not None:
            config["crop_size"] = dict(zip(edges, self.crop_size, strict=True))
        return config

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of every output."""
        height, width = self.crop_size or self.size or (0, 0)
        return 3, height, width

    def __call__(
        self,
        image: Image.Image,
        *,
        out: NDArray[np.float32] | None = None,
        name: str = "image",
        limits: Limits = DEFAULT_LIMITS,
    ) -> NDArray[np.float32]:
        """One decoded image to float32 [3, H, W], into `out` if given.

        Raises:
            ImageTooLarge: as `resized_uint8`.
        """
        return self.normalize(self.resized_uint8(image, name=name, limits=limits), out=out)

    def pixels(
        self,
        images: Sequence[ImageInput],
        *,
        names: Sequence[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> NDArray[np.float32]:
        """Decode and preprocess a batch: float32 [B, 3, H, W], written in place once.

        Args:
            names: how errors call the inputs; by default their path, else "image 0", "image 1", ...

        Raises:
            ImageError: the first input that is not a usable image.
        """
        if names is not None and len(names) != len(images):
            raise InvalidInput(f"got {len(names)} names for {len(images)} images; expected as many")
        batch = np.empty((len(images), *self.output_shape), np.float32)  # [B, 3, H, W]
        for i, image in enumerate(images):
            if names is not None:
                name = names[i]
            else:
                name = _describe(image) if isinstance(image, (str, os.PathLike)) else f"image {i}"
            decoded = decode(image, name=name, limits=limits)
            self(decoded, out=batch[i], name=name, limits=limits)
        return batch

    def resized_uint8(
        self, image: Image.Image, *, name: str = "image", limits: Limits = DEFAULT_LIMITS
    ) -> NDArray[np.uint8]:
        """The part before normalising, for training to cache: uint8 [H, W, 3].

        Raises:
            ImageTooLarge: so elongated that scaling the short edge makes it exceed `limits`.
            ImageError: not an RGB image; use `decode`.
        """
        if image.mode != "RGB":
            raise ImageError(name, f"got PIL mode {image.mode}; expected RGB: use decode() first")
        height, width = self._resized_size(image.height, image.width)
        if height * width > limits.max_pixels:
            raise ImageTooLarge(
                name,
                f"got {image.width} x {image.height} pixels, which resized to a shortest edge of "
                f"{self.shortest_edge} would be {width} x {height}, more than the "
                f"{limits.max_pixels} accepted: crop it",
            )
        array = np.array(image.resize((width, height), resample=self.resample))  # [h, w, 3]
        if self.crop_size is None:
            return array
        return _centre_crop(array, self.crop_size)

    def normalize(
        self, resized: NDArray[np.uint8], *, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """(v * rescale_factor - mean) / std: uint8 [..., H, W, 3] -> float32 [..., 3, H, W].

        A byte has 256 values, so all arithmetic is done beforehand and this looks up. That is
        exact, where the same operations on float32 arrays would differ in the last bit.
        """
        *batch, height, width, channels = resized.shape
        shape = (*batch, channels, height, width)
        if out is None:
            out = np.empty(shape, np.float32)
        if channels != 3 or out.shape != shape or out.dtype != np.float32:
            raise InvalidInput(
                f"got {resized.shape} into {out.dtype} {out.shape}; "
                "expected [..., H, W, 3] into float32 [..., 3, H, W]"
            )
        for c in range(3):
            # "clip" only because the default mode would buffer `out`; no byte is out of range
            np.take(self._table[c], resized[..., c], out=out[..., c, :, :], mode="clip")
        return out

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        """float32 [3, 256]: the normalised value of each byte.

        Rounded where transformers rounds: rescaled in float64, normalised in float32.
        """
        rescaled = (np.arange(256.0) * self.rescale_factor).astype(np.float32)  # [256]
        mean = np.array(self.mean, np.float32)[:, None]  # [3, 1]
        std = np.array(self.std, np.float32)[:, None]
        return (rescaled - mean) / std

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        short, long = min(height, width), max(height, width)
        edge = self.shortest_edge or 1
        scaled = int(edge * long / short)  # transformers truncates, too
        return (edge, scaled) if height <= width else (scaled, edge)


def _centre_crop(array: NDArray[np.uint8], crop_size: tuple[int, int]) -> NDArray[np.uint8]:
    """[h, w, 3] -> [H, W, 3]: cut where larger, pad with zeros where smaller.

    As transformers has it, an odd pixel is cut below or right, and padded above or left.
    """
    here, there = [], []  # slices of the array, and of the result
    for length, wanted in zip(array.shape, crop_size, strict=False):
        cut, pad = max(0, (length - wanted) // 2), max(0, (wanted - length + 1) // 2)
        covered = min(length, wanted)
        here.append(slice(cut, cut + covered))
        there.append(slice(pad, pad + covered))
    result = np.zeros((*crop_size, 3), np.uint8)
    result[tuple(there)] = array[tuple(here)]
    return result


def _family(config: Mapping[str, Any]) -> _Family:
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    if named is None:
        if config.get("do_center_crop") and isinstance(config.get("size"), int):
            raise PreprocessError(
                f"size: got {config['size']} without image_processor_type, which may be a square "
                'or a shortest edge; write {"shortest_edge": ...} or {"height": ..., "width": ...}'
            )
        return _FAMILIES["ViT"]
    match = re.fullmatch(r"(\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(named))
    family = _FAMILIES.get(match[1]) if match else None
    if family is None:
        raise PreprocessError(
            f"image_processor_type: got {named!r}; its rules may differ from a plain resize and "
            f"centre crop, which are those of {', '.join(_FAMILIES)}: describe it as one of these"
        )
    return family


def _edges(key: str, value: Any, *, square: bool = True) -> tuple[int, int] | int:
    """(height, width), or one number for the shortest edge."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return value[0], value[1]
    if isinstance(value, Mapping):
        given = {name: edge for name, edge in value.items() if edge is not None}
        if given.keys() == {"height", "width"}:
            return given["height"], given["width"]
        if given.keys() == {"shortest_edge"} and key == "size":
            return given["shortest_edge"]
    allowed = ' or {"shortest_edge"}' if key == "size" else ""
    raise PreprocessError(f'{key}: got {value!r}; expected {{"height", "width"}}{allowed}')


def _channels(key: str, value: Any) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, (int, float)) else value
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise PreprocessError(f"{key}: got {value!r}; expected three numbers, one per channel")
    try:
        return float(values[0]), float(values[1]), float(values[2])
    except (TypeError, ValueError):
        raise PreprocessError(f"{key}: got {value!r}; expected three numbers") from None
