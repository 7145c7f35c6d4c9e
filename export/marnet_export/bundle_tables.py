"""Print what `marnet-bundle` finds, as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marnet_export.inspection import Answers, flatten, sentence
from marnet_sdk.console import print_table, say
from marnet_sdk.provenance import Replay

if TYPE_CHECKING:
    from marnet_export.prove.bundle import Verification

_PARTS = ("encoder", "loop", "head", "all")
_SHOWN = 60  # characters of a value in a table


def print_description(found: Mapping[str, Any]) -> None:
    """Print what `inspection.describe` says of a bundle."""
    _print_overview(found)
    _print_receipt(found["precision"]["receipt"])
    if kept := found["precision"]["kept"]:
        columns = ("layer of the image encoder that stayed float", "because")
        print_table("kept out of int8", columns, list(kept.items()))
    _print_points(found)
    if backends := found["fidelity"].get("backends"):
        _print_backends(backends)
    _print_versions(found)
    rows = [
        (folder, f"{size['files']:,}", f"{size['bytes']:,}")
        for folder, size in found["sizes"].items()
    ]
    print_table("sizes", ("folder", "files", "bytes"), rows)


def _print_overview(found: Mapping[str, Any]) -> None:
    labels, precision, sampling = found["labels"], found["precision"], found["sampling"]
    if note := found["fidelity"].get("not_run"):
        say(note)
    first = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
    golden, fidelity = found["golden"], found["fidelity"]
    rows = [
        ("method", found["method"]),
        ("labels", f"{len(labels)}: {first}"),
        ("backend", found["backend"]),
        ("reverse loop", found["loop"]),
        ("precision asked", f"{precision['asked']}, loop {precision['loop']}"),
        ("other products in", precision["compute"]),
        ("noise", f"{sampling['noise']}, seed {sampling['seed']}"),
        ("golden images", f"{golden['images']}, to {golden['tolerance']:g} of the largest logit"),
        ("fidelity", sentence(fidelity)),
    ]
    if accuracy := fidelity.get("reference_accuracy"):
        text = f"{fidelity['bundle_accuracy']:.2%}, of the checkpoint {accuracy:.2%}"
        rows.append(("accuracy", text))
    if floor := fidelity.get("instability"):
        text = f"{floor['share']:.2%} of {floor['images']} images, over {len(floor['seeds'])} seeds"
        rows.append(("labels that change with the noise", text))
    held = {"text": "the text encoder", "source": "the checkpoint"}
    rows += [
        ("holds besides", " and ".join(what for key, what in held.items() if found[key]) or "-"),
        ("made from", f"checkpoint {found['checkpoint_sha256']}"),
        ("made on", found["created"]),
        ("digest", found["digest"]),
    ]
    print_table(found["bundle"], ("", ""), rows)


def _print_receipt(receipt: Mapping[str, Any]) -> None:
    rows = [
        (part, f"{s['multiply_adds']:,}", _shares(s["storage"]), _shares(s["compute"]))
        for part in _PARTS
        if (s := receipt.get(part))
    ]
    columns = ("part", "multiply-adds an image", "stored in", "multiplied in")
    print_table("precision delivered, as read from the payload", columns, rows)


def _shares(shares: Mapping[str, float]) -> str:
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.2%}" for name, share in ordered)


def _print_points(found: Mapping[str, Any]) -> None:
    sampling, fidelity = found["sampling"], found["fidelity"].get("operating_points", {})
    rows = []
    for name, point in sampling["points"].items():
        threshold, measured = point["abstain_below"], fidelity.get(name)
        rows.append(
            (
                name + (" (answers)" if name == sampling["default"] else ""),
                point["sampler"] + (f", eta {point['eta']:g}" if point["eta"] else ""),
                str(len(point["timesteps"])),
                str(point["samples"]),
                "-" if threshold is None else f"{threshold:.4f}",
                "-" if measured is None else f"{measured['top1_agreement']:.2%}",
            )
        )
    columns = ("operating point", "sampler", "steps", "samples", "abstain below", "agreement")
    print_table("operating points", columns, rows)


def _print_backends(backends: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for one in backends:
        times = (one.get("milliseconds") or {}).items()
        taken = ", ".join(f"{ms:.3g} for {count}" for count, ms in times)
        reason = one.get("reason") or ""
        rows.append((one["backend"], one["outcome"], taken or "-", reason))
    columns = ("backend", "outcome", "ms for images", "reason")
    print_table("backends that were tried", columns, rows)


def _print_versions(found: Mapping[str, Any]) -> None:
    built, here = found["built_for"], found["here"]
    targets = f" ({', '.join(built['targets'])})" if built["targets"] else ""
    rows = [("machine", f"{built['device']} {built['machine']}{targets}", here["machine"])]
    for name, version in built["packages"].items():
        now = here["differ"].get(name, (version, version))[1]
        mark = " (differs)" if name in here["differ"] else ""
        rows.append((name, version, (now or "not installed") + mark))
    print_table("versions", ("", "built with", "here"), rows)
    if here["unavailable"]:
        say(f"{found['backend']} cannot run here: {here['unavailable']}")


def print_measured(again: Verification, exported: Mapping[str, Any]) -> None:
    """Print how a bundle agrees with its checkpoint: at the export, and here."""
    if again.fidelity:
        rows = list(_measured(again, exported))
        print_table("against the float32 checkpoint", ("", "at the export", "here"), rows)


_MEASURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("images", "images", "{:,}".format),
    ("top-1 agreement", "top1_agreement", "{:.2%}".format),
    ("95 % interval", "top1_interval", lambda pair: f"{pair[0]:.2%} to {pair[1]:.2%}"),
    ("top-5 agreement", "top5_agreement", "{:.2%}".format),
    ("largest logit error", "logit_error_max", "{:.3g}".format),
    ("mean logit error", "logit_error_mean", "{:.3g}".format),
    ("largest logit", "largest_logit", "{:.3g}".format),
    ("accuracy of the checkpoint", "reference_accuracy", "{:.2%}".format),
    ("accuracy of the bundle", "bundle_accuracy", "{:.2%}".format),
    ("labels that depend on the batch", "row_invariance.flips", "{:.0f}".format),
    ("logits depend on it by", "row_invariance.max_difference", "{:.3g}".format),
    ("NaN or infinite", "non_finite", "{:,}".format),
)


def _measured(again: Verification, exported: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows: what, at the export, here."""
    rows: list[tuple[str, ...]] = []
    points = exported.get("operating_points", {})
    for name, fidelity in again.fidelity.items():
        pair = [flatten(x) for x in (points.get(name, {}), asdict(fidelity))]
        at = f", {name}" if len(again.fidelity) > 1 else ""
        for title, key, show in _MEASURES:
            values = [x.get(key) for x in pair]
            rows.append((title + at, *("-" if v is None else show(v) for v in values)))
    ways = (exported.get("trajectory", []), again.trajectory)
    worst = [max((row["error"] for row in way), default=0.0) for way in ways]
    rows.append(("largest error along the trajectory", *(f"{w:.3g}" for w in worst)))
    return rows


def print_differences(parts: Mapping[str, Mapping[str, Sequence[Any]]], a: Path, b: Path) -> None:
    """Print in what two bundles differ, by the part of them."""
    for title, found in parts.items():
        if found:
            rows = [(key, *(_short(value) for value in pair)) for key, pair in found.items()]
            print_table(f"{title}: {len(rows)} differ", ("", str(a), str(b)), rows)
    if not any(parts.values()):
        say("the bundles hold the same")


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def print_answers(answers: Answers, a: Path, b: Path) -> None:
    """Print which golden images two bundles answer differently."""
    if answers.differ:
        count = len(answers.differ)
        print_table(f"labels: {count} differ", ("image", str(a), str(b)), answers.differ)
    same = answers.images - len(answers.differ)
    text = f"{same} of {answers.images} golden images get the same label"
    if answers.logit_difference is None:
        say(f"{text}; logits are not compared, as the sets of labels differ")
        return
    largest = answers.largest_logit
    say(f"{text}; logits up to {largest:.3g} differ by up to {answers.logit_difference:.3g}")


def print_replay(one: Replay) -> None:
    """Print what came of deriving an answer again."""
    if one.answer is not None:
        rows = [(score.label, f"{score.score!r}") for score in one.answer.top]
        print_table("derived again", ("label", "score"), rows)
    for difference in one.differences:
        say(f"differs: {difference}")
    for part in one.surroundings:
        say(f"not as it was: {part}")
    if one.equal and one.tolerance is None:
        say("equal to the bit")
    elif one.equal:
        say(f"equal: logarithms of probabilities within {one.tolerance:.3g}")
