"""This module is `--backend auto`: it builds with every backend that this machine has, and keeps
the fastest that passes.

Each backend is built and verified in a process of its own, so that one that crashes is a line of
the report. Those that pass then answer the same images in turn, from file bytes to predictions.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from marnet_export.build.builder import BUILDERS, check_device, device_of
from marnet_export.choose.sweep import in_turn
from marnet_export.job import export_bundle
from marnet_export.lower.methods import lower
from marnet_export.seal import finish
from marnet_export.settings import Say, Settings
from marnet_export.text import check_text
from marnet_export.work import at_work
from marnet_sdk.backends import why_unavailable
from marnet_sdk.bundle import FIDELITY, reseal_bundle
from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import (
    BackendUnavailable,
    ExportError,
    InvalidInput,
    MarnetError,
    VerificationFailed,
)
from marnet_train.checkpoint import load_checkpoint, write_json

BATCHES = (1, 16)  # images in a call; the first decides
_SETTLE = 0.05  # seconds; a deployed process has one runtime, here they share the cores


@dataclass(frozen=True)
class Candidate:
    """This is what became of one backend."""

    backend: str
    outcome: str  # passed, refused, crashed, unavailable
    reason: str = ""  # why not
    exit_code: int = 0  # of the refusal
    export_s: float | None = None
    agreement: float | None = None
    milliseconds: dict[str, float] | None = None  # images in a call -> a call's median

    def sentence(self) -> str:
        """One line of the report."""
        if self.milliseconds is None or self.agreement is None:
            return f"{self.backend}: {self.outcome}" + (f": {self.reason}" if self.reason else "")
        times = ", ".join(f"{ms:.3g} ms for {n}" for n, ms in self.milliseconds.items())
        return f"{self.backend}: {times}; agreement {self.agreement:.2%}"


def export_fastest(
    checkpoint: Path,
    output: Path,
    settings: Settings,
    *,
    data: Path | None = None,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> list[Candidate]:
    """Write the bundle of the fastest backend that passes; fidelity.json lists all of them.

    Returns:
        The candidates, the one that was written first, and then the others as they are ranked.

    Raises:
        BackendUnavailable: a GPU is asked for, and no backend can run on one here.
        VerificationFailed, ExportError: none passes; lists why.
    """
    backends = _backends(settings.device)
    with at_work(output, overwrite=overwrite) as fresh:
        if settings.text:  # which only the winner gets: too late to find that it cannot be had
            loaded = load_checkpoint(checkpoint)
            check_text(loaded, lower(loaded.model))
        # Inside: the winner moves, which copies nothing, and what a kill leaves goes with it.
        with tempfile.TemporaryDirectory(prefix=".", dir=fresh) as scratch:
            found = [
                _build_apart(backend, Path(scratch), checkpoint, settings, data, say)
                for backend in backends
            ]
            ranked = _race(found, Path(scratch))
            for candidate in ranked:
                say(candidate.sentence())
            ranked = _finish_first(ranked, Path(scratch), checkpoint, settings, say)
            _move(Path(scratch) / ranked[0].backend, fresh)
        report = json.loads((fresh / FIDELITY).read_text("utf-8"))
        write_json(fresh / FIDELITY, report | {"backends": [asdict(c) for c in ranked]})
        reseal_bundle(fresh, settings=asdict(settings))
        Classifier(fresh)
    say(f"{ranked[0].backend} is the fastest here")
    return ranked


def _backends(device: str | None) -> list[str]:
    """Return the backends that build for a device; None: all."""
    if device is None:
        return list(BUILDERS)
    backends, reasons = [], []
    for backend in BUILDERS:
        try:
            device_of(backend, device)
        except ExportError:
            continue
        backends.append(backend)
        reasons += [f"{backend}: {reason}"] if (reason := _why_not(backend, device)) else []
    if len(reasons) == len(backends):
        raise BackendUnavailable(f"nothing runs on {device} here: {'; '.join(reasons)}")
    return backends


def _why_not(backend: str, device: str | None) -> str | None:
    """Say why what a backend builds cannot run on this machine."""
    if reason := why_unavailable(backend):
        return reason
    try:
        check_device(backend, device_of(backend, device))
    except MarnetError as error:
        return str(error)
    return None


def _build_apart(
    backend: str, folder: Path, checkpoint: Path, settings: Settings, data: Path | None, say: Say
) -> Candidate:
    """Export with one backend, in another process."""
    if reason := _why_not(backend, settings.device):
        return Candidate(backend, "unavailable", reason, exit_code=5)
    say(f"{backend}: building and verifying")
    job = {
        "checkpoint": str(checkpoint.absolute()),
        "output": str(folder / backend),
        "answer": str(folder / f"{backend}.json"),  # what a process prints may be anybody's
        "answers": str(folder / "reference"),  # the float32 model's, computed once for all
        "data": data and str(data.absolute()),
        # Text encoder and checkpoint are for the winner.
        "settings": asdict(replace(settings, backend=backend, text=False, source=False)),
    }
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "marnet_export.choose.race"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = round(time.perf_counter() - started, 1)
    if done.returncode:
        return Candidate(backend, "crashed", _cause(done), exit_code=1, export_s=seconds)
    answer = json.loads(Path(job["answer"]).read_text("utf-8"))
    if "refused" in answer:
        code = answer["exit_code"]
        if code == InvalidInput.exit_code:  # whatever the backend
            raise InvalidInput(answer["refused"])
        return Candidate(backend, "refused", answer["refused"], exit_code=code, export_s=seconds)
    return Candidate(backend, "passed", export_s=seconds, agreement=answer["agreement"])


def _cause(done: subprocess.CompletedProcess[str]) -> str:
    """Say how a process ended, and the last thing that it said."""
    number = done.returncode
    how = f"signal {signal.Signals(-number).name}" if number < 0 else f"exit code {number}"
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"{how}, {said[-1][:300]}" if said else how


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """One export, as its process does it."""
    data = job["data"] and Path(job["data"])
    checkpoint, output, answers = (Path(job[key]) for key in ("checkpoint", "output", "answers"))
    try:
        settings = Settings(**job["settings"])
        fidelity = export_bundle(checkpoint, output, settings, data=data, answers=answers)
    except MarnetError as error:
        return {"refused": str(error), "exit_code": error.exit_code}
    return {"agreement": fidelity.top1_agreement}


def _race(found: list[Candidate], folder: Path) -> list[Candidate]:
    """Time those that passed, in turn; the fastest first, then what did not pass."""
    classifiers = {
        c.backend: Classifier(folder / c.backend) for c in found if c.outcome == "passed"
    }
    if not classifiers:
        return found
    taken: dict[str, dict[str, float]] = {backend: {} for backend in classifiers}
    for batch in BATCHES:
        calls = {
            backend: partial(classifier.predict, _golden(classifier, batch))
            for backend, classifier in classifiers.items()
        }
        for backend, milliseconds in in_turn(calls, settle=_SETTLE).items():
            taken[backend][str(batch)] = round(milliseconds, 4)
    timed = [replace(c, milliseconds=taken.get(c.backend)) for c in found]
    first = str(BATCHES[0])
    return sorted(timed, key=lambda c: c.milliseconds[first] if c.milliseconds else float("inf"))


def _golden(classifier: Classifier, count: int) -> list[bytes]:
    """The files of the golden images, repeated to `count`."""
    images = [path.read_bytes() for path in classifier.bundle.golden_images()]
    return [images[i % len(images)] for i in range(count)]


def _finish_first(
    ranked: list[Candidate], folder: Path, checkpoint: Path, settings: Settings, say: Say
) -> list[Candidate]:
    """Add text encoder and checkpoint to the fastest that takes them, which comes first then."""
    refused: list[Candidate] = []
    for i, candidate in enumerate(ranked):
        if candidate.outcome != "passed":
            break
        try:
            finish(
                folder / candidate.backend, checkpoint, replace(settings, backend=candidate.backend)
            )
        except (ExportError, VerificationFailed) as error:
            reason, code = str(error), error.exit_code
            refused.append(
                replace(
                    candidate, outcome="refused", reason=reason, exit_code=code, milliseconds=None
                )
            )
            say(refused[-1].sentence())
        else:
            return [candidate, *ranked[i + 1 :], *refused]
    raise _none_passes([*ranked[len(refused) :], *refused])


def _none_passes(found: list[Candidate]) -> MarnetError:
    lines = "; ".join(candidate.sentence() for candidate in found)
    verified = any(c.exit_code == VerificationFailed.exit_code for c in found)
    kind = VerificationFailed if verified else ExportError
    return kind(
        f"no backend could be built and verified here; no bundle was written: {lines}. Name one "
        "with --backend to see it alone, or try --precision fp32"
    )


def _move(source: Path, target: Path) -> None:
    for entry in source.iterdir():
        shutil.move(entry, target / entry.name)


def main() -> None:
    """Do the export that standard input describes, and write the answer where it says."""
    job = json.load(sys.stdin)
    write_json(Path(job["answer"]), work(job))


if __name__ == "__main__":
    main()
