"""Measure what MARNet, its parts and its controls are worth on a data set, over training seeds.

    python benchmarks/scripts/accuracy.py run --data data/plates --recipe plates --seed 0 --out FILE
    python benchmarks/scripts/accuracy.py control --data data/plates --kind labels FILE
    python benchmarks/scripts/accuracy.py table FILE...

`run` trains one seed and writes, for every row below, which test images it classifies right.
`control` trains a control of it and adds its rows to FILE.
`table` joins the seeds: means, intervals, paired differences to the baseline on the same images.
Validation chooses everything that is chosen; test images only report. Controls take the settings
that validation chose for the real training.

Rows:
    baseline, alignment, +MLP, refined, MARNet      as in the training's own report
    ... steps S, K samples                          the same weights by other reverse processes
    CE alone, +CDR on the baseline, gamma, t        phase B once more with other settings
    labels, random, shuffled                        a control in place of the text
    moving                                          F_s from random weights, taught by ITA alone
    joint                                           L_CDR added to phase A
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from corruptions import (  # pyright: ignore[reportMissingImports]
    KINDS,
    STRENGTHS,
    corrupt,
)
from numpy.typing import NDArray
from torch import Tensor

from marnet_bench.machine import describe_machine
from marnet_sdk.console import print_table, say, track
from marnet_train.assemble import Prepared, prepare
from marnet_train.data.dataset import DataSet, data_hash, read_data_set
from marnet_train.data.pixels import decode_example
from marnet_train.diffusion import sampler_table
from marnet_train.evaluate import Labelled, behind, label_tensor, sample_probabilities, see
from marnet_train.measures import (
    accuracy_at_coverage,
    expected_calibration_error,
    paired_difference,
    risk_coverage,
    student_interval,
)
from marnet_train.memory import keep_freed_memory
from marnet_train.models.backbones import VisionEncoder
from marnet_train.models.marnet import Baseline, MARNet
from marnet_train.models.seda import SeDA
from marnet_train.phases import Refiner, make_features, make_target, train_refinement
from marnet_train.progress import Progress
from marnet_train.recipe import METHODS, Recipe, chosen, load_recipe
from marnet_train.stages import Trained, encoded, refiner_probabilities, score, train_all

STEPS = (1, 2, 5, 10, 100)  # of the chain; those beyond T are left out
DRAWS = 8  # noise samples of every chain; K = 1 is the mean accuracy of all of them
PAIRS = (  # a minus b on the same images
    ("MARNet", "alignment"),
    ("MARNet", "+MLP"),
    ("refined", "alignment"),
    ("refined", "+MLP"),
    ("+MLP", "CE alone"),
    *(
        (row, f"{kind}: {row}")
        for kind in ("labels", "random", "shuffled", "moving", "joint")
        for row in ("alignment", "+MLP", "refined", "MARNet")
    ),
)
CONTROLS = ("labels", "random", "shuffled", "moving", "joint")


class Rows:
    """This records which test images each way to classify gets right, and how sure it is."""

    def __init__(self, labels: Tensor) -> None:
        self.labels, self.found = labels.cpu().numpy(), dict[str, dict[str, Any]]()

    def add(self, name: str, answers: Sequence[Tensor], votes: NDArray | None = None) -> None:
        """Probabilities [N, C] of every answer that noise gives (one where there is no noise).

        Args:
            votes: share of the noise samples that vote for the first answer, [N].
        """
        right, calibration = [], []
        for probabilities in answers:
            p = probabilities.double().cpu().numpy()
            p /= p.sum(axis=1, keepdims=True)
            correct, sure = p.argmax(axis=1) == self.labels, p.max(axis=1)
            right.append(correct)
            calibration.append(
                {
                    "ece": expected_calibration_error(p, self.labels),
                    "risk_coverage": risk_coverage(sure, correct),
                    "at_80": accuracy_at_coverage(sure, correct),
                    "log_loss": float(-np.log(p[np.arange(len(p)), self.labels] + 1e-12).mean()),
                }
            )
        entry: dict[str, Any] = {
            "images": len(self.labels),
            "top1": float(np.mean(right)),
            "right": [np.packbits(r).tobytes().hex() for r in right],
            **{k: float(np.mean([c[k] for c in calibration])) for k in calibration[0]},
        }
        if votes is not None:
            entry["risk_coverage_by_votes"] = risk_coverage(votes, right[0])
            entry["at_80_by_votes"] = accuracy_at_coverage(votes, right[0])
        self.found[name] = entry


@torch.no_grad()
def image_probabilities(model: MARNet | Baseline, seen: Labelled) -> Tensor:
    """Return the probabilities of the classifier on x_v' alone, [N, C]."""
    model.eval()
    return model.alignment_logits(seen.x_v).softmax(dim=1)


def one_pass_probabilities(model: MARNet, mlp: Refiner, seen: Labelled, recipe: Recipe) -> Tensor:
    """Return the probabilities of "+MLP", [N, C]."""
    mlp.eval()
    return refiner_probabilities(mlp, model.condition(seen.x_v), recipe, 0, one_pass=True)


@torch.no_grad()
def add_trained(rows: Rows, trained: Trained, seen: Labelled, base: Labelled) -> None:
    """The rows of the training's own report, and what other reverse processes make of them."""
    model, recipe = trained.model, trained.recipe
    rows.add("baseline", [image_probabilities(trained.baseline, base)])
    rows.add("alignment", [image_probabilities(model, seen)])
    if isinstance(model, SeDA):
        logits = model.learner.classifier(seen.x_v[:, model.vision.dim :])
        rows.add("semantic learner", [logits.softmax(dim=1)])
    rows.add("+MLP", [one_pass_probabilities(model, trained.mlp, seen, recipe)])
    steps = [s for s in STEPS if s < recipe.schedule.steps] + [recipe.schedule.steps]
    for count in steps:
        table = sampler_table(recipe.schedule, "ddpm", count)
        drawn = sample_probabilities(model, seen.x_v, table, 0, DRAWS)
        for name, samples in zip(("refined", "MARNet"), drawn, strict=True):
            rows.add(f"{name}, {count} steps, K = 1", _averaged(samples, 1))
            rows.add(f"{name}, {count} steps, K = {DRAWS}", [samples.mean(dim=0)], _votes(samples))
            if count == recipe.schedule.steps:
                rows.add(name, _averaged(samples, model.config.samples))


def _averaged(samples: Tensor, count: int) -> list[Tensor]:
    """Means over disjoint groups of `count` noise samples, from [K, N, C]: each is one answer."""
    return [group.mean(dim=0) for group in samples.split(count) if len(group) == count]


def _votes(samples: Tensor) -> NDArray:
    """Share of the samples [K, N, C] that vote for the answer of their mean, [N]."""
    answer = samples.mean(dim=0).argmax(dim=1)
    return (samples.argmax(dim=2) == answer).double().mean(dim=0).cpu().numpy()


def add_refiner_controls(
    rows: Rows, ready: Prepared, trained: Trained, seed: int, fresh: MARNet
) -> None:
    """Phase B once more with other settings, or on the baseline's encoder.

    "CE alone" is the denoiser's network without a semantic target: the capacity of the whole
    without any text.
    """
    model, recipe = trained.model, trained.recipe
    target = make_target(model, ready.data, recipe, seed)
    on_baseline = copy.deepcopy(model)
    on_baseline.vision = trained.baseline.vision

    def other(**settings: float) -> Recipe:
        return replace(recipe, refinement=replace(recipe.refinement, **settings))

    bases = {}
    for where, base in (("model", model), ("baseline", on_baseline)):
        features = make_features(
            base, ready.data, encoded(base.vision, ready.data, recipe), target, recipe
        )
        bases[where] = (
            features,
            *(
                base.condition(x_v)
                for x_v in (
                    see(base, features.x_v),
                    ready.splits["val"].seen_whole(base, frozen=_is_frozen(recipe)).x_v,
                    ready.splits["test"].seen_whole(base, frozen=_is_frozen(recipe)).x_v,
                )
            ),
        )
    for name, where, settings, one_pass in (
        ("CE alone, on the baseline", "baseline", other(norm_weight=0.0), True),
        ("+MLP on the baseline", "baseline", recipe, True),
        ("+CDR on the baseline", "baseline", recipe, False),
        ("CE alone", "model", other(norm_weight=0.0), True),
        ("refined, gamma = 1", "model", other(norm_weight=1.0), False),
        ("refined, gamma = 1 / D", "model", other(norm_weight=1 / model.latent_width), False),
        ("refined, t uniform", "model", other(pure_noise=0.0), False),
        ("refined, half of the rows at t = T", "model", other(pure_noise=0.5), False),
    ):
        features, condition, val, test = bases[where]
        refiner = copy.deepcopy(Refiner.of(fresh))

        def look(r: Refiner = refiner, v: Tensor = val, o: bool = one_pass) -> float:
            found = refiner_probabilities(r, v, recipe, seed, one_pass=o)
            return score(found, ready.splits["val"].labels)

        train_refinement(
            refiner,
            condition,
            features,
            settings,
            seed,
            Progress(),
            name,
            look=look,
            one_pass=one_pass,
        )
        rows.add(name, [refiner_probabilities(refiner, test, recipe, seed, one_pass=one_pass)])


def changed(recipe: Recipe, kind: str) -> Recipe:
    """The recipe of a control: something else in place of the text, or phase A otherwise."""
    phase = recipe.alignment
    if kind == "joint":
        return replace(recipe, alignment=replace(phase, joint=True))
    if kind == "moving":  # the text encoder starts from random weights and is taught by ITA alone
        return replace(recipe, text_phase=None, alignment=replace(phase, lr_text=1e-3))
    return replace(recipe, semantics=kind)


def add_control(rows: Rows, kind: str, folder: DataSet, recipe: Recipe, seed: int) -> None:
    """The whole training of a control."""
    recipe = changed(recipe, kind)
    ready = prepare(folder, recipe, seed, torch.device("cpu"))
    val, run = ready.splits["val"], Progress()
    trained = train_all(ready.model, ready.data, val, recipe, seed, run, with_baseline=False)
    model = trained.model
    seen = ready.splits["test"].seen_whole(model, frozen=_is_frozen(recipe))
    table = sampler_table(recipe.schedule, "ddpm")
    rows.add(f"{kind}: alignment", [image_probabilities(model, seen)])
    rows.add(f"{kind}: +MLP", [one_pass_probabilities(model, trained.mlp, seen, recipe)])
    drawn = sample_probabilities(model, seen.x_v, table, 0, DRAWS)
    for name, samples in zip(("refined", "MARNet"), drawn, strict=True):
        rows.add(f"{kind}: {name}", _averaged(samples, model.config.samples))


def add_corruptions(
    rows: Rows, ready: Prepared, trained: Trained, folder: DataSet, limit: int
) -> None:
    """The first `limit` test images, damaged in five ways at three strengths."""
    examples = folder.splits["test"][:limit]
    model, recipe = trained.model, trained.recipe
    table = sampler_table(recipe.schedule, "ddpm")
    same = _is_frozen(recipe)
    for kind in KINDS:
        for strength in STRENGTHS:
            pixels = np.stack(
                [
                    ready.preprocess(corrupt(decode_example(e), kind, strength, i))
                    for i, e in enumerate(track(examples, f"{kind} {strength}"))
                ]
            )
            labels = torch.as_tensor(rows.labels[:limit])
            seen = behind(model, Labelled(_features(model.vision, pixels), labels))
            base = seen if same else Labelled(_features(trained.baseline.vision, pixels), labels)
            few = Rows(labels)
            few.add("baseline", [image_probabilities(trained.baseline, base)])
            few.add("alignment", [image_probabilities(model, seen)])
            few.add("+MLP", [one_pass_probabilities(model, trained.mlp, seen, recipe)])
            drawn = sample_probabilities(model, seen.x_v, table, 0, model.config.samples)
            few.add("refined", [drawn[0].mean(dim=0)])
            few.add("MARNet", [drawn[1].mean(dim=0)])
            rows.found |= {f"{kind} {strength}: {name}": row for name, row in few.found.items()}


@torch.no_grad()
def _features(vision: VisionEncoder, pixels: NDArray[np.float32]) -> Tensor:
    vision.eval()
    return torch.cat([vision(x) for x in torch.from_numpy(pixels).split(64)])


def _is_frozen(recipe: Recipe) -> bool:
    return recipe.alignment.lr_backbone == 0


@click.group()
def main() -> None:
    """Measure one training seed, or join the measurements of several."""


@main.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--recipe", required=True)
@click.option("--method", type=click.Choice(list(METHODS)), help="Default: the recipe's.")
@click.option("--seed", type=int, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--again/--not-again", default=True, help="Phase B with other settings, too.")
@click.option("--corruptions", "damaged", type=int, default=0, help="Images to damage. 0: none.")
def run(
    data: Path, recipe: str, method: str | None, seed: int, out: Path, again: bool, damaged: int
) -> None:
    """Train one seed and measure every row on the test split."""
    keep_freed_memory()
    device, started = torch.device("cpu"), time.perf_counter()
    folder, settings = read_data_set(data), load_recipe(recipe)
    settings = replace(settings, method=method) if method else settings
    ready = prepare(folder, settings, seed, device)
    fresh = copy.deepcopy(ready.model)
    trained = train_all(ready.model, ready.data, ready.splits["val"], settings, seed, Progress())
    seconds = {"training": round(time.perf_counter() - started, 1)}
    frozen = _is_frozen(settings)
    test = ready.splits["test"]
    rows = Rows(test.labels)
    seen = test.seen_whole(trained.model, frozen=frozen)
    add_trained(rows, trained, seen, test.seen_whole(trained.baseline, frozen=frozen))
    say(f"seed {seed}: { ({k: round(v['top1'], 4) for k, v in rows.found.items()}) }")
    if damaged:
        add_corruptions(rows, ready, trained, folder, damaged)
    if again:
        add_refiner_controls(rows, ready, trained, seed, fresh)
    seconds["all"] = round(time.perf_counter() - started, 1)
    found = {
        "recipe": recipe,
        "seed": seed,
        "settings": settings.to_dict(),
        "resolved": trained.recipe.to_dict(),
        "chosen": chosen(settings, trained.recipe),
        "data_sha256": data_hash(folder),
        "test_images": len(test.labels),
        "seconds": seconds,
        "rows": rows.found,
        "machine": describe_machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--kind", type=click.Choice(CONTROLS), required=True)
def control(file: Path, data: Path, kind: str) -> None:
    """Train a control of what FILE measured, and add its rows to FILE."""
    keep_freed_memory()
    found = json.loads(file.read_text("utf-8"))
    folder = read_data_set(data)
    if data_hash(folder) != found["data_sha256"]:
        raise click.UsageError(f"{data} is not the data set that {file} was measured on")
    rows = Rows(label_tensor(folder.splits["test"], folder.labels))
    add_control(rows, kind, folder, Recipe.from_dict(found["resolved"]), found["seed"])
    found = json.loads(file.read_text("utf-8"))  # another control may have written by now
    found["rows"] |= rows.found
    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    say(f"{kind}: { ({k: round(v['top1'], 4) for k, v in rows.found.items()}) }")


def right_answers(runs: Sequence[dict[str, Any]], name: str) -> NDArray[np.float64]:
    """Share of the answers that are right, of each image, [R, N]."""
    images = runs[0]["rows"][name]["images"]
    return np.stack(
        [
            np.mean(
                [
                    np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=images)
                    for bits in run["rows"][name]["right"]
                ],
                axis=0,
            )
            for run in runs
        ]
    )


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Row -> its figures over the seeds that have it, and its paired difference to the baseline.

    A row of a corruption is compared with the baseline on the same damaged images.
    """
    out = {}
    for name in dict.fromkeys(name for run in runs for name in run["rows"]):
        having = [run for run in runs if name in run["rows"]]
        place = name.rpartition(": ")[0]
        peer = f"{place}: baseline" if f"{place}: baseline" in having[0]["rows"] else "baseline"
        rows = [run["rows"][name] for run in having]
        seen = paired_difference(right_answers(having, name), right_answers(having, peer))
        figures = {
            k: float(np.mean([row[k] for row in rows]))
            for k in rows[0]
            if k not in ("right", "images")
        }
        out[name] = {
            **figures,
            "seeds": [run["seed"] for run in having],
            "top1_by_seed": [row["top1"] for row in rows],
            "top1_interval": student_interval([row["top1"] for row in rows]),
            "minus_baseline": seen.mean,
            "interval": seen.interval,
            "interval_over_seeds": seen.over_runs,
        }
    return out


def compare(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Map "a - b" of `PAIRS` to the paired difference of two rows over the seeds that have both."""
    out = {}
    for a, b in PAIRS:
        having = [run for run in runs if a in run["rows"] and b in run["rows"]]
        if having:
            seen = paired_difference(right_answers(having, a), right_answers(having, b))
            out[f"{a} - {b}"] = {
                "seeds": [run["seed"] for run in having],
                "mean": seen.mean,
                "interval": seen.interval,
                "interval_over_seeds": seen.over_runs,
            }
    return out


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write what is joined, as JSON.")
def table(files: Sequence[Path], out: Path | None) -> None:
    """Join seeds: accuracy, and points above the baseline on the same images, with intervals."""
    runs = [json.loads(file.read_text("utf-8")) for file in files]
    found, pairs = summarise(runs), compare(runs)
    columns = ("row", "seeds", "top-1", "over seeds", "minus baseline", "95 %", "over seeds")
    rows = [
        (
            name,
            str(len(r["seeds"])),
            f"{r['top1']:.2%}",
            "{:.1%} to {:.1%}".format(*r["top1_interval"]),
            f"{100 * r['minus_baseline']:+.2f}",
            "{:+.1f} to {:+.1f}".format(*(100 * x for x in r["interval"])),
            "{:+.1f} to {:+.1f}".format(*(100 * x for x in r["interval_over_seeds"])),
        )
        for name, r in found.items()
    ]
    print_table(f"{len(runs)} seeds, {runs[0]['test_images']} test images", columns, rows)
    more = ("ece", "risk_coverage", "at_80", "risk_coverage_by_votes", "at_80_by_votes", "log_loss")
    rows = [(n, *(f"{r[k]:.4f}" if k in r else "" for k in more)) for n, r in found.items()]
    print_table("calibration and selective prediction", ("row", *more), rows)
    rows = [
        (
            name,
            str(len(p["seeds"])),
            f"{100 * p['mean']:+.2f}",
            "{:+.1f} to {:+.1f}".format(*(100 * x for x in p["interval"])),
            "{:+.1f} to {:+.1f}".format(*(100 * x for x in p["interval_over_seeds"])),
        )
        for name, p in pairs.items()
    ]
    print_table("differences", ("rows", "seeds", "points", "95 %", "over seeds"), rows)
    if out is not None:
        same = {k: runs[0][k] for k in ("recipe", "settings", "data_sha256", "test_images")}
        content = {"what": __doc__, **same, "summary": found, "pairs": pairs, "runs": runs}
        out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
