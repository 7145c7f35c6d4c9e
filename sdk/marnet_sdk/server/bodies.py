"""The images and settings in the body of a request to /predict: bytes, multipart or JSON."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field as FormField
from python_multipart.multipart import File, FormParser, parse_options_header

from marnet_sdk.errors import brief
from marnet_sdk.server.service import Refused, ServerLimits

_FIELDS = 16  # of a form, beside its files
EXPECTED = (
    "send the bytes of an image as image/jpeg (or another image type, or "
    "application/octet-stream), files as multipart/form-data, or JSON as application/json"
)


class Asked(BaseModel):
    """The settings that a request may ask for, beside its images."""

    model_config = ConfigDict(extra="forbid")

    top_k: int = Field(
        default=5, ge=1, le=2**31, description="Classes in each answer, the likeliest first"
    )
    samples: int | None = Field(
        default=None, ge=1, le=2**31, description="Noise samples per image; default: the server's"
    )
    deadline_ms: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="Answer within so many milliseconds, or refuse with 504",
    )
    operating_point: str | None = Field(
        default=None,
        max_length=100,
        description="Answer at no other; refused unless it is the one that this server opened",
    )


class JsonImages(Asked):
    """A JSON body: images in base64, and what is asked for."""

    images: list[str] = Field(min_length=1, description="Image files in base64")


_BINARY = {"type": "string", "format": "binary"}
REQUEST_BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": _BINARY},
        "application/octet-stream": {"schema": _BINARY},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"images": {"type": "array", "items": _BINARY, "minItems": 1}},
                "required": ["images"],
            }
        },
        "application/json": {"schema": JsonImages.model_json_schema()},
    },
}  # for the OpenAPI document


@dataclass
class Upload:
    """The images of a request in their order, and the settings that came with them."""

    images: Sequence[bytes | bytearray] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def is_raw(content_type: str) -> bool:
    """Tell whether a body is the bytes of an image, so that nothing has to be taken apart."""
    media = content_type.partition(";")[0].strip().lower()
    return media in ("", "application/octet-stream") or media.startswith("image/")


def read_upload(content_type: str, body: bytearray, limits: ServerLimits) -> Upload:
    """Take a body apart.

    Raises:
        Refused: 415 for another kind of body, 413 for too many images, 400 for a damaged body or
            one without images; names the position of an image that is no base64.
    """
    kind, options = parse_options_header(content_type)
    media = kind.decode("latin-1")
    if is_raw(content_type):
        upload = Upload([body])
    elif media == "application/json":
        upload = _from_json(body, limits)
    elif media == "multipart/form-data":
        upload = _from_form(body, options.get(b"boundary"), limits)
    else:
        raise Refused(415, f"got a body of type {brief(media)}; {EXPECTED}")
    if not upload.images:
        raise Refused(400, f"the body has no image; {EXPECTED}")
    return upload


def merged(query: Asked, settings: dict[str, Any]) -> Asked:
    """Join what the query asks for and what the body asks for.

    Raises:
        Refused: 400, both ask for the same thing, or for something impossible.
    """
    given = query.model_dump(exclude_unset=True)
    if twice := sorted(given.keys() & settings.keys()):
        raise Refused(400, f"{twice[0]} stands in the query and in the body; give it once")
    try:
        return Asked.model_validate({**given, **settings})
    except ValidationError as error:
        raise Refused(400, why(error)) from error


def why(error: ValidationError) -> str:
    """Tell what pydantic found, without repeating what it was given."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{brief(place)}: {first['msg']}" if place else first["msg"]


def _from_json(body: bytearray, limits: ServerLimits) -> Upload:
    try:
        content = JsonImages.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise Refused(400, why(error)) from error
    _check_count(len(content.images), limits)
    images = [_decoded(text, i) for i, text in enumerate(content.images)]
    return Upload(images, content.model_dump(exclude={"images"}, exclude_unset=True))


def _decoded(text: str, position: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        reason = f"image {position}: not base64 ({error})"
        if text.startswith("data:"):
            reason = f"image {position}: a data URI; send only what stands behind its comma"
        raise Refused(400, reason, position=position) from error


def _from_form(body: bytearray, boundary: bytes | None, limits: ServerLimits) -> Upload:
    if not boundary:
        raise Refused(400, "multipart/form-data needs a boundary in its Content-Type")
    images: list[bytes] = []
    settings: dict[str, Any] = {}
    ended: list[bool] = []

    def on_file(file: File) -> None:
        _check_count(len(images) + 1, limits)
        file.file_object.seek(0)
        images.append(file.file_object.read())

    def on_field(one: FormField) -> None:
        name = (one.field_name or b"").decode("utf-8", "replace")
        if name in settings or len(settings) == _FIELDS:
            raise Refused(400, f"the field {brief(name)} is one too many")
        settings[name] = (one.value or b"").decode("utf-8", "replace")

    # Files stay in memory, whose bytes are counted already; none is written to a disk.
    config = {"MAX_MEMORY_FILE_SIZE": float("inf"), "UPLOAD_ERROR_ON_BAD_CTE": True}
    try:
        parser = FormParser(
            "multipart/form-data", on_field, on_file, lambda: ended.append(True), boundary,
            config=config,
        )  # fmt: skip
        parser.write(bytes(body))
        parser.finalize()
    except (FormParserError, AssertionError, UnicodeError, ValueError) as error:
        raise Refused(400, f"not a multipart body ({type(error).__name__})") from error
    if not ended:
        raise Refused(400, "the multipart body ends before its last boundary; send all of it")
    return Upload(images, settings)


def _check_count(images: int, limits: ServerLimits) -> None:
    if images > limits.images:
        raise Refused(
            413, f"the body has more than {limits.images} images; send them in several requests"
        )
