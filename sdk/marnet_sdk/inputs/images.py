"""The way from untrusted bytes to an upright RGB image.

What `decode` makes of an image (no colour management: ICC profiles and gamma are ignored):

    EXIF orientation            applied, of PNG that of its eXIf chunk; XMP is not read in files
    animated (GIF, PNG, WebP)   first frame, on white where it leaves the canvas uncovered; of PNG
                                the still image, which may be no frame; of several TIFF pages or
                                MPO pictures, the first
    alpha, transparent colour   composited on white; alpha that is 0 everywhere is ignored, and so
                                is that of BMP but for 32 bits with a mask for each colour
    palette, 1 bit, grey        converted to RGB
    CMYK, YCCK, YCbCr, LAB      converted to RGB by Pillow, without the coefficients of a TIFF
    16-bit grey                 high byte, v >> 8, which is what Pillow makes of 16-bit colour;
                                refused where all values are below 4096, which would be black
    12-bit grey (TIFF)          v >> 4
    signed, 32-bit, float       refused: nothing says what black and white are
    rows are missing            refused, whatever follows them; see `image_files`. Damaged rows of
                                a fax (CCITT in TIFF) are what libtiff makes of them
    RLE-compressed BMP, PNM     refused: Pillow decodes them a sample at a time, in Python

A PIL image is turned as its `getexif()` says. One that you turned yourself still says that it has
to be turned, unless `PIL.ImageOps.exif_transpose` did it or you set `image.getexif()[274] = 1`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import TiffImageFile

from marnet_sdk.errors import ImageError, ImageTooLarge
from marnet_sdk.inputs.containers import Box, exif_tags
from marnet_sdk.inputs.image_files import (
    Limits,
    Opened,
    Size,
    check_pixels,
    check_tiff,
    open_file,
    quiet,
)

__all__ = ["DEFAULT_LIMITS", "ImageInput", "Limits", "decode", "file_bytes", "shown"]

Buffer = bytes | bytearray | memoryview
ImageInput = str | os.PathLike[str] | Buffer | IO[bytes] | Image.Image | NDArray[np.uint8]
_SHOWN = 200  # characters of an input that a message repeats
DEFAULT_LIMITS = Limits()


def decode(
    image: ImageInput,
    *,
    name: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    at_least: Size | None = None,
) -> Image.Image:
    """Decode, orient and convert one image to RGB, by the table at the top of this file.

    An upright RGB image from PIL is returned as it is, not copied.

    Args:
        image: a path, the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file, such a file opened in
            binary mode (read from where it stands), a PIL image, or a uint8 array: [H, W] grey,
            [H, W, 3] RGB or [H, W, 4] RGBA.
        name: how errors call this input, for example "image 3"; by default its path or "image".
        limits: refused beyond these, before any pixel is decoded.
        at_least: a JPEG file is decoded at a half, a quarter or an eighth of its size where both
            sides (width, height) stay at least so long, which is faster and gives other pixels;
            None: every image is decoded at its own size.

    Raises:
        ImageTooLarge: more bytes or pixels than `limits` allow.
        ImageError: anything else that is not a usable image.
    """
    source = shown(image) if isinstance(image, (str, os.PathLike)) else "image"
    source = source if name is None else name
    try:
        return _decode(image, source, limits, at_least)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # a host that set Pillow's limit below ours
        raise ImageTooLarge(source, f"{str(error)[:_SHOWN]} Send a smaller image") from error
    except Exception as error:
        # Hostile files make Pillow raise nearly anything: OSError, SyntaxError, ValueError,
        # struct.error, IndexError, MemoryError, ... They all mean the same to the caller.
        raise ImageError(
            source,
            f"not a decodable image ({type(error).__name__}: {str(error)[:_SHOWN]}); the file is "
            "incomplete, damaged or of an unsupported variant: send all of it, or re-encode as "
            "JPEG or PNG",
        ) from error


def _decode(image: ImageInput, source: str, limits: Limits, at_least: Size | None) -> Image.Image:
    if isinstance(image, np.ndarray):
        return _from_pil(_from_array(image, source), source, limits)
    if isinstance(image, Image.Image):
        return _from_pil(image, source, limits)
    data = file_bytes(image, source, limits)
    return _from_file(open_file(data, source, limits), source, limits, at_least)


def file_bytes(image: ImageInput, source: str, limits: Limits) -> bytes:
    """The bytes of an image file, at most one more than the limits allow.

    Args:
        image: the path of the file, its bytes, or the file opened in binary mode, which is read.
        source: how errors call it.

    Raises:
        ImageError: it cannot be read, or is nothing that `decode` takes.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read(image, source, limits)
    if isinstance(image, Buffer):
        return bytes(image)
    if hasattr(image, "read"):
        return _read_open(image, source, limits)
    raise ImageError(
        source,
        f"got {type(image).__name__}; expected a path, bytes, a file opened in binary mode, a "
        f"PIL image or a uint8 array [H, W, 3]{_hint(image)}",
    )


def _from_file(file: Opened, source: str, limits: Limits, at_least: Size | None) -> Image.Image:
    image = file.image
    check_pixels(image.width, image.height, source, limits)
    with quiet(type(image)):
        file.load(at_least)
    # Read after loading: only then has Pillow turned a TIFF by itself.
    orientation = exif_tags(file.exif or image.info.get("exif") or b"").get(274)
    return _upright(image, orientation, source, file.covered or _gif_frame(image))


def _from_pil(image: Image.Image, source: str, limits: Limits) -> Image.Image:
    check_pixels(image.width, image.height, source, limits)
    with quiet(type(image)):
        if isinstance(image, TiffImageFile):
            check_tiff(image)
        image.load()
    return _upright(image, _orientation(image), source, _gif_frame(image))


def _upright(
    image: Image.Image, orientation: object, source: str, covered: Box | None
) -> Image.Image:
    """Turn it to RGB, with row 0 at the top. `covered` is what of the canvas is not just page."""
    rgb = _to_rgb(image, source, animated=covered is not None)
    if covered is not None and covered != (0, 0, *image.size):
        page = Image.new("RGB", image.size, "white")
        page.paste(rgb.crop(covered), covered)
        rgb = page
    method = _TRANSPOSE.get(orientation)
    if method is not None:
        rgb = rgb.transpose(method)
    if rgb is not image:
        rgb.info = {}  # an EXIF block left here would turn the image again when decoded again
    return rgb


def _orientation(image: Image.Image) -> object:
    """Read what a PIL image says of itself, which its program may have altered."""
    block = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys()
    with quiet() if block else nullcontext():
        try:
            return image.getexif().get(274)
        except Exception:  # damaged metadata makes Pillow raise nearly anything
            return None


def _gif_frame(image: Image.Image) -> Box | None:
    """Find what the first frame of a GIF covers of its canvas; Pillow composes later ones."""
    return image.dispose_extent if isinstance(image, GifImageFile) and not image.tell() else None


def shown(path: str | os.PathLike[str]) -> str:
    """A path as messages show it. Somebody may have passed a whole file's text for one."""
    text = os.fsdecode(path)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _hint(image: object) -> str:
    """Say what to do with an object of another library; the hint is empty for any other input."""
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
    """Read what is left in a file that somebody opened, at most one byte more than allowed."""
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


# --- pixels --------------------------------------------------------------------------------------

_TRANSPOSE: dict[object, Image.Transpose] = {  # EXIF 2.3, tag 0x0112: what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(image: Image.Image, source: str, *, animated: bool) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and transparent is None:
        return image
    # Older Pillow holds the 16-bit grey of PNG files in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _wide_to_rgb(image, source)
    if image.mode in ("I", "F"):
        raise ImageError(
            source,
            f"got 32-bit or signed pixels (PIL mode {image.mode}), whose range is unknown; "
            "expected 8 or 16 bits: scale to 0 .. 255 and convert to mode L or RGB",
        )
    if isinstance(image, TiffImageFile) and image.mode in ("P", "PA"):
        image = _with_tiff_palette(image)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow converts premultiplied grey to nothing else
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        # Some programs write 0 for alpha and mean no alpha; frames of animations may be empty.
        if isinstance(image, TiffImageFile) and rgba.getbbox(alpha_only=False) is None:
            raise ImageError(
                source,
                "its alpha channel is 0 everywhere, and so are its colours, which may have been "
                "multiplied by it: save it without alpha",
            )
        if transparent is not None or animated or rgba.getbbox() is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            rgba = Image.alpha_composite(white, rgba)
        return rgba.convert("RGB")
    return image.convert("RGB")


def _wide_to_rgb(image: Image.Image, source: str) -> Image.Image:
    """Convert 16-bit grey, or what else Pillow holds in this mode: 12 bits, or 0 for white."""
    wide = np.asarray(image)  # [H, W] of 16-bit values, in int32 for mode I
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits = tags.get(258, (16,))[0]
    low, high = int(wide.min()), int(wide.max())
    if tags.get(262) == 0:
        wide, low, high = 65535 - wide, 65535 - high, 65535 - low
    if bits == 16 and low < high < 4096:
        raise ImageError(
            source,
            f"got 16-bit grey with values from {low} to {high} of 65535, which is black; if it "
            "holds fewer bits, scale them to 0 .. 65535, or to 0 .. 255 and 8 bits",
        )
    grey = (wide >> (bits - 8)).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[np.asarray(image) == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _with_tiff_palette(image: TiffImageFile) -> Image.Image:
    """Give an image the colours of its file.

    They have 16 bits, of which Pillow takes the high ones; some programs write 8, as libtiff knows.
    """
    colours = image.tag_v2[320]
    if max(colours) > 255:
        return image
    mended = image.copy()
    mended.putpalette(bytes(colours), "RGB;L")
    return mended
