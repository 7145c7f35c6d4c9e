"""What the builders write, opened as a deployed process opens it, is the float32 model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from quick import kept
from tiny import make_model, make_seda, plain_refine, tables_of
from tolerances import BUILT, FLOAT32_LAYER

from marnet_export.build import torchscript as torchscript_builder
from marnet_export.build.builder import BUILDERS, builder, check_device, choose_types, device_of
from marnet_export.build.tracing import quiet
from marnet_export.build.types import Types
from marnet_export.lower.methods import lower, lower_marnet
from marnet_export.lower.plan import make_plan
from marnet_export.lower.seda import seeing_plan
from marnet_export.settings import Settings, check_types, order_for
from marnet_sdk.backends import Backend, open_backend, torch_device
from marnet_sdk.backends.torchscript import ENCODER, REFINE, traced_on
from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import BackendUnavailable, ExportError, InvalidInput
from marnet_sdk.noise.tables import Floats
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import SAMPLERS, ScheduleConfig, sampler_table
from marnet_train.models.marnet import MARNet
from marnet_train.models.seda import SeDA

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
    module = builder(backend)
    lowered = lower(model)
    module.build_encoder(lowered, torch.rand(2, 3, side, side), types, payload)
    module.build_refine(lowered, types, payload)
    return types


def deployed_logits(
    backend: Backend, model: MARNet, pixels: Floats, *, sampler: str = "ddpm", steps: int, **noise
) -> Floats:
    """[B, K, C], through tables made as the SDK makes them."""
    table = sampler_table(model.config.schedule, sampler, steps)
    plan = seeing_plan(model) if isinstance(model, SeDA) else make_plan(model)
    tables = tables_of(model, plan, table, **noise)
    return backend.refine(backend.encode(pixels), tables)[0]


@torch.inference_mode()
def eager_logits(
    model: MARNet, pixels: Floats, *, sampler: str = "ddpm", steps: int, **noise
) -> Floats:
    table = sampler_table(model.config.schedule, sampler, steps)
    x_v = model.see(model.vision(torch.from_numpy(pixels))).numpy()
    return plain_refine(model, table, x_v, **noise)[0]


def assert_close(got: Floats, want: Floats, tolerance: float) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("precision", kept(PRECISIONS, {"fp32", "fp16"}))
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_any_size_give_the_float32_model_s_logits(
    backend, precision, opened, model, pixels
):
    want = eager_logits(model, pixels, steps=100)
    run = opened(backend, precision)
    for batch in (1, 2, 5, 33):
        got = deployed_logits(run, model, pixels[:batch], steps=100)
        assert_close(got, want[:batch], BUILT[precision])


WIDE = 40  # more than twice the latent's width
VIT = {"model_type": "vit", "hidden_size": 24, "image_size": 32, "patch_size": 8,
       "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Callable[..., tuple[MARNet, Backend]]:
    """backend, hidden width -> a model with fresh weights, whose loop contracts, built.

    The wide one, whose loop carries the feature, has a vision transformer.
    """
    built: dict[tuple[str, int, bool], tuple[MARNet, Backend]] = {}

    def make(backend: str, hidden: int, *, progressive: bool = False) -> tuple[MARNet, Backend]:
        key = backend, hidden, progressive
        if key not in built:
            vision = {"vision": VIT} if hidden == WIDE else {}
            model = make_model(hidden=hidden, progressive=progressive, **vision)
            payload = tmp_path_factory.mktemp("fresh") / "payload"
            build(model, backend, "fp32", payload)
            built[key] = (model, open_backend(backend, payload, "fp32", 1))
        return built[key]

    return make


@pytest.mark.parametrize("keys", [None, [5, 2**64 - 1, 5, 0, 7]], ids=["shared", "image"])
@pytest.mark.parametrize("samples", kept([1, 3], {3}))
@pytest.mark.parametrize("steps", kept([1, 2, 7, 100], {1, 7}))
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("backend", "hidden"),
    kept(
        [(backend, hidden) for backend in BACKENDS for hidden in (12, WIDE)],
        {("torchscript", 12), ("torchscript", WIDE), ("onnxruntime", WIDE)},
        many=True,
    ),
)
def test_one_file_serves_every_sampler_number_of_steps_samples_and_kind_of_noise(
    backend, hidden, sampler, steps, samples, keys, fresh
):
    model, run = fresh(backend, hidden)
    pixels = np.random.default_rng(1).standard_normal((5, 3, 32, 32)).astype(np.float32)
    how = {"sampler": sampler, "steps": steps, "seed": 9, "samples": samples}
    if keys:
        how["keys"] = [key % (2**64 - samples) for key in keys]
    got = deployed_logits(run, model, pixels, **how)
    assert got.shape == (5, samples, 3)
    assert_close(got, eager_logits(model, pixels, **how), FLOAT32_LAYER)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 1), ("ddpm", 7), ("dpmpp", 7)])
@pytest.mark.parametrize(
    ("backend", "hidden"),
    kept(
        [(b, h) for b in (*BACKENDS, "openvino", "aotinductor") for h in (12, 40)],
        {("torchscript", 40)},  # the test of chains that are carried on has the others
        many=True,
    ),
)
def test_a_progressive_loop_is_built_too(backend, hidden, sampler, steps, fresh):
    model, run = fresh(backend, hidden, progressive=True)
    pixels = np.random.default_rng(1).standard_normal((5, 3, 32, 32)).astype(np.float32)
    how = {"sampler": sampler, "steps": steps, "seed": 9, "samples": 2}
    got = deployed_logits(run, model, pixels, **how)
    assert_close(got, eager_logits(model, pixels, **how), FLOAT32_LAYER)


@pytest.mark.parametrize(
    ("backend", "hidden", "progressive"),
    kept(
        [
            (backend, hidden, progressive)
            for backend in (*BACKENDS, "openvino", "aotinductor")
            for hidden in (12, WIDE)
            for progressive in (False, True)
        ],
        {("torchscript", WIDE, False), ("onnxruntime", 12, True), ("openvino", WIDE, True)},
        many=True,
    ),
)
def test_a_chain_that_carries_another_on_is_built_too(backend, hidden, progressive, tmp_path):
    """With its start, which each image has of its own, at any number of steps and of samples."""
    how = {"hidden": hidden, "progressive": progressive, "handover": "carry"}
    model = make_seda(latent=10, steps=9, **how)
    with torch.no_grad():  # fresh weights leave little
        model.learner.denoiser.layer4.weight *= 100
    build(model, backend, "fp32", tmp_path / "payload")
    run = open_backend(backend, tmp_path / "payload", "fp32", 1)
    pixels = np.random.default_rng(1).standard_normal((5, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        left = model.see(model.vision(torch.from_numpy(pixels)))[:, 20:]
    assert left.std(dim=0).min() > 0.01
    for sampler, steps, keys in (("ddpm", 9, None), ("dpmpp", 4, None), ("ddim", 1, range(5))):
        noise = {"seed": 9, "samples": 2, "keys": keys and [*keys]}
        got = deployed_logits(run, model, pixels, sampler=sampler, steps=steps, **noise)
        want = eager_logits(model, pixels, sampler=sampler, steps=steps, **noise)
        assert_close(got, want, FLOAT32_LAYER)


@pytest.mark.parametrize("sampler", kept(SAMPLERS, {"ddpm"}))
@pytest.mark.parametrize("backend", kept([*BACKENDS, "openvino"], {"onnxruntime"}))
def test_a_thousand_steps_are_the_plain_loop_s(backend, sampler, fresh):
    """In the file that was built of a model with a tenth of them."""
    known, run = fresh(backend, WIDE)
    model = copy.deepcopy(known)
    model.config = replace(model.config, schedule=ScheduleConfig(steps=1000))
    pixels = np.random.default_rng(1).standard_normal((3, 3, 32, 32)).astype(np.float32)
    how = {"sampler": sampler, "steps": 1000, "samples": 2}
    got = deployed_logits(run, model, pixels, **how)
    assert_close(got, eager_logits(model, pixels, **how), FLOAT32_LAYER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampler_steps_seed_and_sample_all_matter_to_the_answer(backend, opened, model, pixels):
    """A graph that ignored one of its inputs could agree with a model that ignored it too."""
    run = opened(backend, "fp32")
    base = {"sampler": "ddpm", "steps": 10, "seed": 0, "samples": 2}
    want = deployed_logits(run, model, pixels, **base)
    scale = np.abs(want).max()
    assert np.abs(want[:, 0] - want[:, 1]).max() > BUILT["fp32"] * scale
    for change in ({"sampler": "ddim"}, {"steps": 20}, {"seed": 1}, {"keys": list(range(1, 34))}):
        got = deployed_logits(run, model, pixels, **(base | change))
        assert np.abs(got - want).max() > BUILT["fp32"] * scale, change


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_are_what_the_final_classifier_sees(backend, opened, model, pixels):
    run = opened(backend, "fp32")
    table = sampler_table(model.config.schedule, "ddpm")
    tables = tables_of(model, make_plan(model), table, samples=2)
    logits, features = run.refine(run.encode(pixels), tables)
    with torch.inference_mode():
        again = model.classifier(torch.from_numpy(features)).numpy()
    assert_close(logits, again, BUILT["fp32"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_file_does_not_grow_with_the_number_of_steps(backend, checkpoint, tmp_path):
    sizes = {}
    for train_steps in (10, 1000):
        model = load_checkpoint(checkpoint).model
        model.config = replace(model.config, schedule=ScheduleConfig(steps=train_steps))
        build(model, backend, "fp32", tmp_path / str(train_steps))
        files = (tmp_path / str(train_steps)).iterdir()
        sizes[train_steps] = sum(file.stat().st_size for file in files)
    assert sizes[1000] == pytest.approx(sizes[10], rel=0.01)


def test_the_onnx_loop_is_one_scan(bundle_of):
    proto = onnx.load(bundle_of("onnxruntime", "fp16") / "payload/refine.onnx")
    operators = [node.op_type for node in proto.graph.node]
    assert operators.count("Scan") == 1
    assert not {"Loop", "If"} & set(operators)
    assert not proto.functions


@pytest.mark.parametrize("precision", kept(PRECISIONS, {"fp32", "fp16"}))
@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_are_stored_in_the_precision_that_was_asked(backend, precision, bundle_of):
    payload = bundle_of(backend, precision) / "payload"
    compute = choose_types(backend, precision, None).compute
    found = builder(backend).products(payload, Types(precision, compute), (3, 32, 32))
    assert {product.storage for product in found} == {precision}


@pytest.mark.parametrize("precision", kept(["fp16", "bf16"], {"fp16"}))
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_files_are_half_as_large(backend, precision, bundle_of):
    def size(precision: str) -> int:
        folder = bundle_of(backend, precision) / "payload"
        files = [file for file in folder.iterdir() if file.suffix != ".safetensors"]
        assert len(files) == 2  # encoder and loop
        return sum(file.stat().st_size for file in files)

    assert size(precision) < 0.6 * size("fp32")


@pytest.mark.parametrize("backend", kept(BACKENDS, {"torchscript"}))
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
    [
        pytest.param("onnxruntime", "fp16", marks=pytest.mark.slow),
        ("torchscript", "fp16"),
        pytest.param("torchscript", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_vision_transformer_is_built_too(backend, precision, tmp_path):
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit = {"model_type": "vit", "hidden_size": 24, "image_size": 16, "patch_size": 4, **size}
    # hidden > 2 D: the loop carries the feature
    model = make_model(steps=5, dim=16, hidden=40, vision=vit)
    payload = tmp_path / "payload"
    types = build(model, backend, precision, payload)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    run = open_backend(backend, payload, types.compute, 1)
    got = deployed_logits(run, model, pixels, seed=1, steps=5)
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
        (
            "onnxruntime",
            "bf16",
            "onnxruntime cannot compute in bf16.*--backend .*openvino .*or torchscript",
        ),
        ("torchscript", "fp16", "torchscript cannot compute in fp16.*choose --compute fp32"),
    ],
)
def test_a_backend_that_cannot_compute_in_a_type_says_which_can(backend, compute, message):
    with pytest.raises(ExportError, match=message):
        choose_types(backend, "fp32", compute)


# --- for a GPU


@pytest.mark.parametrize(
    ("backend", "asked", "device"),
    [
        ("torchscript", None, "cpu"),
        ("torchscript", "cuda", "cuda"),
        ("aotinductor", "cpu", "cpu"),
        ("aotinductor", "cuda", "cuda"),
        ("tensorrt", None, "cuda"),
        ("tensorrt", "cuda", "cuda"),
        ("openvino", None, "cpu"),
        ("onnxruntime", "cpu", "cpu"),
    ],
)
def test_a_backend_builds_for_the_device_that_is_asked_for(backend, asked, device):
    assert device_of(backend, asked) == device


@pytest.mark.parametrize(
    ("backend", "asked", "message"),
    [
        (
            "onnxruntime",
            "cuda",
            "onnxruntime builds for cpu alone, got --device cuda; .* torchs",
        ),
        ("openvino", "cuda", "choose --backend aotinductor or tensorrt or torchscript"),
        ("tensorrt", "cpu", "tensorrt builds for cuda alone, got --device cpu; .* or torchscript"),
    ],
)
def test_a_device_that_a_backend_does_not_build_for_is_refused(backend, asked, message):
    with pytest.raises(ExportError, match=message):
        check_types(Settings(backend, device=asked))


def test_a_device_that_does_not_exist_is_refused():
    with pytest.raises(InvalidInput, match=r"device: got 'cudda', expected one of cpu, cuda\. Did"):
        Settings("torchscript", device="cudda")


@pytest.mark.parametrize("backend", ["torchscript", "aotinductor"])
@pytest.mark.parametrize(
    ("precision", "compute", "expected"),
    [
        ("fp32", None, "fp32"),
        ("fp16", None, "fp16"),
        ("bf16", None, "bf16"),
        ("fp16", "fp32", "fp32"),
        ("fp32", "fp16", "fp16"),
    ],
)
def test_on_a_gpu_products_are_computed_in_the_type_that_is_asked_for(
    backend, precision, compute, expected
):
    types = choose_types(backend, precision, compute, "cuda")
    assert types == Types(precision, expected)


@pytest.mark.parametrize("backend", ["torchscript", "aotinductor"])
def test_a_gpu_that_torch_does_not_find_is_an_error_before_anything_is_built(backend, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    message = rf"^{backend} cannot run on cuda: torch \S+ is built without CUDA; install one .*$"
    with pytest.raises(BackendUnavailable, match=message) as caught:
        check_types(Settings(backend, device="cuda"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", BUILDERS)
def test_without_a_gpu_what_is_built_for_the_processor_or_ahead_of_time_is_built(
    backend, monkeypatch
):
    monkeypatch.setattr(torch.version, "cuda", None)
    check_device(backend, device_of(backend, None))


def test_the_device_reaches_the_builders_that_build_for_several():
    for backend in ("torchscript", "aotinductor", "tensorrt"):
        assert order_for(Settings(backend, device="cuda")).device == "cuda"
    for backend in ("torchscript", "aotinductor", "openvino"):
        assert order_for(Settings(backend)).device == "cpu"
    ahead = order_for(Settings("tensorrt", targets=("sm86", "sm89")))
    assert (ahead.device, ahead.targets) == ("cuda", ("sm86", "sm89"))


@pytest.fixture
def traced_for(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """A payload that says of itself that it was traced on some device."""

    def make(device: str) -> Path:
        write = torchscript_builder._save

        def save(module, types, path, _) -> None:
            write(module, types, path, device)

        monkeypatch.setattr(torchscript_builder, "_save", save)
        lowered, types = lower_marnet(make_model()), Types("fp32", "fp32")
        torchscript_builder.build_encoder(lowered, torch.rand(2, 3, 32, 32), types, tmp_path)
        torchscript_builder.build_refine(lowered, types, tmp_path)
        return tmp_path

    return make


def test_what_was_traced_on_a_gpu_says_so_and_does_not_open_on_the_processor(traced_for):
    payload = traced_for("cuda")
    assert {traced_on(payload / name) for name in (ENCODER, REFINE)} == {"cuda"}
    message = r"traced on cuda and cannot run on cpu; .*--backend torchscript --device cpu"
    with pytest.raises(BackendUnavailable, match=message):
        open_backend("torchscript", payload, "fp32", None, "cpu")


def test_what_was_traced_on_the_processor_does_not_open_on_a_gpu(traced_for, monkeypatch):
    payload = traced_for("cpu")
    assert traced_on(payload / ENCODER) == "cpu"
    monkeypatch.setattr(torch_device, "why_no_cuda", lambda: None)
    message = r"refine.pt was traced on cpu and cannot run on cuda; .* --device cuda"
    with pytest.raises(BackendUnavailable, match=message):
        open_backend("torchscript", payload, "fp32", None, "cuda")


def test_traced_convolutions_never_use_tf32(traced_for):
    with quiet():
        module = torch.jit.load(str(traced_for("cpu") / ENCODER))
    graph = module.inlined_graph  # which the nodes do not keep alive
    convolutions = graph.findAllNodes("aten::_convolution", recurse=True)
    assert convolutions
    assert [list(node.inputs())[-1].toIValue() for node in convolutions] == [False] * len(
        convolutions
    )
