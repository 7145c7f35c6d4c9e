"""Recipes: those of the package, files, and everything that is refused with a useful sentence."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from marnet_sdk.errors import RecipeError
from marnet_train.diffusion import ScheduleConfig
from marnet_train.recipe import (
    SEMANTICS,
    Augment,
    Recipe,
    TextPhase,
    chosen,
    load_recipe,
    recipe_names,
)

ENCODERS = '[vision]\nmodel_type = "vit"\n[text]\nmodel_type = "bert"\n'


def read(folder: Path, text: str | bytes) -> Recipe:
    path = folder / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return load_recipe(str(path))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_read(name: str) -> None:
    recipe = load_recipe(name)
    assert json.loads(json.dumps(recipe.to_dict()))["schedule"]["steps"] in (20, 100)
    assert set(recipe.vision) & {"model_type", "pretrained"}
    assert set(recipe.text) & {"model_type", "pretrained"}


def test_the_package_has_small_recipes_and_the_papers() -> None:
    assert recipe_names() == [
        "digits",
        "grocery",
        "grocery_finetune",
        "ingredients101",
        "plates",
        "vireofood172",
        "vit_b16_bert",
    ]
    paper = load_recipe("vit_b16_bert")
    assert paper.vision == {"pretrained": "google/vit-base-patch16-224-in21k"}
    assert (paper.dim, paper.hidden, paper.time_dim) == (768, 1024, 64)
    assert (paper.alignment.temperature, paper.alignment.ita_weight) == (0.07, 0.5)


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    recipe = read(tmp_path, f"dim = 32\n{ENCODERS}[schedule]\nsteps = 7\n[augment]\nflip = true\n")
    assert recipe.dim == 32
    assert recipe.vision == {"model_type": "vit"}
    assert recipe.schedule.steps == 7
    assert recipe.schedule.max_beta == 0.999
    assert recipe.augment == Augment(flip=True)
    assert recipe.alignment.epochs == 10


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("cosine100", ScheduleConfig()), ("group_linear20", ScheduleConfig("linear", steps=20))],
)
def test_a_schedule_may_be_named(name: str, schedule: ScheduleConfig, tmp_path: Path) -> None:
    recipe = read(tmp_path, f'schedule = "{name}"\n{ENCODERS}')
    assert recipe.schedule == schedule
    assert recipe == read(tmp_path, f"{ENCODERS}[schedule]\n{as_table(recipe.to_dict())}")


def as_table(recipe: dict[str, Any]) -> str:
    return "".join(f"{key} = {toml(value)}\n" for key, value in recipe["schedule"].items())


def test_a_linear_schedule_may_be_described(tmp_path: Path) -> None:
    text = f'{ENCODERS}[schedule]\nkind = "linear"\nsteps = 7\nlast_beta = 0.5\n'
    assert read(tmp_path, text).schedule == ScheduleConfig("linear", 7, last_beta=0.5)


def test_what_validation_chooses_is_auto(tmp_path: Path) -> None:
    text = f'samples = "auto"\n{ENCODERS}[alignment]\nita_weight = "auto"\n'
    recipe = read(tmp_path, f'{text}[refinement]\nnorm_weight = "auto"\n')
    assert recipe.samples == recipe.alignment.ita_weight == recipe.refinement.norm_weight == "auto"
    decided = replace(
        recipe,
        samples=4,
        alignment=replace(recipe.alignment, ita_weight=0.1),
        refinement=replace(recipe.refinement, norm_weight=0.04),
    )
    assert chosen(recipe, decided) == {
        "samples": 4,
        "alignment.ita_weight": 0.1,
        "refinement.norm_weight": 0.04,
    }
    assert chosen(decided, decided) == {}


def test_numbers_may_stand_where_auto_may(tmp_path: Path) -> None:
    text = f"samples = 8\n{ENCODERS}[alignment]\nita_weight = 1\n[refinement]\nnorm_weight = 0.5\n"
    recipe = read(tmp_path, text)
    found = (recipe.samples, recipe.alignment.ita_weight, recipe.refinement.norm_weight)
    assert found == (8, 1.0, 0.5)
    assert type(recipe.alignment.ita_weight) is float


def test_a_text_phase_is_there_only_if_the_recipe_has_the_table(tmp_path: Path) -> None:
    assert read(tmp_path, ENCODERS).text_phase is None
    recipe = read(tmp_path, f"{ENCODERS}[text_phase]\nepochs = 3\n")
    assert recipe.text_phase == TextPhase(epochs=3)
    assert json.loads(json.dumps(recipe.to_dict()))["text_phase"]["epochs"] == 3


@pytest.mark.parametrize("kind", SEMANTICS)
def test_every_kind_of_semantics_may_be_asked_for(kind: str, tmp_path: Path) -> None:
    assert read(tmp_path, f'semantics = "{kind}"\n{ENCODERS}').semantics == kind


def test_joint_training_takes_a_text_encoder_that_stands_still(tmp_path: Path) -> None:
    assert read(tmp_path, f"{ENCODERS}[alignment]\njoint = true\n").alignment.joint


def test_a_whole_number_may_stand_for_a_fraction(tmp_path: Path) -> None:
    lr = read(tmp_path, f"{ENCODERS}[refinement]\nlr = 1\n").refinement.lr
    assert (lr, type(lr)) == (1.0, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"hiden = 3\n{ENCODERS}",
            r"mine\.toml: unknown setting 'hiden'\. Did you mean 'hidden'\?",
        ),
        (
            f"{ENCODERS}[alignment]\nepoch = 3\n",
            r"mine\.toml: alignment: unknown setting 'epoch'\. Did you mean 'epochs'\?",
        ),
        (f"qqqq = 3\n{ENCODERS}", r"unknown setting 'qqqq'\.$"),
        ('[vision]\nmodel_type = "vit"\n', "mine.toml: the setting 'text' is missing"),
        ("", "the setting 'vision' is missing"),
        (f'dim = "64"\n{ENCODERS}', "dim must be int, got '64'"),
        (f"dim = 64.0\n{ENCODERS}", "dim must be int, got 64.0"),
        (f"dim = true\n{ENCODERS}", "dim must be int, got True"),
        (f"{ENCODERS}[refinement]\nlr = true\n", "lr must be float, got True"),
        (f"fusion = 3\n{ENCODERS}", "fusion must be str, got 3"),
        (f"progressive = 1\n{ENCODERS}", "progressive must be bool, got 1"),
        (f'handover = "cary"\n{ENCODERS}', "handover 'cary' is unknown. Did you mean 'carry'"),
        (f"{ENCODERS}[augment]\nflip = 1\n", "augment: flip must be bool, got 1"),
        (f"schedule = 100\n{ENCODERS}", "schedule must be a table, got 100"),
        (
            f'schedule = "group_linear2"\n{ENCODERS}',
            r"mine\.toml: schedule: no schedule 'group_linear2'\. Did you mean 'group_linear20'\? "
            r"Choose from cosine100, group_linear20, or describe one in a \[schedule\] table",
        ),
        (f'schedule = "qqqq"\n{ENCODERS}', r"schedule: no schedule 'qqqq'\. Choose from cosine100"),
        (f'augment = "cosine100"\n{ENCODERS}', "augment must be a table, got 'cosine100'"),
        (f"{ENCODERS}[[alignment]]\nepochs = 1\n", "alignment must be a table, got "),
        ('vision = "vit"\ntext = "bert"\n', "vision must be a table, got 'vit'"),
        (f"image = 224\n{ENCODERS}", "image must be a table, got 224"),
        (f"dim = 0\n{ENCODERS}", "dim must be finite and at least 1, got 0"),
        (f"{ENCODERS}[refinement]\nviews = 0\n", "views must be finite and at least 1, got 0"),
        (f"{ENCODERS}[refinement]\nlr = nan\n", "lr must be finite and at least 0, got nan"),
        (f"{ENCODERS}[augment]\nrotate = inf\n", "rotate must be finite and at least 0, got inf"),
        (f"{ENCODERS}[alignment]\nlr_heads = -1e-3\n", "lr_heads must be finite and at least 0"),
        (f'{ENCODERS}[schedule]\nkind = "line"\n', "mine.toml: schedule: schedule kind 'line' is"),
        (f"{ENCODERS}[schedule]\nmax_beta = 1\n", "0 < max_beta < 1, got .* max_beta 1.0"),
        (
            f"{ENCODERS}[schedule]\nfirst_beta = 0.5\n",
            "schedule: .* 0 < first_beta <= last_beta < 1, got first_beta 0.5 and last_beta 0.02",
        ),
        (f'dim = "auto"\n{ENCODERS}', "dim must be int, got 'auto'"),
        (f'samples = "Auto"\n{ENCODERS}', """samples must be int or "auto", got 'Auto'"""),
        (f"samples = 0\n{ENCODERS}", "samples must be finite and at least 1, got 0"),
        (f"samples = 1.5\n{ENCODERS}", 'samples must be int or "auto", got 1.5'),
        (f"samples = true\n{ENCODERS}", 'samples must be int or "auto", got True'),
        (
            f'{ENCODERS}[alignment]\nita_weight = "best"\n',
            """alignment: ita_weight must be float or "auto", got 'best'""",
        ),
        (f'{ENCODERS}[alignment]\ntemperature = "auto"\n', "must be float, got 'auto'"),
        (f'{ENCODERS}[refinement]\nlr = "auto"\n', "lr must be float, got 'auto'"),
        (f"{ENCODERS}[refinement]\nnorm_weight = -1\n", "norm_weight must be finite and at least"),
        (
            f'semantics = "shufled"\n{ENCODERS}',
            r"mine\.toml: semantics 'shufled' is unknown\. Did you mean 'shuffled'\? Choose from "
            "text, labels, random, shuffled",
        ),
        (f"{ENCODERS}[alignment]\ndropout = 1.0\n", "dropout must be below 1, got 1.0"),
        (f"{ENCODERS}[refinement]\ndropout = 1.5\n", "dropout must be below 1, got 1.5"),
        (f"{ENCODERS}[refinement]\npure_noise = 1.1\n", "pure_noise must be at most 1, got 1.1"),
        (f"{ENCODERS}[alignment]\nwarmup = 2\n", "warmup must be at most 1, got 2.0"),
        (f"{ENCODERS}[alignment]\ntemperature = 0\n", "temperature must be above 0, got 0.0"),
        (
            f"{ENCODERS}[alignment]\njoint = true\nlr_text = 1e-5\n",
            "joint training needs a text encoder that stands still: set lr_text = 0",
        ),
        (
            f"{ENCODERS}[text_phase]\nepoch = 3\n",
            r"text_phase: unknown setting 'epoch'\. Did you mean 'epochs'\?",
        ),
        (f"text_phase = 3\n{ENCODERS}", "text_phase must be a table, got 3"),
        ("dim = \n", r"mine\.toml: not valid TOML: .*line 1"),
        (b"\xff\xfe\x00d", "not valid TOML: .*utf-8"),
        ("dim = " + "9" * 5000, "not valid TOML: .*4300 digits"),
        ("x = " + "[" * 5000, "not valid TOML: .*recursion"),
    ],
)
def test_a_faulty_recipe_is_refused_with_the_place_and_the_fault(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, text)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"'digts'\. Did you mean 'digits'\? The package has"):
        load_recipe("digts")


def test_a_file_that_is_not_there_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe .*nowhere\.toml.* path of a \.toml file"):
        load_recipe(str(tmp_path / "nowhere.toml"))


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    assert read(tmp_path, f"\ufeffdim = 32\n{ENCODERS}").dim == 32


def test_only_files_that_end_in_toml_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(ENCODERS)
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(str(path))


KEYS = st.sampled_from(["steps", "kind", "offset", "epochs", "lr_text", "flip"]) | st.text()
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.text(max_size=5) | st.just({}),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)
NAMES = st.sampled_from(
    ["vision", "text", "dim", "image", "schedule", "alignment", "augment", "samples", "text_phase"]
)


@given(st.text(max_size=60) | st.text("[]=.\"'{}\n# dimvsoext0123", max_size=60))
@example("[vision]\n[text]\n")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_recipe_or_a_recipe_error(tmp_path: Path, text: str) -> None:
    with suppress(RecipeError):
        assert isinstance(read(tmp_path, text), Recipe)


@given(st.dictionaries(NAMES, VALUES, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_are_a_recipe_or_a_recipe_error(tmp_path: Path, content: dict[str, Any]) -> None:
    """Well-formed TOML, so that the checks behind the parser are reached."""
    lines = [f"{key} = {toml(value)}" for key, value in content.items()]
    try:
        recipe = read(tmp_path, "\n".join(lines))
    except RecipeError:
        return
    assert isinstance(recipe.vision, dict)
    assert isinstance(recipe.text, dict)
    assert isinstance(recipe.dim, int)


def toml(value: Any) -> str:
    """JSON spells most values as TOML does."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("clip_norm = 0.0\n", "clip_norm must be above 0, got 0.0; leave it out not to clip"),
        ("[alignment]\npatience = 2\n", r"patience of \[alignment\] needs keep_best = true there"),
        ("[alignment]\nkeep_best = true\npatience = 0\n", "patience must be finite and at least 1"),
        ("[refinement]\npatience = 1.5\n", "patience must be int, got 1.5"),
    ],
)
def test_settings_of_best_weights_and_gradients_are_checked(
    text: str, told: str, tmp_path: Path
) -> None:
    head, table = (text, "") if text.startswith("clip") else ("", text)
    with pytest.raises(RecipeError, match=told):
        read(tmp_path, f"{head}{ENCODERS}{table}")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_read_back_from_what_it_writes(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
