"""What of a transcript is compared with the page: all that is the same on every machine."""

from __future__ import annotations

import pytest
from readme import words

WRITTEN = """\
$ marnet-export --precision fp16
checkpoint runs/digits (the newest under ./runs)
aotinductor: building and verifying
onnxruntime: building and verifying
openvino: building and verifying
torchscript: building and verifying
onnxruntime: 1.34 ms for 1, 3.94 ms for 16; agreement 100.00%
openvino: 1.81 ms for 1, 4.23 ms for 16; agreement 100.00%
aotinductor: 2.08 ms for 1, 6.09 ms for 16; agreement 100.00%
torchscript: 2.31 ms for 1, 6.85 ms for 16; agreement 100.00%
tensorrt: unavailable: no CUDA driver (libcuda.so.1 is not here)
onnxruntime is the fastest here
largest logit error 0.012 of 16.1
wrote bundles/digits-fp16.marnet

$ marnet-bench --batch 64
from bytes: 2.38 times the speed of plain PyTorch (95 % interval of the ratio 2.34 to 2.59)
from pixels: 2.88 times the speed of plain PyTorch (95 % interval of the ratio 2.82 to 2.95)
python 3.11.7, marnet 0.1.0, torch 2.13.0+cpu, openvino 2026.4.1, numpy 2.4.6; load 1.56
digits-fp16.marnet: batch 64, 100 steps, AMD EPYC, 2 threads

 model             top-1   top-5   agree    from  p50 ms    p90    p99  images/s     x
 ──────────────────────────────────────────────────────────────────────────────────────
 MARNet, PyTorch  100.0%  100.0%           bytes   29.90  30.62  32.94     2,134
 MARNet, bundle                   100.0%   bytes   12.56  13.27  15.80     5,199  2.38
"""
OPENVINO = "openvino: 1.81 ms for 1, 4.23 ms for 16; agreement 100.00%\n"
AOTINDUCTOR = "aotinductor: 2.08 ms for 1, 6.09 ms for 16; agreement 100.00%\n"
TORCHSCRIPT = "torchscript: 2.31 ms for 1, 6.85 ms for 16; agreement 100.00%\n"
TENSORRT = "tensorrt: unavailable: no CUDA driver (libcuda.so.1 is not here)\n"

# A machine -> what its transcript has in place of what.
MACHINES = {
    "another processor": {"AMD EPYC": "Intel(R) Xeon(R) Processor @ 2.00GHz"},
    "a processor without a name": {"AMD EPYC": ""},
    "more cores": {"2 threads": "128 threads"},
    "a name that breaks the title": {
        "AMD EPYC, 2 threads": "11th Gen Intel(R) Core(TM) i7-1165G7, or so, \n@ 2.80GHz, 8 threads"
    },
    "a title that breaks elsewhere": {
        "100 steps, AMD EPYC, 2 threads": "100 \nsteps, Neoverse-N1, 64 \nthreads"
    },
    "other versions": {
        "3.11.7, marnet 0.1.0, torch 2.13.0+cpu": "3.12.1, marnet 0.2.0rc1, torch 2.11.0a0+cu130",
        "openvino 2026.4.1, ": "",
    },
    "a machine at work": {
        "python 3.11": "unsteady: medians drift by up to 35% during the run; is something else "
        "busy?\npython 3.11"
    },
    "too much noise to tell": {
        "2.38 times the speed of plain PyTorch": "no difference from plain PyTorch can be told"
    },
    "a slow one": {"1.34 ms": "1.2e+03 ms", "0.012 of": "1.2e-05 of"},
    "another winner": {"onnxruntime: 1.34": "openvino: 1.34", "onnxruntime is": "openvino is"},
    "another order": {OPENVINO + AOTINDUCTOR: AOTINDUCTOR + OPENVINO},
    "no compiler": {
        AOTINDUCTOR: "",
        TENSORRT: TENSORRT + "aotinductor: refused: there is no g++ here\n",
    },
    "a backend less": {
        "openvino: building and verifying\n": "",
        OPENVINO: "",
        TENSORRT: TENSORRT + "openvino: unavailable: it is not installed\n",
    },
    "a GPU": {
        "torchscript: building": "tensorrt: building and verifying\ntorchscript: building",
        "onnxruntime: 1.34": "tensorrt: 0.2 ms for 1, 0.4 ms for 16; agreement 99.63%\n"
        "onnxruntime: 1.34",
        TENSORRT: "",
        "onnxruntime is": "tensorrt is",
    },
}
CHANGES = {
    "a word": {"is the fastest here": "is fastest here"},
    "a line less": {"checkpoint runs/digits (the newest under ./runs)\n": ""},
    "a line more": {"wrote bundles": "warning: the disk is old\nwrote bundles"},
    "what every backend says first": {"building and verifying": "building"},
    "what one backend says": {"openvino: building and verifying": "openvino: building"},
    "the result of every backend": {"; agreement": "; same label"},
    "a backend that crashed": {TORCHSCRIPT: "torchscript: crashed: signal SIGABRT\n"},
    "a title without threads": {"AMD EPYC, 2 threads": "AMD EPYC"},
    "a report without load": {"; load 1.56": ""},
    "another verdict": {"times the speed of": "times as fast as"},
    "a column": {" agree ": " equal "},
}


def changed(replacements: dict[str, str]) -> str:
    text = WRITTEN
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", MACHINES)
def test_another_machine_has_the_same_words(name: str) -> None:
    assert words(changed(MACHINES[name])) == words(WRITTEN)


@pytest.mark.parametrize("name", CHANGES)
def test_a_message_that_changed_is_noticed(name: str) -> None:
    assert words(changed(CHANGES[name])) != words(WRITTEN)


def test_the_words_are_those_of_the_messages() -> None:
    said = " ".join(words(WRITTEN))
    assert "runs digits the newest under runs BACKEND building and verifying BACKEND ms" in said
    assert "ms for ms for agreement BACKEND is the fastest here largest logit" in said
    assert "VERSIONS load digits fp marnet batch steps PROCESSOR threads model top top" in said
