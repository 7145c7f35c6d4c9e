"""The report of gpu_suite.py as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Line = dict[str, Any]

_OWN = {"line", "unit", "p10", "median", "p90", "p99", "n", "fidelity", "missing", "runtime"}


def markdown(report: dict[str, Any]) -> str:
    """All sections: the loop as one table for each length and type, the others a line each."""
    parts = [_head(report)]
    for name, section in report["sections"].items():
        lines = section["lines"]
        parts.append(f"### {name}")
        if "error" in section:
            parts.append(f"This section ended early: {section['error']}")
        parts += _loop(lines) if name == "loop" else [_flat(lines)]
        parts += [_runtimes(lines), _missing(lines)]
    return "\n\n".join(part for part in parts if part)


def _head(report: dict[str, Any]) -> str:
    machine = report["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    name = machine.get("name", "CPU: a rehearsal, whose figures mean nothing")
    return f"{name}, driver {machine['card'].get('driver_version', '-')}, {packages}; " + str(
        machine["date"]
    )


def _loop(lines: Sequence[Line]) -> list[str]:
    """Microseconds a step: a row for each form, a column for each batch."""
    measured = [line for line in lines if "median" in line]
    parts = []
    for precision, steps in _different(measured, "precision", "steps"):
        chosen = [x for x in measured if (x["precision"], x["steps"]) == (precision, steps)]
        batches = sorted({line["batch"] for line in chosen})
        rows = []
        for (form,) in _different(chosen, "line"):
            own = {line["batch"]: line for line in chosen if line["line"] == form}
            cells = [_spread(own[b]) if b in own else "" for b in batches]
            errors = [line["fidelity"]["relative_error"] for line in own.values()]
            same = all(line["fidelity"]["replays_equal"] for line in own.values())
            rows.append([form, *cells, f"{max(errors):.1e}", "yes" if same else "no"])
        titles = ["", *(f"batch {b}" for b in batches), "largest error", "same bits"]
        parts.append(f"T = {steps}, {precision}, microseconds a step (p10 to p90)")
        parts.append(_table(titles, rows))
    return parts


def _flat(lines: Sequence[Line]) -> str:
    """A row for each line."""
    rows = []
    for line in lines:
        if "median" in line:
            keys = {k: v for k, v in line.items() if k not in _OWN}
            p99 = f"{line['p99']:.4g}" if line["unit"] == "ms" else ""
            cells = [_words(keys), f"{_spread(line)} {line['unit']}", p99, _words(line["fidelity"])]
            rows.append([line["line"], *cells])
    titles = ["", "of", "median (p10 to p90)", "p99", "fidelity"]
    return _table(titles, rows) if rows else ""


def _runtimes(lines: Sequence[Line]) -> str:
    """Say how our backends ran the loop."""
    found = {
        f"- {line['line']}, {line['precision']}: {line['runtime']['loop']}"
        for line in lines
        if "runtime" in line
    }
    return "\n".join(sorted(found))


def _missing(lines: Sequence[Line]) -> str:
    """Say what was not measured: a line for each reason."""
    found: dict[tuple[str, str], int] = {}
    for line in lines:
        if "missing" in line:
            key = line["line"], line["missing"]
            found[key] = found.get(key, 0) + 1
    return "\n".join(
        f"- not measured: {name}{f' ({count} times)' if count > 1 else ''}: {why}"
        for (name, why), count in found.items()
    )


def _spread(line: Line) -> str:
    return f"{line['median']:.4g} ({line['p10']:.4g} to {line['p90']:.4g})"


def _words(content: dict[str, Any]) -> str:
    values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in content.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _different(lines: Iterable[Line], *keys: str) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(line[key] for key in keys) for line in lines))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
