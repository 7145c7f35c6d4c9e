"""From untrusted bytes to an upright RGB image.

What `decode` makes of an image (no colour management: ICC profiles and gamma are ignored):

    EXIF orientation            applied
    animated (GIF, PNG, WebP)   first frame; of several TIFF pages or MPO pictures, the first
    alpha, transparent colour   composited on white
    palette, 1 bit, grey        converted to RGB
    CMYK, YCCK, YCbCr, LAB      converted to RGB by Pillow
    16-bit grey                 high byte, v >> 8, which is what Pillow makes of 16-bit colour
    32-bit integer, float       refused: nothing says what white is
    truncated                   refused
    RLE-compressed BMP, PNM     refused: Pillow decodes them a sample at a time, in Python

Images come from strangers. Metadata that pixels do not depend on is removed from JPEG and PNG
files before Pillow sees them: it is the larger part of the attack surface, and Pillow's warnings
about damaged metadata cannot be silenced for one thread only.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from marnet_sdk.errors import ImageError, ImageTooLarge, InvalidInput
from marnet_sdk.process import lock_free_in_children

Buffer = bytes | bytearray | memoryview
ImageInput = str | os.PathLike[str] | Buffer | IO[bytes] | Image.Image | NDArray[np.uint8]
_SHOWN = 200  # characters of an input that a message repeats


@dataclass(frozen=True)
class Limits:
    """How large an untrusted image may be.

    A decoded image takes 4 bytes of memory per pixel, and up to 20 while it is converted. Pillow
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


def decode(
    image: ImageInput, *, name: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Image.Image:
    """Decode, orient and convert one image to RGB, by the table at the top of this file.

    An upright RGB image from PIL is returned as it is, not copied.

    Args:
        image: a path, the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file, such a file opened in
            binary mode (read from where it stands), a PIL image, or a uint8 array: [H, W] grey,
            [H, W, 3] RGB or [H, W, 4] RGBA.
        name: how errors call this input, for example "image 3"; by default its path or "image".
        limits: refused beyond these, before any pixel is decoded.

    Raises:
        ImageTooLarge: more bytes or pixels than `limits` allow.
        ImageError: anything else that is not a usable image.
    """
    source = shown(image) if isinstance(image, (str, os.PathLike)) else "image"
    source = source if name is None else name
    try:
        return _decode(image, source, limits)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # a host that set Pillow's limit below ours
        raise ImageTooLarge(source, f"{error} Send a smaller image") from error
    except Exception as error:
        # Hostile files make Pillow raise nearly anything: OSError, SyntaxError, ValueError,
        # struct.error, IndexError, MemoryError, ... They all mean the same to the caller.
        raise ImageError(
            source,
            f"not a decodable image ({type(error).__name__}: {error}); the file is incomplete, "
            "damaged or of an unsupported variant: send all of it, or re-encode as JPEG or PNG",
        ) from error


def _decode(image: ImageInput, source: str, limits: Limits) -> Image.Image:
    exif = b""
    if isinstance(image, np.ndarray):
        image = _from_array(image, source)
    elif isinstance(image, (str, os.PathLike)):
        image, exif = _open(_read(image, source, limits), source, limits)
    elif isinstance(image, Buffer):
        image, exif = _open(bytes(image), source, limits)
    elif isinstance(image, Image.Image):
        pass
    elif hasattr(image, "read"):
        image, exif = _open(_read_open(image, source, limits), source, limits)
    else:
        raise ImageError(
            source,
            f"got {type(image).__name__}; expected a path, bytes, a file opened in binary mode, a "
            f"PIL image or a uint8 array [H, W, 3]{_hint(image)}",
        )
    _check_pixels(image.width, image.height, source, limits)
    with _quiet(type(image)):
        image.load()
    rgb = _to_rgb(image, source)
    # Read after loading: only then has Pillow seen all of a PNG, and turned a TIFF by itself.
    method = _TRANSPOSE.get(_tags(exif or image.info.get("exif") or b"").get(274, 1))
    if method is not None:
        rgb = rgb.transpose(method)
    if rgb is not image:
        rgb.info = {}  # an EXIF block left here would turn the image again when decoded again
    return rgb


def shown(path: str | os.PathLike[str]) -> str:
    """A path as messages show it. Somebody may have passed a whole file's text for one."""
    text = os.fsdecode(path)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _hint(image: object) -> str:
    """What to do with something of another library."""
    if isinstance(image, Mapping):
        return ": of a row of a data set pass the image alone, such as row['image']"
    if hasattr(image, "__dlpack__"):
        return ": of a tensor [3, H, W] pass x.permute(1, 2, 0).numpy(), with values 0 .. 255"
    return ""


def _read(path: str | os.PathLike[str], source: str, limits: Limits) -> bytes:
    try:
        # A pipe or a device would let us wait for ever.
        mode = Path(path).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ImageError(source, "not a file but a pipe or a device; pass its bytes")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size or limits.max_bytes  # 0 in /proc
            return file.read(min(size, limits.max_bytes) + 1)  # one more than allowed tells
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        text = os.fsdecode(path)
        hint = ""
        if text.startswith("data:"):
            hint = "; it is a data URI: pass base64.b64decode() of what stands after its comma"
        elif re.match(r"[a-z]+://", text):
            hint = "; URLs are not fetched: download it and pass its bytes"
        raise ImageError(source, f"cannot be read: {reason}{hint}") from error


def _read_open(file: Any, source: str, limits: Limits) -> bytes:
    """What is left in a file that somebody opened, and one byte more than allowed at most."""
    try:
        data: Any = file.read(limits.max_bytes + 1)
    except UnicodeDecodeError:  # it was opened as text
        data = ""
    if not isinstance(data, bytes):
        if hasattr(data, "close"):
            data.close()  # a coroutine that nobody will wait for
        raise ImageError(
            source,
            f"read() of the {type(file).__name__} gave {type(data).__name__}, expected bytes: open "
            'it in binary mode, open(path, "rb"), or await what is read and pass that',
        )
    return data


def _from_array(array: NDArray[Any], source: str) -> Image.Image:
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
    return Image.fromarray(np.ascontiguousarray(array))


def _check_pixels(width: int, height: int, source: str, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            source,
            f"got {width} x {height} pixels; at most {limits.max_pixels} are accepted: send a "
            "smaller image, or raise Limits.max_pixels if its origin is trusted",
        )


# --- opening a file -----------------------------------------------------------------------------

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


def _open(data: bytes, source: str, limits: Limits) -> tuple[ImageFile, bytes]:
    """The image, not decoded yet, and the EXIF block that was taken out of its file, if any."""
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
    exif = b""
    if plugin is JpegImageFile:
        data, exif = _strip_jpeg(data)
    elif plugin is PngImageFile:
        data, exif = _strip_png(data)
    elif plugin is TiffImageFile:
        tags = _tags(data)
        # TileWidth x TileLength may be more than the image, and libtiff allocates it whole.
        _check_pixels(tags.get(322, 1), tags.get(323, 1), source, limits)
    file = _Bytes(data)
    with _quiet(plugin):
        image = plugin(file)
    file.header_read = True
    if isinstance(image, TiffImageFile):
        image.is_animated = True  # else loading reads nested directories, which may share as much
    if image.tile and image.tile[0][0] in Image.DECODERS:  # written in Python: minutes of work
        raise ValueError(f"the {image.tile[0][0]} variant decodes too slowly")
    if plugin is JpegImageFile:
        scans = data.count(b"\xff\xda")  # each walks over every pixel, however few its bytes
        if scans * image.width * image.height > _SCANS * limits.max_pixels:
            size = f"{image.width} x {image.height} pixels"
            raise ValueError(f"{scans} scans of {size} are many times the work of an ordinary file")
    return image, exif


_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")  # libjpeg, too, skips fill bytes and junk
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}  # TEM, RST0-7, SOI: markers without a payload
_JPEG_DROPPED = {0xFE, *range(0xE1, 0xEE), 0xEF}  # COM, APP1-13, APP15; colour needs APP0 and 14


def _strip_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """The file without its metadata, and its EXIF block (ITU T.81, annex B)."""
    kept, exif, at = [data[:2]], b"", 2
    while found := _JPEG_MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker in _JPEG_BARE:
            continue
        if marker == 0xDA:  # start of the first scan: entropy-coded data follows
            if data.rfind(b"\xff\xd9", at) < 0:  # from the end, where it is
                break
            return b"".join([*kept, b"\xff\xda", data[at:]]), exif
        end = at + max(2, int.from_bytes(data[at : at + 2], "big"))
        if marker == 0xE1 and data.startswith(b"Exif\0\0", at + 2):
            exif = exif or data[at + 8 : end]
        if marker not in _JPEG_DROPPED:
            kept += (found[0], data[at:end])
        at = end
    raise ValueError("the JPEG file ends before its image")


def _strip_png(data: bytes) -> tuple[bytes, bytes]:
    """The file without its metadata, and its EXIF block (PNG specification, section 5).

    Dropping the animation chunks leaves the still image that every viewer shows.
    """
    kept, exif, at = [data[:8]], b"", 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]  # length, kind, payload, checksum
        at += 12 + length
        if at > len(data):
            break
        if kind == b"eXIf":
            exif = exif or chunk[8:-4]
        elif not kind[:1].islower() or kind == b"tRNS":  # a capital marks a critical chunk
            # Pillow does not check pixels, and with LOAD_TRUNCATED_IMAGES accepts damaged ones.
            if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
                raise ValueError(f"wrong checksum in PNG chunk {kind!r}")
            kept.append(chunk)
        if kind == b"IEND":
            return b"".join(kept), exif
    raise ValueError("the PNG file ends before its image")


def _tags(tiff: bytes) -> dict[int, int]:
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


_warning_filters = lock_free_in_children()


@contextmanager
def _quiet(plugin: type[Image.Image]) -> Iterator[None]:
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


# --- pixels --------------------------------------------------------------------------------------

_TRANSPOSE = {  # EXIF 2.3, tag 0x0112: what brings row 0 to the top and column 0 to the left
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(image: Image.Image, source: str) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and transparent is None:
        return image
    # Older Pillow holds the 16-bit grey of PNG files in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        wide = np.asarray(image)  # [H, W] of 16-bit values, in int32 for mode I
        grey = (wide >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            grey[wide == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
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
