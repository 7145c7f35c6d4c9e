"""Names that a reader takes for each other have the same look."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marnet_train.data.looks import Looks, look

words = st.text(st.characters(codec="utf-8"), max_size=12)
invisible = st.sampled_from(["\u200b", "\u200d", "\ufeff", "\u00ad", "\u2060", "\ufe0f"])
blanks = st.sampled_from([" ", "\u00a0", "\t", "\u3000", "\u2009"])


@given(words, st.integers(0, 12), invisible, blanks)
def test_what_cannot_be_seen_does_not_change_a_look(
    word: str, at: int, hidden: str, blank: str
) -> None:
    seen = look(word)
    assert look(word[:at] + hidden + word[at:]) == seen
    assert look(f"{blank}{word}{blank}") == seen
    assert look(word.replace(" ", blank)) == seen


@given(words)
def test_case_and_composition_do_not_change_a_look(word: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert look(unicodedata.normalize(form, word)) == look(word)
    assert look(word.casefold()) == look(word)
    assert look(look(word)) == look(word)


@pytest.mark.parametrize(("one", "other"), [("cat", "cut"), ("1", "2"), ("a b", "ab"), ("é", "e")])
def test_different_names_look_different(one: str, other: str) -> None:
    assert look(one) != look(other)
    assert Looks([one]).hint(other) == ""


def test_a_hint_shows_what_cannot_be_seen() -> None:
    assert "there is 'caf\\xe9'" in Looks(["caf\u00e9", "tea"]).hint("CAFE\u0301")
