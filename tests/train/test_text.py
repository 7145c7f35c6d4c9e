"""The tokenizer that is trained on the texts at hand, and what encoding makes of texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from marnet_sdk.errors import RecipeError
from marnet_train.text import check_vocabulary, encode, load_tokenizer, train_tokenizer

TEXTS = [
    "pork, scallion, ginger, soy sauce",
    "Tofu and Chilli oil",
    "egg, tomato",
    "rice; egg; scallion",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS)


def test_training_texts_are_whole_words_between_cls_and_sep(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids, _ = encode(tokenizer, ["egg, tomato"], 16)
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist()) == [
        "[CLS]",
        "egg",
        ",",
        "tomato",
        "[SEP]",
    ]


def test_case_and_accents_do_not_matter(tokenizer: PreTrainedTokenizerFast) -> None:
    plain, dressed = (encode(tokenizer, [text], 16)[0] for text in ("chilli tofu", "CHÍLLI Tofu"))
    assert torch.equal(plain, dressed)


def test_unseen_words_fall_into_known_pieces_and_unseen_letters_are_unknown(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    pieces = tokenizer.tokenize("ginko")
    assert "".join(piece.removeprefix("##") for piece in pieces) == "ginko"
    assert tokenizer.tokenize("7") == ["[UNK]"]


def test_pieces_inside_a_word_are_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert sorted(tokenizer.all_special_tokens) == ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UNK]"]
    assert "##o" not in tokenizer.tokenize("##o")


def test_texts_are_padded_to_the_longest_and_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, mask = encode(tokenizer, ["egg", "egg, tomato"], 16)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert ids[0, 3:].tolist() == [tokenizer.pad_token_id] * 2


def test_texts_are_padded_on_the_right_whatever_side_the_tokenizer_prefers() -> None:
    tokenizer = train_tokenizer(TEXTS)
    expected = encode(tokenizer, ["egg", "egg, tomato"], 16)
    tokenizer.padding_side = "left"
    for found, usual in zip(encode(tokenizer, ["egg", "egg, tomato"], 16), expected, strict=True):
        assert torch.equal(found, usual)


def test_texts_are_cut_at_max_tokens_and_still_end_in_sep(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids, mask = encode(tokenizer, TEXTS, 4)
    assert ids.shape == (4, 4)
    assert mask.all()
    assert set(ids[:, -1].tolist()) == {tokenizer.sep_token_id}


def test_an_empty_text_is_cls_and_sep(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, _ = encode(tokenizer, [""], 16)
    assert ids.tolist() == [[tokenizer.cls_token_id, tokenizer.sep_token_id]]


def test_the_vocabulary_keeps_to_its_size() -> None:
    texts = [f"{a}{b}{c}" for a in "abcde" for b in "fghij" for c in "klmno"]
    assert len(train_tokenizer(texts, vocabulary=60)) == 60


def test_the_same_texts_give_the_same_tokenizer_in_any_order_and_process() -> None:
    """The trainer underneath seeds its hashes anew each time: fifty ties tempt it to differ."""
    texts = [f"{a}{b}{c}" for a in "abcde" for b in "fghij" for c in "klmno"]
    code = (
        "import sys, json; from marnet_train.text import train_tokenizer; "
        "print(json.dumps(train_tokenizer(json.loads(sys.argv[1]), 60).get_vocab()))"
    )
    first = train_tokenizer(texts, 60).get_vocab()
    assert train_tokenizer(reversed(texts), 60).get_vocab() == first
    other = subprocess.run(
        [sys.executable, "-c", code, json.dumps(texts)], capture_output=True, check=True, text=True
    )
    assert json.loads(other.stdout) == first


def test_a_saved_tokenizer_is_loaded_as_it_was(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for found, expected in zip(encode(again, TEXTS, 8), encode(tokenizer, TEXTS, 8), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("damage", ["{", None])
def test_a_tokenizer_that_cannot_be_loaded_is_refused_with_its_place(
    tokenizer: PreTrainedTokenizerFast, damage: str | None, tmp_path: Path
) -> None:
    if damage:
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(
        RecipeError, match=rf"(?s)no tokenizer could be loaded from '{tmp_path}.*tokenizer\.json"
    ):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_refused_when_it_knows_less_than_half_of_the_tokens() -> None:
    tokenizer = train_tokenizer(["abc abc"])
    check_vocabulary(tokenizer, ["abc x", "abc"], "here")
    check_vocabulary(tokenizer, ["abc x"], "here")  # exactly half
    with pytest.raises(
        RecipeError, match=r"'here' knows 1 of 3 tokens .* tokenizer\.json and tokenizer_config"
    ):
        check_vocabulary(tokenizer, ["abc x y"], "here")


def test_only_the_first_thousand_texts_are_checked() -> None:
    check_vocabulary(train_tokenizer(["abc"]), ["abc"] * 1000 + ["x"] * 5000, "here")
