"""The text encoder travels in the bundle, in a folder of its own: see `marnet_sdk.text`.

Texts are cut as in training, because that is what the encoder has seen. What was written is opened
as the SDK opens it and held against training's own tokenisation and the float32 encoder, each text
alone, where nothing is padded.
Axes: N texts, L tokens, D_s text features, D of the common space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase

from marnet_export.build.builder import USUAL, Order, builder
from marnet_export.build.opened import open_built_text
from marnet_export.build.types import Types
from marnet_export.lower.methods import Alignment, Lowered
from marnet_sdk.errors import ExportError, MarnetError, RecipeError, VerificationFailed
from marnet_sdk.noise.tables import Floats
from marnet_sdk.text import (
    ALIGNMENT,
    GOLDEN_EMBEDDINGS,
    GOLDEN_TEXTS,
    TOKENIZER,
    TextEmbedder,
    cosines,
    open_embedder,
)
from marnet_train.checkpoint import Checkpoint, write_json
from marnet_train.data.imagefolder import read_split
from marnet_train.text import check_vocabulary, encode, load_tokenizer

WITHOUT = "--no-text leaves the text encoder out, and the bundle classifies all the same"
MAX_TEXTS = 24  # of each kind: labels, texts of the samples, random tokens
GOLDEN = 8  # texts that travel with the bundle
BATCH = 16  # texts of different lengths that are encoded together
# Bounds by the coarser of the types of storage and arithmetic. fp32: the order of sums, through up
# to a dozen layers. fp16 and bf16: one rounding of every factor, 2^-12 and 2^-9, which layers
# normalise but also add up.
# Relative error of x_s, as a norm, of the worst text.
MAX_ERROR = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-2}
# Cosine similarity of the worst text's embedding to the float32 one.
MIN_COSINE = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.995}


def text_types(backend: str, types: Types) -> Types:
    """Choose the types of the text encoder: int8 is for the image encoder and the loop."""
    if types.storage != "int8":
        return types
    return Types("fp16" if "fp16" in builder(backend).storage else "fp32", types.compute)


def export_text(
    checkpoint: Checkpoint,
    lowered: Lowered,
    backend: str,
    types: Types,
    folder: Path,
    order: Order = USUAL,
) -> dict[str, Any] | None:
    """Build the text encoder into `folder`, a bundle's text/, and verify it.

    Args:
        order: says where it is built for.

    Returns:
        What was measured: `texts`, how many; `max_tokens`; `storage`, `compute`; of the worst text,
        alone and in a batch, `error`, the relative error of x_s, and `cosine`, the similarity of
        its embedding to the float32 one. None: the method has no text encoder.

    Raises:
        ExportError: the checkpoint's tokenizer cannot travel, or the backend cannot build or run
            its text encoder.
        VerificationFailed: what was built does not agree with the float32 encoder.
    """
    if lowered.text is None or lowered.alignment is None:
        return None
    types = text_types(backend, types)
    source = _Source(checkpoint, lowered)
    folder.mkdir(parents=True)
    write_tokenizer(source.tokenizer, source.max_tokens, folder / TOKENIZER)
    save_file(_projections(lowered.alignment), folder / ALIGNMENT)
    with _typed_errors(lowered.text, backend):
        builder(backend).build_text(lowered, types, folder, order)
        opened_by = partial(open_built_text, device=order.device)
        embedder = open_embedder(folder, backend, types.compute, opened_by=opened_by)
        report = _verify(embedder, source, types)
    _write_golden(embedder, source.texts, types, folder)
    about = {"texts": len(source.texts), "max_tokens": source.max_tokens}
    return about | {"storage": types.storage, "compute": types.compute} | report


def check_text(checkpoint: Checkpoint, lowered: Lowered) -> None:
    """Refuse, before anything is built, a checkpoint whose texts could not be encoded."""
    if lowered.text is not None:
        _Source(checkpoint, lowered)


def verify_text(
    folder: Path,
    checkpoint: Checkpoint,
    lowered: Lowered,
    backend: str,
    types: Types,
    device: str | None = None,
) -> dict[str, float]:
    """Hold a text encoder that is in a bundle's text/ against its checkpoint, on this machine.

    Args:
        types: what the image encoder was built in, as for `export_text`.
        device: that it was built for.

    Returns:
        `error` and `cosine`, as `export_text`.

    Raises:
        VerificationFailed: it does not agree with the float32 encoder.
    """
    types = text_types(backend, types)
    opened_by = partial(open_built_text, device=device)
    embedder = open_embedder(folder, backend, types.compute, opened_by=opened_by)
    assert lowered.alignment is not None
    for name, want in _projections(lowered.alignment).items():
        if not np.array_equal(getattr(embedder.alignment, name), want):
            raise VerificationFailed(f"{name} of {folder / ALIGNMENT} is not the checkpoint's")
    return _verify(embedder, _Source(checkpoint, lowered), types)


@contextmanager
def _typed_errors(encoder: nn.Module, backend: str) -> Iterator[None]:
    """Say which encoder could not be built or run; exporters and runtimes raise anything."""
    try:
        yield
    except (MarnetError, OSError):
        raise
    except Exception as error:
        config = getattr(getattr(encoder, "backbone", None), "config", None)
        kind = getattr(config, "model_type", type(encoder).__name__)
        raise ExportError(
            f"{backend} cannot build the text encoder, a {kind} ({type(error).__name__}: "
            f"{str(error).strip()[:300]}); choose another --backend, or {WITHOUT}"
        ) from error


class _Source:
    """The checkpoint's text encoder in float32, its tokenizer, and texts to verify with."""

    def __init__(self, checkpoint: Checkpoint, lowered: Lowered) -> None:
        self.encoder = lowered.text
        try:
            self.tokenizer = load_tokenizer(checkpoint.path)
            described = _sample_texts(checkpoint)
            if described:
                check_vocabulary(self.tokenizer, described, checkpoint.path)
        except RecipeError as error:
            raise ExportError(f"{error}. Or leave it: {WITHOUT}") from error
        self.max_tokens = max_tokens(checkpoint, self.tokenizer)
        texts = verification_texts(checkpoint.labels, described, self.tokenizer, self.max_tokens)
        # A tokenizer without special tokens makes nothing of an empty text, and the SDK refuses it.
        self.texts = [t for t in texts if encode(self.tokenizer, [t], self.max_tokens)[1].any()]

    def tokens(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask [N, L], as in training."""
        return encode(self.tokenizer, texts, self.max_tokens)

    @torch.inference_mode()
    def features(self) -> Floats:
        """Compute x_s [N, D_s], each text alone."""
        assert self.encoder is not None
        return np.concatenate([self.encoder(*self.tokens([text])).numpy() for text in self.texts])


def max_tokens(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return where training cut its texts, or, where training.json is lost, the most the encoder
    takes.
    """
    settings = checkpoint.training.get("settings")
    trained = settings.get("max_tokens") if isinstance(settings, dict) else None
    if isinstance(trained, int):
        return trained
    # The tokenizer's limit is smaller where positions start behind the padding's, as RoBERTa's.
    limit = checkpoint.model.config.text.get("max_position_embeddings")
    if not isinstance(limit, int) or limit < 1:  # XLNet says -1: none
        raise ExportError(
            f"{checkpoint.path}: neither training.json (settings.max_tokens) nor the text encoder "
            f"(max_position_embeddings) says how long a text may be; train it again, or {WITHOUT}"
        )
    return min(limit, tokenizer.model_max_length)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, max_tokens: int, path: Path) -> None:
    """Write it in the format of `tokenizers`, set to cut and pad as `marnet_train.text.encode`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pad = tokenizer.pad_token
    if not isinstance(backend, Tokenizer) or not isinstance(pad, str):
        lacks = "no padding token" if isinstance(backend, Tokenizer) else "no fast form"
        raise ExportError(
            f"the tokenizer {type(tokenizer).__name__} has {lacks}, so a bundle cannot hold it; "
            f"expected one that tokenizer.json can describe. {WITHOUT}"
        )
    own = Tokenizer.from_str(backend.to_str())
    own.enable_truncation(max_tokens, direction=tokenizer.truncation_side)
    own.enable_padding(
        direction="right",
        pad_id=tokenizer.convert_tokens_to_ids(pad),
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=pad,
    )
    path.write_text(own.to_str(pretty=True) + "\n", "utf-8")


def _projections(alignment: Alignment) -> dict[str, Floats]:
    return {
        "vision_weight": alignment.vision[0],
        "vision_bias": alignment.vision[1],
        "text_weight": alignment.text[0],
        "text_bias": alignment.text[1],
    }


def _sample_texts(checkpoint: Checkpoint) -> list[str]:
    """Texts of the validation samples, as far as there are any."""
    if not checkpoint.samples.is_dir():
        return []
    texts = [example.text for example in read_split(checkpoint.samples, needs_text=False)]
    return [text for text in texts if text]


def verification_texts(
    labels: Sequence[str],
    described: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> list[str]:
    """Label names, longer texts made of them, texts of the data, random tokens, and odd ones.

    Names alone would not do: descriptions may avoid them, and then all are the unknown token.
    """
    names = _spread(labels)
    joined = [", ".join(names[:count]) for count in (2, 3, 5, 8) if count <= len(names)]
    random = np.random.default_rng(0)
    lengths = random.integers(1, max_tokens + 1, size=MAX_TEXTS)
    drawn = [random.integers(0, len(tokenizer), size=length).tolist() for length in lengths]
    vocabulary = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in drawn]
    words = ", ".join([*names, *described[:4], vocabulary[0]]).split()
    odd = [
        "",
        "  UPPER  case,\nfour lines;\ttabs... ",
        "Crème brûlée, 北京烤鸭, пельмени, עברית, 🍜 and e\u0301",
        " ".join((words * max_tokens)[: 2 * max_tokens]),  # will be cut
    ]
    return [*odd, *_spread(described), *names, *joined, *vocabulary]


def _spread(texts: Sequence[str]) -> list[str]:
    """Up to `MAX_TEXTS` of them, from the first to the last."""
    rows = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), MAX_TEXTS)).round())
    return [texts[int(row)] for row in rows]


def _verify(embedder: TextEmbedder, source: _Source, types: Types) -> dict[str, float]:
    """Hold what was built against training's tokens and the float32 encoder."""
    texts = source.texts
    _check_tokens(embedder, source)
    want = source.features()
    starts = range(0, len(texts), BATCH)
    try:
        alone = np.concatenate([embedder.features([text]) for text in texts])
        mixed = np.concatenate([embedder.features(texts[i : i + BATCH]) for i in starts])
    except MarnetError as error:
        raise VerificationFailed(_failed(types, str(error))) from error
    coarser = max(types.storage, types.compute, key=list(MAX_ERROR).index)
    found = []
    for how, got in (("alone", alone), ("in a batch", mixed)):
        errors = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
        similar = cosines(embedder.alignment.texts(got), embedder.alignment.texts(want))
        error, cosine = float(errors.max()), float(similar.min())
        found.append((error, cosine))
        least, most = MIN_COSINE[coarser], MAX_ERROR[coarser]
        if not (error <= most and cosine >= least):  # NaN too
            worst = texts[int(errors.argmax())]
            raise VerificationFailed(
                _failed(
                    types,
                    f"encoded {how}, x_s is off by up to {error:.3g} of its norm (bound "
                    f"{most:g}) and embeddings have a cosine similarity down to "
                    f"{cosine:.6f} (bound {least:g}), worst at {worst[:40]!r}",
                )
            )
    return {"error": max(e for e, _ in found), "cosine": min(c for _, c in found)}


def _check_tokens(embedder: TextEmbedder, source: _Source) -> None:
    for texts in (source.texts, *([text] for text in source.texts)):
        got, want = embedder.tokenize(texts), source.tokens(texts)
        if not all(np.array_equal(g, w.numpy()) for g, w in zip(got, want, strict=True)):
            raise VerificationFailed(
                f"the bundle's tokenizer makes of {len(texts)} texts, the first {texts[0][:40]!r}, "
                f"other tokens than training did; no bundle was written. {WITHOUT}"
            )


def _failed(types: Types, problem: str) -> str:
    exact = {types.storage, types.compute} == {"fp32"}
    instead = "choose another --backend" if exact else "try --precision fp32"
    return (
        f"the text encoder in {types.storage}, computed in {types.compute}, does not agree with "
        f"the float32 one: {problem}. No bundle was written; {instead}, or {WITHOUT}"
    )


def _write_golden(embedder: TextEmbedder, texts: Sequence[str], types: Types, folder: Path) -> None:
    """Keep a few texts, and what the built encoder made of them."""
    kept = list(texts[:GOLDEN])
    save_file({"embeddings": embedder.embed(kept)}, folder / GOLDEN_EMBEDDINGS)
    # Another machine has the same weights, so only the arithmetic may differ.
    content = {"texts": kept, "compute": types.compute, "min_cosine": MIN_COSINE[types.compute]}
    write_json(folder / GOLDEN_TEXTS, content)
