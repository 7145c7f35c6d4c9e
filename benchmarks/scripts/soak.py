"""Ask for images for a long time while bundles take turns, and see whether anything is left behind.

    python benchmarks/scripts/soak.py --model bundles/a.marnet --other bundles/b.marnet --out FILE

Callers ask for images of several sizes, each the next when the one before is answered. Some of what
they send is no image, some have a deadline that is too short, and some give up. Meanwhile the two
bundles replace each other. Every answer is compared with that of a single call of the bundle that
says it gave it. Resident memory, threads and descriptors are those of this process; with --server,
of a `marnet-serve` of its own, which is asked over HTTP.

The change of memory is that of the medians of equal parts of the run, one to the next, with
Student's 95 % interval. Some requests and reloads before it, in which the pools of threads and of
memory grow, and the first fifth of the run do not count.
"""

from __future__ import annotations

import http.client
import io
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import psutil
from PIL import Image

from marnet_bench.machine import describe_machine
from marnet_bench.photographs import golden_images
from marnet_sdk import Classifier
from marnet_sdk.console import Command, print_table, say
from marnet_sdk.errors import DeadlineExceeded, ImageError, QueueFull
from marnet_sdk.serve.deployment import Deployment
from marnet_train.measures import student_interval

SIDES = (28, 64, 200, 640)  # pixels of the images that are asked for
SHORT = 1e-4  # seconds, in which nothing is answered
# What becomes of requests, and of how many each is asked for.
ANSWERED, NO_IMAGE, TOO_LATE, GIVEN_UP = "answered", "no image", "too late", "given up"
SHARES = {ANSWERED: 0.82, NO_IMAGE: 0.06, TOO_LATE: 0.06, GIVEN_UP: 0.06}
BROKEN = (b"", b"no image", b"\xff\xd8\xff\xe0" + b"x" * 500, b"\x89PNG\r\n\x1a\n" + bytes(40))
_PATIENCE = 120.0  # seconds until a request counts as hanging
_LOOKS, _PARTS = 240, 12  # at the memory, and parts of the run that are compared
_CALM, _SETTLE = 0.5, 20.0  # seconds
_EARLY = 40  # reloads before it is measured, at most
_MAIN = "from marnet_sdk.server.cli import main; main()"


@dataclass(frozen=True)
class Said:
    """An answer: the digest of the bundle that gave it, the likeliest class and its score."""

    bundle: str
    index: int
    score: float


class Target(Protocol):
    """Is what answers, and the process that it does so in."""

    process: psutil.Process

    def ask(self, image: bytes, deadline: float | None = None) -> Said | str:
        """Ask for an image: what was said, or why there is no answer."""
        ...

    def give_up(self, image: bytes) -> None:
        """Ask for an image, and do not wait for the answer."""
        ...

    def reload(self) -> None:
        """Go on with the bundle that the link points to now."""
        ...

    def hang_up(self) -> None:
        """Close what this thread has open."""
        ...


class InProcess:
    """A `Deployment` in this process."""

    def __init__(self, link: Path) -> None:
        self.process = psutil.Process()
        self._deployment = Deployment(lambda: Classifier(link))
        self.close = self._deployment.close

    def ask(self, image: bytes, deadline: float | None = None) -> Said | str:
        try:
            with self._deployment.using() as classifier:
                future = classifier.submit(image, deadline=deadline)
                digest = classifier.bundle.digest
            answer = future.result(_PATIENCE)
        except ImageError:
            return NO_IMAGE
        except (DeadlineExceeded, QueueFull) as error:
            return TOO_LATE if isinstance(error, DeadlineExceeded) else "queue full"
        return Said(digest, answer.index, answer.score)

    def give_up(self, image: bytes) -> None:
        with self._deployment.using() as classifier:
            classifier.submit(image).cancel()

    def reload(self) -> None:
        self._deployment.reload()

    def hang_up(self) -> None:
        pass


class Served:
    """A `marnet-serve` of its own, with one connection for each thread that asks."""

    def __init__(self, link: Path) -> None:
        words = [sys.executable, "-c", _MAIN, "--model", str(link), "--port", "0"]
        self._served = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.process, self._mine = psutil.Process(self._served.pid), threading.local()
        self._port = int(re.findall(r":(\d+)/", self._line("listening on"))[0])
        self._line("self-test passed")

    def ask(self, image: bytes, deadline: float | None = None) -> Said | str:
        status, found = self._post(image, deadline)
        if status != http.client.OK:
            return {400: NO_IMAGE, 504: TOO_LATE, 429: "queue full"}[status]
        (answer,) = found["answers"]
        return Said(found["bundle"], answer["index"], answer["score"])

    def give_up(self, image: bytes) -> None:
        connection = self._connect()
        connection.request("POST", "/predict", image, {"Content-Type": "image/png"})
        connection.close()

    def reload(self) -> None:
        self._served.send_signal(signal.SIGHUP)
        self._line("reloaded: ")

    def close(self) -> None:
        self._served.terminate()
        self._served.communicate(timeout=_PATIENCE)

    def hang_up(self) -> None:
        if hasattr(self._mine, "connection"):
            self._mine.connection.close()

    def _post(self, image: bytes, deadline: float | None) -> tuple[int, Any]:
        if not hasattr(self._mine, "connection"):
            self._mine.connection = self._connect()
        path = "/predict" + ("" if deadline is None else f"?deadline_ms={1e3 * deadline:g}")
        self._mine.connection.request("POST", path, image, {"Content-Type": "image/png"})
        response = self._mine.connection.getresponse()
        return response.status, json.loads(response.read())

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=_PATIENCE)

    def _line(self, expected: str) -> str:
        assert self._served.stderr is not None
        if expected not in (line := self._served.stderr.readline()):
            raise click.ClickException(f"marnet-serve says {line!r}, expected {expected!r}")
        return line


def images_for(bundles: Sequence[Path]) -> tuple[list[bytes], dict[str, list[Said]]]:
    """Images of several sizes, and what each bundle says of them in single calls, by its digest.

    Images that are a close call for one of the bundles are left out.
    """
    images = []
    with Classifier(bundles[0]) as classifier:
        for side in SIDES:
            for kind, file in zip(
                ("PNG", "JPEG") * 4, golden_images(classifier.bundle, 8), strict=True
            ):
                picture = Image.open(io.BytesIO(file)).convert("RGB").resize((side, side))
                picture.save(out := io.BytesIO(), kind)
                images.append(out.getvalue())
    said, clear = {}, np.ones(len(images), bool)
    for path in bundles:
        with Classifier(path) as classifier:
            answers = [classifier.predict(image) for image in images]
            clear &= [a.top[0].score - a.top[1].score > 0.05 for a in answers]
            digest = classifier.bundle.digest
            said[digest] = [Said(digest, a.index, a.score) for a in answers]
    kept = np.flatnonzero(clear)
    return [images[i] for i in kept], {d: [all_[i] for i in kept] for d, all_ in said.items()}


class Soak:
    """Callers that ask until all requests are made."""

    def __init__(
        self, target: Target, images: Sequence[bytes], said: dict[str, list[Said]], requests: int
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self.done = 0
        self.requests = requests
        self.looks: list[dict[str, float]] = []  # at the process, at equal steps of the requests
        self._target, self._images, self._said = target, images, said
        self._numbers, self._lock = count(), threading.Lock()

    def call(self) -> None:
        """Ask again and again.

        Raises:
            ClickException: an answer is not the one of the bundle that gave it.
        """
        while (number := next(self._numbers)) < self.requests:
            outcome = self._request(random.Random(number))
            with self._lock:
                if self.done % max(1, self.requests // _LOOKS) == 0:
                    self.looks.append({"requests": self.done} | held(self._target.process))
                self.outcomes[outcome] += 1
                self.done += 1
        self._target.hang_up()

    def _request(self, rng: random.Random) -> str:
        (what,) = rng.choices([*SHARES], [*SHARES.values()])
        place = rng.randrange(len(self._images))
        if what == GIVEN_UP:
            self._target.give_up(self._images[place])
            return GIVEN_UP
        image = rng.choice(BROKEN) if what == NO_IMAGE else self._images[place]
        found = self._target.ask(image, SHORT if what == TOO_LATE else None)
        if isinstance(found, str):
            return found
        if found.index != self._said[found.bundle][place].index:
            raise click.ClickException(f"image {place}: got {found}, and alone it is "
                                       f"{self._said[found.bundle][place]}")  # fmt: skip
        return ANSWERED


def held(process: psutil.Process) -> dict[str, float]:
    """Resident MiB, threads and descriptors of a process."""
    with process.oneshot():
        memory = process.memory_info().rss / 2**20
        return {"mib": memory, "threads": process.num_threads(), "fds": process.num_fds()}


def ask_all(run: Soak, callers: int, reloads: int, swap: Callable[[], None]) -> None:
    """Let so many callers make all requests of a run, and reload at equal steps of them."""
    due = deque((i + 1) * run.requests // (reloads + 1) for i in range(reloads))
    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(run.call) for _ in range(callers)]
        while due:  # also where the requests end before the reloads
            if run.done >= due[0] or all(future.done() for future in futures):
                due.popleft()
                swap()
            time.sleep(0.005)
        for future in futures:
            future.result()


def swapped(link: Path, bundles: Sequence[Path]) -> Iterator[None]:
    """Let the link point to one bundle after the other, each time in one step."""
    for number in count():
        (fresh := link.with_name("fresh")).symlink_to(bundles[number % 2].resolve())
        fresh.rename(link)
        yield


def slope(looks: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Change of resident memory, KiB for each 1,000 requests, with its 95 % interval."""
    late = looks[len(looks) // 5 :]
    if len(late) < 2 * _PARTS:
        return {"kib": None, "low": None, "high": None}
    parts = np.array_split(np.array([[look["requests"], look["mib"]] for look in late]), _PARTS)
    at, mib = np.array([np.median(part, axis=0) for part in parts]).T
    changes = 1024 * np.diff(mib) / np.diff(at) * 1000
    low, high = student_interval(changes.tolist())
    return {"kib": float(changes.mean()), "low": low, "high": high}


def settled(process: psutil.Process, wanted: dict[str, float]) -> dict[str, float]:
    """Wait until a process holds no more than wanted, or some seconds, and tell what it holds."""
    end = time.monotonic() + _SETTLE
    while True:
        found = held(process)
        if not left(wanted, found) or time.monotonic() > end:
            return found
        time.sleep(0.05)


def left(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Name what there is more of than before."""
    return [name for name in ("threads", "fds") if after[name] > before[name]]


def soak(
    target: Target, run: Soak, images: Sequence[bytes], ask_all: Callable[[Soak], None]
) -> dict[str, Any]:
    """Measure a target that is warm."""
    first = [target.ask(image) for image in images]
    target.hang_up()  # a server closes what idles
    time.sleep(_CALM)  # until what ended before is gone
    before, started = held(target.process), time.perf_counter()
    ask_all(run)
    seconds = time.perf_counter() - started
    last = [target.ask(image) for image in images]
    target.hang_up()
    return {
        "seconds": seconds,
        "outcomes": dict(run.outcomes),
        "same_at_the_end": first == last,
        "before": before,
        "after": settled(target.process, before),
        "kib_per_1000": slope(run.looks),
        "looks": run.looks,
    }


@click.command(cls=Command)
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--other", type=click.Path(exists=True, path_type=Path), required=True,
              help="A bundle that takes turns with it.")  # fmt: skip
@click.option("--requests", type=click.IntRange(1), default=200_000, show_default=True)
@click.option("--reloads", type=click.IntRange(0), default=40, show_default=True, help="Even.")
@click.option("--callers", type=click.IntRange(1), default=16, show_default=True)
@click.option("--server", is_flag=True, help="Ask marnet-serve instead of the classifier itself.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(
    model: Path, other: Path, requests: int, reloads: int, callers: int, server: bool, out: Path
) -> None:
    """Soak a classifier or a server, write the record and print its table.

    Ends with an error for wrong answers, for threads or descriptors that are left, and for other
    answers at the end than at the start.
    """
    bundles, reloads = (model, other), reloads // 2 * 2  # so that it ends with the first
    images, said = images_for(bundles)
    with tempfile.TemporaryDirectory() as folder:
        swaps = swapped(link := Path(folder) / "current.marnet", bundles)
        next(swaps)
        target = Served(link) if server else InProcess(link)

        def swap() -> None:
            next(swaps)
            target.reload()

        try:  # pools of threads and of memory have their size afterwards
            turns = min(reloads, _EARLY)
            early = Soak(target, images, said, min(requests, 40 * callers + 60 * turns))
            ask_all(early, callers, turns, swap)
            run = Soak(target, images, said, requests)
            found = soak(target, run, images, lambda run: ask_all(run, callers, reloads, swap))
        finally:
            target.close()
    about = {"target": "marnet-serve" if server else "in process", "requests": requests}
    about |= {"bundles": [path.name for path in bundles], "reloads": reloads, "callers": callers}
    found = about | found | {"machine": describe_machine()}
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print_found(found)
    if (more := left(found["before"], found["after"])) or not found["same_at_the_end"]:
        what = f"{', '.join(more)} are left" if more else "other answers at the end"
        raise click.ClickException(f"{what}; see {out}")


def print_found(found: dict[str, Any]) -> None:
    """A row for each thing that might be left behind."""
    before, after, change = found["before"], found["after"], found["kib_per_1000"]
    rows = [
        ("resident MiB", f"{before['mib']:.1f}", f"{after['mib']:.1f}"),
        ("threads", str(before["threads"]), str(after["threads"])),
        ("descriptors", str(before["fds"]), str(after["fds"])),
    ]
    print_table(found["target"], ("", "before", "after"), rows)
    say(f"{found['requests']} requests and {found['reloads']} reloads in {found['seconds']:.0f} s")
    if change["kib"] is not None:
        say(f"memory changes by {change['kib']:+.1f} KiB for each 1,000 requests "
            f"(95 % interval {change['low']:+.1f} to {change['high']:+.1f})")  # fmt: skip
    say(", ".join(f"{outcome}: {number}" for outcome, number in sorted(found["outcomes"].items())))


if __name__ == "__main__":
    main()
