"""All published data sets have a command, a notice, a recipe, and counts that are compared.

How one is written, replaced and refused is in `test_data_grocery`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from marnet_sdk.errors import InvalidInput
from marnet_train.cli import main
from marnet_train.data.dataset import DataSet
from marnet_train.data.examples import Example
from marnet_train.data.published import DATA_SETS, unofficial_counts, write_published
from marnet_train.data_cli import data
from marnet_train.recipe import recipe_names


@pytest.mark.parametrize(
    ("name", "pictures"),
    [("grocery", 5_421), ("vireofood172", 110_241), ("ingredients101", 101_000)],
)
def test_a_published_data_set_has_a_command_a_recipe_and_its_official_number_of_pictures(
    name: str, pictures: int
) -> None:
    assert sum(DATA_SETS[name].OFFICIAL.values()) == pictures
    assert name in recipe_names()
    described = " ".join(CliRunner().invoke(main, ["data", name, "--help"]).stdout.split())
    assert f"{pictures:,}" in described
    assert "downloads nothing" in described


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_kinds_that_a_command_offers_are_those_that_the_reader_knows(name: str) -> None:
    offered = [tuple(p.type.choices) for p in data.commands[name].params if p.name == "kind"]
    assert offered == ([DATA_SETS[name].KINDS] if len(DATA_SETS[name].KINDS) > 1 else [])


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInput, match=r"kind: got 'corse' for grocery; expected one of \('fine'"
    ):
        write_published("grocery", tmp_path, tmp_path / "out", kind="corse")


def test_each_split_that_is_not_the_official_one_is_named(tmp_path: Path) -> None:
    row = Example(tmp_path / "a.png", "cat", None)
    found = DataSet(tmp_path, ("cat",), {"train": (row,) * 3, "val": (row,), "test": (row,)})
    told = unofficial_counts(found, {"train": 3, "val": 1_200, "test": 1})
    assert told == [
        "val has 1 images, the official split has 1,200; results cannot be compared with published "
        "ones"
    ]
