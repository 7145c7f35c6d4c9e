"""The text encoder of a bundle: from texts to embeddings that images can be compared with.

text/text.*                 the graph, ids and mask -> x_s
text/tokenizer.json         with truncation and padding in it, so that `tokenizers` is all it needs
text/alignment.safetensors  the projections of image and text features, eq. (7) and (8)
text/golden.*               a few texts and the embeddings they gave when the bundle was built

Nothing of it is read to classify.
Axes: N texts, L tokens, D_v and D_s widths of the encoders' features, D of the common space.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from marnet_sdk.alignment import project
from marnet_sdk.backends import TextEncoder, open_text
from marnet_sdk.bundle import TEXT, Bundle
from marnet_sdk.errors import (
    BackendUnavailable,
    BundleFormatError,
    InferenceError,
    InvalidInput,
    MarnetWarning,
    SelfTestFailed,
    brief,
    requires_extra,
)
from marnet_sdk.noise.tables import Floats, Integers
from marnet_sdk.self_test import mismatch

TOKENIZER, ALIGNMENT = "tokenizer.json", "alignment.safetensors"
GOLDEN_TEXTS, GOLDEN_EMBEDDINGS = "golden.json", "golden.safetensors"

# Characters for each token that is kept. A word rarely has 16, so one look is enough; a text that
# has not filled its tokens after 1,024 for each is cut there, whatever follows.
_FIRST_LOOK, _LAST_LOOK = 16, 1024
_LOOK_BEHIND = 64  # characters behind a word that may decide where it ends: accents, marks


def check_texts(texts: str | Iterable[str]) -> tuple[list[str], bool]:
    """The texts as a list, and whether it was a single one.

    Raises:
        InvalidInput: it is neither a text nor many of them; names the first that is none.
    """
    if isinstance(texts, str):
        return [_check_text(texts, "the text")], True
    if isinstance(texts, bytes | bytearray | memoryview) or not isinstance(texts, Iterable):
        raise InvalidInput(
            f"texts: got {type(texts).__name__}; expected a str, or a list or iterator of them"
        )
    return [_check_text(text, f"text {i}") for i, text in enumerate(texts)], False


def _check_text(text: str, name: str) -> str:
    if not isinstance(text, str):
        raise InvalidInput(f"{name}: got {type(text).__name__}; expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{name}: its character {error.start} is half of a surrogate pair, which no tokenizer "
            'takes; decode its bytes with errors="replace"'
        ) from error
    return str(text)


@dataclass(frozen=True, eq=False)
class Alignment:
    """The projections into the space in which images and texts are compared."""

    vision_weight: Floats  # [D, D_v]
    vision_bias: Floats  # [D]
    text_weight: Floats  # [D, D_s]
    text_bias: Floats  # [D]

    def images(self, x_v: Floats) -> Floats:
        """Project to x_v' = g(E_v(x_v)), eq. (7), of length 1: [B, D_v] -> [B, D]."""
        return _unit(project(x_v, self.vision_weight, self.vision_bias))

    def texts(self, x_s: Floats) -> Floats:
        """Project to x_s' = g(E_s(x_s)), eq. (8), of length 1: [B, D_s] -> [B, D]."""
        return _unit(project(x_s, self.text_weight, self.text_bias))


def _unit(y: Floats) -> Floats:
    return y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), np.float32(1e-12))


class Tokenizer:
    """A tokenizer.json that cuts and pads. May be called from several threads at once."""

    def __init__(self, inner: Any) -> None:
        """Wrap `inner`, a `tokenizers.Tokenizer`."""
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self._marks = [number for number, token in added.items() if token.special]
        self._unknown = _unknown_id(inner)
        self._margin = _LOOK_BEHIND + max((len(t.content) for t in added.values()), default=0)

    def __call__(self, texts: Sequence[str]) -> tuple[Integers, Integers]:
        """Turn texts into ids and mask, [N, L]."""
        found = self._inner.encode_batch([self.beginning(text) for text in texts])
        ids, mask = [e.ids for e in found], [e.attention_mask for e in found]
        return np.array(ids, np.int64), np.array(mask, np.int64)

    def count(self, ids: Integers, mask: Integers) -> tuple[Integers, Integers]:
        """Count the tokens of each text that stand for its words, and those that are known."""
        unknown = (mask > 0) & (ids == self._unknown)
        known = (mask > 0) & ~unknown & ~np.isin(ids, self._marks)
        return (known | unknown).sum(axis=1), known.sum(axis=1)

    def beginning(self, text: str) -> str:
        """Cut a long text to what decides its tokens, so that 100 MB cost what a page costs."""
        cut = self._inner.truncation
        if cut is None:
            return text
        most = _LAST_LOOK * cut["max_length"]
        if cut["direction"] == "left":
            return text[-most:]
        size = _FIRST_LOOK * cut["max_length"] + self._margin
        while size < min(len(text), most):
            if self._decides(text[:size]):
                return text[:size]
            size *= 4
        return text[:most]

    def _decides(self, text: str) -> bool:
        """Tell whether whatever follows this text leaves the tokens that are kept as they are.

        It does where another word begins behind them, and well before the end.
        """
        found = self._inner.encode(text)
        last = max((word for word in found.word_ids if word is not None), default=-1)
        return any(
            word is not None and word > last and start < len(text) - self._margin
            for rest in found.overflowing
            for word, (start, _) in zip(rest.word_ids, rest.offsets, strict=True)
        )


def _unknown_id(inner: Any) -> int:
    """The id that stands for what a `tokenizers.Tokenizer` does not know; -1: it knows all."""
    model = json.loads(inner.to_str())["model"]
    if isinstance(number := model.get("unk_id"), int):  # Unigram
        return number
    token = model.get("unk_token")
    found = None if token is None else inner.token_to_id(token)
    return -1 if found is None else found


@dataclass(frozen=True, eq=False)
class TextEmbedder:
    """An opened text encoder. May be called from several threads at once."""

    tokenize: Tokenizer
    encode: TextEncoder
    alignment: Alignment

    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> Floats:
        """Embed texts: aligned embeddings of length 1, [N, D].

        Warns once where the model knows less than half of some texts.

        Raises:
            InvalidInput: a text of which the model knows nothing.
            InferenceError: the encoder gives NaN or infinity.
        """
        parts = [np.empty((0, len(self.alignment.text_bias)), np.float32)]
        strange: list[int] = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            ids, mask = self.tokenize(batch)
            strange += [start + i for i in self._mostly_unknown(batch, ids, mask, start)]
            parts.append(self.alignment.texts(self._encode(batch, ids, mask, start)))
        if strange:
            warnings.warn(
                f"most words of {len(strange)} of {len(texts)} texts are unknown to this model, "
                f"the first is text {strange[0]} ({texts[strange[0]][:40]!r}); scores say little "
                "of them: use words like those of the training texts",
                MarnetWarning,
                stacklevel=3,  # who called the classifier
            )
        return np.concatenate(parts)

    def embed(self, texts: Sequence[str]) -> Floats:
        """Embed a few texts, known or not, to prove that the encoder is what it was."""
        return self.alignment.texts(self.features(texts))

    def features(self, texts: Sequence[str]) -> Floats:
        """Encode one batch to x_s [N, D_s]."""
        return self._encode(texts, *self.tokenize(texts), start=0)

    def _mostly_unknown(
        self, texts: Sequence[str], ids: Integers, mask: Integers, start: int
    ) -> list[int]:
        """Find the texts of which less than half is known.

        Raises:
            InvalidInput: nothing of one is known; errors count from `start`.
        """
        words, known = self.tokenize.count(ids, mask)
        if len(empty := np.flatnonzero(known == 0)):
            row = int(empty[0])
            problem = "this model knows none of its words" if words[row] else "it has no word"
            raise InvalidInput(
                f"text {start + row}: {problem}: {brief(texts[row])}; expected at least one "
                "word like those of the training texts"
            )
        return np.flatnonzero(2 * known < words).tolist()

    def _encode(self, texts: Sequence[str], ids: Integers, mask: Integers, start: int) -> Floats:
        x_s = self.encode(ids, mask)
        if len(bad := np.flatnonzero(~np.isfinite(x_s).all(axis=1))):
            text = texts[bad[0]]
            raise InferenceError(
                f"the features of text {start + bad[0]} ({text[:40]!r}) hold NaN or infinity; "
                "expected finite numbers: export the bundle again with --precision fp32"
            )
        return x_s


OpenText = Callable[[str, Path, str, int | None], TextEncoder]


def open_embedder(
    folder: Path,
    backend: str,
    compute: str,
    threads: int | None = None,
    *,
    opened_by: OpenText = open_text,
) -> TextEmbedder:
    """Open the text encoder in `folder`, a bundle's text/.

    Args:
        compute, threads: those of `marnet_sdk.backends.open_backend`.
        opened_by: what opens the graph.

    Raises:
        MissingExtra: tokenizers, or a package of the backend, is not installed.
        BackendUnavailable: the installed ones cannot read what is there.
        BundleFormatError: the projections are not what they should be.
    """
    tokenize = open_tokenizer(folder / TOKENIZER)
    with _malformed(folder / ALIGNMENT):
        arrays = load_file(folder / ALIGNMENT)
        alignment = Alignment(**arrays)
        shapes = {name: array.shape for name, array in arrays.items()}
        width = shapes["text_bias"]
        fits = len(width) == 1 and shapes["vision_bias"] == width
        for name in ("vision_weight", "text_weight"):
            fits = fits and len(shapes[name]) == 2 and shapes[name][:1] == width
        if not fits:
            raise ValueError(f"the shapes {shapes} do not fit each other")
    return TextEmbedder(tokenize, opened_by(backend, folder, compute, threads), alignment)


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json that truncates and pads.

    Raises:
        MissingExtra: tokenizers is not installed.
        BackendUnavailable: the installed one cannot read the file.
    """
    with requires_extra("text", "tokenizers"):
        import tokenizers
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers has no narrower type for a file that it cannot parse
        raise BackendUnavailable(
            f"tokenizers {tokenizers.__version__} cannot read {path}: {error}; upgrade with: "
            "pip install --upgrade tokenizers"
        ) from error


def open_text_part(
    bundle: Bundle,
    threads: int | None,
    device: str | None = None,
) -> TextEmbedder:
    """Check, open and test the text encoder of a bundle.

    Args:
        device: that of `marnet_sdk.backends.open_backend`.

    Raises:
        BundleFormatError: the bundle has none, or not all of it.
        BundleCorrupt, BundleError: a file is not what was written, or cannot be read.
        MissingExtra, BackendUnavailable: it cannot run here.
        SelfTestFailed: it does not give its golden embeddings.
    """
    if not bundle.has(TEXT):
        manifest = bundle.manifest
        raise BundleFormatError(
            f"{bundle.path} has no text encoder: it was exported with --no-text, or its method has "
            "none. To match texts, export it again without --no-text: marnet-export "
            f"--backend {manifest.backend} --precision {manifest.precision.asked}"
        )
    folder = bundle.check(TEXT)
    needed = (TOKENIZER, ALIGNMENT, GOLDEN_TEXTS, GOLDEN_EMBEDDINGS)
    for path in (*(folder / name for name in needed), *folder.rglob("*")):
        if not path.is_dir():
            bundle.file(path.relative_to(bundle.path).as_posix())
    with _malformed(folder / GOLDEN_TEXTS):
        golden = json.loads((folder / GOLDEN_TEXTS).read_text("utf-8"))
        texts, _ = check_texts(golden["texts"])
        compute, least = str(golden["compute"]), float(golden["min_cosine"])
        if not texts:
            raise ValueError("no texts")
    with _malformed(folder / GOLDEN_EMBEDDINGS):
        expected = load_file(folder / GOLDEN_EMBEDDINGS)["embeddings"]
    opened_by = partial(open_text, device=device)
    embedder = open_embedder(folder, bundle.manifest.backend, compute, threads, opened_by=opened_by)
    _self_test(bundle, embedder, texts, expected, least)
    return embedder


def _self_test(
    bundle: Bundle, embedder: TextEmbedder, texts: list[str], expected: Floats, least: float
) -> None:
    """Embed the golden texts, and refuse other embeddings than the golden.

    Raises:
        SelfTestFailed: they differ.
    """
    try:
        got = embedder.embed(texts)
    except InferenceError as error:
        raise SelfTestFailed(mismatch(bundle, str(error))) from error
    if got.shape != expected.shape:
        what = f"golden texts give embeddings {got.shape}, expected {expected.shape}"
        raise SelfTestFailed(mismatch(bundle, what))
    found = float(cosines(got, expected).min())
    if not found >= least:  # NaN too
        what = (
            f"embeddings of golden texts have a cosine similarity of {found:.6f} to those of "
            f"the export (at least {least:g} is expected)"
        )
        raise SelfTestFailed(mismatch(bundle, what))


def cosines(a: Floats, b: Floats) -> np.ndarray:
    """Cosine similarity of each row of a [N, D] to the same row of b, in float64: [N]."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return (x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))


@contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """Name the file whose content is not what the format prescribes."""
    try:
        yield
    except (KeyError, TypeError, ValueError, InvalidInput, SafetensorError) as error:
        raise BundleFormatError(
            f"{path} lacks what matching needs: {error}; export the bundle again"
        ) from error
