"""Images are matched with texts: the model's own similarities, and nothing of it before a text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.normalizers import NFC, NFKC, BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Metaspace
from tokenizers.processors import BertProcessing
from tokenizers.trainers import BpeTrainer
from tolerances import FLOAT32_LAYER, FLOAT32_TWICE

import marnet_sdk.matching
from marnet_sdk import Classifier, ImageError
from marnet_sdk.bundle import Manifest, read_bundle, seal_bundle
from marnet_sdk.errors import (
    BackendUnavailable,
    BundleCorrupt,
    BundleFormatError,
    InferenceError,
    InvalidInput,
    MarnetWarning,
    MissingExtra,
    SelfTestFailed,
)
from marnet_sdk.text import TextEmbedder, Tokenizer, open_tokenizer
from marnet_train.checkpoint import load_checkpoint
from marnet_train.data.imagefolder import read_split
from marnet_train.losses import cosine_similarity_matrix
from marnet_train.models.marnet import MARNet
from marnet_train.text import encode, load_tokenizer

BACKENDS = ("torchscript", "onnxruntime", "openvino")
TEXTS = [
    "a closed oval",
    "stem",
    "a plain stem; even stroke, upright, narrow",
    "a closed plain Größe 字 🍜",
    "oval x " * 50,
]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MARNet:
    return load_checkpoint(checkpoint).model


@pytest.fixture(scope="module")
def classifier(bundle_of) -> Classifier:
    return Classifier(bundle_of("torchscript", "fp32"))


@pytest.fixture(scope="module")
def paths(digits: Path) -> list[Path]:
    return sorted((digits / "test").glob("*.png"))[:5]


@torch.inference_mode()
def aligned_texts(model: MARNet, checkpoint: Path, texts: list[str]) -> torch.Tensor:
    """x_s' [N, D] through transformers, as training makes it."""
    return model.align_text(model.text(*encode(load_tokenizer(checkpoint), texts, 48)))


# --- the same as the model ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_embeddings_and_similarities_are_the_float32_model_s(
    backend, bundle_of, model, checkpoint, paths
):
    clf = Classifier(bundle_of(backend, "fp32"))
    semantic = aligned_texts(model, checkpoint, TEXTS)
    got = clf.embed_text(TEXTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, F.normalize(semantic, dim=-1), atol=FLOAT32_LAYER)
    with torch.inference_mode():
        visual = model.align_vision(model.vision(torch.from_numpy(clf.preprocess.pixels(paths))))
        want = cosine_similarity_matrix(visual, semantic)
    scores = clf.match(paths, TEXTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, want, atol=FLOAT32_TWICE)
    assert np.abs(want.numpy()).max() > 0.1


def test_an_image_s_own_description_fits_better_than_those_of_other_classes(classifier, digits):
    examples = [e for e in read_split(digits / "test", needs_text=False) if e.text][:120]
    scores = classifier.match([e.image for e in examples], [e.text for e in examples])
    labels = np.array([e.label for e in examples])
    other = labels[:, None] != labels
    better = np.mean([(scores[i, i] > row[other[i]]).mean() for i, row in enumerate(scores)])
    assert better > 0.9  # by chance: 0.5
    assert scores[~other].mean() > scores[other].mean() + 0.2


def test_a_text_s_embedding_depends_on_the_text_alone(classifier):
    together = classifier.embed_text(TEXTS)
    for size in (1, 2, 3):
        split = classifier.embed_text(TEXTS, batch_size=size)
        np.testing.assert_allclose(split, together, atol=FLOAT32_LAYER)
    for text, row in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(classifier.embed_text(text), row, atol=FLOAT32_LAYER)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=FLOAT32_LAYER)


def test_batch_size_changes_no_similarity(classifier, paths):
    expected = classifier.match(paths, TEXTS)
    for size in (1, 2, 4):
        got = classifier.match(paths, TEXTS, batch_size=size)
        np.testing.assert_allclose(got, expected, atol=FLOAT32_TWICE)


def test_a_long_text_is_cut_as_in_training(classifier):
    long = "a closed oval, " * 40
    np.testing.assert_array_equal(
        classifier.embed_text(long), classifier.embed_text(long + "then a plain stem")
    )
    assert not np.array_equal(classifier.embed_text("a plain stem"), classifier.embed_text(long))


# --- shapes and inputs --------------------------------------------------------------------------


def test_one_image_or_one_text_has_no_axis_of_its_own(classifier, paths):
    table = classifier.match(paths, TEXTS)
    assert table.shape == (5, 5)
    row, column = classifier.match(paths[1], TEXTS), classifier.match(paths, TEXTS[2])
    np.testing.assert_allclose(row, table[1], atol=FLOAT32_TWICE)
    np.testing.assert_allclose(column, table[:, 2], atol=FLOAT32_TWICE)
    assert classifier.match(paths[:1], TEXTS[:1]).shape == (1, 1)
    number = classifier.match(paths[1], TEXTS[2])
    assert np.shape(number) == ()
    assert float(number) == pytest.approx(float(table[1, 2]), abs=FLOAT32_TWICE)
    width = classifier.embed_text(TEXTS).shape[1]
    assert classifier.embed_text("a stem").shape == (width,)
    assert classifier.embed_text(["a stem"]).shape == (1, width)


def test_no_images_or_no_texts_give_an_empty_axis(classifier, paths):
    assert classifier.match(paths, []).shape == (5, 0)
    assert classifier.match([], TEXTS).shape == (0, 5)
    assert classifier.match([], "a stem").shape == (0,)
    assert classifier.match(paths[0], []).shape == (0,)
    assert classifier.match([], []).shape == (0, 0)
    assert classifier.embed_text([]).shape == (0, classifier.embed_text("a stem").shape[0])


def test_images_and_texts_come_in_every_kind_that_is_allowed(classifier, paths):
    expected = classifier.match(paths, TEXTS)
    pictures = [np.array(Image.open(path).convert("RGB")) for path in paths]
    kinds = [str(paths[0]), paths[1].read_bytes(), Image.open(paths[2]), *pictures[3:]]
    texts = iter(np.array(TEXTS))  # NumPy's own strings, in an iterator
    got = classifier.match((image for image in kinds), texts)
    np.testing.assert_allclose(got, expected, atol=FLOAT32_TWICE)
    stacked = classifier.match(np.stack(pictures), tuple(TEXTS))
    np.testing.assert_allclose(stacked, expected, atol=FLOAT32_TWICE)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (7, "texts: got int; expected a str, or a list"),
        (None, "texts: got NoneType; expected a str"),
        (b"a stem", "texts: got bytes; expected a str"),
        (["a stem", None], "text 1: got NoneType; expected str"),
        ([["a stem"]], "text 0: got list; expected str"),
        (np.array([1.0]), "text 0: got float64; expected str"),
        (["a stem", "half \ud83c"], "text 1: its character 5 is half of a surrogate pair"),
        ("\udfff", "the text: its character 0 is half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_refused_by_its_place(classifier, paths, texts, message):
    with pytest.raises(InvalidInput, match=message):
        classifier.embed_text(texts)
    with pytest.raises(InvalidInput, match=message):
        classifier.match(paths, texts)


def test_a_bad_image_is_named(classifier, paths):
    with pytest.raises(ImageError, match=r"^image 3 \(nowhere.png\): cannot be read"):
        classifier.match([*paths[:3], "nowhere.png"], TEXTS, batch_size=2)
    with pytest.raises(ImageError, match=r"^nowhere.png: cannot be read"):
        classifier.match("nowhere.png", TEXTS)
    with pytest.raises(ImageError, match=r"^image 1: got a file that starts with"):
        classifier.match([paths[0], b"not an image"], TEXTS)


@pytest.mark.parametrize("size", [0, -1, 1.5, None])
def test_a_batch_size_that_is_none_is_refused(classifier, paths, size):
    with pytest.raises(InvalidInput, match="batch_size must be"):
        classifier.match(paths, TEXTS, batch_size=size)
    with pytest.raises(InvalidInput, match="batch_size must be"):
        classifier.embed_text(TEXTS, batch_size=size)


# --- answers that are none ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(classifier) -> TextEmbedder:
    classifier.embed_text("a stem")
    return classifier._text


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_features_that_are_no_numbers_are_an_error_that_names_the_text(embedder, batch_size):
    def spoiled(ids, mask):
        x_s = embedder.encode(ids, mask).copy()
        x_s[mask.sum(axis=1) > 4, 3] = np.nan
        return x_s

    message = r"the features of text 1 \('a plain stem'\) hold NaN .*export the bundle again with"
    with pytest.raises(InferenceError, match=message):
        replace(embedder, encode=spoiled)(["oval", "a plain stem"], batch_size)


class Bare:
    """A tokenizer that puts no marks around a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.count = tokenizer, tokenizer.count

    def __call__(self, texts):
        ids, mask = self.tokenizer(texts)
        return ids[:, 1:-1], mask[:, 2:]


def test_a_text_without_a_token_is_refused(embedder):
    plain = replace(embedder, tokenize=Bare(embedder.tokenize))
    assert plain(["a stem", "oval"]).shape[0] == 2
    with pytest.raises(InvalidInput, match=r"text 2: it has no word: ''; expected at least one"):
        plain(["a stem", "oval", ""], 2)
    with pytest.raises(InvalidInput, match=r"text 0: it has no word: ''"):
        plain([""])


# --- words that the model does not know ---------------------------------------------------------

UNKNOWN = ["\U0001f436", "\u72ac", "\u0643\u0644\u0628", "\u043a\u0440\u0443\u0433 \u72ac", "[UNK]"]
NO_WORD = ["", "   ", "\u200f", "\n\t", "[SEP] [CLS][PAD]"]


@pytest.mark.parametrize("text", [*UNKNOWN, *NO_WORD], ids=ascii)
def test_a_text_of_which_the_model_knows_nothing_is_refused(classifier, paths, text):
    problem = "it has no word" if text in NO_WORD else "this model knows none of its words"
    message = re.escape(f"text 1: {problem}: {text!r}; expected at least one word")
    for batch_size in (1, 64):
        with pytest.raises(InvalidInput, match=message):
            classifier.embed_text(["a stem", text], batch_size=batch_size)
        with pytest.raises(InvalidInput, match=message):
            classifier.match(paths, ["a stem", text], batch_size=batch_size)
    with pytest.raises(InvalidInput, match=f"text 0: {problem}"):
        classifier.match(paths[0], text)


def test_no_more_than_200_characters_of_a_refused_text_are_shown(classifier):
    with pytest.raises(InvalidInput) as error:
        classifier.embed_text("\u72ac " * 500)
    assert str(error.value).count("\u72ac") == 100


def test_texts_of_which_most_words_are_unknown_are_counted_in_one_warning(classifier, paths):
    texts = ["a stem", "oval \u72ac \u72ac", "oval \u72ac", "stem \u72ac \u72ac \u72ac"] * 2
    message = (
        r"most words of 4 of 8 texts are unknown .*the first is text 1 \('oval \u72ac \u72ac'\)"
    )
    for call in (classifier.embed_text, lambda t, **how: classifier.match(paths[0], t, **how)):
        with pytest.warns(MarnetWarning, match=message) as caught:
            call(texts, batch_size=3)
        assert len(caught) == 1
        assert caught[0].filename == __file__  # where it is called, so that it can be found
    classifier.embed_text(["a stem", "oval \u72ac"])  # half is enough


# --- long texts ---------------------------------------------------------------------------------


def word_pieces() -> tokenizers.Tokenizer:
    words = ["a", "b", "ab", "abc", "##a", "##b", "##c", "##bc", ".", "!", "1", "2", "12"]
    marks = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*marks, *words])}
    made = tokenizers.Tokenizer(
        WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=9)
    )
    made.normalizer, made.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    made.post_processor = BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    made.add_special_tokens(marks)
    return made


def byte_pairs() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(BPE())
    made.normalizer, made.pre_tokenizer = NFC(), ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(initial_alphabet=ByteLevel.alphabet(), vocab_size=300, show_progress=False)
    made.train_from_iterator(["ab abc   a b 1212 e\u0301"] * 3, trainer)
    made.add_special_tokens(["<|end|>"])
    return made


def pieces() -> tokenizers.Tokenizer:
    alphabet = [("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0), ("b", -3.0), ("\u2581ab", -2.5)]
    made = tokenizers.Tokenizer(Unigram([*alphabet, ("abc", -4.0)], unk_id=0))
    made.normalizer, made.pre_tokenizer = NFKC(), Metaspace()
    return made


PARTS = st.sampled_from(
    [
        "ab",
        "abc",
        " ",
        "  ",
        "\n",
        "a" * 30,
        ".",
        "[MASK]",
        "<|end|>",
        "1",
        "12",
        "e\u0301",
        "\u0301",
    ]
)
LONG = st.lists(PARTS | st.text(max_size=5), min_size=1, max_size=40).map("".join)


@pytest.mark.parametrize("make", [word_pieces, byte_pairs, pieces])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_beginning_of_a_long_text_gives_the_tokens_of_the_whole(make, side, tmp_path):
    whole = make()
    whole.enable_truncation(5, direction=side)
    whole.enable_padding()
    whole.save(str(tmp_path / "tokenizer.json"))
    ours = open_tokenizer(tmp_path / "tokenizer.json")
    shorter = []

    @given(st.lists(st.tuples(LONG, st.integers(1, 40)), min_size=1, max_size=3))
    @settings(max_examples=60)
    def check(drawn):
        texts = [part * count for part, count in drawn]
        found = whole.encode_batch(texts)
        ids, mask = ours(texts)
        assert ids.tolist() == [e.ids for e in found]
        assert mask.tolist() == [e.attention_mask for e in found]
        shorter.extend(len(ours.beginning(text)) < len(text) for text in texts)

    check()
    assert any(shorter) or side == "left"  # so it did cut; from the left only very long texts are


@pytest.mark.parametrize("text", ["a closed oval, " * 10**6, " " * 10**7, "x" * 10**7])
def test_the_tokenizer_sees_a_bounded_part_of_a_huge_text(embedder, text):
    seen = embedder.tokenize.beginning(text)
    assert text.startswith(seen)
    assert len(seen) <= 1024 * 48
    assert ("oval" not in text) or len(seen) < 4000


def test_a_huge_text_is_answered_like_its_beginning(classifier):
    page = "a closed oval, " * 40
    np.testing.assert_array_equal(classifier.embed_text(page * 20_000), classifier.embed_text(page))


def test_features_of_an_image_that_are_no_numbers_are_an_error_that_names_it(
    classifier, paths, monkeypatch
):
    backend = classifier._guard.check()

    class Spoiling:
        def encode(self, pixels):
            x_v = backend.encode(pixels).copy()
            x_v[-1] = np.inf
            return x_v

    monkeypatch.setattr(classifier._guard, "_backend", Spoiling())
    names = re.escape(f"the features of image 1 ({paths[1]}) hold NaN or infinity, from the enc")
    with pytest.raises(InferenceError, match=names):
        classifier.match(paths[:2], TEXTS)
    with pytest.raises(InferenceError, match="the features of the image hold NaN or infinity"):
        classifier.match(paths[0], TEXTS)


# --- loading, at the first text -----------------------------------------------------------------


@pytest.fixture
def copy(bundle_of, tmp_path: Path) -> Path:
    return shutil.copytree(bundle_of("onnxruntime", "fp32"), tmp_path / "copy.marnet")


def damage(path: Path) -> None:
    """Change bits in the middle, not the size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def reseal(bundle: Path, change: Callable[[Path], object]) -> None:
    """Change its text/ and give it a manifest that is right about all its bytes."""
    manifest = read_bundle(bundle).manifest
    change(bundle / "text")
    kept = {f.name: getattr(manifest, f.name) for f in fields(Manifest) if f.name != "files"}
    seal_bundle(bundle, kept)


ALONE = """
import sys
for name in {absent}:
    sys.modules[name] = None  # importing it fails
from marnet_sdk import Classifier
clf = Classifier({bundle!r})
print(clf.predict({image!r}).label)
print([n for n in ("tokenizers", "torch", "transformers") if sys.modules.get(n)])
print(clf.match({image!r}, {texts!r}).tolist())
"""


def run_alone(
    bundle: Path, image: Path, absent: tuple[str, ...]
) -> subprocess.CompletedProcess[str]:
    """Predict, tell what was imported for it, then match."""
    code = ALONE.format(absent=absent, bundle=str(bundle), image=str(image), texts=TEXTS)
    command = [sys.executable, "-I", "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_matching_needs_neither_torch_nor_transformers(backend, bundle_of, paths):
    bundle = bundle_of(backend, "fp32")
    done = run_alone(bundle, paths[0], ("torch", "transformers", "huggingface_hub"))
    assert done.stderr == ""
    label, imported, scores = done.stdout.splitlines()
    clf = Classifier(bundle)
    assert (label, imported) == (clf.predict(paths[0]).label, "[]")
    expected = clf.match(paths[0], TEXTS)
    np.testing.assert_allclose(json.loads(scores), expected, atol=FLOAT32_TWICE)


def test_without_tokenizers_images_are_classified_and_a_text_names_what_to_install(copy, paths):
    done = run_alone(copy, paths[0], ("torch", "tokenizers"))
    assert done.stdout.splitlines() == [Classifier(copy).predict(paths[0]).label, "[]"]
    last = done.stderr.splitlines()[-1]
    assert MissingExtra.__name__ in last
    assert last.endswith('"tokenizers" is not installed; run: pip install "marnet[text]"')


def test_nothing_of_the_text_encoder_is_read_to_classify(copy, paths):
    label = Classifier(copy).predict(paths[0]).label
    files = sorted((copy / "text").iterdir())
    assert len(files) >= 5
    for file in files:
        damage(file)
    done = run_alone(copy, paths[0], ())
    assert done.stdout.splitlines() == [label, "[]"]
    assert BundleCorrupt.__name__ in done.stderr.splitlines()[-1]


def test_a_changed_byte_in_any_file_is_noticed_by_the_first_text_and_can_be_repaired(copy, paths):
    clf = Classifier(copy)
    for file in sorted((copy / "text").iterdir()):
        sound = file.read_bytes()
        damage(file)
        with pytest.raises(BundleCorrupt, match=rf"{file.name} does not have the SHA-256"):
            clf.match(paths, TEXTS)
        file.write_bytes(sound)
    assert clf.match(paths, TEXTS).shape == (5, 5)
    shutil.rmtree(copy / "text")
    assert clf.match(paths, TEXTS).shape == (5, 5)  # it is read once


def test_the_process_may_change_its_directory_before_the_first_text(copy, paths, monkeypatch):
    """As a daemon does after it has opened a bundle by a relative path."""
    expected = Classifier(copy).match(paths, TEXTS)
    monkeypatch.chdir(copy.parent)
    clf = Classifier(copy.name)
    monkeypatch.chdir("/")
    assert np.array_equal(clf.match(paths, TEXTS), expected)


def test_many_threads_that_meet_at_the_first_text_load_it_once(bundle_of, paths, monkeypatch):
    opened = []
    real = marnet_sdk.matching.open_text_part
    monkeypatch.setattr(
        marnet_sdk.matching, "open_text_part", lambda *a: opened.append(a) or real(*a)
    )
    for backend in BACKENDS:
        clf = Classifier(bundle_of(backend, "fp32"))
        barrier = Barrier(8)

        def match(i: int, clf: Classifier = clf, barrier: Barrier = barrier) -> np.ndarray:
            barrier.wait(60)
            return clf.match(paths[i % 5], TEXTS[: 1 + i % 5])

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(match, range(8)))
        table = clf.match(paths, TEXTS)
        for i, row in enumerate(answers):
            expected = table[i % 5, : 1 + i % 5]
            np.testing.assert_allclose(row, expected, atol=FLOAT32_TWICE)
    assert len(opened) == len(BACKENDS)


def test_a_bundle_without_a_text_encoder_names_the_command_that_makes_one(noisy_bundle, paths):
    clf = Classifier(noisy_bundle)
    message = (
        r"noisy.marnet has no text encoder: it was exported with --no-text, .* export it again "
        r"without --no-text: marnet-export --backend torchscript --precision fp32$"
    )
    with pytest.raises(BundleFormatError, match=message):
        clf.match(paths, TEXTS)
    with pytest.raises(BundleFormatError, match=message):
        clf.embed_text("a stem")
    with pytest.raises(InvalidInput, match="text 0: got int"):  # the caller's mistake comes first
        clf.match(paths, [1])


def change_golden(text: Path) -> None:
    kept = load_file(text / "golden.safetensors")["embeddings"]
    save_file({"embeddings": kept[::-1].copy()}, text / "golden.safetensors")


def drop_golden_rows(text: Path) -> None:
    kept = load_file(text / "golden.safetensors")["embeddings"]
    save_file({"embeddings": kept[1:].copy()}, text / "golden.safetensors")


def set_golden(**changes: Any) -> Callable[[Path], object]:
    def change(text: Path) -> None:
        content = json.loads((text / "golden.json").read_text())
        (text / "golden.json").write_text(json.dumps(content | changes))

    return change


def cut_projection(text: Path) -> None:
    kept = load_file(text / "alignment.safetensors")
    save_file(kept | {"text_weight": kept["text_weight"][1:]}, text / "alignment.safetensors")


def drop_projection(text: Path) -> None:
    kept = load_file(text / "alignment.safetensors")
    save_file({"text_bias": kept["text_bias"]}, text / "alignment.safetensors")


SEALED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "other golden embeddings": (
        change_golden,
        SelfTestFailed,
        r"does not reproduce its golden answers .*: embeddings of golden texts have a cosine "
        r"similarity of -?\d\.\d+ to those of the export",
    ),
    "fewer golden embeddings": (
        drop_golden_rows,
        SelfTestFailed,
        r"embeddings \(8, 64\), expected",
    ),
    "an impossible bound": (set_golden(min_cosine=float("nan")), SelfTestFailed, "at least nan"),
    "no golden texts": (set_golden(texts=[]), BundleFormatError, "golden.json lacks .*: no texts"),
    "a golden text that is none": (set_golden(texts=[1]), BundleFormatError, "text 0: got int"),
    "an unknown arithmetic": (set_golden(compute="int4"), BackendUnavailable, "int4"),
    "golden.json that is no JSON": (
        lambda text: (text / "golden.json").write_text("{"),
        BundleFormatError,
        "golden.json lacks what matching needs",
    ),
    "no tokenizer": (
        lambda text: (text / "tokenizer.json").unlink(),
        BundleFormatError,
        "the manifest lists no text/tokenizer.json; export it again",
    ),
    "a tokenizer of another version": (
        lambda text: (text / "tokenizer.json").write_text('{"version": "9.0"}'),
        BackendUnavailable,
        r"tokenizers \d.* cannot read .*tokenizer.json: .*pip install --upgrade tokenizers",
    ),
    "projections that do not fit": (
        cut_projection,
        BundleFormatError,
        r"alignment.safetensors lacks .*the shapes .* do not fit each other",
    ),
    "a projection too few": (drop_projection, BundleFormatError, "alignment.safetensors lacks"),
    "projections that are none": (
        lambda text: (text / "alignment.safetensors").write_bytes(b"none"),
        BundleFormatError,
        "alignment.safetensors lacks what matching needs",
    ),
}


@pytest.mark.parametrize("name", SEALED)
def test_a_sealed_text_part_that_cannot_be_used_is_a_typed_error(copy, paths, name):
    change, error, message = SEALED[name]
    reseal(copy, change)
    clf = Classifier(copy)
    with pytest.raises(error, match=f"(?s){message}"):
        clf.embed_text("a stem")
    assert clf.predict(paths[0]).label  # it still classifies


def test_a_file_in_its_folder_that_the_manifest_does_not_list_is_refused(copy):
    (copy / "text/extra.onnx").write_bytes(b"x")
    clf = Classifier(copy)
    with pytest.raises(BundleFormatError, match=r"the manifest lists no text/extra.onnx"):
        clf.embed_text("a stem")
