"""An editor shows a docstring alone, so none begins in the middle of a sentence."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sdk", "kernels", "train", "export", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MIDDLES = {
    "After", "Args", "As", "Before", "By", "For", "From", "How", "Of", "Raises", "Returns", "Those",
    "To", "Until", "What", "When", "Where", "Whether", "Which", "Why", "With", "Within",
}  # fmt: skip
HELP_TEXTS = ("scikit-learn's 1,797 ", "5,421 ")  # of commands: they begin with a name, a number


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_begin_where_a_sentence_begins(path):
    tree = ast.parse(path.read_text("utf-8"))
    lone = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    strings = [n.value for n in lone if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    texts = [inspect.cleandoc(text) for text in strings]  # those below variables, too
    assert [text for text in texts if text.split()[0].strip(":,") in MIDDLES] == []
    others = [text for text in texts if not text.startswith(HELP_TEXTS)]
    assert [text for text in others if not text[0].isupper()] == []
    assert [text for text in texts if text.split("\n\n")[0][-1] not in ".:"] == []
