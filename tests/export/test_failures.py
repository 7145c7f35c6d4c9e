"""An export that fails: one line that says why and what to do, and nothing left behind.

Of a small untrained checkpoint, since what is wrong is wrong whatever it has learnt.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from kills import SCRIPTS
from quick import kept
from safetensors.numpy import load_file, save_file
from test_nothing_lost import in_small_filesystem

from marnet_export.build.builder import BUILDERS
from marnet_export.build.tensorrt import engines
from marnet_export.choose import race
from marnet_export.cli import main
from marnet_export.job import export_bundle
from marnet_export.settings import Settings
from marnet_export.work import at_work
from marnet_sdk.bundle import read_bundle
from marnet_sdk.commands.classify import main as classify
from marnet_sdk.errors import BackendUnavailable, OutputBusy
from marnet_sdk.gpu.tensorrt_library import Device, find_device, load_library

Weights = dict[str, np.ndarray]
LEAN = ("--no-text", "--no-source", "--loop", "graph")
HOPPER = Device("NVIDIA H100", (9, 0), 13000)


@pytest.fixture
def changed(small, tmp_path) -> Callable[..., Path]:
    """A copy with other weights or another configuration."""

    def make(
        weights: Callable[[Weights], None] | None = None,
        config: Callable[[dict], None] | None = None,
    ) -> Path:
        folder = shutil.copytree(small, tmp_path / "changed")
        if weights is not None:
            state = load_file(folder / "model.safetensors")
            weights(state)
            save_file(state, folder / "model.safetensors")
        if config is not None:
            content = json.loads((folder / "config.json").read_text())
            config(content)
            (folder / "config.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture
def out(tmp_path) -> Path:
    """Where the bundle would be; nothing else may be beside it."""
    (tmp_path / "bundles").mkdir()
    return tmp_path / "bundles/b"


def export(checkpoint: Path, out: Path, *arguments: str) -> Result:
    options = ("--checkpoint", str(checkpoint), "--output", str(out), *LEAN, *arguments)
    return CliRunner().invoke(main, options)


def error_of(result: Result, out: Path, exit_code: int) -> str:
    """The one line, after a look at what is left."""
    assert result.exit_code == exit_code, result.stderr
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert list(out.parent.iterdir()) == []
    *said, last = result.stderr.splitlines()
    assert last.startswith("Error: ")
    assert not [line for line in said if "Error" in line or "Traceback" in line]
    return last


# --- what is not installed, or not here


@pytest.mark.parametrize(
    ("backend", "package", "extra", "options"),
    [
        pytest.param("onnxruntime", "onnxruntime", "onnxruntime", (), marks=pytest.mark.slow),
        ("openvino", "openvino", "openvino", ()),
        ("openvino", "nncf", "export", ("--precision", "int8")),
        ("tensorrt", "tensorrt_rtx", "rtx", ("--precision", "fp16", "--target", "sm89")),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_pip_line(
    backend, package, extra, options, small, out, monkeypatch
):
    load_library.cache_clear()
    monkeypatch.delitem(sys.modules, BUILDERS[backend], raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = export(small, out, "--backend", backend, *options)
    load_library.cache_clear()
    assert f'not installed; run: pip install "marnet[{extra}]"' in error_of(result, out, 5)


@pytest.fixture
def no_gpu() -> str:
    """Why this machine has no GPU: without a driver or with one."""
    try:
        device = find_device()
    except BackendUnavailable as error:
        return str(error)
    pytest.skip(f"this machine has a GPU: {device}")


def test_without_a_gpu_the_option_that_names_others_is_proposed(small, out, no_gpu):
    result = export(small, out, "--backend", "tensorrt", "--precision", "fp16")
    said = error_of(result, out, 1)
    assert f"this one has {no_gpu}" in said
    assert said.endswith("name them, as in --target sm86,sm89")


@pytest.mark.slow
def test_engines_are_built_without_a_gpu_but_not_loaded(small, out, no_gpu):
    settings = Settings(
        "tensorrt", "fp16", targets=("sm89",), min_agreement=0.5, text=False, source=False
    )
    export_bundle(small, out, settings)
    image = str(small / "samples/0.png")
    result = CliRunner().invoke(classify, [image, "--model", str(out)])
    assert result.exit_code == 5
    assert result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert no_gpu in said


def test_the_shell_of_tensorrt_from_pypi_is_named_where_only_the_real_one_would_do(
    small, out, tmp_path, monkeypatch
):
    shell = tmp_path / "packages"
    shell.mkdir()
    (shell / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11')")
    monkeypatch.syspath_prepend(shell)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    load_library.cache_clear()
    monkeypatch.setattr(engines, "find_device", lambda: HOPPER)
    result = export(small, out, "--backend", "tensorrt", "--precision", "fp16")
    said = error_of(result, out, 5)
    assert "installed without the libraries of TensorRT (ImportError: libnvinfer.so.11)" in said
    assert "replace it: pip uninstall -y tensorrt, then pip install --extra-index-url" in said


# --- what a backend cannot carry


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("tensorrt", "fp16", "--target", "sm90"), "does not build for sm90 (Hopper): it builds"),
        (
            ("tensorrt", "int8", "--target", "sm89"),
            "fp16 loop: add --loop-precision fp16",
        ),
        (("torchscript", "int8"), "--backend onnxruntime or openvino or tensorrt"),
    ],
)
def test_types_and_gpus_that_a_backend_does_not_have_are_refused(options, message, small, out):
    assert message in error_of(export(small, out, *flags(*options)), out, 1)


def flags(backend: str, precision: str, *more: str) -> tuple[str, ...]:
    return ("--backend", backend, "--precision", precision, *more)


def test_targets_are_for_backends_that_build_for_other_machines(small, out):
    result = export(small, out, *flags("onnxruntime", "fp16", "--target", "sm86"))
    said = error_of(result, out, 2)
    assert "got sm86 for onnxruntime" in said
    assert "--backend tensorrt" in said


@pytest.mark.parametrize("steps", [(), ("--steps", "auto")])
def test_a_chain_that_is_longer_than_an_engine_s_loop_is_refused(steps, changed, out):
    long = changed(config=lambda content: content["schedule"].update(steps=1001))
    result = export(long, out, *flags("tensorrt", "fp16", "--target", "sm89", *steps))
    said = error_of(result, out, 1)
    assert "loops of at most 1000 steps, got 1001; choose fewer with --steps, or another" in said


@pytest.mark.parametrize("backend", kept(["onnxruntime", "openvino"], {"openvino"}))
def test_a_single_step_is_carried_though_a_loop_needs_two(backend, small, out):
    """Of the sampler that looks back, too."""
    more = {"text": False, "source": False, "loop": "graph"}
    settings = Settings(backend, steps=1, sampler="dpmpp", **more)
    export_bundle(small, out, settings)
    assert read_bundle(out).manifest.sampling.point.timesteps == (10,)


# --- numbers


def one_nan(weights: Weights) -> None:
    weights["classifier.weight"][1, 2] = np.nan


def encoder_overflows(weights: Weights) -> None:
    """Finite weights of which one product is not."""
    name = next(n for n in weights if n.startswith("vision.") and n.endswith("convolution.weight"))
    weights[name][:] = 3e38


def condition_overflows(weights: Weights) -> None:
    weights["vision_std"][0] = 1e-45


def loop_overflows(weights: Weights) -> None:
    weights["denoiser.layer2.weight"] *= np.float32(1e30)


def head_overflows(weights: Weights) -> None:
    weights["classifier.weight"][:] = 3e38


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_nan, "model.safetensors: classifier.weight holds NaN or infinite values"),
        (encoder_overflows, "image encoder of the float32 checkpoint gives NaN or infinity for 8"),
        (condition_overflows, "from step 1 of 10 on (t = 10, ddpm): one pass through its denoiser"),
        (loop_overflows, "from step 2 of 10 on (t = 9, ddpm): its denoiser does not contract"),
        (head_overflows, "the head, behind the reverse chain, of the float32 checkpoint gives NaN"),
    ],
)
def test_numbers_that_are_none_stop_the_export_where_they_begin(change, message, changed, out):
    assert message in error_of(export(changed(change), out, "--backend", "torchscript"), out, 1)


@pytest.mark.parametrize(
    "backend", kept(["onnxruntime", "openvino", "tensorrt"], {"onnxruntime", "tensorrt"})
)
def test_a_weight_beyond_fp16_is_named_and_bf16_proposed(backend, changed, out):
    def overflow(weights: Weights) -> None:
        weights["classifier.weight"][0, 0] = 1e5

    target = ("--target", "sm89") if backend == "tensorrt" else ()
    result = export(changed(overflow), out, *flags(backend, "fp16", *target))
    said = error_of(result, out, 1)
    assert "head.classifier.weight holds 1e+05, beyond the largest fp16 value" in said
    assert said.endswith("use --precision bf16 or fp32")


# --- labels


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "c", "d"], "id2label names 4 classes, the weights have 3; take both from"),
        (["a", "b"], "id2label names 2 classes, the weights have 3; take both from"),
    ],
)
def test_labels_of_another_number_than_the_classifier_s_are_one_line(names, message, changed, out):
    other = changed(
        config=lambda content: content.update(id2label={str(i): n for i, n in enumerate(names)})
    )
    assert message in error_of(export(other, out, "--backend", "torchscript"), out, 1)


# --- interrupted


_STOPPED = """
import os, signal, sys
from marnet_export.build import torchscript
from marnet_export.cli import main
from marnet_train.checkpoint import load_checkpoint

place, checkpoint = sys.argv[1:]
load_checkpoint(checkpoint)  # imports once, for all the children
options = ["--checkpoint", checkpoint, "--backend", "torchscript", "--no-text", "--no-source"]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
    child = os.fork()
    if child == 0:
        # Behind the encoder, which has been written by then.
        torchscript.build_refine = lambda *_, **__: os.kill(os.getpid(), number)
        main(["--output", f"{place}/{number.name}/b", *options])
    _, status = os.waitpid(child, 0)
    print(number.name, os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.slow
def test_an_export_that_is_stopped_while_it_builds_leaves_nothing_that_is_seen(small, tmp_path):
    command = [sys.executable, "-c", _STOPPED, str(tmp_path), str(small)]
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # no child finds libgomp's threads after a fork
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=one)
    assert done.stdout.splitlines() == ["SIGINT 1", "SIGTERM 143", "SIGKILL -9"]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Aborted!") == 1
    for stopped in ("SIGINT", "SIGTERM"):
        assert list((tmp_path / stopped).iterdir()) == []
    killed = tmp_path / "SIGKILL"
    (work,) = {entry.name for entry in killed.iterdir()} - {".b.lock"}
    assert work.startswith(".b.")
    assert (killed / work / "new/payload/encoder.pt").exists()
    # Nothing is locked, and what is an hour old goes with the next export.
    long_ago = time.time() - 3700
    os.utime(killed / work, (long_ago, long_ago))
    assert export(small, killed / "b", "--backend", "torchscript").exit_code == 0
    assert [entry.name for entry in killed.iterdir()] == ["b"]


@pytest.mark.slow
def test_what_a_killed_search_for_the_fastest_leaves_goes_with_the_next_export(
    small, out, monkeypatch
):
    """Each candidate is a bundle, in the folder of what becomes the bundle."""
    places = []

    def killed(backend: str, folder: Path, *_: object) -> None:
        places.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(race, "_build_apart", killed)
    result = export(small, out)
    assert result.exit_code == 1
    assert "Aborted!" in result.stderr
    assert list(out.parent.iterdir()) == []
    (place,) = places
    assert place.parent.name == "new"  # which is removed when stale: nothing is beside it


# --- the place to write to


def test_a_second_export_to_one_place_is_refused_and_disturbs_nothing(small, out):
    with at_work(out, overwrite=False) as fresh:
        result = export(small, out, "--backend", "torchscript")
        assert result.exit_code == OutputBusy.exit_code == 1
        (said,) = result.stderr.splitlines()
        assert f"process {os.getpid()} on {os.uname().nodename} is at work there" in said
        assert said.endswith("wait for it, stop it, or choose another output")
        (fresh / "mine").touch()
    assert [entry.name for entry in out.parent.iterdir()] == ["b"]
    assert [entry.name for entry in out.iterdir()] == ["mine"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of util-linux")
def test_a_read_only_folder_and_a_full_disk_are_one_line(small, tmp_path):
    folder = tmp_path / "disk"
    command = f"{SCRIPTS}/marnet-export --checkpoint {small} {' '.join(LEAN)} --precision fp16"
    to_rtx = f"{command} --backend tensorrt --target sm89 -o full"
    script = f"""
        mount -o remount,ro .
        {command} --backend torchscript -o deep/inside; echo code $?; ls -A
        mount -o remount,rw .
        head -c $(( $(df --output=avail -B1 . | tail -1) - 40000 )) /dev/zero > filler
        {to_rtx}; echo code $?; ls -A
    """
    first, second = in_small_filesystem(folder, 2000, textwrap.dedent(script)).split("code 1\n")[:2]
    assert first.count("\n") == 1
    assert ".inside.lock: cannot be written (Read-only file system: " in first
    assert "change the permissions of the folder" in first
    (said,) = [line for line in second.splitlines() if "Error" in line]
    assert "full: no space left on its file system" in said
    assert "Traceback" not in second
