"""The text encoder in a bundle is training's: the same tokens, the same features, verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick import kept
from tiny import make_model
from torch import nn
from transformers import CanineTokenizer

from marnet_export import text as text_part
from marnet_export.build import torchscript
from marnet_export.build.builder import Order
from marnet_export.build.types import Types
from marnet_export.lower.methods import Lowered, lower
from marnet_export.text import (
    MAX_ERROR,
    MIN_COSINE,
    export_text,
    max_tokens,
    text_types,
    verification_texts,
    write_tokenizer,
)
from marnet_sdk.errors import ExportError, VerificationFailed
from marnet_sdk.text import Tokenizer, open_embedder, open_tokenizer
from marnet_train.checkpoint import Checkpoint, load_checkpoint
from marnet_train.text import encode, load_tokenizer, train_tokenizer

FLOAT32 = Types("fp32", "fp32")
ALMOST_EXACT = 1e-5  # float32 through two layers, where a wrong token moves x_s by its own size


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def lowered(loaded: Checkpoint) -> Lowered:
    return lower(loaded.model)


@pytest.mark.parametrize(
    ("backend", "storage", "compute"),
    kept(
        [
            ("torchscript", "fp32", "fp32"),
            ("onnxruntime", "fp32", "fp32"),
            ("openvino", "fp32", "fp32"),
            ("torchscript", "bf16", "bf16"),
            ("onnxruntime", "fp16", "fp32"),
        ],
        {("torchscript", "fp32", "fp32"), ("onnxruntime", "fp16", "fp32")},
        many=True,
    ),
)
def test_what_is_written_is_measured_and_opens(
    loaded, lowered, tmp_path, backend, storage, compute
):
    report = export_text(loaded, lowered, backend, Types(storage, compute), tmp_path / "text")
    assert report is not None
    assert (report["storage"], report["compute"], report["max_tokens"]) == (storage, compute, 48)
    assert report["texts"] >= 60
    assert report["error"] <= (ALMOST_EXACT if storage == "fp32" else MAX_ERROR[storage])
    assert report["cosine"] >= MIN_COSINE[storage]
    rounded = report["error"] > ALMOST_EXACT
    assert rounded == (storage != "fp32")  # so what was asked for did happen
    embedder = open_embedder(tmp_path / "text", backend, compute)
    assert embedder(["a closed loop"]).shape == (1, lowered.alignment.text[0].shape[0])
    kept = json.loads((tmp_path / "text/golden.json").read_text())
    assert len(kept["texts"]) == 8
    assert "" in kept["texts"]


def test_int8_is_for_the_image_encoder_and_the_loop():
    assert text_types("torchscript", Types("int8", "bf16")) == Types("fp16", "bf16")
    for types in (FLOAT32, Types("bf16", "fp32")):
        assert text_types("openvino", types) == types


def test_a_method_without_text_has_no_text_part(loaded, lowered, tmp_path):
    silent = replace(lowered, text=None)
    assert export_text(loaded, silent, "torchscript", FLOAT32, tmp_path / "text") is None
    assert not (tmp_path / "text").exists()


# --- tokens -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(checkpoint: Path, tmp_path_factory) -> tuple[Tokenizer, Callable]:
    """The bundle's, and training's."""
    trained = load_tokenizer(checkpoint)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(trained, 48, path)
    return open_tokenizer(path), lambda texts: encode(trained, texts, 48)


PIECES = st.sampled_from(["loop", "stroke,", "[SEP]", "[PAD]", "[unused]", "\n", " ", "##e", "ÉE"])


@given(st.lists(st.text(max_size=80) | st.lists(PIECES).map(" ".join), min_size=1, max_size=5))
def test_any_texts_give_the_tokens_that_training_gives(tokenizers, texts):
    ours, training = tokenizers
    for got, want in zip(ours(texts), training(texts), strict=True):
        np.testing.assert_array_equal(got, want.numpy())


def test_texts_are_cut_where_training_cut_them(tokenizers):
    ids, mask = tokenizers[0](["loop " * 10_000, "loop"])
    assert ids.shape == mask.shape == (2, 48)
    assert mask.sum(axis=1).tolist() == [48, 3]
    assert ids[0, -1] == ids[1, 2]  # the end mark is there all the same


def test_a_tokenizer_that_cuts_elsewhere_is_refused(loaded, lowered, tmp_path, monkeypatch):
    monkeypatch.setattr(
        text_part, "write_tokenizer", lambda own, most, path: write_tokenizer(own, most - 1, path)
    )
    with pytest.raises(VerificationFailed, match=r"other tokens than training did; no bundle"):
        export_text(loaded, lowered, "torchscript", FLOAT32, tmp_path / "text")


def test_a_tokenizer_without_a_fast_form_names_the_way_out(tmp_path):
    with pytest.raises(ExportError, match=r"CanineTokenizer has no fast form.*--no-text leaves"):
        write_tokenizer(CanineTokenizer(), 48, tmp_path / "tokenizer.json")


def test_a_tokenizer_that_cannot_pad_names_the_way_out(checkpoint, tmp_path):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.pad_token = None
    with pytest.raises(ExportError, match=r"has no padding token.*--no-text leaves"):
        write_tokenizer(tokenizer, 48, tmp_path / "tokenizer.json")


def without(checkpoint: Path, copy: Path, *names: str) -> Checkpoint:
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns(*names))
    return load_checkpoint(copy)


def test_a_checkpoint_without_its_tokenizer_names_the_way_out(checkpoint, lowered, tmp_path):
    bare = without(checkpoint, tmp_path / "c", "tokenizer*.json")
    with pytest.raises(ExportError, match=r"(?s)no tokenizer could be loaded .*--no-text leaves"):
        export_text(bare, lowered, "torchscript", FLOAT32, tmp_path / "text")


def test_the_tokenizer_of_another_language_is_refused(checkpoint, lowered, tmp_path):
    other = without(checkpoint, tmp_path / "c")
    train_tokenizer(["суп", "хлеб", "чай, лимон"]).save_pretrained(other.path)
    with pytest.raises(ExportError, match=r"knows \d+ of \d+ tokens .*--no-text leaves"):
        export_text(other, lowered, "torchscript", FLOAT32, tmp_path / "text")


def test_the_longest_text_is_training_s_or_else_what_the_encoder_takes(loaded, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    assert max_tokens(loaded, tokenizer) == 48
    lost = replace(loaded, training={})
    assert max_tokens(lost, tokenizer) == 64
    tokenizer.model_max_length = 62  # as RoBERTa's, whose positions start at 2
    assert max_tokens(lost, tokenizer) == 62
    endless = make_model(
        text={"model_type": "xlnet", "d_model": 8, "n_head": 2, "n_layer": 1, "d_inner": 8}
    )
    with pytest.raises(ExportError, match=r"neither training.json .* says how long .*--no-text"):
        max_tokens(replace(lost, model=endless), tokenizer)


# --- features -----------------------------------------------------------------------------------


def without_mask(module: nn.Module) -> nn.Module:
    class WithoutMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.inner(ids, torch.ones_like(mask))

    return WithoutMask()


def other_words(module: nn.Module) -> nn.Module:
    class OtherWords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.inner(mask, mask)

    return OtherWords()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without_mask, r"encoded in a batch, x_s is off by up to .* worst at '"),
        (other_words, r"encoded alone, x_s is off by up to .* \(bound 0\.0001\)"),
    ],
)
def test_a_graph_that_does_something_else_is_refused(
    loaded, lowered, tmp_path, monkeypatch, broken, message
):
    build = torchscript.BUILDER.build_text

    def build_broken(lowered: Lowered, types: Types, payload: Path, order: Order) -> None:
        assert lowered.text is not None
        build(replace(lowered, text=broken(lowered.text)), types, payload, order)

    breaks = replace(torchscript.BUILDER, build_text=build_broken)
    monkeypatch.setattr(torchscript, "BUILDER", breaks)
    with pytest.raises(VerificationFailed, match=message + ".*No bundle .* another --backend"):
        export_text(loaded, lowered, "torchscript", FLOAT32, tmp_path / "text")


def test_an_encoder_that_overflows_is_refused(loaded, tmp_path):
    model = load_checkpoint(loaded.path).model
    with torch.no_grad():
        next(model.text.parameters())[:] = 1e6  # fp16 ends at 65504
    with pytest.raises(VerificationFailed, match=r"in fp16, .*hold NaN or .* try --precision"):
        export_text(loaded, lower(model), "torchscript", Types("fp16", "fp32"), tmp_path / "text")


class Counting(nn.Module):
    """An encoder whose graph no exporter can write: it asks Python for its values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.inner(ids, mask)[: len(set(ids[:, 0].tolist())) + len(ids)]


def test_an_encoder_that_the_backend_cannot_build_names_the_way_out(loaded, lowered, tmp_path):
    odd = replace(lowered, text=Counting(lowered.text))
    message = r"(?s)onnxruntime cannot build the text encoder, a Counting \(.*--no-text leaves"
    with pytest.raises(ExportError, match=message):
        export_text(loaded, odd, "onnxruntime", FLOAT32, tmp_path / "text")


KINDS = {
    "roberta": {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2},
    "distilbert": {"dim": 8, "n_heads": 2, "n_layers": 2, "hidden_dim": 16},
    "mpnet": {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2},
}


@pytest.mark.parametrize(
    ("kind", "backend"),
    kept(
        [(kind, backend) for kind in KINDS for backend in ("torchscript", "openvino")]
        + [("roberta", "onnxruntime")],  # which takes seconds to export
        {("roberta", "torchscript"), ("mpnet", "openvino")},
        many=True,
    ),
)
def test_other_encoders_of_the_bert_family_travel_too(kind, backend, loaded, tmp_path):
    """From a checkpoint without training.json and without samples."""
    tokenizer = train_tokenizer(["beef, noodles and coriander", "rice with beans", "a cup of tea"])
    tokenizer.save_pretrained(tmp_path / "c")
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    model = make_model(text={"model_type": kind, **size, **KINDS[kind]})
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(tmp_path / "c")
    made = replace(loaded, path=tmp_path / "c", model=model, training={})
    report = export_text(made, lower(model), backend, FLOAT32, tmp_path / "text")
    assert report is not None
    assert report["max_tokens"] == 32
    assert report["error"] <= ALMOST_EXACT


def test_verification_covers_short_long_odd_and_unknown_texts(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    labels = [f"class {i}" for i in range(1000)]
    texts = verification_texts(labels, ["a closed loop"] * 500, tokenizer, 48)
    assert len(texts) < 100  # a thousand classes take no longer than a hundred
    assert {labels[0], labels[-1], ", ".join(labels[:1])} <= set(texts)
    lengths = encode(tokenizer, texts, 10**6)[1].sum(dim=1)
    assert int(lengths.min()) == 2  # the empty text
    assert int(lengths.max()) > 48  # one that is cut
    assert len(set(lengths.tolist())) > 10
    assert texts == verification_texts(labels, ["a closed loop"] * 500, tokenizer, 48)
