"""Tokenizers: trained on the texts at hand for a text encoder from scratch, or loaded with one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from marnet_sdk.errors import RecipeError

_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CHECKED_TEXTS = 1000  # of the training texts, to see whether a loaded tokenizer knows them
_TOKENIZER_FILES = (
    "put the encoder's tokenizer.json and tokenizer_config.json (or vocab.txt) there, or name a "
    "checkpoint that has them in [text] of the recipe"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = 8192) -> PreTrainedTokenizerFast:
    """Train a lower-casing WordPiece tokenizer, as BERT's, on `texts`.

    The same texts give the same tokenizer.
    """
    lower, split = BertNormalizer(lowercase=True), BertPreTokenizer()
    texts = sorted(texts)
    words = {w for t in texts for w, _ in split.pre_tokenize_str(lower.normalize_str(t))}
    # Left alone, the trainer numbers the "##x" pieces in the order of a randomly seeded hash, and
    # breaks ties between merges by number. Given as special tokens they are numbered first.
    inner = [f"##{letter}" for letter in sorted({letter for w in words for letter in w[1:]})]
    trainer = WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=[*_SPECIAL.values(), *inner], show_progress=False
    )
    trained = Tokenizer(WordPiece(unk_token=_SPECIAL["unk"]))
    trained.normalizer, trained.pre_tokenizer = lower, split
    trained.train_from_iterator(texts, trainer)
    # A new one, in which "##x" is no special token.
    tokenizer = Tokenizer(WordPiece(vocab=trained.get_vocab(), unk_token=_SPECIAL["unk"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, split
    first, last = ((_SPECIAL[n], tokenizer.token_to_id(_SPECIAL[n])) for n in ("cls", "sep"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first[0]} $A {last[0]}", special_tokens=[first, last]
    )
    names: dict[str, Any] = {f"{name}_token": token for name, token in _SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def load_tokenizer(source: str | Path, **settings: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder or of a hub checkpoint.

    Raises:
        RecipeError: there is none, or its files are damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(source, **settings)
    except Exception as error:  # tokenizers has no narrower type for a file that it cannot parse
        raise RecipeError(
            f"no tokenizer could be loaded from {str(source)!r} ({' '.join(str(error).split())}); "
            f"{_TOKENIZER_FILES}"
        ) from error


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], source: str | Path
) -> None:
    """Refuse a tokenizer that does not know the texts: without files, transformers makes one.

    Raises:
        RecipeError: more than half of the tokens of the first `CHECKED_TEXTS` are unknown.
    """
    found = tokenizer(list(texts[:CHECKED_TEXTS]), add_special_tokens=False)["input_ids"]
    tokens = [token for ids in cast("list[list[int]]", found) for token in ids]
    unknown = sum(token == tokenizer.unk_token_id for token in tokens)
    if 2 * unknown > len(tokens) or not tokens:
        raise RecipeError(
            f"the tokenizer of {str(source)!r} knows {len(tokens) - unknown} of {len(tokens)} "
            f"tokens of the training texts, expected at least half; {_TOKENIZER_FILES}"
        )


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both int64 [N, L].

    They are cut at `max_tokens` and padded right to the longest.
    """
    out = tokenizer(
        list(texts),
        padding=True,
        padding_side="right",  # whatever the tokenizer's own: rows are later cut at their longest
        truncation=True,
        max_length=max_tokens,
        return_tensors="pt",
    )
    return torch.as_tensor(out["input_ids"]), torch.as_tensor(out["attention_mask"])
