"""Many callers of one classifier: threads, tasks of several event loops, streams."""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readme
from PIL import Image
from readme import ROOT, blocks
from tolerances import BUILT
from waiting import until

from marnet_sdk import Classifier, ImageError, Prediction
from marnet_sdk.backends import InTwoCalls
from marnet_sdk.bundle import BatchTimes, reseal_bundle
from marnet_sdk.cpus import cpus
from marnet_sdk.environment import processor
from marnet_sdk.errors import (
    ClassifierClosed,
    DeadlineExceeded,
    InferenceError,
    InvalidInput,
    QueueFull,
)
from marnet_sdk.serve.policy import Batching

SECONDS = 60  # after which a test that waits has failed


@pytest.fixture(scope="module")
def bundle(bundle_of) -> Path:
    return bundle_of("onnxruntime", "fp32")


@pytest.fixture(scope="module")
def opened(bundle) -> Iterator[Classifier]:
    with Classifier(bundle, threads=1) as classifier:
        yield classifier


@pytest.fixture
def classifier(opened) -> Classifier:
    """With a batcher that has not learned anything yet."""
    opened._serve([opened._run], Batching(decoders=1))
    return opened


@pytest.fixture(scope="module")
def paths(digits: Path) -> list[Path]:
    return sorted((digits / "test").glob("*.png"))[:12]


@pytest.fixture(scope="module")
def expected(opened, paths) -> list[Prediction]:
    return [opened.predict(path) for path in paths]


def ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("marnet-")}


def check(answer: Prediction, wanted: Prediction) -> None:
    """Check that an answer is the same, but for how sums are rounded in another batch."""
    assert (answer.label, answer.index, answer.samples) == (
        *(wanted.label, wanted.index),
        wanted.samples,
    )
    scores = {top.index: top.score for top in wanted.top}
    for top in answer.top:
        assert top.score == pytest.approx(scores.get(top.index, top.score), abs=BUILT["fp32"])


class Gate(InTwoCalls):
    """A backend that waits at a gate."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.open, self.sizes = backend, threading.Event(), list[int]()

    def encode(self, pixels):
        self.sizes.append(len(pixels))
        assert self.open.wait(SECONDS)
        return self.backend.encode(pixels)

    def refine(self, x_v, tables):
        return self.backend.refine(x_v, tables)


@pytest.fixture
def gate(classifier, monkeypatch) -> Iterator[Gate]:
    gate = Gate(classifier._guard.check())
    monkeypatch.setattr(classifier._guard, "_backend", gate)
    yield gate
    gate.open.set()


def test_the_answers_are_those_of_predict_whatever_shares_the_batch(
    classifier, paths, expected, gate
):
    first = classifier.submit(paths[0])
    until(lambda: gate.sizes)
    sources = [str(paths[1]), paths[2].read_bytes(), Image.open(paths[3]), *paths[4:]]
    futures = [classifier.submit(image, top_k=i) for i, image in enumerate(sources, 1)]
    until(lambda: classifier.batching_stats().ready >= len(futures))
    gate.open.set()
    check(first.result(SECONDS), expected[0])
    for count, (future, wanted) in enumerate(zip(futures, expected[1:], strict=True), 1):
        answer = future.result(SECONDS)
        assert len(answer.top) == min(count, 10)
        check(answer, wanted)
    assert gate.sizes[:2] == [1, 4]  # four times as many as were tried before, and no more


def test_other_samples_run_in_other_batches(classifier, paths, gate):
    first = classifier.submit(paths[0])
    until(lambda: gate.sizes)
    futures = [classifier.submit(paths[1], samples=k) for k in (1, 2, 1, 2)]
    until(lambda: classifier.batching_stats().ready >= 4)
    gate.open.set()
    assert [future.result(SECONDS).samples for future in futures] == [1, 2, 1, 2]
    assert first.result(SECONDS).samples == 1
    assert sum(gate.sizes) == 5
    wanted = classifier.predict(paths[1], samples=2)
    check(futures[1].result(), wanted)
    kinds = {kind.samples for kind in classifier.batching_stats().learned}
    assert kinds == {1, 2}


def test_an_image_that_is_not_usable_fails_alone_and_is_named_as_by_predict(
    classifier, paths, expected, tmp_path
):
    bad = tmp_path / "notes.jpg"
    bad.write_bytes(b"these are not pixels")
    futures = [classifier.submit(image) for image in (paths[0], bad, b"x", paths[1])]
    check(futures[0].result(SECONDS), expected[0])
    check(futures[3].result(SECONDS), expected[1])
    for future, image in ((futures[1], bad), (futures[2], b"x")):
        with pytest.raises(ImageError) as caught:
            future.result(SECONDS)
        with pytest.raises(ImageError) as alone:
            classifier.predict(image)
        assert str(caught.value) == str(alone.value)


class Spoiling(Gate):
    """A backend that has no number for images with a white corner."""

    white = 0.0  # as the model sees it

    def encode(self, pixels):
        x_v = super().encode(pixels)
        x_v[pixels[:, 0, 0, 0] == self.white] = np.nan
        return x_v


def test_an_image_whose_logits_are_no_numbers_fails_alone(classifier, paths, expected, monkeypatch):
    spoiling = Spoiling(classifier._guard.check())
    monkeypatch.setattr(classifier._guard, "_backend", spoiling)
    spoiling.open.set()
    white = np.full((8, 8, 3), 255, np.uint8)
    spoiling.white = classifier.preprocess.pixels([white])[0, 0, 0, 0]
    first = classifier.submit(white)
    with pytest.raises(InferenceError, match=r"the logits of the image hold NaN .* encoder"):
        first.result(SECONDS)
    spoiling.open.clear()
    begun = len(spoiling.sizes)
    blocking = classifier.submit(np.zeros((8, 8, 3), np.uint8))
    until(lambda: len(spoiling.sizes) > begun)
    futures = [classifier.submit(image) for image in (white, paths[0], white)]
    until(lambda: classifier.batching_stats().ready >= 3)
    spoiling.open.set()
    assert blocking.result(SECONDS)
    for future in (futures[0], futures[2]):
        with pytest.raises(InferenceError, match="the logits of the image hold NaN"):
            future.result(SECONDS)
    check(futures[1].result(SECONDS), expected[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"samples": 1.5}, r"samples must be an integer, got 1\.5"),
        ({"deadline": "soon"}, r"deadline must be a finite number of seconds, got 'soon' \(str\)"),
        ({"deadline": float("nan")}, "deadline must be a finite number of seconds, got nan"),
        ({"priority": 0.5}, r"priority must be an integer, got 0\.5 \(float\)"),
    ],
)
def test_impossible_arguments_are_refused_at_once(classifier, paths, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        classifier.submit(paths[0], **arguments)


def test_overload_and_deadlines_are_errors_of_the_call(bundle, paths, monkeypatch):
    with Classifier(bundle, threads=1, batching=Batching(max_queue=1)) as classifier:
        gate = Gate(classifier._guard.check())
        monkeypatch.setattr(classifier._guard, "_backend", gate)
        running = classifier.submit(paths[0])
        until(lambda: gate.sizes)
        waiting = classifier.submit(paths[1], priority=1)
        until(lambda: classifier.batching_stats().ready)
        with pytest.raises(QueueFull, match=r"1 requests wait already, .*Batching\(max_queue=1\)"):
            classifier.submit(paths[2])
        assert waiting.cancel()
        with pytest.raises(DeadlineExceeded, match="the deadline has passed"):
            classifier.submit(paths[2], deadline=-1)
        gate.open.set()
        assert running.result(SECONDS)
        assert classifier.batching_stats().refused == {"queue full": 1, "deadline": 1}


@pytest.mark.parametrize(
    ("processor_", "threads", "sizes"),
    [(processor(), 1, {1, 4, 16}), ("another", 1, {1}), (processor(), 2, {1})],
    ids=["such a machine", "another processor", "another number of threads"],
)
def test_what_the_export_measured_is_known_from_the_start_on_such_a_machine(
    bundle, paths, tmp_path, processor_, threads, sizes
):
    shutil.copytree(bundle, copy := tmp_path / "timed.marnet")
    seconds = ((1, 5.0), (4, 5.5), (16, 7.0))
    reseal_bundle(copy, batch_times=BatchTimes(processor_, threads, seconds))
    with Classifier(copy, threads=1) as classifier:
        assert classifier.submit(paths[0]).result(SECONDS)
        (learned,) = classifier.batching_stats().learned.values()
        assert learned.medians.keys() == sizes


# --- tasks


def test_tasks_of_two_event_loops_share_the_model(classifier, paths, expected):
    async def many() -> list[Prediction]:
        return await asyncio.gather(*(classifier.apredict(path) for path in paths))

    with ThreadPoolExecutor(2) as pool:
        loops = [pool.submit(asyncio.run, many()) for _ in range(2)]
        for loop in loops:
            for answer, wanted in zip(loop.result(SECONDS), expected, strict=True):
                check(answer, wanted)


def test_a_task_that_is_cancelled_cancels_its_request(classifier, paths, gate):
    async def give_up() -> None:
        running = asyncio.ensure_future(classifier.apredict(paths[0]))
        while not gate.sizes:
            await asyncio.sleep(0)
        before = classifier.batching_stats()
        task = asyncio.ensure_future(classifier.apredict(paths[1]))
        while classifier.batching_stats().accepted == before.accepted:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open.set()
        assert await running
        await classifier.apredict(paths[2])
        assert classifier.batching_stats().cancelled == before.cancelled + 1

    asyncio.run(give_up())


def test_errors_reach_the_task(classifier):
    with pytest.raises(ImageError, match="image 0: "):
        asyncio.run(classifier.apredict(b"x"))


def test_64_threads_get_the_answers_of_one(classifier, paths, expected):
    def work(start: int) -> None:
        places = [(start + i) % len(paths) for i in range(4)]
        futures = [classifier.submit(paths[place]) for place in places]
        for place, future in zip(places, futures, strict=True):
            check(future.result(SECONDS), expected[place])

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(work, range(64)))
    assert classifier.batching_stats().answered == 256


# --- life


def test_a_classifier_with_a_batcher_goes_with_its_last_reference(bundle, paths):
    before, classifier = ours(), Classifier(bundle, threads=1)
    assert classifier.submit(paths[0]).result(SECONDS)
    with pytest.raises(ImageError):
        classifier.submit(b"x").result(SECONDS)
    held = [weakref.ref(x) for x in (classifier, classifier._guard.check(), classifier._batcher)]
    gc.disable()
    try:
        del classifier
        assert [ref() for ref in held] == [None] * 3
        assert ours() <= before
    finally:
        gc.enable()


def test_a_request_is_answered_though_nobody_holds_the_classifier(bundle, paths, expected):
    check(Classifier(bundle, threads=1).submit(paths[0]).result(SECONDS), expected[0])


def test_closing_answers_accepted_requests_and_refuses_others(bundle, paths, expected):
    classifier = Classifier(bundle, threads=1)
    futures = [classifier.submit(path) for path in paths]
    classifier.close()
    for future, wanted in zip(futures, expected, strict=True):
        check(future.result(0), wanted)
    calls = (
        classifier.submit,
        classifier.predict_stream,
        lambda x: asyncio.run(classifier.apredict(x)),
    )
    for call in calls:
        with pytest.raises(ClassifierClosed, match=r"this Classifier is closed; open .* again"):
            call(paths[0])


# --- streams


def test_a_stream_answers_in_order_with_errors_in_their_place(classifier, paths, expected):
    images = [*paths[:3], b"x", *paths[3:]]
    answers = list(classifier.predict_stream(iter(images), batch_size=5, top_k=2))
    error = answers.pop(3)
    assert isinstance(error, ImageError)
    assert error.source == "image 3"
    for answer, wanted in zip(answers, expected, strict=True):
        assert isinstance(answer, Prediction)
        assert len(answer.top) == 2
        check(answer, wanted)
    assert list(classifier.predict_stream([])) == []
    assert [a.samples for a in classifier.predict_stream(paths[:1], samples=2)] == [2]


def test_an_endless_stream_runs_in_bounded_memory(classifier, paths):
    before = ours()
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []
    picture = np.array(Image.open(paths[0]).convert("RGB"))

    def images() -> Iterator[np.ndarray]:
        while True:
            image = picture.copy()
            made.append(weakref.ref(image))
            alive.append(sum(reference() is not None for reference in made))
            yield image

    answers = classifier.predict_stream(images(), batch_size=4)
    label = classifier.predict(paths[0]).label
    assert {answer.label for answer in itertools.islice(answers, 200)} == {label}
    assert max(alive) <= 4 + max(4, cpus().threads) + 2
    assert ours() > before
    answers.close()
    assert ours() <= before


def test_what_a_stream_s_source_raises_comes_after_the_answers_before_it(classifier, paths):
    def images() -> Iterator[Path]:
        yield from paths[:5]
        raise OSError("the disk is gone")

    answers = classifier.predict_stream(images(), batch_size=4)
    assert len(list(itertools.islice(answers, 5))) == 5
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)
    assert list(answers) == []


def test_a_stream_refuses_one_image_and_impossible_arguments_at_once(classifier, paths):
    with pytest.raises(InvalidInput, match=r"predict_stream takes many images, got .*use predict"):
        classifier.predict_stream(str(paths[0]))
    with pytest.raises(InvalidInput, match="batch_size must be at least 1, got 0"):
        classifier.predict_stream(paths, batch_size=0)


def test_a_stream_keeps_its_classifier_until_its_end(bundle, paths, expected):
    answers = Classifier(bundle, threads=1).predict_stream(paths, batch_size=5)
    for answer, wanted in zip(answers, expected, strict=True):
        check(answer, wanted)


# --- brown-out


def test_a_queue_that_is_too_long_is_answered_at_the_points_that_are_allowed(swept_bundle, paths):
    impatient = Batching(brown_out=("fast",), patience=0)
    fast = Classifier(swept_bundle, operating_point="fast", threads=1).predict(paths[0])
    with Classifier(
        swept_bundle, operating_point="exact", threads=1, batching=impatient
    ) as classifier:
        exact = classifier.predict(paths[0])
        assert (exact.operating_point, fast.operating_point) == ("exact", "fast")
        answer = classifier.submit(paths[0]).result(SECONDS)
        assert answer.operating_point == "fast"
        check(answer, fast)
        samples = fast.samples  # whoever asks for a number of them gets the point that they know
        assert (
            classifier.submit(paths[0], samples=samples).result(SECONDS).operating_point == "exact"
        )
        stats = classifier.batching_stats()
        assert stats.stepped_down == 1
        assert {kind.operating_point: n for kind, n in stats.images.items()} == {
            "fast": 1,
            "exact": 1,
        }


def test_a_short_queue_is_answered_as_asked(swept_bundle, paths):
    patient = Batching(brown_out=("fast", "zero"), patience=1000)
    with Classifier(
        swept_bundle, operating_point="exact", threads=1, batching=patient
    ) as classifier:
        for answer in [future.result(SECONDS) for future in map(classifier.submit, paths)]:
            assert answer.operating_point == "exact"
        assert classifier.batching_stats().stepped_down == 0


def test_a_point_that_the_bundle_does_not_have_is_refused_when_it_is_opened(bundle):
    with pytest.raises(InvalidInput, match=r"operating_point: got 'slow'; .* has default"):
        Classifier(bundle, batching=Batching(brown_out=("slow",)))


# --- forks and exits

IN_CHILDREN = """
import os, sys
os.cpu_count = lambda: 2
from marnet_sdk import Classifier, MarnetError
bundle, image = sys.argv[1:]
several, single = Classifier(bundle, threads=2), Classifier(bundle, threads=1)
label = several.submit(image).result().label
pending = [single.submit(image) for _ in range(30)]

def inherited():
    try:
        several.submit(image)
    except MarnetError as error:
        return type(error).__name__

def in_child(work):
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, str(work()).encode())
        sys.exit(0)  # not os._exit: what it holds is destroyed
    os.close(write)
    print(os.read(read, 200).decode(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

in_child(inherited)
in_child(lambda: single.submit(image).result().label == label)
in_child(lambda: single.batching_stats().accepted)
in_child(lambda: (single.close(), several.close()))
print(all(future.result().label == label for future in pending))
print(several.submit(image).result().label == label)
"""

EXIT_WHILE_BUSY = """
import sys
from marnet_sdk import Classifier
classifier = Classifier(sys.argv[1], threads=1)
classifier.submit(sys.argv[2]).result()
futures = [classifier.submit(sys.argv[2]) for _ in range(300)]
sys.exit(0)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_forked_child_is_refused_or_has_threads_of_its_own(bundle, paths):
    done = run(IN_CHILDREN, bundle, paths[0])
    assert done.stdout.splitlines() == [
        "WrongProcess 0", "True 0", "0 0", "(None, None) 0", "True", "True",
    ], done.stderr  # fmt: skip


def label_of(bundle: Path, image: Path) -> str:
    with Classifier(bundle, threads=1) as classifier:
        return classifier.submit(image).result(SECONDS).label


def test_a_spawned_process_answers_with_a_classifier_of_its_own(
    classifier, bundle, paths, expected
):
    assert classifier.submit(paths[0]).result(SECONDS).label == expected[0].label
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(label_of, bundle, paths[0]).result(SECONDS) == expected[0].label


def test_a_process_ends_with_0_while_requests_wait(bundle, paths):
    done = run(EXIT_WHILE_BUSY, bundle, paths[0])
    assert (done.returncode, done.stderr) == (0, "")


def test_the_program_of_the_page_runs(digits, bundle_of, tmp_path):
    for name, target in {
        "data/digits": digits,
        "bundles/digits-fp16.marnet": bundle_of("onnxruntime", "fp16"),
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(target)
    page = blocks(ROOT / "docs/deploying.md")
    (program,) = (text for kind, text in page if kind == "python" and "submit" in text)
    answered = readme.run("python", program, tmp_path).splitlines()
    assert len(answered) == 3
    assert answered[0] == f"{{{answered[1]!r}}}"
    (deployed,) = (text for kind, text in page if kind == "python" and "Deployment" in text)
    assert readme.run("python", deployed, tmp_path).split()[0] == answered[1]
