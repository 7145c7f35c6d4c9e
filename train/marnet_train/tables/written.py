"""Joined rows as tables for people: Markdown and CSV, beside the JSON that has everything."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marnet_sdk.outputs import atomic_file
from marnet_train.recipe import METHODS

ALIGNED = {  # by what phase A aligns images and texts, in place of ITA
    "swd": "alignment by SWD",
    "ssan": "alignment by SSAN",
    "cdd": "alignment by CDD",
    "sdm": "alignment by SDM",
    "team": "alignment by TEAM",
}
INSTEAD = {  # of a training in which something else plays the text, or a part is another
    "labels": "one-hot labels in place of the text",
    "random": "random vectors in place of the text",
    "shuffled": "texts of another class",
    "moving": "a text encoder that moves",
    "joint": "one phase for A and B",
    "marnet": "MARNet: no semantic learner",
    "progressive": "denoisers that see their last estimate",
    "carry": "one chain through both stages",
}
TITLES = {  # rows of MARNet's table 2, and the table's own names
    "baseline": "baseline: image only",
    "alignment": "+EMA: the alignment branch",
    "+MLP on the baseline": "+MLP: one pass, on the baseline's encoder",
    "+CDR on the baseline": "+CDR(MLP): the loop, on the baseline's encoder",
    "MARNet": "+Fusion: the whole",
}
_DAMAGED = re.compile(r"[a-z]+ \d$")
_SEPARATE = ("semantic learner", "+MLP", "refined", "fusion with +MLP")
SECTIONS: dict[str, Callable[[str], bool]] = {  # the first that takes a row has it
    "parts": lambda name: name in TITLES,
    "on the aligned encoder": lambda name: name in _SEPARATE,
    "cross-entropy alone": lambda name: name.startswith("CE alone"),
    "controls": lambda name: name.partition(": ")[0] in INSTEAD,
    "other alignment losses": lambda name: name.partition(": ")[0] in ALIGNED,
    "other fusions": lambda name: name.startswith("fusion: "),
    "other settings of phase B": lambda name: name.startswith("refined, ") and "steps" not in name,
    "operating points": lambda name: ", K = " in name,
    "damaged images": lambda name: bool(_DAMAGED.match(name.partition(": ")[0])),
    "other rows": lambda name: True,
}
_COLUMNS = ("", "seeds", "top-1", "95 % over seeds", "top-5", "points", "95 %", "over seeds", "p")
_FIGURES = ("top1", "top5", "ece", "risk_coverage", "at_80", "log_loss")


@dataclass(frozen=True)
class Table:
    """This is one table: a title, the names of its columns, and its rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self, level: int = 2) -> str:
        """Return the table with its title as a heading of that level."""
        first, *others = (
            f"| {' | '.join(line)} |".replace("  ", " ") for line in (self.columns, *self.rows)
        )
        head = (f"{'#' * level} {self.title}", "", first, f"|{'---|' * len(self.columns)}")
        return "\n".join((*head, *others))


def section_of(name: str) -> str:
    """Say in which table a row stands."""
    return next(section for section, takes in SECTIONS.items() if takes(name))


def by_section(names: Iterable[str]) -> dict[str, list[str]]:
    """Sort rows into their tables; those of the first stand as in MARNet's table 2."""
    sections: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for name in names:
        sections[section_of(name)].append(name)
    sections["parts"].sort(key=[*TITLES].index)
    return sections


def shown(name: str, method: str) -> str:
    """Return the name of a row, or of a pair of rows, as people read it.

    The whole of SeDA is "MARNet" among the rows, as that of MARNet is.
    """
    return " - ".join(
        row if row.startswith("marnet: ") else row.replace("MARNet", METHODS[method])
        for row in name.split(" - ")
    )


def tables(joined: Mapping[str, Any]) -> list[Table]:
    """Make the tables of what `ablate` or `evaluate` joined, those that have rows."""
    found, method = joined["summary"], joined.get("method", "marnet")
    made = [
        Table(section, _COLUMNS, [_row(name, found[name], method) for name in names])
        for section, names in by_section(found).items()
    ]
    pairs = [_pair(shown(name, method), p) for name, p in joined.get("pairs", {}).items()]
    made.append(
        Table("differences on the same images",
              ("", "seeds", "points", "95 %", "over seeds", "p"), pairs)
    )  # fmt: skip
    made.append(_spaces(joined.get("spaces", {})))
    left_out = [*joined.get("left_out", {}).items()]
    made.append(Table("left out, and why", ("row", "reason"), left_out))
    return [table for table in made if table.rows]


def _row(name: str, r: Mapping[str, Any], method: str) -> list[str]:
    title, top5 = TITLES.get(name) or shown(name, method), r.get("top5")
    spread = interval(r["top1_interval"], signed=False)
    first = [title, str(len(r["seeds"])), percent(r["top1"]), spread]
    first.append("" if top5 is None else percent(top5))
    if "minus_baseline" not in r or name == "baseline":
        return [*first, "", "", "", ""]
    gain = f"{100 * r['minus_baseline']:+.2f}"
    intervals = interval(r["interval"]), interval(r["interval_over_seeds"])
    return [*first, gain, *intervals, chance(r["p"])]


def _pair(name: str, p: Mapping[str, Any]) -> list[str]:
    intervals = interval(p["interval"]), interval(p["interval_over_seeds"])
    return [name, str(len(p["seeds"])), f"{100 * p['mean']:+.2f}", *intervals, chance(p["p"])]


def _spaces(spaces: Mapping[str, Mapping[str, Any]]) -> Table:
    figures = ("cka", "mmd", "cosine", "cosine_others")
    rows = [
        [name, *(_mean(found[f]) if f in found else "" for f in figures)]
        for name, found in spaces.items()
    ]
    names = ("linear CKA", "MMD, squared", "cosine to the own class's text", "to the others'")
    return Table("alignment with the texts", ("", *names), rows)


def _mean(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    spread = "" if is_missing(low) else f" ({low:.3f} to {high:.3f})"
    return f"{found['mean']:.3f}{spread}"


def percent(share: float) -> str:
    """Write a share in percent."""
    return f"{100 * share:.2f} %"


def is_missing(bound: float | None) -> bool:
    """Tell whether a bound is that of one seed, which has no interval: NaN, and null in JSON."""
    return bound is None or math.isnan(bound)


def interval(bounds: Sequence[float], *, signed: bool = True) -> str:
    """Write an interval of shares in points; nothing where one seed gives none."""
    if is_missing(bounds[0]):
        return ""
    low, high = (100 * bound + 0.0 for bound in bounds)
    return f"{low:+.1f} to {high:+.1f}" if signed else f"{low:.1f} to {high:.1f}"


def chance(p: float) -> str:
    """Write a p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def write_tables(folder: Path, name: str, title: str, joined: Mapping[str, Any]) -> None:
    """Write NAME.json, NAME.md and NAME.csv into a folder, each as a whole."""
    (parts, text) = tables(joined), [f"# {title}", _HOW_TO_READ]
    write_texts(
        folder,
        {
            f"{name}.json": as_json(joined),
            f"{name}.md": "\n\n".join((*text, *(t.markdown() for t in parts))) + "\n",
            f"{name}.csv": as_csv(_CSV_COLUMNS, _csv_rows(joined)),
        },
    )


_HOW_TO_READ = (
    "Means over training seeds. Points are differences to the baseline on the same images; their "
    "95 % interval is for other images and other seeds, p is its two-sided test, and "
    '"over seeds" is Student\'s interval of the seeds alone. Of twenty rows that differ in '
    "nothing, one has a p below 0.05. Test images chose nothing."
)
_CSV_COLUMNS = (
    *("row", "section", "seeds", *_FIGURES, "top1_low", "top1_high", "minus_baseline"),
    *("low", "high", "low_over_seeds", "high_over_seeds", "p"),
)


def _csv_rows(joined: Mapping[str, Any]) -> Iterable[Sequence[object]]:
    method = joined.get("method", "marnet")
    for name, r in joined["summary"].items():
        seeds = " ".join(map(str, r["seeds"]))
        figures = [r.get(figure, "") for figure in _FIGURES]
        against = [r.get("minus_baseline", ""), *r.get("interval", ("", ""))]
        more = (*r.get("interval_over_seeds", ("", "")), r.get("p", ""))
        yield (
            shown(name, method),
            section_of(name),
            seeds,
            *figures,
            *r["top1_interval"],
            *against,
            *more,
        )


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write rows as CSV; what is not a number is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if isinstance(x, float) and math.isnan(x) else x for x in row])
    return text.getvalue()


def as_json(content: Any) -> str:
    """Write data as JSON, which has no NaN: null stands in its place."""

    def strict(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: strict(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [strict(inner) for inner in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return json.dumps(strict(content), indent=1, allow_nan=False) + "\n"


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files by name into a folder, each as a whole."""
    for name, text in texts.items():
        with atomic_file(folder / name) as fresh:
            fresh.write_text(text, "utf-8")
