"""Tables of whole trainings: every row, every control, and an interruption that costs nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import TINY, change, write_recipe, write_small
from torch import Tensor

from marnet_sdk.errors import DataError, OutputBusy, OutputExists, RecipeError
from marnet_train import phases, stages
from marnet_train.cli import main
from marnet_train.data.dataset import read_data_set
from marnet_train.data.pixels import PixelStore
from marnet_train.diffusion import ScheduleConfig
from marnet_train.measures import student_interval
from marnet_train.models.backbones import VisionEncoder
from marnet_train.progress import Progress, saved_progress
from marnet_train.tables import rows as rows_of_tables
from marnet_train.tables import subject
from marnet_train.tables.ablate import ablate, changed
from marnet_train.tables.answers import right_answers
from marnet_train.tables.figures import figures
from marnet_train.tables.spaces import SPACES
from marnet_train.tables.written import section_of

RECIPE = change(
    TINY,
    schedule=replace(TINY.schedule, steps=4),
    samples=2,
    alignment={"epochs": 1},
    refinement={"epochs": 1, "views": 1},
    fusion_phase={"epochs": 1, "draws": 1},
)
SEDA = change(replace(RECIPE, method="seda"), semantic={"epochs": 1})
FUSIONS = ("concat", "add", "mul", "sum", "hm")
BRANCHES = ("alignment", "+MLP", "refined", "MARNet")


@pytest.fixture(scope="module")
def data(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """49, 30 and 20 digits."""
    return write_small(digits, tmp_path_factory.mktemp("ablate") / "data")


class Watched:
    """What a call of `ablate` trained: the phases, and what played the text."""

    def __init__(self, patch: pytest.MonkeyPatch, stop_at: str = "") -> None:
        self.phases: list[str] = []
        self.semantics: list[tuple[str, Tensor, Tensor, Tensor]] = []
        self.chains = 0  # of test images, as they are trained
        self.encoded: Counter[tuple[VisionEncoder, int]] = Counter()  # by an encoder, images
        log, vectors = Progress.log, phases.semantic_vectors
        views = phases.compute_views
        refined = subject.refined_features

        def watched_log(run: Progress, **line: Any) -> None:
            log(run, **line)
            self.phases.append(line["phase"])
            if line["phase"] == stop_at:
                raise KeyboardInterrupt

        def watched_vectors(kind: str, texts: Tensor, labels: Tensor, *more: Any) -> Tensor:
            found = vectors(kind, texts, labels, *more)
            self.semantics.append((kind, texts, labels, found))
            return found

        def counted(*given: Any) -> Tensor:
            self.chains += 1
            return refined(*given)

        def watched_views(vision: VisionEncoder, store: PixelStore, *more: Any) -> Tensor:
            self.encoded[vision, len(store)] += 1
            return views(vision, store, *more)

        for module in (phases, stages):
            patch.setattr(module, "compute_views", watched_views)
        patch.setattr(subject, "refined_features", counted)
        patch.setattr(Progress, "log", watched_log)
        patch.setattr(phases, "semantic_vectors", watched_vectors)


Whole = tuple[Path, dict[str, Any], Watched]


@pytest.fixture(scope="module")
def whole(data: Path) -> Whole:
    """Two seeds with one control: the folder, what was joined, and what was trained."""
    out = data.parent / "whole"
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(patch)
        joined = ablate(data, RECIPE, out, name="tiny", seeds=(0, 1), controls=("shuffled",))
    return out, joined, watched


def test_every_row_of_two_seeds_comes_out(whole: Whole) -> None:
    _, joined, _ = whole
    found = joined["summary"]
    assert set(found) == {
        *("baseline", *BRANCHES, "fusion with +MLP"),
        *("CE alone", "CE alone, on the baseline", "CE alone, fused"),
        *("+MLP on the baseline", "+CDR on the baseline"),
        *("refined, gamma = 1", "refined, gamma = 1 / D"),
        *("refined, t uniform", "refined, half of the rows at t = T"),
        *(f"fusion: {f}, {level}" for level in ("feature", "logit") for f in FUSIONS
          if (f, level) != ("concat", "feature")),
        *(f"{n}, {s} steps, K = {k}" for n in ("refined", "MARNet") for s in (1, 2, 4)
          for k in (1, 8)),
        *(f"MARNet, {sampler} {s} steps, K = {k}" for sampler in ("ddim", "dpmpp")
          for s in (1, 2) for k in (1, 8)),
        *(f"shuffled: {name}" for name in BRANCHES),
    }  # fmt: skip
    assert {tuple(row["seeds"]) for row in found.values()} == {(0, 1)}
    assert joined["left_out"] == {}
    own = set(SPACES)
    controls = {f"shuffled: {space}" for space in SPACES if space != "x_v of the baseline"}
    assert set(joined["spaces"]) == own | controls
    assert {"cka", "mmd", "cosine", "cosine_others"} == set(joined["spaces"]["x_CDR"])
    assert set(joined["spaces"]["x_v"]) == {"cka"}  # 8 and 12 wide


def test_a_row_is_compared_with_the_baseline_of_its_own_seed(whole: Whole) -> None:
    """By hand from which images each has right: K = 2 of 8 noise samples make four answers."""
    _, joined, _ = whole
    runs = joined["runs"]
    assert len(runs[0]["rows"]["MARNet"]["right"]) == 4
    assert len(runs[0]["rows"]["MARNet, 2 steps, K = 1"]["right"]) == 8
    one, other = (right_answers(runs, name) for name in ("MARNet", "baseline"))
    assert one.shape == (2, 20)
    differences = (one - other).mean(axis=1)
    found = joined["summary"]["MARNet"]
    assert found["minus_baseline"] == pytest.approx(differences.mean())
    assert found["interval_over_seeds"] == pytest.approx(student_interval(differences.tolist()))
    assert found["top1_by_seed"] == pytest.approx(one.mean(axis=1).tolist())


def test_the_same_fusion_and_setting_give_the_row_of_the_training(whole: Whole) -> None:
    """gamma = 1 and uniform t are this recipe's own, so nothing differs."""
    rows = whole[1]["runs"][0]["rows"]
    for name in ("refined, gamma = 1", "refined, t uniform"):
        assert rows[name]["right"] == rows["refined"]["right"]


def test_all_fusions_share_the_chains_of_the_trained_model(whole: Whole) -> None:
    """Eight noise samples of the model, of four other refiners and the one on the baseline's
    encoder, and of the control; for two seeds."""
    assert whole[2].chains == 2 * 8 * (1 + 4 + 1 + 1)


def test_an_encoder_that_was_tuned_sees_training_and_test_images_once(whole: Whole) -> None:
    encoded = whole[2].encoded
    for images in (49, 20):
        times = [count for (_, seen), count in encoded.items() if seen == images]
        # Of each seed: the model, its baseline, and the model of the control.
        assert times == [1] * 6


def test_the_control_with_shuffled_texts_learns_the_texts_of_other_classes(whole: Whole) -> None:
    _, joined, watched = whole
    assert {kind for kind, *_ in watched.semantics} == {"text", "shuffled"}
    for kind, texts, labels, found in watched.semantics:
        if kind == "text":
            assert torch.equal(found, texts)
            continue
        rows = (found[:, None] == texts).all(dim=2)  # equal texts have equal vectors
        own = labels[:, None] == labels
        assert rows.any(dim=1).all()
        assert not (rows & own).all(dim=1).any()
        theirs = labels[(rows & ~own).int().argmax(dim=1)]
        assert (theirs != labels).all()
    assert joined["pairs"]["MARNet - shuffled: MARNet"]["seeds"] == [0, 1]


def test_tables_are_written_for_people_and_programs(whole: Whole) -> None:
    out, joined, _ = whole
    assert json.loads((out / "ablation.json").read_text())["test_images"] == 20
    text = (out / "ablation.md").read_text()
    for title in ("parts", "controls", "other fusions", "operating points", "alignment with"):
        assert f"\n## {title}" in text
    assert text.count("\n| fusion: ") == 9
    assert (out / "ablation.csv").read_text().count("\n") == len(joined["summary"]) + 1
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(whole: Whole, data: Path, monkeypatch) -> None:
    out, joined, _ = whole
    watched = Watched(monkeypatch)
    again = ablate(data, RECIPE, out, name="tiny", seeds=(0, 1), controls=("shuffled",))
    assert watched.phases == []
    assert again["summary"].keys() == joined["summary"].keys()
    assert again["runs"] == json.loads(json.dumps(joined["runs"]))


def test_an_interrupted_ablation_goes_on_and_trains_nothing_twice(
    whole: Whole, data: Path, tmp_path: Path
) -> None:
    """In one of the last rows: the rows before it are read, and all are as if undisturbed."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        first = Watched(patch, stop_at="fusion: sum, feature")
        with pytest.raises(KeyboardInterrupt):
            ablate(data, RECIPE, out, name="tiny", seeds=(0,), controls=())
    assert "baseline" in first.phases
    assert not list(out.glob("*/*.json"))
    with pytest.MonkeyPatch.context() as patch:
        second = Watched(patch)
        joined = ablate(data, RECIPE, out, name="tiny", seeds=(0,), controls=())
    assert not set(second.phases) & (set(first.phases) - {"fusion: sum, feature"})
    expected = {n: r for n, r in whole[1]["runs"][0]["rows"].items() if "shuffled" not in n}
    assert joined["runs"][0]["rows"] == expected
    assert sorted(p.name for p in (out / "seed-0").iterdir()) == ["text.json", "text.safetensors"]


def test_of_two_commands_on_one_folder_each_does_its_own_seed(whole: Whole, data: Path) -> None:
    """Another process is at work on a control of seed 1, so seed 0 is all that can be done."""
    out, joined, _ = whole
    with saved_progress(out / "seed-1/labels.json", {}, restart=False):
        with pytest.raises(OutputBusy, match=r"seed-1/labels\.json"):
            ablate(data, RECIPE, out, name="tiny", seeds=(1,), controls=("labels",))
        found = ablate(data, RECIPE, out, name="tiny", seeds=(0,), controls=("shuffled",))
    assert found["runs"] == json.loads(json.dumps(joined["runs"]))


def test_a_control_of_a_folder_that_is_there_is_added(whole: Whole) -> None:
    files = {path.name for path in (whole[0] / "seed-1").iterdir()}
    assert files == {"text.json", "text.safetensors", "shuffled.json"}
    of_text, shuffled = (
        json.loads((whole[0] / f"seed-1/{kind}.json").read_text()) for kind in ("text", "shuffled")
    )
    assert shuffled["resolved"] == {**of_text["resolved"], "semantics": "shuffled"}


def test_another_recipe_or_folder_is_refused_before_any_training(
    whole: Whole, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputExists, match="made with other settings; choose another --out"):
        ablate(data, replace(RECIPE, hidden=20), whole[0], seeds=(0,))
    with pytest.raises(OutputExists, match="made with other damaged; choose another --out"):
        ablate(data, RECIPE, whole[0], seeds=(0,), damaged=3)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputExists, match=r"holds something else \(thesis.tex\); choose a new"):
        ablate(data, RECIPE, tmp_path, seeds=(0,))


def test_what_cannot_be_trained_is_refused_before_any_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'shuffled'\\?"):
        ablate(data, RECIPE, tmp_path / "out", controls=("shufled",))
    with pytest.raises(RecipeError, match="joint training is MARNet's"):
        ablate(data, replace(RECIPE, method="seda"), tmp_path / "out", controls=("joint",))
    with pytest.raises(RecipeError, match="has it already; set progressive = false, and the"):
        ablate(data, replace(RECIPE, progressive=True), tmp_path / "out", controls=["progressive"])
    with pytest.raises(RecipeError, match="has method marnet and handover restart; add --method"):
        ablate(data, RECIPE, tmp_path / "out", controls=["carry"])
    for split in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(data / split)
    with pytest.raises(DataError, match="has no test/ split"):
        ablate(tmp_path / "data", RECIPE, tmp_path / "out")
    assert not list((tmp_path / "out").glob("seed-*"))


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("random", {"semantics": "random"}),
        ("marnet", {"method": "marnet"}),
        ("progressive", {"progressive": True}),
        ("joint", {"alignment": replace(RECIPE.alignment, joint=True)}),
        (
            "moving",
            {"text_phase": None, "alignment": replace(RECIPE.alignment, lr_text=1e-3)},
        ),
    ],
)
def test_a_control_changes_one_thing_of_the_recipe(kind: str, seen: dict[str, Any]) -> None:
    assert changed(RECIPE, kind) == replace(RECIPE, **seen)


def test_the_control_carry_gives_both_stages_one_schedule() -> None:
    linear = ScheduleConfig("linear", steps=20)
    one = replace(linear, steps=SEDA.semantic_schedule.steps)
    found = changed(replace(SEDA, schedule=linear), "carry")
    assert found == replace(SEDA, schedule=linear, handover="carry", semantic_schedule=one)
    assert changed(found, "marnet").handover == "restart"


def test_another_loss_has_its_papers_weight_or_as_many_tries_as_ita() -> None:
    own = changed(RECIPE, "cdd").alignment
    assert (own.loss, own.ita_weight, own.per_class) == ("cdd", 0.3, 6)
    searched = changed(RECIPE, "sdm", search=True).alignment
    assert (searched.loss, searched.ita_weight, searched.per_class) == ("sdm", "auto", 1)
    frozen = change(RECIPE, alignment={"lr_backbone": 0.0})
    assert changed(RECIPE, "team").alignment.ita_weight == 1.0
    assert changed(frozen, "team") == frozen  # it is left out


@pytest.mark.slow
def test_a_fusion_that_does_not_fit_the_widths_is_left_out_with_its_reason(
    data: Path, tmp_path: Path
) -> None:
    joined = ablate(data, replace(RECIPE, dim=10), tmp_path / "out", seeds=(4,), controls=())
    assert set(joined["left_out"]) == {f"fusion: {f}, feature" for f in FUSIONS if f != "concat"}
    assert "dim (10) must equal the width of the text features (12)" in str(joined["left_out"])
    assert "fusion: hm, logit" in joined["summary"]
    assert "## left out, and why" in (tmp_path / "out/ablation.md").read_text()


@pytest.mark.slow
def test_team_is_left_out_with_its_reason_where_the_image_encoder_is_frozen(
    data: Path, tmp_path: Path
) -> None:
    frozen = change(RECIPE, alignment={"lr_backbone": 0.0})
    joined = ablate(data, frozen, tmp_path / "out", seeds=(0,), controls=("team",))
    assert joined["left_out"]["team"] == "of a frozen image encoder only x_v is kept, no tokens"
    assert not any(name.startswith("team") for name in joined["summary"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["random", "labels", "moving", "joint", "swd", "ssan", "cdd", "sdm", "team"]
)
def test_every_control_is_trained_and_compared(kind: str, data: Path, tmp_path: Path) -> None:
    joined = ablate(data, RECIPE, tmp_path / "out", seeds=(0,), controls=(kind,))
    assert {f"{kind}: {name}" for name in BRANCHES} <= set(joined["summary"])
    of_control = json.loads((tmp_path / f"out/seed-0/{kind}.json").read_text())
    assert of_control["chosen"] == {}


@pytest.mark.slow
def test_seda_is_compared_with_its_peer_without_the_semantic_learner(
    data: Path, tmp_path: Path
) -> None:
    recipe = change(SEDA, vision={**SEDA.vision, "hidden_sizes": [4, 12]})
    joined = ablate(data, recipe, tmp_path / "out", seeds=(0,), controls=("labels",))
    found = set(joined["summary"])
    assert {"semantic learner", "labels: semantic learner", "marnet: refined"} <= found
    assert {"marnet: +CDR on the baseline", "marnet: CE alone, fused"} <= found
    assert not {"marnet: semantic learner", "+CDR on the baseline"} & found
    of_peers = {"semantic learner", "refined", "MARNet"}
    for peer in ("progressive", "carry"):
        assert {f"{peer}: {name}" for name in of_peers} <= found
        assert {f"{name} - {peer}: {name}" for name in of_peers} <= set(joined["pairs"])
    assert joined["settings"]["method"] == "seda"
    text = (tmp_path / "out/ablation.md").read_text()
    assert "SeDA, recipe custom" in text
    assert "| SeDA - marnet: MARNet |" in text
    assert list(figures(tmp_path / "out")["confidence"])[-1] == "SeDA"


@pytest.mark.slow
def test_carry_is_left_out_with_its_reason_where_the_widths_differ(
    data: Path, tmp_path: Path
) -> None:
    joined = ablate(data, SEDA, tmp_path / "out", seeds=(0,), controls=())
    assert "their widths must be equal, got 8 and 12" in joined["left_out"]["carry"]
    assert "progressive: refined" in joined["summary"]
    assert not any(name.startswith("carry") for name in joined["summary"])


@pytest.mark.slow
def test_damaged_images_have_rows_of_their_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are spread over the whole split: in one that is sorted the first are of one class."""
    seen: list[Path | Any] = []
    decode = rows_of_tables.decode_example
    monkeypatch.setattr(
        rows_of_tables, "decode_example", lambda e: seen.append(e.image) or decode(e)
    )
    joined = ablate(data, RECIPE, tmp_path / "out", seeds=(0,), controls=(), damaged=10)
    test = [example.image for example in read_data_set(data).splits["test"]]
    assert seen[:10] == [test[i] for i in (0, 2, 4, 6, 8, 11, 13, 15, 17, 19)]
    rows = joined["runs"][0]["rows"]
    damaged = [name for name in rows if section_of(name) == "damaged images"]
    assert len(damaged) == 5 * 3 * 5
    assert {rows[name]["images"] for name in damaged} == {10}


@given(total=st.integers(1, 5_000), count=st.integers(1, 5_000))
def test_chosen_images_are_spread_evenly(total: int, count: int) -> None:
    chosen = subject.spread(total, count).tolist()
    assert len(chosen) == min(total, count)
    assert chosen[0] == 0
    gaps = {b - a for a, b in pairwise(chosen)}
    assert len(gaps) <= 2
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1 and chosen[-1] == total - 1)


# --- figures


def test_figures_are_drawn_from_what_was_kept(whole: Whole, data: Path, tmp_path: Path) -> None:
    for path in whole[0].glob("seed-*/text.*"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    found = figures(tmp_path)
    for name in ("figure-3.png", "figure-4.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert found["seeds"] == 2
    assert list(found["silhouette"]) == list(SPACES)
    first = found["confidence"]["baseline"]
    assert (first["minus_first"], first["p"]) == (0, 1)
    losses = [r["rows"]["alignment"]["log_loss"] for r in whole[1]["runs"]]
    assert found["confidence"]["alignment"]["mean"] >= np.exp(-np.mean(losses)) - 1e-6  # Jensen
    assert -1 <= found["silhouette"]["x_CDR"]["mean"] <= 1
    text = (tmp_path / "figures.md").read_text()
    assert "| x_CDR | " in text
    assert (tmp_path / "figures.csv").read_text().count("\n") == 11
    assert json.loads((tmp_path / "figures.json").read_text()).keys() == found.keys()


# --- as a user types it


def marnet_train(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_prints_the_tables_and_names_the_next_one(
    whole: Whole, data: Path, tmp_path: Path
) -> None:
    """On a folder that is finished, with the recipe it was made with."""
    recipe = write_recipe(RECIPE, tmp_path / "tiny.toml")
    words = ("--data", data, "--recipe", recipe, "--out", whole[0])
    result = marnet_train("ablate", *words, "--seeds", "0,1", "--controls", "shuffled")
    assert result.exit_code == 0, result.output
    assert "+CDR(MLP): the loop, on the baseline's encoder" in result.stdout
    assert f"marnet-train figures {whole[0]}" in result.stderr
    drawn = marnet_train("figures", whole[0])
    assert drawn.exit_code == 0, drawn.output
    assert "Figure 3 as numbers: the mean silhouette of the classes" in drawn.stdout


def test_compare_trains_with_every_alignment_loss(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marnet_train.tables import ablate as module

    asked: list[Any] = []

    def note(*_: Any, **settings: Any) -> dict[str, Any]:
        asked.append(settings)
        return {"summary": {}}

    monkeypatch.setattr(module, "ablate", note)
    recipe = write_recipe(RECIPE, tmp_path / "tiny.toml")
    where = ("--data", data, "--recipe", recipe, "--out", tmp_path / "out")
    result = marnet_train("compare", *where, "--seeds", "3")
    assert result.exit_code == 0, result.output
    losses = ["swd", "ssan", "cdd", "sdm", "team"]
    assert (asked[0]["controls"], asked[0]["seeds"]) == (losses, (3,))
    assert asked[0]["name"] == "tiny.toml"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seeds", "0,0"), "has a number twice"),
        (("--seeds", "0;1"), "is not a valid integer"),
        (("--controls", "rnadom"), "Did you mean 'random'?"),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    words: tuple[str, str], said: str, data: Path, tmp_path: Path
) -> None:
    where = ("--data", data, "--recipe", "digits", "--out", tmp_path / "out")
    result = marnet_train("ablate", *where, *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_figures_of_an_empty_folder_name_the_command_that_fills_it(tmp_path: Path) -> None:
    result = marnet_train("figures", tmp_path)
    assert result.exit_code == 2
    assert "which marnet-train ablate writes; run it first" in result.stderr
