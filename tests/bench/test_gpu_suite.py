"""The GPU suite: rehearsed whole on the CPU, with only the packages that its machine has."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_scripts import load_script
from emulate import emulate_text, guarded
from tolerances import BUILT
from torch.utils.flop_counter import FlopCounterMode

from marnet_export.lower.class_token import for_class_token
from marnet_kernels.compile import compile_cubin
from marnet_kernels.loader import DeviceInfo
from marnet_kernels.persistent import check_launch
from marnet_kernels.reverse_sampler import layout

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu_suite.py"
HIDDEN = (
    "click", "rich", "sklearn", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf",
    "datasets", "psutil", "matplotlib", "hypothesis",
)  # fmt: skip
# The suite as it runs on a bare machine: these are not installed, and marnet is not either.
BARE = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        hidden = fullname.partition(".")[0] in {HIDDEN!r}
        return None if hidden else super().find_spec(fullname, path, target)

sys.meta_path[:] = [f for f in sys.meta_path if f is not PathFinder and "editable" not in repr(f)]
sys.meta_path.append(Finder)
here = {[str(ROOT / n) for n in ("sdk", "kernels", "train", "export", "benchmarks")]!r}
sys.path[:] = [p for p in sys.path if p not in here]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
H100 = DeviceInfo((9, 0), 132, 232_448, cooperative=True)


def has_gpu() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def run_bare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BARE, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def suite() -> Iterator[ModuleType]:
    """gpu_suite.py, with its sections importable."""
    module = load_script("gpu_suite.py")
    path = list(sys.path)
    module.use_checkout()
    yield module
    sys.path[:] = path


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict[str, Any]:
    """The report of a rehearsal of all sections."""
    output = tmp_path_factory.mktemp("suite") / "report.json"
    done = run_bare("--dry-run", "--output", output)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def measured(report: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return [line for line in report["sections"][section]["lines"] if "missing" not in line]


@pytest.mark.slow
def test_every_section_runs_with_only_what_a_bare_machine_has(suite, rehearsal):
    assert list(rehearsal["sections"]) == list(suite.SHARES)
    for name, section in rehearsal["sections"].items():
        assert "error" not in section, section["error"]
        assert len(section["clocks"]) == 2
        assert measured(rehearsal, name)
    assert rehearsal["dry_run"]
    assert rehearsal["machine"]["packages"]["torch"] == torch.__version__


@pytest.mark.slow
def test_every_line_has_its_spread_and_how_right_it_is(rehearsal):
    for name in rehearsal["sections"]:
        for line in measured(rehearsal, name):
            assert 0 < line["p10"] <= line["median"] <= line["p90"] <= line["p99"], line
            assert line["n"] >= 3
            assert line["unit"] in ("us a step", "us", "ms", "images/s", "TB/s", "TFLOP/s")
            assert line["fidelity"], line


@pytest.mark.slow
@pytest.mark.parametrize("section", ["ceilings", "loop", "pipeline"])
def test_errors_are_those_of_the_type(rehearsal, section):
    found = [x for x in measured(rehearsal, section) if "relative_error" in x["fidelity"]]
    assert found
    # What all pictures share is taken off the pipeline's logits: the largest is half as large.
    factor = 2 if section == "pipeline" else 1
    for line in found:
        assert line["fidelity"]["relative_error"] < factor * BUILT[line["precision"]], line


@pytest.mark.slow
def test_what_is_missing_says_why(rehearsal):
    reasons = {
        line["missing"].partition(":")[0]
        for section in rehearsal["sections"].values()
        for line in section["lines"]
        if "missing" in line
    }
    torchvision = set() if importlib.util.find_spec("torchvision") else {"ModuleNotFoundError"}
    assert reasons == {"needs a CUDA device"} | torchvision


@pytest.mark.slow
def test_the_loop_is_measured_in_every_form_at_every_batch(rehearsal):
    lines = measured(rehearsal, "loop")
    forms = {(line["batch"], line["line"]) for line in lines if line["precision"] == "fp16"}
    batches, names = ({form[i] for form in forms} for i in range(2))
    assert forms == {(batch, name) for batch in batches for name in names}
    assert len(batches) == 2
    assert names == {
        "eager, plain",
        "eager, rewritten",
        "torch.compile of a step (reduce-overhead), plain",
        "CUDA graph, plain",
        "CUDA graph of torch.compile's step, plain",
        "CUDA graph, rewritten",
        "persistent kernel (its NumPy twin)",
    }
    assert all(line["fidelity"]["replays_equal"] for line in lines)


@pytest.mark.slow
def test_the_pipeline_answers_with_the_labels_of_the_float32_model(rehearsal):
    lines = [x for x in measured(rehearsal, "pipeline") if "agreement" in x["fidelity"]]
    assert {"torch eager", "marnet torchscript"} <= {line["line"] for line in lines}
    for line in lines:
        # With fresh weights many answers are close calls: one of eight may go the other way.
        assert line["fidelity"]["agreement"] >= (1.0 if line["precision"] == "fp16" else 0.75)
        assert line["fidelity"]["labels"] > 1  # or agreement says nothing
        rate = 1e3 * line["batch"] / line["median"]
        assert line["images_per_s"] == pytest.approx(rate, rel=1e-3)


@pytest.mark.slow
def test_pictures_have_pillows_grey_levels(rehearsal):
    lines = {line["line"]: line["fidelity"] for line in measured(rehearsal, "images")}
    assert lines["torch interpolate, antialias"]["grey_levels"] <= 1
    assert lines["JPEG decoding, 1 thread"]["equal"]


@pytest.mark.slow
def test_a_report_becomes_tables(suite, rehearsal, tmp_path, capsys):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(rehearsal))
    assert suite.main(["--table", str(file)]) == 0
    text = capsys.readouterr().out
    for name in suite.SHARES:
        assert f"### {name}\n" in text
    assert "T = 4, fp16, microseconds a step" in text
    assert "|  | batch 1 | batch 3 | largest error | same bits |" in text
    assert "- not measured: marnet tensorrt (2 times): needs a CUDA device" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    for table in tables:
        assert len({row.count("|") for row in table}) == 1


@pytest.mark.skipif(has_gpu(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    output = tmp_path / "report.json"
    done = run_bare("--output", output)
    assert done.returncode == 5
    assert done.stderr.endswith("no CUDA device here; to rehearse on the CPU, add --dry-run\n")
    assert not output.exists()


# Sections that fail as kernels do, in a process in which nothing else ran before.
FAILING = f"""
import json, os, runpy, signal, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_suite
gpu_suite.use_checkout()
import numpy as np
from gpu_sections.measure import Machine

def breaks(job):
    job.add("before", np.ones(3), "ms", {{"equal": True}})
    raise RuntimeError("the card fell out")

def works(job):
    kept = json.loads(output.read_text())  # the file as a run that is killed now leaves it
    assert kept["sections"]["breaks"]["error"] == "RuntimeError: the card fell out"
    with job.attempt("a line", batch=1):
        raise ValueError("\\n\\n  too many rows\\nsecond line")

def dies(job):
    for name in ("first", "second", "third", "fourth"):
        if job.was_measured(line=name, batch=1) or job.was_lost(name, batch=1):
            continue
        with job.attempt(name, batch=1):
            if name == "second":
                os.kill(os.getpid(), signal.SIGSEGV)
            if name == "third":
                Machine.is_lost = lambda self: True
                raise RuntimeError("unspecified launch failure")
            job.add(name, np.ones(3), "ms", {{"equal": True}}, batch=1)

def hangs(job):
    with job.attempt("waits for what never comes"):
        output.with_name("begun").touch()
        threading.Event().wait()

sections = dict(breaks=breaks, works=works, dies=dies, hangs=hangs)
for name, run in sections.items():
    sys.modules["gpu_sections." + name] = SimpleNamespace(run=run)
gpu_suite.SHARES = dict(zip(sections, (0.3, 0.3, 0.39, 0.01)))
output = Path(sys.argv[1])
gpu_suite.Suite(output, 100.0, tiny=True, grace=0.5).run(["breaks", "works", "dies"])

from gpu_sections import child
why = child.run_apart(lambda send: threading.Event().wait(), print, 0.1)
assert why == "given up: it had not ended after 0 s"
over, begun, wait = [], output.with_name("begun"), child.wait

def until_it_hangs(objects, seconds):
    # Time is over once the section hangs, however long it took to come to that.
    while not over:
        hangs = begun.exists()  # before what it has sent by then is looked for
        if ready := wait(objects, 0.05):
            return ready
        over.extend([True] * hangs)
    return []

child.wait = until_it_hangs
gpu_suite.time = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000 * len(over))
gpu_suite.Suite(output.with_name("hangs.json"), 100.0, tiny=True).run(["hangs"])
"""


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, Any]:
    """The sections of FAILING."""
    output = tmp_path_factory.mktemp("failing") / "report.json"
    command = [sys.executable, "-c", FAILING, output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(file.read_text()) for file in (output, output.with_name("hangs.json"))]
    return {name: section for r in reports for name, section in r["sections"].items()}


def test_a_section_that_fails_is_told_and_the_next_one_runs(failures):
    assert [line["line"] for line in failures["breaks"]["lines"]] == ["before"]
    assert "error" not in failures["works"]
    missing = {"line": "a line", "batch": 1, "missing": "ValueError: too many rows"}
    assert failures["works"]["lines"] == [missing]


def test_a_kernel_that_takes_its_process_with_it_costs_only_its_own_line(failures):
    section = failures["dies"]
    died = ["its process ended with signal 11", "RuntimeError: unspecified launch failure"]
    assert section["lost"] == died
    assert "error" not in section
    lines = {line["line"]: line for line in section["lines"]}
    assert list(lines) == ["first", "second", "third", "fourth"]
    assert [lines[name].get("missing") for name in lines] == [None, *died, None]


def test_a_section_that_never_ends_is_given_up(failures):
    why = failures["hangs"]["error"]
    assert why.startswith("given up: it had not ended after ")
    assert failures["hangs"]["lines"] == [{"line": "waits for what never comes", "missing": why}]


def test_lines_are_taken_in_turn_and_back(suite):
    from gpu_sections.measure import Machine, interleave, latencies

    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "ab"}
    machine = Machine(torch.device("cpu"))
    for taken in (
        interleave(machine, calls, 0.0, least=3, sample_ms=0.0),
        latencies(machine, calls, 0.0, least=3),
    ):
        assert [len(values) for values in taken.values()] == [3, 3]
        assert "".join(order[-6:]) == "abbaab"


def test_an_answer_that_is_not_finite_has_an_infinite_error(suite):
    from gpu_sections.measure import relative_error

    wanted = torch.tensor([1.0, -4.0])
    assert relative_error(torch.tensor([2.0, -4.0]), wanted) == 0.25
    assert math.isinf(relative_error(torch.tensor([math.nan, 1.0]), wanted))
    with pytest.raises(ValueError, match=r"got shape \(1,\), expected \(2,\)"):
        relative_error(torch.ones(1), wanted)


def test_the_kernels_of_the_suite_compile_without_spilling(suite):
    pytest.importorskip("cuda.bindings.nvrtc")
    from gpu_sections.ceilings import whole_source

    for arch in ("sm_80", "sm_90"):
        assert compile_cubin(whole_source(), arch).spill_bytes == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kernel", ["broadcast", "counter", "epoch"])
def test_blocks_see_what_the_others_published(suite, kernel, seed):
    from gpu_sections.ceilings import SOURCE, Arguments

    blocks, words, rounds = 3, 2, 5
    data = guarded(np.full((2, blocks, words, 4), kernel == "broadcast", np.uint32))
    counter, wrong = guarded(np.zeros(32, np.uint32)), guarded(np.zeros(32, np.uint32))
    addresses = (array.ctypes.data for array in (data, counter, wrong))
    arguments = Arguments(*addresses, words, rounds)
    emulate_text(SOURCE).launch(kernel, arguments, grid=blocks, block=256, seed=seed)
    assert wrong[0] == 0
    assert counter[0] == (blocks * rounds if kernel == "counter" else 0)
    if kernel != "broadcast":
        np.testing.assert_array_equal(data[0], 4)
        np.testing.assert_array_equal(data[1], 5)


def test_a_word_that_is_not_what_it_should_be_is_told(suite):
    from gpu_sections.ceilings import SOURCE, Arguments

    data, wrong = guarded(np.ones((4, 4), np.uint32)), guarded(np.zeros(32, np.uint32))
    data[2, 1] = 7
    arguments = Arguments(data.ctypes.data, wrong.ctypes.data + 64, wrong.ctypes.data, 4, 2)
    emulate_text(SOURCE).launch("broadcast", arguments, grid=1, block=256)
    assert wrong[0] == 1


@pytest.mark.parametrize("rows", [1, 8, 16, 64])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_all_variants_of_the_loop_are_tried_the_chosen_one_first(suite, rows, precision):
    from gpu_sections.loop import choose_variant, variants

    plan = layout(1024, precision)
    found = list(variants(plan, rows, H100, every=True))
    assert found[0] == choose_variant(plan, rows, H100)
    assert len(set(found)) == len(found)
    exchanges = {"counter", "epoch"} if precision == "fp16" else {"counter"}
    assert {variant.exchange for variant in found} == exchanges
    assert {variant.tiles for variant in found} > {found[0].tiles}
    for variant in found:
        assert variant.rows * variant.groups >= rows
        assert variant.blocks(plan) * variant.groups <= H100.multiprocessors
    few = list(variants(plan, rows, H100, every=False))
    assert few[0] == found[0]
    assert len(few) <= 3


def test_the_multiply_adds_of_a_vit_are_what_torch_counts(suite):
    from gpu_sections.models import TINY_VIT, make_model
    from gpu_sections.pipeline import vit_multiply_adds

    model = make_model(TINY_VIT | {"attn_implementation": "eager"}, 4, tiny=True)
    for narrow, encoder in ((False, model.vision), (True, for_class_token(model.vision))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.zeros(1, 3, 32, 32))
        expected = counter.get_total_flops() // 2
        assert vit_multiply_adds(model, for_class_token=narrow) == expected


class Kernel:
    """Stands where a kernel is launched: checks what it is given, and leaves memory as it is."""

    launched: list[Any]

    def __init__(self, *how: Any) -> None:
        self.how = how

    def launch(self, stream: int, arguments: Any) -> None:
        if hasattr(arguments, "steps") and self.how:
            plan, variant = self.how
            check_launch(plan, variant, arguments)
        self.launched.append(arguments)


@pytest.fixture
def no_card(suite, monkeypatch) -> Any:
    """A machine that takes the CPU for a GPU of 132 multiprocessors: its kernels do nothing."""
    from gpu_sections import ceilings, loop, measure

    class NoCard(measure.Machine):
        is_cuda, stream = True, 0  # pyright: ignore

        def wait(self) -> None:
            pass

        def capture(self, call: Any) -> Any:
            return call

        def milliseconds(self, call: Any, repeats: int = 1) -> float:
            call()
            return 1.0

    class Aligned(measure.Memory):
        @property
        def addresses(self) -> dict[str, int]:
            return {name: max(tensor.data_ptr() & ~127, 128) for name, tensor in self.items()}

    monkeypatch.setattr(Kernel, "launched", [], raising=False)
    monkeypatch.setattr(loop, "Memory", Aligned)
    monkeypatch.setattr(loop, "ReverseSampler", Kernel)
    monkeypatch.setattr(loop, "current_device", lambda: H100)
    monkeypatch.setattr(loop, "compiled", lambda machine, function, **how: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    driver = SimpleNamespace(cuLaunchCooperativeKernel=lambda *given: (0,))
    monkeypatch.setattr(ceilings, "compile_cubin", lambda *given: None)
    monkeypatch.setattr(ceilings, "load_function", lambda *given: None)
    monkeypatch.setattr(ceilings._cuda, "load", lambda name: driver)
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return NoCard(torch.device("cpu"))


@pytest.mark.parametrize(
    ("section", "launches"),
    [
        ("ceilings", set()),
        ("loop", {"ReverseSamplerArguments"}),
        ("images", set()),
    ],
)
def test_what_only_a_gpu_runs_launches_kernels_as_they_take_it(no_card, section, launches):
    from gpu_sections.measure import Job

    job = Job(no_card, True, 100.0, say=lambda text: None)
    importlib.import_module(f"gpu_sections.{section}").run(job)
    reasons = {x["line"]: x["missing"] for x in job.lines if "missing" in x}
    assert set(reasons) <= {"torchvision resize, antialias"}, reasons
    assert {type(arguments).__name__ for arguments in Kernel.launched} == launches
    if section == "loop":
        forms = {line["line"] for line in job.lines}
        assert "persistent kernel, epoch, tiles 2, groups 1, copies 2" in forms
        assert "persistent kernel, counter, tiles 2, groups 1, copies 1" in forms


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no CUDA device on this machine")
def test_the_sections_without_models_run_on_a_gpu(tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--seconds", "60", "--only", "ceilings", "images"]
    done = subprocess.run(
        [*command, "--output", output], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    for name in ("ceilings", "images"):
        section = copy.copy(report["sections"][name])
        assert "error" not in section
        missing = [line for line in section["lines"] if "missing" in line]
        assert {line["line"] for line in missing} <= {"torchvision resize, antialias"}, missing
    waits = [x for x in measured(report, "ceilings") if "right" in x["fidelity"]]
    assert len(waits) == 13
    assert all(line["fidelity"]["right"] for line in waits)
