"""The command `ablate`: every row of a method's table over training seeds, with its controls.

    DIR/seed-0/text.json          rows of the training with the text, and what is trained on from it
    DIR/seed-0/random.json        rows of a control: a whole training with something else as text
    DIR/seed-0/text.safetensors   vectors of test images, for the figures
    DIR/ablation.md .csv .json .png

A training that was interrupted goes on where it was, row by row; what has its file is not done
again. Validation chooses everything that is chosen, and controls take the settings that it chose
for the text of the same seed. Test images only report.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from marnet_sdk.console import say
from marnet_sdk.errors import DataError, OutputExists, RecipeError
from marnet_sdk.outputs import atomic_file, writable
from marnet_train.assemble import prepare
from marnet_train.data.dataset import DataSet, data_hash, read_data_set
from marnet_train.evaluate import pick_device
from marnet_train.phases import Training
from marnet_train.progress import Progress, saved_progress, threads_of
from marnet_train.recipe import METHODS, Recipe, check_choice, chosen
from marnet_train.refinement import Refiner
from marnet_train.stages import train_all
from marnet_train.tables.charts import draw_rows
from marnet_train.tables.joined import average, compare, summarise
from marnet_train.tables.rows import (
    Rows,
    baseline_groups,
    branch_rows,
    groups,
    other_fusions,
)
from marnet_train.tables.spaces import similarities, vectors
from marnet_train.tables.subject import Subject
from marnet_train.tables.written import ALIGNED, INSTEAD, write_tables
from marnet_train.threads import training_threads
from marnet_train.trainer import check_apart, provenance

TEXT = "text"  # the training that the controls are compared with
USUAL = ("random", "shuffled", "labels")
CONTROLS = (*USUAL, "moving", "joint", "progressive", "carry", *ALIGNED)
WEIGHTS = {"swd": 1.0, "ssan": 1.0, "cdd": 0.3, "sdm": 1.0, "team": 1.0}  # of their papers
NAME = "ablation"


@dataclass(frozen=True)
class Experiment:
    """This is what one folder holds: a recipe on a data set, over seeds."""

    folder: DataSet
    sha256: str
    recipe: Recipe
    name: str  # of the recipe
    out: Path
    device: torch.device
    damaged: int  # test images to damage

    def path(self, seed: int, kind: str) -> Path:
        """Say where the rows of one training are."""
        return self.out / f"seed-{seed}" / f"{kind}.json"

    def identity(self) -> dict[str, Any]:
        """Return what all trainings of a folder have in common, as JSON data."""
        settings = self.recipe.to_dict()
        return {"settings": settings, "data_sha256": self.sha256, "damaged": self.damaged}


def ablate(
    data: Path,
    recipe: Recipe,
    out: Path,
    *,
    name: str = "custom",
    seeds: Sequence[int] = (0, 1, 2),
    controls: Sequence[str] = USUAL,
    damaged: int = 0,
    threads: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Train what is missing in `out`, and write its tables from all that is there.

    Args:
        seeds: of the trainings.
        controls: some of `CONTROLS`. Of SeDA, its peer without the semantic learner comes as well,
            the one whose denoisers are progressive, and the one whose chain is carried over.
        damaged: so many test images are measured damaged, too; 0: none.

    Returns:
        The content of ablation.json.

    Raises:
        DataError, RecipeError, InvalidInput: before any training.
        OutputExists: `out` holds something else, or another recipe or data set.
        OutputBusy: another process works on the same training.
    """
    check_apart(data, out)
    kinds = _kinds(recipe, controls)
    folder = read_data_set(data)
    if "test" not in folder.splits:
        raise DataError(
            f"{data} has no test/ split, and tables report on images that chose nothing; add one"
        )
    _check_folder(out)
    with training_threads(threads, threads_of(sorted(out.glob("seed-*/*.partial")))):
        target = pick_device(device)
        all_of_it = Experiment(folder, data_hash(folder), recipe, name, out, target, damaged)
        todo = [(seed, kind) for seed in seeds for kind in kinds]
        _check_same(all_of_it)
        for number, (seed, kind) in enumerate(todo, 1):
            if not all_of_it.path(seed, kind).is_file():
                title = (INSTEAD | ALIGNED).get(kind, METHODS[recipe.method])
                say(f"[{number} of {len(todo)}] seed {seed}: {title}")
                _train(all_of_it, seed, kind)
                if kind == kinds[-1] and number < len(todo):
                    write_joined(out)  # to look at meanwhile
    return write_joined(out)


def _kinds(recipe: Recipe, controls: Sequence[str]) -> list[str]:
    """Return the trainings of a seed, in order; each has settings that can be."""
    for kind in controls:
        check_choice("control", kind, CONTROLS)
        changed(recipe, kind)
    peers = []
    if recipe.method == "seda":
        has = {"progressive": recipe.progressive, "carry": recipe.handover == "carry"}
        peers = ["marnet", *(kind for kind, had in has.items() if not had)]
    return [*dict.fromkeys((TEXT, *peers, *controls))]


def changed(recipe: Recipe, kind: str, *, search: bool = False) -> Recipe:
    """Return the recipe of a control: something else in place of the text, or another part.

    Args:
        search: validation chooses the weight of another alignment loss, because it chose ITA's,
            and the baseline had as many tries; else it is that of the loss's own paper.

    Raises:
        RecipeError: this recipe cannot be trained so.
    """
    phase = recipe.alignment
    if kind == TEXT:
        return recipe
    if kind == "joint":
        return recipe.but(alignment={"joint": True})
    if kind == "moving":  # the text encoder starts from random weights and is taught by ITA alone
        return replace(recipe.but(alignment={"lr_text": 1e-3}), text_phase=None)
    if kind == "marnet":
        return replace(recipe, method="marnet", handover="restart")
    if kind == "team" and phase.frozen:  # no tokens are kept, and `_rows` leaves it out
        return recipe
    if kind == "progressive":
        if recipe.progressive:
            raise RecipeError(
                "the control progressive trains the recipe with progressive = true, and this "
                "recipe has it already; set progressive = false, and the control compares both"
            )
        return replace(recipe, progressive=True)
    if kind == "carry":
        if recipe.method != "seda" or recipe.handover == "carry":
            raise RecipeError(
                'the control carry trains SeDA with handover = "carry" in place of "restart", and '
                f"this recipe has method {recipe.method} and handover {recipe.handover}; add "
                '--method seda and set handover = "restart", and the control compares both'
            )
        one = replace(recipe.schedule, steps=recipe.semantic_schedule.steps)
        return replace(recipe, handover="carry", semantic_schedule=one)
    if kind in ALIGNED:
        few = min(6, max(2, phase.batch // 2)) if kind == "cdd" else phase.per_class
        weight = "auto" if search else WEIGHTS[kind]
        return recipe.but(alignment={"loss": kind, "ita_weight": weight, "per_class": few})
    return replace(recipe, semantics=kind)


def _check_folder(out: Path) -> None:
    """Refuse a folder with something else in it, which the tables would be mixed with."""
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
        others = [
            e.name
            for e in out.iterdir()
            if not e.name.startswith((".", "seed-", f"{NAME}.", "figure"))
        ]
    if others:
        raise OutputExists(
            f"{out} holds something else ({', '.join(sorted(others)[:3])}); choose a new folder, "
            "or one that this command wrote"
        )


def _check_same(experiment: Experiment) -> None:
    """Refuse a folder whose trainings had another recipe or other data."""
    now = experiment.identity()
    for path in sorted(experiment.out.glob("seed-*/*.json")):
        before = json.loads(path.read_text("utf-8"))
        other = [
            key for key, value in now.items() if before.get(key) != json.loads(json.dumps(value))
        ]
        if other:
            raise OutputExists(
                f"{path} was made with other {' and '.join(other)}; choose another --out for this "
                "recipe and these data"
            )


def _train(experiment: Experiment, seed: int, kind: str) -> None:
    """Do one training and write its rows, going on from where an interrupted one was."""
    path, recipe = experiment.path(seed, kind), experiment.recipe
    if kind != TEXT:
        of_text = json.loads(experiment.path(seed, TEXT).read_text("utf-8"))
        search = recipe.alignment.ita_weight == "auto"
        recipe = changed(Recipe.from_dict(of_text["resolved"]), kind, search=search)
    where = provenance(experiment.folder, experiment.device)
    decisive = {"seed": seed, "kind": kind, **where, **experiment.identity()}
    with saved_progress(path, decisive, restart=False) as run:
        found = _rows(experiment, recipe, seed, kind, run, path.with_suffix(".safetensors"))
        content = {
            "recipe": experiment.name,
            "seed": seed,
            "kind": kind,
            **experiment.identity(),
            "chosen": chosen(recipe, Recipe.from_dict(found["resolved"])),
            "seconds": {"training": found.pop("seconds"), "all": round(run.seconds, 1)},
            **found,
            "machine": where["machine"],
            "versions": where["versions"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with atomic_file(path) as fresh:
            fresh.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _rows(
    experiment: Experiment, recipe: Recipe, seed: int, kind: str, run: Progress, beside: Path
) -> dict[str, Any]:
    """Train and measure: the rows, the alignment with the texts, and what was left out.

    Args:
        beside: where the vectors of a training with the text are kept.
    """
    folder, with_baseline = experiment.folder, kind in (TEXT, "marnet")
    if kind == "team" and recipe.alignment.frozen:
        return _left_out(recipe, kind, "of a frozen image encoder only x_v is kept, no tokens")
    try:
        ready = prepare(folder, recipe, seed, experiment.device)
    except RecipeError as error:
        if kind != "carry":
            raise
        return _left_out(recipe, kind, str(error))
    classes, width = len(folder.labels), ready.model.text.dim
    if kind == "labels" and classes > width:
        why = f"{classes} classes have no one-hot vectors in a text width of {width}"
        return _left_out(recipe, kind, why)
    fresh = copy.deepcopy(Refiner.of(ready.model))
    val = ready.splits["val"]
    trained = train_all(
        ready.model, ready.data, val, recipe, seed, run, with_baseline=with_baseline
    )
    training = Training(trained.recipe, seed, run)
    subject = Subject(ready, trained, fresh, training, with_baseline)
    fusions, left_out = other_fusions(subject) if kind == TEXT else ({}, {})
    seconds = run.once("seconds", trained.modules, lambda: round(run.seconds, 1))
    rows: Rows = {}
    for title, work in _groups(experiment, subject, kind, fusions):
        rows |= run.once(f"rows: {title}", trained.modules, work)
    prefix = "" if kind == TEXT else f"{kind}: "
    found = vectors(subject)
    if kind == TEXT:
        with atomic_file(beside) as file:
            save_file({name: t.cpu().contiguous() for name, t in found.items()}, file)
    spaces = similarities(subject, folder.splits["test"], found)
    return {
        "resolved": trained.recipe.to_dict(),
        "test_images": len(subject.labels),
        "rows": {f"{prefix}{name}": row for name, row in rows.items()},
        "spaces": {f"{prefix}{name}": figures for name, figures in spaces.items()},
        "left_out": left_out,
        "seconds": seconds,
    }


def _left_out(recipe: Recipe, kind: str, why: str) -> dict[str, Any]:
    """Return what `_rows` does, of a control that cannot be with these encoders."""
    return {"resolved": recipe.to_dict(), "rows": {}, "left_out": {kind: why}, "seconds": 0.0}


def _groups(
    experiment: Experiment, subject: Subject, kind: str, fusions: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """Yield the rows of one training: all of them with the text, the branches of a control."""
    if kind == TEXT:
        yield from groups(
            subject, experiment.folder, damaged=experiment.damaged, fusions=dict(fusions)
        )
        return
    yield "branches", partial(branch_rows, subject)
    if kind == "marnet":
        yield from baseline_groups(subject)


def read_runs(out: Path) -> list[dict[str, Any]]:
    """Read what was measured: one run for each seed, with the rows of all its trainings."""
    runs = []
    for folder in sorted(out.glob("seed-*"), key=lambda f: int(f.name.removeprefix("seed-"))):
        files = {f.stem: json.loads(f.read_text("utf-8")) for f in sorted(folder.glob("*.json"))}
        if TEXT not in files:
            continue
        run = {key: value for key, value in files[TEXT].items() if key != "kind"}
        for kind, content in files.items():
            if kind != TEXT:
                run["seconds"] = run["seconds"] | {kind: content["seconds"]["all"]}
                for part in ("rows", "spaces", "left_out"):
                    run[part] = run[part] | content.get(part, {})
        runs.append(run)
    return runs


def write_joined(out: Path) -> dict[str, Any]:
    """Join what is in a folder over seeds, and write it as JSON, Markdown, CSV and PNG."""
    runs = read_runs(out)
    first = runs[0]
    method = first["settings"]["method"]
    joined = {
        "what": "A method, its parts and its controls on a data set, over training seeds: "
        "marnet-train ablate",
        "method": method,
        **{key: first[key] for key in ("recipe", "settings", "data_sha256", "test_images")},
        "summary": summarise(runs),
        "pairs": compare(runs),
        "spaces": average([run["spaces"] for run in runs]),
        "left_out": {name: why for run in runs for name, why in run["left_out"].items()},
        "runs": runs,
    }
    title = f"{METHODS[method]}, recipe {first['recipe']}: {first['test_images']} test images"
    write_tables(out, NAME, title, joined)
    draw_rows(joined, title, out / f"{NAME}.png")
    return joined
