"""Two reports of `marnet-bench`, line by line: how many times as fast the newer one is.

Each line is resampled on its own, because the two runs had no rounds in common. The interval holds
what varied inside of each run. It cannot hold what differs between two runs of the same program,
such as neighbours on the machine: that is what the margin is for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from marnet_bench.timing import MEDIAN, Statistic, independent_interval
from marnet_sdk.errors import DataError, InvalidInput, Regression

# What names a line, in any scenario, and what two reports must have in common to measure the same.
_NAMES = ("model", "stage", "traffic", "input", "precision", "batch", "rate")
_SETTINGS = (
    *("scenario", "batch", "batches", "sampler", "images", "image_bytes", "together"),
    *("photographs", "latency_ms", "searched"),
)
_OF_MACHINE = ("processor", "architecture", "cpus")
SLOWER, FASTER, SAME = "slower", "faster", "no difference"


@dataclass(frozen=True)
class Change:
    """One line of both reports."""

    line: str
    measure: str  # what was compared: median, 99th percentile, mean, or rate
    old: float  # milliseconds; of a rate, images a second
    new: float
    ratio: float  # above 1 where the new one is faster
    low: float  # of the 95 % interval
    high: float

    @property
    def verdict(self) -> str:
        """Tell which is faster, where the interval does not hold 1."""
        if self.low <= 1 <= self.high:
            return SAME
        return FASTER if self.low > 1 else SLOWER

    def regressed(self, margin: float) -> bool:
        """Tell whether it is shown to be slower by more than a margin."""
        return self.high < 1 - margin


def read_report(path: Path) -> dict[str, Any]:
    """Read a report that `marnet-bench --output` wrote.

    Raises:
        DataError: it is no such file.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
        found = {"scenario", "lines", "machine"} <= report.keys() and report["scenario"]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is no report ({error}); expected JSON of marnet-bench --output"
        ) from error
    if not isinstance(found, str):
        raise DataError(f"{path} is no report; expected JSON of marnet-bench --output")
    return report


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], *, anyway: bool = False
) -> tuple[list[Change], list[str]]:
    """Compare two reports of the same scenario and settings.

    Args:
        anyway: also of different models, machines or threads.

    Returns:
        The lines that both have, and notes: what differs otherwise, and lines of one alone.

    Raises:
        InvalidInput: they measured different things, or they differ and `anyway` is false.
        DataError: a report keeps no times, or has lines that are none.
    """
    if apart := list(_differences(old, new, _SETTINGS)):
        raise InvalidInput(
            f"the reports measured different things: {'; '.join(apart)}; measure one again with "
            "the settings of the other"
        )
    other = [*_other_model(old, new), *_differences(old["machine"], new["machine"], _OF_MACHINE)]
    other += _differences(old, new, ("threads",))
    if other and not anyway:
        raise InvalidInput(
            f"the reports are not of one model on one machine: {'; '.join(other)}; measure both on "
            "the same one, or add --anyway"
        )
    try:
        changes = [*_rates(old, new), *_lines(old, new)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"a report has a line without its times ({type(error).__name__}: {error}); measure it "
            "again with this version of marnet-bench"
        ) from error
    if not changes:
        raise InvalidInput("the reports have no line in common; measure the same candidates")
    return changes, [*other, *_notes(old, new)]


def check_regression(changes: list[Change], margin: float) -> None:
    """Refuse lines that are shown to be slower by more than a margin.

    Raises:
        Regression: names them.
    """
    if worse := [change for change in changes if change.regressed(margin)]:
        named = "; ".join(
            f"{c.line}, {c.measure}: {c.ratio:.2f} times the speed ({c.low:.2f} to {c.high:.2f})"
            for c in worse
        )
        raise Regression(
            f"slower by more than {margin:.0%}: {named}; measure again on an idle machine, or look "
            "for what changed"
        )


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], names: tuple[str, ...]
) -> Iterator[str]:
    for name in names:
        was, now = old.get(name), new.get(name)
        if was != now and was is not None and now is not None:  # older versions wrote fewer
            yield f"{name} {was} and {now}"


def _other_model(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Tell whether it is another model: by its checkpoint, else by its name or its address."""
    for name in ("checkpoint_sha256", "model", "bundle", "url"):
        was, now = old.get(name), new.get(name)
        if was is not None and now is not None:
            if was != now:
                yield f"{name} {was} and {now}"
            return
    yield "only one names its model"


def _notes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    yield from _differences(old, new, ("bundle", "backend", "loop", "steps", "fast_decode"))
    yield from _differences(old["machine"]["packages"], new["machine"]["packages"], _packages(old))
    for which, one, other in (("old", old, new), ("new", new, old)):
        missing = [_name(line) for line in one["lines"] if _key(line) not in _by_key(other)]
        if missing and not one.get("searched"):
            yield f"only in the {which} report: {', '.join(missing)}"


def _packages(report: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(report["machine"]["packages"])


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in _NAMES)


def _by_key(report: Mapping[str, Any]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    return {_key(line): line for line in report["lines"]}


def _name(line: Mapping[str, Any]) -> str:
    named = {name: line[name] for name in _NAMES if line.get(name) is not None}
    numbers = {"batch": "batch {}", "rate": "{} images/s", "input": "from {}"}
    return ", ".join(numbers.get(name, "{}").format(value) for name, value in named.items())


def _lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Compare the times that both reports keep."""
    after = _by_key(new)
    for key, line in _by_key(old).items():
        if key not in after:
            continue
        was, now = (np.array(one["seconds"], np.float64) for one in (line, after[key]))
        for measure, statistic in _measures(line).items():
            old_ms, new_ms = (1e3 * float(statistic(seconds)) for seconds in (was, now))
            interval = independent_interval(was, now, statistic)
            yield Change(_name(line), measure, old_ms, new_ms, *interval)


def _measures(line: Mapping[str, Any]) -> dict[str, Statistic]:
    if line.get("traffic") == "offline":  # parts of one long query, whose answers come in batches
        return {"mean per image": partial(np.mean, axis=-1)}
    found = {"median": MEDIAN}
    if line.get("traffic") == "server":
        found["99th percentile"] = lambda seconds: np.percentile(seconds, 99, axis=-1)
    return found


def _rates(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Compare the highest rates that searches found to be answered in time.

    A search ends between the highest rate in time and the lowest too late: these bound the ratio.
    """
    if not (old.get("searched") and new.get("searched") and old["best"] and new["best"]):
        return
    (was, was_late), (now, now_late) = _bracket(old), _bracket(new)
    if was_late is None or now_late is None:
        return
    yield Change(
        "highest rate in time", "images/s", was, now, now / was, now / was_late, now_late / was
    )


def _bracket(report: Mapping[str, Any]) -> tuple[float, float | None]:
    """The highest rate that was answered in time, and the lowest above it that was not, if any."""
    limit = report["latency_ms"]
    low = max(run["rate"] for run in report["runs"] if run["p99_ms"] <= limit)
    late = [r["rate"] for r in report["runs"] if r["p99_ms"] > limit and r["rate"] > low]
    return low, min(late, default=None)


def described(changes: list[Change], notes: list[str], margin: float) -> dict[str, Any]:
    """The comparison as plain data."""
    lines = [
        asdict(change) | {"verdict": change.verdict, "regressed": change.regressed(margin)}
        for change in changes
    ]
    return {"margin": margin, "lines": lines, "notes": notes}
