"""Kill trainings and exports at random moments, and see that nothing is lost.

python tests/kills.py --kills 60 --output benchmarks/results/DATE-kills.json

After every kill the checkpoint or bundle must be absent, or whole and the one that was there
before; the same command must then go on; and the weights must be those of a run that nobody
disturbed.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import click

from marnet_sdk import Classifier
from marnet_sdk.environment import versions
from marnet_sdk.files import sha256_file
from marnet_train.checkpoint import load_checkpoint
from marnet_train.data.digits import write_digits

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
SCRIPTS = Path(sys.executable).parent
_SMALLER = {
    "dim = 128": "dim = 64",
    "hidden = 192": "hidden = 96",
    "epochs = 12": "epochs = 2",
    "epochs = 20": "epochs = 4",
    "epochs = 60": "epochs = 12",
    "epochs = 40": "epochs = 12",
    "views = 4": "views = 1",
    "draws = 2": "draws = 1",
}


def write_quick_recipe(path: Path) -> Path:
    """The digits recipe with few epochs, as a file for the command line."""
    text = (resources.files("marnet_train") / "recipes/digits.toml").read_text("utf-8")
    for old, new in _SMALLER.items():
        assert text.count(f"\n{old}") == 1, old
        text = text.replace(f"\n{old}", f"\n{new}")
    path.write_text(text, "utf-8")
    return path


def fit_command(data: Path, recipe: Path, out: Path) -> list[str]:
    options = ["--data", data, "--recipe", recipe, "--out", out, "--threads", "1", "--force"]
    return [str(SCRIPTS / "marnet-train"), "fit", *map(str, options)]


def export_command(checkpoint: Path, out: Path) -> list[str]:
    options = ["--checkpoint", checkpoint, "--output", out, "--backend", "onnxruntime", "--force"]
    options += ["--precision", "fp16", "--min-agreement", "0.9"]
    return [str(SCRIPTS / "marnet-export"), *map(str, options)]


@dataclass
class Target:
    """A command, what it writes, and how to tell that this is whole."""

    command: list[str]
    out: Path
    fingerprint: Callable[[Path], str]  # raises if what lies there is not whole
    log: Path
    seconds: float = 10.0  # a run takes, from the first sign of work
    kills: Counter[str] = field(default_factory=Counter)
    finished: int = 0

    def state(self) -> str | None:
        return self.fingerprint(self.out) if self.out.exists() else None

    def at_work(self) -> bool:
        """Whether something beside the target shows that the command has begun to write."""
        beside = self.out.parent.iterdir() if self.out.parent.exists() else ()
        return any(path.name != self.out.name and self.out.name in path.name for path in beside)

    def run(self, kill: signal.Signals | None = None, share: float = 0.0) -> bool:
        """Run the command, killed after a share of its time; whether it came to its end."""
        leftovers = self.at_work()
        with self.log.open("ab") as log:
            process = subprocess.Popen(self.command, stdout=log, stderr=log)
            started = time.perf_counter()
            while not leftovers and not self.at_work() and not _ended(process, 0.002):
                pass
            if kill is None:
                process.wait()
                self.seconds = time.perf_counter() - started
            elif not _ended(process, share * self.seconds):
                process.send_signal(kill)
                self.kills[kill.name] += 1
                process.wait()
        if process.returncode == 0:
            self.finished += 1
        elif kill is None:
            raise AssertionError(f"{self.command} failed:\n{self.log.read_text()[-3000:]}")
        return process.returncode == 0

    def check(self, before: str | None, reference: str) -> None:
        """After a kill: what was there before, or the whole new one."""
        assert self.state() in (before, reference), f"{self.out} is neither old nor new"


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def weights(checkpoint: Path) -> str:
    load_checkpoint(checkpoint)
    return sha256_file(checkpoint / "model.safetensors")


def answers(bundle: Path) -> str:
    """A bundle that opens has checked every byte and its golden answers."""
    Classifier(bundle)
    return sha256_file(bundle / "golden/answers.safetensors")


def torment(target: Target, kills: int, rng: random.Random) -> str:
    """Run to the end once, then kill `kills` runs; returns the fingerprint that every end gave."""
    target.run()
    reference = target.state()
    assert reference is not None
    while target.kills.total() < kills:
        before = target.state()
        target.run(rng.choice(SIGNALS), rng.random())
        target.check(before, reference)
        if rng.random() < 0.2:  # from nothing, too
            shutil.rmtree(target.out, ignore_errors=True)
    target.run()
    assert target.state() == reference, "the weights are not those of an undisturbed run"
    return reference


def measure(kills: int, seed: int) -> dict[str, Any]:
    """Two thirds of the kills on training, one third on export."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_digits(folder / "digits")
        recipe = write_quick_recipe(folder / "quick.toml")
        checkpoint, bundle = folder / "runs/quick", folder / "bundles/quick.marnet"
        fit = Target(fit_command(folder / "digits", recipe, checkpoint), checkpoint, weights,
                     folder / "fit.log")  # fmt: skip
        export = Target(export_command(checkpoint, bundle), bundle, answers, folder / "export.log")
        torment(fit, kills - kills // 3, rng)
        torment(export, kills // 3, rng)
        resumed = fit.log.read_text().count("going on from")
    return {
        "kills": fit.kills.total() + export.kills.total(),
        "lost": 0,
        "training": {"signals": dict(fit.kills), "finished": fit.finished, "resumed": resumed},
        "export": {"signals": dict(export.kills), "finished": export.finished},
        "seed": seed,
        "versions": versions(("marnet", "torch", "onnxruntime", "safetensors")),
    }


@click.command()
@click.option("--kills", type=click.IntRange(min=3), default=60, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(kills: int, seed: int, output: Path) -> None:
    """Kill marnet-train fit and marnet-export at random moments; stop at the first loss."""
    result = measure(kills, seed)
    output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
