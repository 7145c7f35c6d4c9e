"""Environments of their own for tests: only what pip would install for a requirement, no network.

Nothing is downloaded: the files of distributions that are installed here are linked there.
"""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(requirement: str, of_marnet: Iterable[str] | None = None) -> set[str]:
    """The distributions that pip would install for it, other than marnet.

    Args:
        of_marnet: what marnet requires; None: as it is installed here.
    """
    found: set[tuple[str, str]] = set()
    todo = [Requirement(requirement)]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        lines = list(of_marnet or []) if name == "marnet" else []
        for extra in ("", *wanted.extras):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            needs = map(Requirement, lines or metadata.requires(name) or [])
            todo += [n for n in needs if n.marker is None or n.marker.evaluate({"extra": extra})]
    return {name for name, _ in found} - {"marnet"}


@cache
def _owners() -> dict[str, set[str]]:
    """Top-level name in site-packages -> the distributions that have files there."""
    owners: dict[str, set[str]] = {}
    for distribution in metadata.distributions():
        name = distribution.name  # reads a file each time
        for line in (distribution.read_text("RECORD") or "").splitlines():
            owners.setdefault(line.partition("/")[0], set()).add(name)
    return owners


def link_files(distribution: str, site: Path) -> None:
    """Show every file of an installed distribution in another site-packages folder.

    A folder that no other distribution has files in is linked as a whole: torch has 15,000 files.
    """
    for file in metadata.distribution(distribution).files or []:
        alone = len(file.parts) > 1 and len(_owners()[file.parts[0]]) == 1
        shown = Path(file.parts[0]) if alone else Path(file)
        source, target = Path(str(file.locate())), site / shown
        if ".." in file.parts or target.is_symlink() or not source.is_file():
            continue  # scripts, which lie outside site-packages; or linked already
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.parents[len(file.parts) - 2] if alone else source)


def make_environment(folder: Path, distributions: Iterable[str]) -> Path:
    """A virtual environment that holds these distributions and nothing else; its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    for name in distributions:
        link_files(name, site_packages(folder / "bin/python"))
    return folder / "bin/python"


def site_packages(python: Path) -> Path:
    """Where the environment of an interpreter keeps its packages."""
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    return site


def run(python: Path, code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code there, with every warning an error."""
    # -I: neither the working directory nor the user's packages nor PYTHON* variables
    command = [python, "-I", "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)
