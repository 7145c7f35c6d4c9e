"""What the builders write, opened as a deployed process opens it, is the float32 model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file
from tolerances import BUILT

from marnet_export.builders import TORCH_TYPES, Types, builder, choose_types
from marnet_export.plan import make_plan
from marnet_export.verify import reference_logits
from marnet_sdk.backends import Backend, Floats, make_tables, open_backend
from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import ExportError
from marnet_sdk.trajectory import draw_trajectory
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import ScheduleConfig, sampler_table
from marnet_train.models.marnet import MARNet, MarnetConfig

BACKENDS = ("torchscript", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "bf16")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MARNet:
    return load_checkpoint(checkpoint).model


@pytest.fixture(scope="module")
def pixels(checkpoint: Path) -> Floats:
    """Real images, 33 of them."""
    loaded = load_checkpoint(checkpoint)
    return loaded.preprocess.pixels(sorted(loaded.samples.glob("*.png"))[:33])


@pytest.fixture(scope="module")
def opened(bundle_of) -> Callable[[str, str], Backend]:
    def open_payload(backend: str, precision: str) -> Backend:
        bundle = read_bundle(bundle_of(backend, precision))
        compute = bundle.manifest.precision.compute
        return open_backend(backend, bundle.path / "payload", compute, 1)

    return open_payload


def build(model: MARNet, backend: str, precision: str, payload: Path) -> Types:
    """Build with images of noise as the example to trace: values must not matter."""
    payload.mkdir(parents=True)
    types = choose_types(backend, precision, None)
    side = model.config.vision.get("image_size", 32)
    example = torch.rand(2, 3, side, side)
    builder(backend).build(model, make_plan(model), example, types, payload)
    return types


def deployed_logits(
    backend: Backend, model: MARNet, pixels: Floats, folder: Path, *, seed: int, steps: int
) -> Floats:
    """Through tables of this seed and number of steps, made as the SDK makes them."""
    plan = make_plan(model, steps=steps)
    file = folder / f"{seed}-{steps}.safetensors"
    save_file(plan.tensors(), file)
    table = plan.table
    width = model.denoiser.dim
    tables = make_tables(
        file, seed=seed, timesteps=table.timesteps, train_steps=table.train_steps, width=width
    )
    return backend.run(pixels, tables)[0]


def eager_logits(model: MARNet, pixels: Floats, *, seed: int, steps: int) -> Floats:
    table = sampler_table(model.config.schedule, "ddpm", steps)
    noise = draw_trajectory(seed, table.timesteps, table.train_steps, model.denoiser.dim)
    return reference_logits(model, table, noise, pixels)


def assert_close(got: Floats, want: Floats, tolerance: float) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_any_size_give_the_float32_model_s_logits(
    backend, precision, opened, model, pixels, tmp_path
):
    want = eager_logits(model, pixels, seed=0, steps=100)
    run = opened(backend, precision)
    for batch in (1, 2, 5, 33):
        got = deployed_logits(run, model, pixels[:batch], tmp_path, seed=0, steps=100)
        assert_close(got, want[:batch], BUILT[precision])


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_serves_other_seeds_and_numbers_of_steps(
    backend, steps, opened, model, pixels, tmp_path
):
    got = deployed_logits(opened(backend, "fp32"), model, pixels, tmp_path, seed=9, steps=steps)
    assert_close(got, eager_logits(model, pixels, seed=9, steps=steps), BUILT["fp32"])
    built_for = eager_logits(model, pixels, seed=0, steps=100)
    assert np.abs(got - built_for).max() > BUILT["fp32"] * np.abs(built_for).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_are_what_the_final_classifier_sees(backend, bundle_of, opened, model, pixels):
    sampling = read_bundle(bundle_of(backend, "fp32")).manifest.sampling
    tables = make_tables(
        bundle_of(backend, "fp32") / "payload/plan.safetensors",
        seed=sampling.seed,
        timesteps=sampling.timesteps,
        train_steps=sampling.train_steps,
        width=sampling.width,
    )
    logits, features = opened(backend, "fp32").run(pixels, tables)
    with torch.inference_mode():
        again = model.classifier(torch.from_numpy(features)).numpy()
    assert_close(logits, again, BUILT["fp32"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_file_does_not_grow_with_the_number_of_steps(backend, checkpoint, tmp_path):
    sizes = {}
    for train_steps in (10, 1000):
        model = load_checkpoint(checkpoint).model
        model.config = replace(model.config, schedule=ScheduleConfig(steps=train_steps))
        build(model, backend, "fp32", tmp_path / str(train_steps))
        (file,) = (tmp_path / str(train_steps)).iterdir()
        sizes[train_steps] = file.stat().st_size
    assert sizes[1000] == pytest.approx(sizes[10], rel=0.01)


def test_the_onnx_loop_is_one_scan(bundle_of):
    proto = onnx.load(bundle_of("onnxruntime", "fp16") / "payload/model.onnx")
    operators = [node.op_type for node in proto.graph.node]
    assert operators.count("Scan") == 1
    assert not {"Loop", "If"} & set(operators)
    assert not proto.functions


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_are_stored_in_the_precision_that_was_asked(backend, precision, bundle_of):
    payload = bundle_of(backend, precision) / "payload"
    stored = builder(backend).stored_elements(payload)
    assert stored[TORCH_TYPES[precision]] / sum(stored.values()) > 0.95
    assert set(stored) == {TORCH_TYPES[precision], torch.float32}  # vectors stay in float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_files_are_half_as_large(backend, bundle_of):
    def size(precision: str) -> int:
        folder = bundle_of(backend, precision) / "payload"
        (file,) = folder.glob("model.*")
        return file.stat().st_size

    assert size("fp16") < 0.6 * size("fp32")
    assert size("bf16") < 0.6 * size("fp32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_building_leaves_the_model_as_it_was(backend, checkpoint, tmp_path):
    model = load_checkpoint(checkpoint).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build(model, backend, "fp16", tmp_path / "payload")
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("torchscript", "fp16"), ("torchscript", "bf16"), ("onnxruntime", "fp16")],
)
def test_a_vision_transformer_is_built_too(backend, precision, tmp_path):
    torch.manual_seed(0)
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = MarnetConfig(
        vision={"model_type": "vit", "hidden_size": 24, "image_size": 16, "patch_size": 4, **size},
        text={"model_type": "bert", "hidden_size": 16, "vocab_size": 8, **size},
        labels=("a", "b", "c"),
        dim=16,
        hidden=40,  # > 2 D: the loop carries the feature
        schedule=ScheduleConfig(steps=5),
    )
    model = MARNet(config).eval()
    payload = tmp_path / "payload"
    types = build(model, backend, precision, payload)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    run = open_backend(backend, payload, types.compute, 1)
    got = deployed_logits(run, model, pixels, tmp_path, seed=1, steps=5)
    assert_close(got, eager_logits(model, pixels, seed=1, steps=5), BUILT[precision])


@pytest.mark.parametrize(
    ("backend", "precision", "compute", "expected"),
    [
        ("torchscript", "fp32", None, "fp32"),
        ("torchscript", "fp16", None, "fp32"),
        ("torchscript", "bf16", None, "bf16"),
        ("torchscript", "bf16", "fp32", "fp32"),
        ("torchscript", "fp16", "bf16", "bf16"),
        ("onnxruntime", "fp16", None, "fp32"),
        ("onnxruntime", "bf16", None, "fp32"),
    ],
)
def test_half_precision_is_computed_with_only_where_it_is_asked_for(
    backend, precision, compute, expected
):
    types = choose_types(backend, precision, compute)
    assert types == Types(storage=precision, compute=expected)
    assert precision in types.sentence
    assert expected in types.sentence


@pytest.mark.parametrize(
    ("backend", "compute", "message"),
    [
        ("onnxruntime", "bf16", "onnxruntime cannot compute in bf16.*--backend torchscript"),
        ("torchscript", "fp16", "torchscript cannot compute in fp16.*choose --compute fp32$"),
    ],
)
def test_a_backend_that_cannot_compute_in_a_type_says_which_can(backend, compute, message):
    with pytest.raises(ExportError, match=message):
        choose_types(backend, "fp32", compute)
