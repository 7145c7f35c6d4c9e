"""The bytes of image files, taken apart without a decoder: what is metadata, and what is missing.

Metadata that pixels do not depend on is removed from JPEG, PNG and WebP files before Pillow sees
them: it is the larger part of the attack surface, and Pillow's warnings about damaged metadata
cannot be silenced for one thread only.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

Box = tuple[int, int, int, int]  # left, upper, right, lower


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
NO_JPEG_END = "the JPEG file ends before its image"
# More than the blocks that are decoded together can take, with each restart marker in turn.
_JPEG_BLOCKS = bytes(i * 37 % 251 for i in range(10 * 64 * 27 // 8))  # of at most 27 bits a value
_JPEG_PAD = _JPEG_BLOCKS + b"".join(bytes((0xFF, 0xD0 + n)) + _JPEG_BLOCKS for n in range(8))


def strip_jpeg(data: bytes) -> tuple[bytes, bytes, bool]:
    """The file without its metadata, its EXIF block, and whether it had an end marker.

    Raises:
        ValueError: it ends before its image.
    """
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
    raise ValueError(NO_JPEG_END)


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
        raise ValueError(NO_JPEG_END)
    return len(data) if end is None else end


def padded_jpeg(data: bytes) -> bytes:
    """A stripped file, with more behind its data than the blocks that it may lack can take."""
    return data.removesuffix(_JPEG_END) + _JPEG_PAD + _JPEG_END


# --- PNG (PNG specification, section 5) -----------------------------------------------------------


def strip_png(data: bytes) -> tuple[bytes, bytes, bool]:
    """The file without its metadata, its EXIF block, and whether the checksums of pixels are right.

    Dropping the animation chunks leaves the still image that every viewer shows. The last bytes of
    the pixel stream are a checksum, too: in a chunk of their own they are read only if there are
    too few rows without them.

    Raises:
        ValueError: a chunk that pixels depend on is damaged.
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


def png_rows(png: bytes, width: int, height: int) -> tuple[bool, bool]:
    """Tell whether the rows of all pixels are there, and whether their stream's checksum is right.

    The checksum is looked at only where there are no rows beyond those.
    """
    bits, colour, *_, interlaced = png[24:29]
    depth = bits * {2: 3, 4: 2, 6: 4}.get(colour, 1)  # of a pixel
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-((x - width) // dx), -((y - height) // dy)) for x, y, dx, dy in passes]
    needed = sum(rows * (1 + (columns * depth + 7) // 8) for columns, rows in sizes if columns)
    size, whole = _inflate(png, needed)
    return size >= needed, whole


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


# --- WebP (RFC 9649) ----------------------------------------------------------------------------

_WEBP_IMAGE = {b"ALPH", b"VP8 ", b"VP8L", b"ANIM"}


def strip_webp(data: bytes) -> tuple[bytes, bytes, Box | None]:
    """The image or the first frame without metadata, its EXIF block, and what the frame covers.

    What is kept is whole or refused by libwebp, whatever the file says of its length.

    Raises:
        ValueError: the EXIF block is missing.
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
