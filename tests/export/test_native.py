"""The native loop in a bundle: the same classifier, kept where it is faster, with a way out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from bf16 import bf16_only
from calibration import calibrate
from compilers import need_compiler
from native import make_input
from plan_twin import run_plan
from safetensors.numpy import load_file, save_file
from tiny import make_model, make_seda, tables_of, write_checkpoint
from tolerances import BUILT, FLOAT32_LOOP, FLOAT32_TWICE, INT8

from marnet_export import job
from marnet_export.build import native
from marnet_export.build.native import loop_layers
from marnet_export.build.types import Types
from marnet_export.choose import loop as choose_loop
from marnet_export.choose.loop import faster_up_to, shown
from marnet_export.job import export_bundle
from marnet_export.lower.methods import lower_marnet
from marnet_export.lower.modules import ScriptedLoop
from marnet_export.lower.plan import make_plan
from marnet_export.prove.bundle import check_receipt
from marnet_export.prove.checks import PASSED
from marnet_export.rebuild import changed_settings
from marnet_export.settings import Settings
from marnet_kernels.native import NativeLoop, loop_reference
from marnet_sdk import Classifier
from marnet_sdk import native_loop as sdk
from marnet_sdk.backends import IN_GRAPH
from marnet_sdk.bundle import read_bundle, reseal_bundle
from marnet_sdk.cpus import cpus
from marnet_sdk.errors import (
    BundleFormatError,
    ExportError,
    InvalidInput,
    NativeLoopMissing,
    VerificationFailed,
)
from marnet_sdk.native_loop import LAYERS, load_layers, save_layers
from marnet_sdk.noise.tables import Tables
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.diffusion import sampler_table

KEEP = {1: {"native": 1.0, "graph": 2.0}, 4: {"native": 3.0, "graph": 2.0}}
DROP = {1: {"native": 2.0, "graph": 1.0}}
PROGRESSIVE = "the denoiser is progressive, and the native loop feeds no estimate back"
CARRIED = "the chain starts from what stage 1 left, the native loop from noise"
LEFT_TO_THE_GRAPH = [
    (partial(make_model, steps=10, progressive=True), PROGRESSIVE),
    (partial(make_seda, latent=10, steps=10, handover="carry"), CARRIED),
]


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    need_compiler()


def settings_of(backend: str, precision: str, **more) -> Settings:
    return Settings(
        backend, precision, **{"min_agreement": 0.98, "text": False, "steps": 10} | more
    )


def _refine(classifier: Classifier) -> sdk.NativeRefine:
    """Return what runs the loop and the head of an open classifier."""
    refine = classifier._guard.check().refine
    assert isinstance(refine, sdk.NativeRefine)
    return refine


# The layers are the plan's


@pytest.mark.parametrize("carry", ["hidden", "feature"])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp"])
def test_the_loop_is_the_plan(carry, sampler):
    model = make_model(dim=24, hidden=32)
    plan, table = make_plan(model, carry), sampler_table(model.config.schedule, sampler, 20)
    x_v = 2 + 3 * np.random.default_rng(1).standard_normal((5, len(model.vision_mean)))
    drawn = [
        draw_trajectory(0, table.timesteps, table.train_steps, 24, trajectory=k) for k in range(3)
    ]
    want = run_plan(plan, table, x_v, drawn)
    tables = tables_of(model, plan, table, samples=3)
    layers = loop_layers(plan, Types("fp32", "fp32"))
    assert sdk.compile_library() is None
    for loop in (NativeLoop(layers), lambda *a: loop_reference(layers, *a)):
        got = loop(x_v.astype(np.float32), tables.coefficients, tables.bias)
        assert np.abs(got - want).max() <= FLOAT32_LOOP * np.abs(want).max()


@pytest.mark.parametrize("carry", ["hidden", "feature"])
def test_in_int8_it_is_nearly_the_plan(carry):
    model = make_model(dim=24, hidden=32)
    plan = make_plan(model, carry)
    calibration = calibrate(model, plan=plan, steps=10)
    lowered = lower_marnet(model, plan)
    layers = loop_layers(plan, Types("int8", "fp32"))
    inputs = calibration.x_v, calibration.coefficients, calibration.bias
    with torch.inference_mode():
        loop = ScriptedLoop(lowered.step(torch.float32))
        want = loop(*map(torch.from_numpy, inputs)).numpy()
    got = NativeLoop(layers)(*inputs)
    assert np.abs(got - want).max() <= INT8 * np.abs(want).max()


@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16", "int8"])
def test_a_loop_is_stored_in_the_type_that_is_asked_for(storage, tmp_path):
    plan = make_plan(make_model(dim=24, hidden=32))
    layers = loop_layers(plan, Types(storage, "fp32"))
    once = "fp32" if storage == "int8" else storage
    found = {name: layer.kind for name, layer in layers.layers()}
    inner = dict.fromkeys(("hidden2", "hidden3", "carry"), storage)
    assert found == {"condition": once, "output": once, **inner}
    save_layers(layers, tmp_path / LAYERS, 7)
    again, most_rows = load_layers(tmp_path / LAYERS)
    assert most_rows == 7
    assert again.slope == layers.slope
    for (name, one), (_, other) in zip(layers.layers(), again.layers(), strict=True):
        assert one.kind == other.kind, name
        for part in ("weight", "bias", "scale"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


# A bundle with it


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("onnxruntime", "fp16"),
        pytest.param("onnxruntime", "int8", marks=pytest.mark.slow),
        pytest.param("openvino", "fp16", marks=pytest.mark.slow),
        pytest.param("openvino", "bf16", marks=(bf16_only, pytest.mark.slow)),
    ],
)
def test_it_answers_as_the_graph_beside_it(backend, precision, native_bundle, monkeypatch):
    path = native_bundle(backend, precision)
    one = Classifier(path)
    assert one.bundle.manifest.loop == "native"
    assert one.runtime.loop.startswith("native: ")
    pixels = load_file(path / "golden/answers.safetensors")["pixels"]
    got = one.logits(pixels)
    monkeypatch.setattr(sdk, "why_missing", lambda: "it is not here")
    monkeypatch.setattr(sdk, "_warned", {"it is not here"})
    other = Classifier(path)
    assert other.runtime.loop == IN_GRAPH
    want = other.logits(pixels)
    tolerance = INT8 if precision == "int8" else BUILT[precision]
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize(
    ("precision", "compute"),
    [("fp16", "fp32"), pytest.param("int8", "int8", marks=pytest.mark.slow)],
)
def test_the_receipt_is_read_from_its_layers(precision, compute, native_bundle):
    bundle = read_bundle(native_bundle("onnxruntime", precision))
    loop = bundle.manifest.precision.receipt["loop"]
    assert loop.multiply_adds == 9 * 3 * 96 * 96
    assert (loop.storage, loop.compute) == ({precision: 1.0}, {compute: 1.0})
    assert check_receipt(bundle).outcome == PASSED


@bf16_only
@pytest.mark.slow
def test_the_receipt_of_openvino_says_float32(native_bundle):
    receipt = read_bundle(native_bundle("openvino", "bf16")).manifest.precision.receipt
    assert receipt["loop"].storage == {"bf16": 1.0}
    assert receipt["loop"].compute == {"fp32": 1.0}
    assert receipt["encoder"].compute["bf16"] > 0.9


def test_fidelity_is_of_the_native_loop_and_has_both_times(native_bundle):
    found = json.loads((native_bundle("onnxruntime", "fp16") / "fidelity.json").read_text())
    assert found["loop"]["runs"] == "native"
    assert set(found["loop"]["milliseconds"]["1"]) == {"native", "graph"}
    assert found["top1_agreement"] >= 0.98
    assert found["instability"]["images"] > 0  # what the graph's verification found is kept


def test_more_rows_than_it_is_for_go_through_the_graph(native_bundle):
    classifier = Classifier(native_bundle("onnxruntime", "fp16"))
    refine = _refine(classifier)
    assert refine._graph is None  # not loaded for the golden answers, which are few
    pixels = load_file(classifier.bundle.path / "golden/answers.safetensors")["pixels"]
    many = np.resize(pixels, (refine.most_rows + 1, *pixels.shape[1:]))
    got = classifier.logits(many)
    assert refine._graph is not None
    want = classifier.logits(pixels)
    assert np.abs(got[: len(want)] - want).max() <= BUILT["fp16"] * np.abs(want).max()


@pytest.mark.slow
def test_in_int8_it_runs_every_batch(native_bundle):
    """An answer must not depend on how many images come with it, and the graph's is another."""
    path = native_bundle("onnxruntime", "int8")
    classifier = Classifier(path)
    refine = _refine(classifier)
    layers, most_rows = load_layers(path / "payload" / LAYERS)
    assert most_rows == sdk.ANY_ROWS
    assert "rows the graph" not in classifier.runtime.loop
    assert json.loads((path / "fidelity.json").read_text())["loop"]["most_rows"] is None
    x_v, *tables = make_input(layers, images=70, samples=1)
    many, _ = refine(x_v, Tables(*tables))
    few, _ = refine(x_v[:3], Tables(*tables))
    assert np.abs(few - many[:3]).max() <= FLOAT32_TWICE * np.abs(many).max()  # the head's sums
    assert refine._graph is None


def test_without_the_library_the_graph_answers_and_it_is_said_once(native_bundle, monkeypatch):
    path = native_bundle("onnxruntime", "fp16")
    pixels = load_file(path / "golden/answers.safetensors")["pixels"]
    want = Classifier(path).predict(sorted((path / "golden/images").iterdir()))
    monkeypatch.setattr(sdk, "why_missing", lambda: "it is not here; run: make native")
    monkeypatch.setattr(sdk, "_warned", set())
    with pytest.warns(NativeLoopMissing, match="runs as a graph, which is slower: it is not here"):
        classifier = Classifier(path)
    assert classifier.runtime.loop == IN_GRAPH
    got = classifier.predict(sorted((path / "golden/images").iterdir()))
    assert [a.label for a in got] == [a.label for a in want]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Classifier(path).logits(pixels)


def test_threads_are_those_of_the_classifier(native_bundle):
    path = native_bundle("onnxruntime", "fp16")
    assert _refine(Classifier(path, threads=1)).loop.most_threads == 1
    assert _refine(Classifier(path)).loop.most_threads == cpus().threads


def test_it_runs_without_torch(native_bundle):
    code = (
        "import sys; from marnet_sdk import Classifier; c = Classifier(sys.argv[1]);"
        "c.predict(sorted((c.bundle.path / 'golden/images').iterdir()));"
        "print(c.runtime.loop[:6], 'torch' in sys.modules)"
    )
    path = str(native_bundle("onnxruntime", "fp16"))
    command = [sys.executable, "-W", "error", "-c", code, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("native False\n", "")


@pytest.mark.parametrize("damage", ["metadata", "weight", "file"])
def test_layers_that_are_none_are_refused(damage, tmp_path):
    plan = make_plan(make_model(dim=24, hidden=32))
    save_layers(loop_layers(plan, Types("fp32", "fp32")), tmp_path / LAYERS, 7)
    arrays = load_file(tmp_path / LAYERS)
    if damage == "file":
        (tmp_path / LAYERS).write_bytes(b"nothing")
    elif damage == "metadata":
        save_file(arrays, tmp_path / LAYERS)
    else:
        about = {"most_rows": 1, "slope": 0.01, "kinds": {"hidden2": "fp32"}}
        save_file(arrays, tmp_path / LAYERS, {"loop": json.dumps(about)})
    with pytest.raises(
        BundleFormatError, match=r"does not hold the layers of a loop .* export the"
    ):
        load_layers(tmp_path / LAYERS)


def test_a_manifest_must_say_what_the_payload_has(native_bundle, tmp_path):
    shutil.copytree(native_bundle("onnxruntime", "fp16"), tmp_path / "b")
    reseal_bundle(tmp_path / "b", loop="graph")
    with pytest.raises(BundleFormatError, match=r"loop 'graph' does not go with .*native_loop"):
        read_bundle(tmp_path / "b")


# Whether it is kept


@pytest.mark.parametrize(
    ("taken", "loop"),
    [(KEEP, "native"), pytest.param(DROP, "graph", marks=pytest.mark.slow)],
)
def test_auto_keeps_whichever_is_faster(taken, loop, small, tmp_path, monkeypatch):
    monkeypatch.setattr(choose_loop, "time_loops", lambda *_: taken)
    said: list[str] = []
    export_bundle(small, tmp_path / "b", settings_of("openvino", "fp32"), say=said.append)
    bundle = read_bundle(tmp_path / "b")
    assert bundle.manifest.loop == loop
    assert bundle.manifest.settings["loop"] == "auto"
    files = {path.name for path in (bundle.path / "payload").iterdir()}
    assert ({LAYERS, "head.xml"} <= files) == (loop == "native")
    assert ({LAYERS, "head.xml"} & files == set()) == (loop == "graph")
    line = next(line for line in said if "the native loop" in line)
    if loop == "native":
        assert "up to 1 rows at once: 1 ms for 1, the graph 2; 3 ms for 4, the graph 2" in line
        assert load_layers(bundle.path / "payload" / LAYERS)[1] == 1
    else:
        assert "the graph runs the loop: the native loop is no faster here" in line


@pytest.mark.slow
def test_a_native_loop_that_fails_is_left_out_or_refused(checkpoint, tmp_path, monkeypatch):
    def wrong(plan, types):
        layers = loop_layers(plan, types)
        return replace(layers, output=replace(layers.output, weight=-layers.output.weight))

    monkeypatch.setattr(native, "loop_layers", wrong)
    said: list[str] = []
    settings = settings_of("onnxruntime", "fp32")
    export_bundle(checkpoint, tmp_path / "b", settings, say=said.append)
    assert read_bundle(tmp_path / "b").manifest.loop == "graph"
    assert any("the graph runs the loop: default: top-1 agreement is" in line for line in said)
    with pytest.raises(VerificationFailed, match=r"the native loop: .* try --loop graph"):
        export_bundle(checkpoint, tmp_path / "c", replace(settings, loop="native"))
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_without_a_compiler_the_graph_runs_and_it_says_why(small, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "compile_library", lambda: "g++ is not installed")
    said: list[str] = []
    settings = settings_of("onnxruntime", "fp32")
    export_bundle(small, tmp_path / "b", settings, say=said.append)
    assert read_bundle(tmp_path / "b").manifest.loop == "graph"
    assert "the graph runs the loop: g++ is not installed" in said
    with pytest.raises(ExportError, match=r"--loop native: g\+\+ is not installed; leave --loop"):
        export_bundle(small, tmp_path / "c", replace(settings, loop="native"))


def test_a_backend_without_a_place_for_it_says_so(small, tmp_path):
    settings = settings_of("torchscript", "fp32", loop="native")
    with pytest.raises(ExportError, match="--loop native: torchscript has no place for it"):
        export_bundle(small, tmp_path / "b", settings)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "why"), LEFT_TO_THE_GRAPH)
def test_a_loop_that_it_does_not_run_is_left_to_the_graph_which_is_said(make, why, tmp_path):
    checkpoint = write_checkpoint(make(), tmp_path / "untrained")
    said: list[str] = []
    export_bundle(checkpoint, tmp_path / "b", settings_of("onnxruntime", "fp32"), say=said.append)
    assert read_bundle(tmp_path / "b").manifest.loop == "graph"
    assert said.count(f"the graph runs the loop: {why}") == 1


@pytest.mark.parametrize(("make", "why"), LEFT_TO_THE_GRAPH)
def test_for_a_loop_that_it_does_not_run_it_is_refused_before_anything_is_built(
    make, why, tmp_path, monkeypatch
):
    checkpoint = write_checkpoint(make(), tmp_path / "untrained")
    monkeypatch.setattr(job, "builder", lambda _: None)  # it would build nothing
    with pytest.raises(ExportError, match=f"--loop native: {why}; leave --loop out"):
        export_bundle(checkpoint, tmp_path / "b", settings_of("onnxruntime", "fp32", loop="native"))
    assert not (tmp_path / "b").exists()


def test_a_loop_that_does_not_exist_is_refused():
    with pytest.raises(InvalidInput, match=r"loop: got 'nativ', expected one of .* 'native'\?"):
        Settings("onnxruntime", loop="nativ")


def test_another_backend_chooses_its_loop_anew(native_bundle):
    bundle = read_bundle(native_bundle("onnxruntime", "fp16"))
    assert changed_settings(bundle, {}).loop == "native"
    assert changed_settings(bundle, {"backend": "torchscript"}).loop == "auto"


def test_rows_are_those_up_to_which_it_is_faster():
    assert faster_up_to(KEEP) == 1
    assert faster_up_to(DROP) == 0
    assert faster_up_to({}) == 0
    assert shown(DROP) == "2 ms for 1, the graph 1"
