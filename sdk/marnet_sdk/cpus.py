"""The CPUs that this process may use: by its affinity mask, their cores, and its groups' quota.

A container platform limits a process by the time that it grants in each period (`docker run
--cpus=1`, a pod's CPU limit) and not by the CPUs that it shows. With a thread for each of those,
the grant is gone early in the period, and all of them stand still until the next one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path, PurePosixPath

from marnet_sdk.arguments import positive
from marnet_sdk.errors import InvalidInput

_ROOT = Path("/")


@dataclass(frozen=True)
class Cpus:
    """The processors that there are for this process."""

    machine: int  # logical CPUs of the machine
    allowed: int  # of them, those that its affinity mask lets it run on
    cores: int  # physical cores among the allowed
    quota: float | None  # CPUs whose whole time its control groups grant; None: no limit is known

    @property
    def threads(self) -> int:
        """The number of threads worth having: one a core, at most the quota, rounded up."""
        return self.cores if self.quota is None else max(1, min(self.cores, ceil(self.quota)))

    @property
    def limited(self) -> bool:
        """Tell whether the process may use less than the machine has."""
        return self.allowed < self.machine or (self.quota or self.machine) < self.machine

    def __str__(self) -> str:
        quota = "" if self.quota is None else f", with a quota of {self.quota:.3g}"
        return f"{self.allowed} of {self.machine} CPUs ({self.cores} cores){quota}"


def cpus(root: Path = _ROOT) -> Cpus:
    """Find what this process may use now. `root` is the folder that holds proc and sys."""
    machine = os.cpu_count() or 1
    mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(machine))
    return Cpus(max(machine, len(mask)), len(mask), count_cores(mask, root), quota(root))


def check_threads(threads: int | None) -> int | None:
    """The number that a user asked for; None is left to whoever runs the threads.

    Raises:
        InvalidInput: no integer, below 1, or more than the machine has CPUs.
    """
    here = cpus()
    if threads is not None and (threads := positive("threads", threads)) > here.machine:
        raise InvalidInput(
            f"threads: got {threads}, but this machine has {here.machine} CPUs; pass at most that "
            f"many, or leave it out for {here.threads}: this process may use {here}"
        )
    return threads


def wait_briefly() -> None:
    """Let OpenMP's waiting threads spin for about a millisecond and sleep then.

    To be called before torch is imported, whose libgomp reads the variable when it is loaded. By
    itself it spins for many times longer, on cores that another process or a quota may need. What
    the user's environment says about it stands.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "20000"


def count_cores(mask: set[int], root: Path = _ROOT) -> int:
    """Physical cores that the CPUs of `mask` belong to; each CPU is one where nothing is said."""
    topology = root / "sys/devices/system/cpu"
    siblings = (_read(topology / f"cpu{n}/topology/thread_siblings_list") for n in mask)
    return len({text or f"cpu{n}" for n, text in zip(mask, siblings, strict=True)})


def quota(root: Path = _ROOT) -> float | None:
    """The least that a control group of this process, or one around it, grants, in CPUs."""
    try:
        granted = [_granted(folder) for folder in _groups(root)]
    except ValueError:  # an emulated /proc that is written otherwise
        return None
    return min((cpus for cpus in granted if cpus is not None), default=None)


def _granted(folder: Path) -> float | None:
    """Read what the control group of `folder` grants: a group of version 2, or else of 1."""
    words = (_read(folder / "cpu.max") or "").split() or [
        (_read(folder / f"cpu.cfs_{name}_us") or "") for name in ("quota", "period")
    ]
    try:
        time, period = (int(word) for word in words)
    except ValueError:  # "max", or no such file
        return None
    return time / period if time > 0 and period > 0 else None


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the groups around this process that may limit its CPU time, v1 and v2.

    A container may see the path of its group on the host, but only that group's own folder: what
    is not there has no files to read.
    """
    paths = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = PurePosixPath(path)
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        is_it = kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(","))
        if is_it and kind in paths:
            _, _, _, above, point = mount.split(" ")[:5]
            folder = root / point.lstrip("/")
            inside = paths[kind]
            inside = inside.relative_to(above) if inside.is_relative_to(above) else inside
            names = [name for name in inside.parts if name not in ("/", "..")]
            yield folder
            for depth in range(len(names)):
                yield folder.joinpath(*names[: depth + 1])


def _read(path: Path) -> str | None:
    """The text of a small file, or None where it cannot be read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None


def int8_sums_overflow() -> bool:
    """Tell whether sums of uint8 times int8 products overflow on this CPU, as on x86 without VNNI.

    Runtimes have slower products that do not, or weights of 7 bits.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx2" in flags and "vnni" not in flags
