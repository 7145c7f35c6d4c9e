"""Measure an environment without torch: its size, and the time from its start to a first label.

    python benchmarks/scripts/cold_start.py --model BUNDLE --image FILE --out cold_start.json

Without --python, an environment is made of this checkout with pip, as a user would: the bundle's
backend and nothing else. Each start is a process of its own. Its files are in the page cache, as
the first start is not counted; the disk is not measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
import venv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from marnet_bench.machine import describe_machine
from marnet_sdk.bundle import read_bundle
from marnet_sdk.console import Command, print_table, say

ROOT = Path(__file__).parents[2]
_CODE = """
import sys, time
begun = time.perf_counter()
from marnet_sdk import Classifier
imported = time.perf_counter()
classifier = Classifier(sys.argv[1])
opened = time.perf_counter()
label = classifier.predict(sys.argv[2]).label
answered = time.perf_counter()
print(repr(label), imported - begun, opened - imported, answered - opened, flush=True)
"""
_ABOUT = """
import importlib.util, json, sysconfig
names = [n for n in ("torch", "transformers", "onnx") if importlib.util.find_spec(n)]
print(json.dumps([names, sysconfig.get_path("purelib")]))
"""
PARTS = ("import_s", "open_s", "predict_s")


@click.command(cls=Command)
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--image", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--python", type=click.Path(exists=True, path_type=Path),
              help="The interpreter of an environment; default: one is made.")  # fmt: skip
@click.option("--starts", type=click.IntRange(1), default=20, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(model: Path, image: Path, python: Path | None, starts: int, out: Path) -> None:
    """Measure starts and size, write the record and print its table."""
    backend = read_bundle(model, lazily=True).manifest.backend
    with ExitStack() as stack:
        if python is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            python = made(folder, backend)
        names, site = json.loads(ran(python, _ABOUT))
        if names:
            raise click.ClickException(
                f"{python} has {', '.join(names)}; expected an environment without torch, such as "
                f'pip install ".[{backend}]" makes'
            )
        found: dict[str, Any] = {"bundle": model.name, "backend": backend, "starts": []}
        started(python, model, image)  # brings the files into the page cache
        for _ in range(starts):
            found["starts"].append(started(python, model, image))
        found["bytes"] = sizes(Path(site))
    found["median_s"] = statistics.median(start["whole_s"] for start in found["starts"])
    found["machine"] = describe_machine()
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print_found(found)


def made(folder: Path, backend: str) -> Path:
    """Make an environment with this checkout and what the backend needs; its interpreter."""
    say(f'making an environment: pip install ".[{backend}]"')
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    command = [python, "-m", "pip", "install", "--quiet", f"{ROOT}[{backend}]"]
    if subprocess.run(command, check=False).returncode:
        raise click.ClickException("pip could not make the environment; name one with --python")
    return python


def ran(python: Path, code: str, *arguments: Path) -> str:
    """Run a program that sees nothing but its environment, and return what it prints."""
    command = [python, "-I", "-c", code, *map(os.path.abspath, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{python} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def started(python: Path, model: Path, image: Path) -> dict[str, float]:
    """One start: seconds of its whole process, and of the parts in it that are ours."""
    begun = time.perf_counter()
    printed = ran(python, _CODE, model, image)
    whole = time.perf_counter() - begun
    parts = map(float, printed.split()[-len(PARTS) :])
    return {"whole_s": whole, **dict(zip(PARTS, parts, strict=True))}


def sizes(site: Path) -> dict[str, int]:
    """Bytes of every package in a site-packages folder, but for what pip brings itself."""
    found: dict[str, int] = {}
    for entry in site.iterdir():
        if not entry.name.startswith(("pip", "setuptools", "__pycache__", "_distutils")):
            inside = [entry] if entry.is_file() else entry.rglob("*")
            found[entry.name] = sum(path.stat().st_size for path in inside if path.is_file())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def print_found(found: dict[str, Any]) -> None:
    """Medians of the starts, and the largest packages."""
    starts, size = found["starts"], found["bytes"]
    rows = [("whole process, to its end", f"{found['median_s']:.2f} s")]
    rows += [
        (part.removesuffix("_s"), f"{statistics.median(s[part] for s in starts):.2f} s")
        for part in PARTS
    ]
    rows.append(("installed", f"{sum(size.values()) / 1e6:.0f} MB"))
    rows += [(f"  {name}", f"{n / 1e6:.0f} MB") for name, n in [*size.items()][:5]]
    title = f"{found['bundle']} ({found['backend']}), medians of {len(starts)} starts"
    print_table(title, ("", ""), rows)


if __name__ == "__main__":
    main()
