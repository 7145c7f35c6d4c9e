"""What forks, pools, exits and reloads do to a process that holds a classifier."""

from __future__ import annotations

import gc
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compilers import need_compiler
from quick import kept
from waiting import until

from marnet_sdk import Classifier, process
from marnet_sdk.backends import BACKENDS
from marnet_sdk.errors import BundleCorrupt, ClassifierClosed, InvalidInput

NATIVE = "native"  # the loop of a bundle of onnxruntime
# A bundle of aotinductor takes a minute of g++; `make test` has it in test_builder_aotinductor.
_QUICK = {"onnxruntime", "openvino", "torchscript", NATIVE}
_HERE = sorted(set(BACKENDS) - {"tensorrt"})
ON_A_CPU, SERVED = kept(_HERE, _QUICK), kept([*_HERE, NATIVE], _QUICK)


def in_programs(*quick: str) -> list[Any]:
    """All that is served; each case is a program, so few are quick. `NATIVE` has onnxruntime."""
    return kept([*_HERE, NATIVE], quick)


@pytest.fixture
def image(digits: Path) -> Path:
    return min((digits / "test").glob("*.png"))


@pytest.fixture
def served(
    bundle_of: Callable[[str, str], Path], native_bundle: Callable[[str, str], Path]
) -> Callable[[str], Path]:
    """backend, or `NATIVE` -> a bundle."""

    def make(name: str) -> Path:
        if name != NATIVE:
            return bundle_of(name, "fp32")
        need_compiler()
        return native_bundle("onnxruntime", "fp16")

    return make


# Two CPUs at least, and a native loop uses several threads however small it is.
PRELUDE = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
os.cpu_count = lambda: 2
import marnet_kernels.native.loop
marnet_kernels.native.loop._WORK = 1
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of its own, on a machine as `PRELUDE` says; it hangs if it takes minutes."""
    program = PRELUDE + code
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


# --- forks

IN_CHILDREN = """
from marnet_sdk import Classifier, MarnetError
bundle, image = sys.argv[1:]
several, single = Classifier(bundle, threads=2), Classifier(bundle, threads=1)
images = [image] * 16

def inherited():
    try:
        several.predict(images)
    except MarnetError as error:
        assert str(os.getpid()) in str(error)
        return f"{type(error).__name__} in process {os.getpid()}"

def in_child(work):
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, str(work()).encode())
        sys.exit(0)  # not os._exit: what it holds is destroyed
    os.close(write)
    text = os.read(read, 200).decode().replace(str(child), "PID")
    print(text, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

label = several.predict(images)[0].label
assert single.predict(images)[0].label == label
several.match(image, "a text")
in_child(inherited)
in_child(lambda: single.predict(images)[0].label == label)
in_child(lambda: Classifier(bundle).predict(images)[0].label == label)
in_child(lambda: several.close())
print(several.predict(images)[0].label == label)
"""


@pytest.mark.parametrize("backend", in_programs("openvino", NATIVE))
def test_a_forked_child_answers_or_raises_at_once_and_ends(served, image, backend):
    """Several threads raise; one thread, and a classifier of the child's own, answer."""
    done = run(IN_CHILDREN, served(backend), image)
    assert done.stdout.splitlines() == [
        "WrongProcess in process PID 0", "True 0", "True 0", "None 0", "True",
    ], done.stderr  # fmt: skip


FORK_WHILE_BUSY = """
import threading
from marnet_sdk import Classifier
bundle, image = sys.argv[1:]
clf = Classifier(bundle, threads=1)
label, begun = clf.predict(image).label, threading.Semaphore(0)

def loop():
    while True:
        clf.predict(image)
        begun.release()

for _ in range(3):
    threading.Thread(target=loop, daemon=True).start()
for _ in range(5):
    begun.acquire()
    if not (child := os.fork()):
        os._exit(clf.predict(image).label != label)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("backend", in_programs("openvino", NATIVE))
def test_a_fork_while_other_threads_classify_leaves_nothing_locked(served, image, backend):
    done = run(FORK_WHILE_BUSY, served(backend), image)
    assert (done.stdout.split(), done.returncode) == (["0"] * 5, 0), done.stderr


def test_in_a_child_of_a_process_with_torch_several_threads_are_refused(bundle_of, image):
    code = """
import torch
from marnet_sdk import Classifier
if not os.fork():
    try:
        Classifier(sys.argv[1], threads=2)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
os.wait()
"""
    done = run(code, bundle_of("torchscript", "fp16"))
    assert "WrongProcess threads: got 2 in a process that was forked from one" in done.stdout


def test_a_classifier_is_not_sent_to_another_process(bundle_of):
    classifier = Classifier(bundle_of("onnxruntime", "fp16"))
    with pytest.raises(InvalidInput, match="cannot be copied or sent to another process; open"):
        pickle.dumps(classifier)


@pytest.fixture
def fresh(monkeypatch) -> process._State:
    """A state in which no thread of the other tests is."""
    state = process._State()
    monkeypatch.setattr(process, "_state", state)
    return state


def thread(work: Callable[[], object]) -> threading.Thread:
    started = threading.Thread(target=work, daemon=True)
    started.start()
    return started


def test_a_fork_waits_for_native_calls_and_none_begins_meanwhile(fresh):
    inside, leave, order = threading.Event(), threading.Event(), list[str]()

    def call():
        with process.native():
            inside.set()
            leave.wait()
            with process.native():  # which would else wait for the fork that waits for it
                order.append("call")

    def fork():
        process._hold()
        order.append("fork")
        process._let_go()

    def late():
        with process.native():
            order.append("late call")

    calling = thread(call)
    inside.wait()
    forking = thread(fork)
    until(lambda: fresh.holder is not None)
    coming = thread(late)
    leave.set()
    for each in (calling, forking, coming):
        each.join()
    assert order == ["call", "fork", "late call"]
    assert not fresh.depth


def test_the_end_of_the_process_lets_its_own_thread_go_on(fresh):
    process._end()
    with process.native():
        pass
    process._hold()
    process._let_go()
    assert fresh.holder == threading.get_ident()


# --- exits

EXIT_WHILE_BUSY = """
import threading
from marnet_sdk import Classifier
clf, begun = Classifier(sys.argv[1], threads=1), threading.Semaphore(0)

def loop():
    while True:
        clf.predict(sys.argv[2])
        clf.match(sys.argv[2], "a text")
        begun.release()

for _ in range(4):
    threading.Thread(target=loop, daemon=True).start()
for _ in range(8):
    begun.acquire()
sys.exit(0)
"""


@pytest.mark.parametrize("backend", in_programs(NATIVE))
def test_a_process_ends_with_0_while_daemon_threads_classify(served, image, backend):
    done = run(EXIT_WHILE_BUSY, served(backend), image)
    assert (done.returncode, done.stderr) == (0, "")


# --- the end of a classifier


@pytest.mark.parametrize("backend", SERVED)
def test_a_classifier_goes_with_its_last_reference(served, image, backend):
    classifier = Classifier(served(backend))
    classifier.predict(image, samples=2)
    classifier.match(image, "a text")
    held = [weakref.ref(x) for x in (classifier, classifier._guard.check(), classifier._text)]
    gc.disable()
    try:
        del classifier
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


def test_the_import_of_torch_keeps_nobody_who_opened_a_classifier(bundle_of):
    code = """
import gc, weakref
from marnet_sdk import Classifier
gc.disable()
print(weakref.ref(Classifier(sys.argv[1]))())
"""
    assert run(code, bundle_of("torchscript", "fp16")).stdout == "None\n"


def test_a_closed_classifier_says_so_at_once(bundle_of, image):
    with Classifier(bundle_of("onnxruntime", "fp32")) as classifier:
        pixels = classifier.preprocess.pixels([image])
        classifier.match(image, "a text")
        backend = weakref.ref(classifier._guard.check())
    assert backend() is None
    classifier.close()
    calls: list[Callable[[], object]] = [
        lambda: classifier.predict(image),
        lambda: classifier.predict([]),
        lambda: classifier.embed(image),
        lambda: classifier.match(image, "a text"),
        lambda: classifier.embed_text("a text"),
        lambda: classifier.logits(pixels),
        lambda: classifier.runtime,
    ]
    for call in calls:
        with pytest.raises(ClassifierClosed, match=r"this Classifier is closed; open .* again"):
            call()
    assert "onnxruntime" in repr(classifier)


def test_the_workers_of_the_native_loop_end_with_the_last_classifier(served, image):
    code = """
from marnet_kernels.native import library
from marnet_sdk import Classifier
from waiting import until
bundle, image = sys.argv[1:]
one, two = (Classifier(bundle, threads=2) for _ in range(2))
want = one.predict(image).label
workers = library().marnet_loop_workers
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
print(workers())
one.close()
assert two.predict(image).label == want
print(workers())
two.close()
print(workers())
until(lambda: threads() < before)  # one that has ended may be listed for a moment
"""
    done = run(code, served(NATIVE), image)
    assert (done.stdout.split(), done.returncode) == (["1", "1", "0"], 0), done.stderr


def test_a_call_that_is_running_survives_closing(bundle_of, image):
    classifier = Classifier(bundle_of("onnxruntime", "fp16"))
    with classifier._guard.calling() as backend:
        classifier.close()
        pixels = classifier.preprocess.pixels([image])
        assert backend.encode(pixels).shape[0] == 1


RELOADS = """
from marnet_sdk import Classifier
from waiting import until

def counts():
    maps = open("/proc/self/maps").read().splitlines()
    pages = int(open("/proc/self/statm").read().split()[1])
    code = sum(line.endswith((".so (deleted)", ".so")) for line in maps)
    return len(os.listdir("/proc/self/task")), code, len(os.listdir("/proc/self/fd")), pages * 4096

seen = []
for i in range(10):
    with Classifier(sys.argv[1], threads=2) as clf:
        clf.predict(sys.argv[2])
        clf.match(sys.argv[2], "a text")
    seen.append(counts())
*most, before = map(max, zip(*seen[:5]))
until(lambda: all(n <= m for n, m in zip(counts(), most)))  # an ended thread may be listed yet
print(counts()[-1] - before < 6e6, most, seen)
"""


@pytest.mark.parametrize("backend", in_programs(NATIVE))
def test_reloads_leave_threads_mapped_code_and_memory_flat(served, image, backend):
    done = run(RELOADS, served(backend), image)
    assert done.stdout.startswith("True"), done.stdout + done.stderr


# --- the files of a running bundle


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_a_running_bundle_s_files_may_be_written_over_cut_or_removed(
    bundle_of, image, backend, tmp_path
):
    bundle = tmp_path / "live.marnet"
    shutil.copytree(bundle_of(backend, "fp32"), bundle)
    classifier = Classifier(bundle)
    expected = classifier.embed([image] * 3), classifier.match(image, "a text")
    files = [path for path in bundle.rglob("*") if path.is_file()]

    def overwrite(path: Path) -> None:
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))

    for change in (overwrite, lambda path: path.write_bytes(b""), Path.unlink):
        for path in files:
            change(path)
        got = classifier.embed([image] * 3), classifier.match(image, "a text")
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_text_encoder_that_changed_before_the_first_text_is_refused(bundle_of, image, tmp_path):
    bundle = tmp_path / "live.marnet"
    shutil.copytree(bundle_of("onnxruntime", "fp32"), bundle)
    classifier = Classifier(bundle)
    (bundle / "text/text.onnx").write_bytes(b"")
    with pytest.raises(BundleCorrupt, match=r"text\.onnx has 0 bytes, the manifest says"):
        classifier.match(image, "a text")
    assert classifier.predict(image).label in classifier.labels
