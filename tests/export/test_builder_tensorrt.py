"""Real engines of TensorRT-RTX, and the strongly typed ONNX files that they are built from."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from quick import kept
from tiny import make_model, plain_refine, tables_of
from tolerances import BF16_LAYER, BUILT, FLOAT32_LAYER, TWIN_LOOP

from marnet_export.build.builder import Order
from marnet_export.build.tensorrt.engines import add_engines, layers_of, parse_network
from marnet_export.build.tensorrt.graphs import (
    _session,
    build_encoder,
    build_refine,
    build_text,
    open_reference,
    open_text_reference,
    products,
)
from marnet_export.build.types import TORCH_TYPES, Calibration, Types
from marnet_export.lower.methods import Lowered, lower, lower_marnet
from marnet_export.lower.plan import make_plan
from marnet_kernels.reverse_sampler import pack_tables, reverse_sampler_reference
from marnet_sdk.errors import BackendUnavailable, ExportError, InvalidInput, MissingExtra
from marnet_sdk.files import sha256_file
from marnet_sdk.gpu.persistent_loop import LoopWeights
from marnet_sdk.gpu.tensorrt_library import (
    find_device,
    load_library,
    make_log,
    read_header,
    read_index,
)
from marnet_sdk.noise.tables import Floats, Tables
from marnet_train.diffusion import sampler_table
from marnet_train.models.marnet import MARNet

RTX = load_library("tensorrt_rtx")
TARGETS = ("sm80", "sm120")
BUCKETS = (1, 4)
HOW = [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("int8", "fp16")]
EACH = kept(HOW, {("fp16", "fp16")}, many=True)  # engines take seconds to build
TRANSFORMER = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"hidden_size": 24, "image_size": 32, "patch_size": 8, **TRANSFORMER},
    "swin": {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2],
             "num_heads": [2], "window_size": 4},
    "convnext": {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]},
}  # fmt: skip


def model_of(kind: str, **config: Any) -> MARNet:
    vision = {"model_type": kind, **VISION[kind]}
    return make_model(hidden=16, dim=64, vision=vision, **config)


def pixels_of(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def features_of(model: MARNet, count: int) -> Floats:
    """x_v [count, D_v], spread as the model's statistics say."""
    noise = np.random.default_rng(1).standard_normal((count, len(model.vision_mean)))
    return (noise * model.vision_std.numpy() + model.vision_mean.numpy()).astype(np.float32)


@torch.inference_mode()
def calibration_of(lowered: Lowered, pixels: torch.Tensor) -> Calibration:
    tables = np.zeros((1, 3), np.float32), np.zeros((1, 1, 1, lowered.row_width), np.float32)
    return Calibration(pixels.numpy(), lowered.encoder(pixels).numpy(), *tables)


def assert_close(got: Floats, want: Floats, tolerance: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


Built = tuple[MARNet, Lowered, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[..., Built]:
    """Storage and compute type -> a small vision transformer, lowered, and its payload."""
    known: dict[tuple[str, str], Built] = {}

    def make(storage: str = "fp16", compute: str = "fp16") -> Built:
        key = storage, compute
        if key not in known:
            payload = tmp_path_factory.mktemp("built")
            model = model_of("vit")
            lowered = lower(model)
            how = {"targets": TARGETS, "buckets": BUCKETS}
            calibration = calibration_of(lowered, pixels_of(64))
            types = Types(storage, compute)
            build_encoder(
                lowered, pixels_of(2), types, payload, Order(calibration=calibration, **how)
            )
            build_refine(lowered, Types(compute, compute), payload, Order(**how))
            known[key] = model, lowered, payload
        return known[key]

    return make


@pytest.fixture(scope="module")
def text_payload(tmp_path_factory) -> tuple[MARNet, Path]:
    payload = tmp_path_factory.mktemp("text")
    model = make_model()
    build_text(
        lower(model), Types("fp16", "fp16"), payload, Order(targets=TARGETS, buckets=BUCKETS)
    )
    return model, payload


# --- types


@pytest.mark.parametrize(("storage", "compute"), EACH)
def test_tensorrt_multiplies_in_the_types_that_were_asked_for(built, storage, compute):
    _, _, payload = built(storage, compute)
    found = products(payload, Types(storage, compute), (3, 32, 32))
    multiplied = "int8" if storage == "int8" else compute
    layers = [p for p in found if p.part == "encoder" and p.storage != "activation"]
    assert {(p.storage, p.compute) for p in layers} == {(storage, multiplied)}
    attention = [p for p in found if p.storage == "activation"]
    # One operator in the first layer; in the last, for the class token, two products.
    assert [(p.part, p.compute) for p in attention] == 3 * [("encoder", compute)]
    rest = [p for p in found if p.part != "encoder"]
    assert {(p.storage, p.compute) for p in rest} == {(compute, compute)}


def test_the_receipt_counts_every_multiplication_once(built):
    _, lowered, payload = built()
    found = products(payload, Types("fp16", "fp16"), (3, 32, 32))
    tokens, width, inside = 17, 24, 48
    layer = tokens * (4 * width * width + 2 * width * inside)
    attention = 2 * tokens * tokens * width  # both heads of 12
    # Of the last layer, keys and values of all tokens, and the rest of the class token.
    last = 2 * tokens * width * width + 2 * width * width + 2 * width * inside
    last += 2 * tokens * width
    encoder = 16 * width * 3 * 8 * 8 + layer + attention + last
    assert sum(p.multiply_adds for p in found if p.part == "encoder") == encoder
    assert sum(p.multiply_adds for p in found if p.part == "loop") == lowered.plan.multiply_adds
    assert Counter(p.part for p in found)["loop"] == 3
    # The condition, the last step without its carry, the alignment and the classifier.
    head = 24 * 16 + 2 * 16 * 16 + 16 * 64 + 24 * 768 + (768 + 64) * 3
    assert sum(p.multiply_adds for p in found if p.part == "head") == head


@pytest.mark.parametrize(("storage", "compute"), EACH[1:])
def test_everything_but_products_is_float32(built, storage, compute):
    _, _, payload = built(storage, compute)
    kinds, float32 = RTX.module.LayerType, RTX.module.DataType.FLOAT
    seen = Counter()
    for name in ("encoder.onnx", "refine.onnx"):
        log = make_log(RTX.module)
        builder = RTX.module.Builder(log)
        network, _parser = parse_network(RTX, builder, log, payload / name)
        for layer in layers_of(network):
            if layer.type in (kinds.NORMALIZATION, kinds.SOFTMAX, kinds.RECURRENCE):
                assert layer.get_output(0).dtype == float32, layer.name
                seen[layer.type] += 1
        graph = onnx.shape_inference.infer_shapes(onnx.load(payload / name)).graph
        types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
        sums = [node for node in graph.node if node.op_type == "Add"]
        assert {types[node.output[0]] for node in sums} == {onnx.TensorProto.FLOAT}
    assert seen[kinds.NORMALIZATION] == 5
    assert seen[kinds.RECURRENCE] == 2  # the state and the estimate before


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_the_loop_s_state_is_summed_in_float32(compute, built, tmp_path):
    """2,000 steps of 2^-10 each: a sum in bfloat16 would stop growing at 1 / 4, in fp16 at 2."""
    width, one = 16, np.eye(16)
    model = make_model(hidden=width, dim=width)
    plan = replace(
        make_plan(model, "hidden"),
        condition_weight=np.zeros((width, 10)),
        hidden2=(one - np.outer(one[15], one[15]), one[15]),  # channel 15 holds 1
        hidden3=(one, 0 * one[0]),
        carry_weight=np.outer(one[0], one[15]),  # channel 0 of the state counts the steps
        output=(one, 0 * one[0]),
    )
    lowered, steps = lower_marnet(model, plan), 4001
    types = Types(compute, compute)
    build_refine(lowered, types, tmp_path, Order(targets=["sm80"], buckets=[1]))
    shutil.copy(built()[2] / "encoder.onnx", tmp_path)
    coefficients = np.tile(np.array([[1, 2**-10, 0]], np.float32), (steps, 1))
    tables = Tables(coefficients, np.zeros((steps, 1, 1, width), np.float32))
    features = open_reference(tmp_path, 1).refine(features_of(model, 1), tables)[1]
    assert features[0, 0, -width] == pytest.approx(4000 / 1024, rel=BF16_LAYER)


@pytest.mark.parametrize(
    ("storage", "compute", "message"),
    [
        ("fp16", "fp32", "got fp16 stored and fp32 computed; choose --precision fp32"),
        ("fp32", "bf16", "got fp32 stored and bf16 computed; choose --precision bf16"),
    ],
)
def test_types_that_a_strongly_typed_network_cannot_have_are_refused(
    storage, compute, message, tmp_path
):
    lowered, types = lower(make_model()), Types(storage, compute)
    with pytest.raises(ExportError, match=message):
        build_encoder(lowered, pixels_of(2), types, tmp_path, Order(targets=TARGETS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_int8_is_for_the_encoder_and_needs_images(tmp_path):
    lowered, types = lower(make_model()), Types("int8", "fp16")
    with pytest.raises(ExportError, match="int8 needs images"):
        build_encoder(lowered, pixels_of(2), types, tmp_path, Order(targets=TARGETS))
    with pytest.raises(ExportError, match=r"reverse loop in fp16, bf16 or fp32.*int8 encoder with"):
        build_refine(lowered, types, tmp_path, Order(targets=TARGETS))
    assert list(tmp_path.iterdir()) == []


# --- the same graphs on the CPU


@pytest.mark.parametrize(("storage", "compute"), EACH)
def test_the_graphs_answer_as_the_float32_model_does(built, storage, compute):
    model, lowered, payload = built(storage, compute)
    run, pixels = open_reference(payload, 1), pixels_of(9)
    with torch.inference_mode():
        want = model.vision(pixels).numpy()
    tolerance = {"fp32": FLOAT32_LAYER, "int8": BUILT["bf16"]}.get(storage, BUILT[compute])
    for batch in (1, 2, 9):
        assert_close(run.encode(pixels[:batch].numpy()), want[:batch], tolerance)
    for sampler, steps, samples, keys in [
        ("ddpm", 100, 1, None),
        ("dpmpp", 7, 3, None),
        ("ddim", 1, 2, None),
        ("ddpm", 5, 2, [5, 2**64 - 4, 5]),
    ]:
        table = sampler_table(model.config.schedule, sampler, steps)
        noise = {"seed": 9, "samples": samples, "keys": keys}
        x_v = features_of(model, 3)
        got = run.refine(x_v, tables_of(model, lowered.plan, table, **noise))
        for one, other in zip(got, plain_refine(model, table, x_v, **noise), strict=True):
            assert_close(one, other, BUILT[compute])


@pytest.mark.slow
def test_bf16_is_rounded_though_the_cpu_has_no_bf16_products(built):
    """Rounding to 8 bits moves answers by far more than a float32 sum in another order does."""
    model, _, payload = built("bf16", "bf16")
    pixels = pixels_of(9)
    with torch.inference_mode():
        exact = model.vision(pixels).numpy()
    found = open_reference(payload, 1).encode(pixels.numpy())
    assert np.abs(found - exact).mean() > 1e-4 * np.abs(exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in VISION if kind != "vit"])
def test_encoders_of_every_family_are_built(kind, tmp_path):
    model = model_of(kind)
    how = {"targets": ["sm89"], "buckets": [2]}
    build_encoder(lower(model), pixels_of(2), Types("fp16", "fp16"), tmp_path, **how)
    (one,) = read_index(tmp_path)
    assert read_header(one.file(tmp_path, "encoder")).version == RTX.version


def test_the_text_encoder_takes_any_batch_and_length(text_payload):
    model, payload = text_payload
    run = open_text_reference(payload, 1)
    rng = np.random.default_rng(0)
    for batch, length in [(1, 1), (3, 7), (2, 512)]:
        ids = rng.integers(0, 8, (batch, length))
        mask = np.ones_like(ids)
        mask[0, length // 2 + 1 :] = 0
        with torch.inference_mode():
            want = model.text(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
        assert_close(run(ids, mask), want, BUILT["fp16"])
    (engines,) = read_index(payload)
    assert engines.engines["text"].ranges == {"tokens": (1, 512)}
    assert engines.engines["text"].batches == ((1, 4),)


def test_the_words_of_a_text_encoder_are_stored_in_16_bits_too(text_payload):
    model, payload = text_payload
    tensors = {t.name: t for t in onnx.load(payload / "text.onnx").graph.initializer}
    kinds = {tuple(t.dims): t.data_type for t in tensors.values()}
    words = model.text.get_submodule("backbone.embeddings.word_embeddings").weight
    assert kinds[tuple(words.shape)] == onnx.TensorProto.FLOAT16


def test_an_attention_mask_that_lets_everything_pass_is_left_out(built, text_payload):
    def masks(path: Path) -> list[int]:
        return [len(n.input) for n in onnx.load(path).graph.node if n.op_type == "Attention"]

    assert masks(built()[2] / "encoder.onnx") == [3]
    assert masks(text_payload[1] / "text.onnx") == [4]  # texts are padded


def test_building_leaves_the_model_as_it_was(built):
    model, _, _ = built()
    fresh = model_of("vit").state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())


# --- around the persistent kernel


def around_kernel(payload: Path, x_v: Floats, tables: Tables) -> list[Floats]:
    """Logits and features by condition.onnx, the kernel's twin in NumPy, and finish.onnx."""
    weights = LoopWeights.load(payload / "loop.safetensors")
    before, behind = (_session(payload / f"{name}.onnx", 1) for name in ("condition", "finish"))
    (q,) = before.run(["q"], {"x_v": x_v})
    packed_tables = pack_tables(tables.coefficients, tables.bias)
    h3 = reverse_sampler_reference(weights.pack(), q, *packed_tables, weights.slope)
    padded = np.zeros((*h3.shape[:2], weights.padded), np.float32)
    padded[..., : h3.shape[2]] = h3
    # What lies in the padding is the kernel's business; finish does not look.
    padded[..., h3.shape[2] :] = np.nan
    return behind.run(["logits", "features"], {"x_v": x_v, "h3": padded})


@pytest.mark.parametrize("compute", kept(["fp16", "bf16"], {"fp16"}))
@pytest.mark.parametrize(("sampler", "steps", "samples"), [("ddpm", 7, 1), ("dpmpp", 5, 3)])
def test_the_kernel_between_its_graphs_does_what_refine_does(
    built, compute, sampler, steps, samples
):
    model, lowered, payload = built(compute, compute)
    table = sampler_table(model.config.schedule, sampler, steps)
    tables = tables_of(model, lowered.plan, table, samples=samples)
    x_v = features_of(model, 5)
    got, want = (
        around_kernel(payload, x_v, tables),
        open_reference(payload, 1).refine(x_v, tables),
    )
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, TWIN_LOOP[compute])


@pytest.mark.parametrize("kind", kept(["fp16", "bf16"], {"fp16"}))
def test_the_kernel_s_weights_are_those_of_the_graph_bit_for_bit(kind, built):
    _, lowered, payload = built(kind, kind)
    found = LoopWeights.load(payload / "loop.safetensors")
    step = lowered.step(TORCH_TYPES[kind])
    for name, matrix in found.matrices.items():
        layer: Any = getattr(step, name)
        assert torch.equal(torch.from_numpy(matrix), layer.matrix.float())
    assert (found.operand, found.padded, found.slope) == (kind, 256, pytest.approx(0.01))


def test_condition_pads_with_zeros(built):
    model, _, payload = built()
    (q,) = _session(payload / "condition.onnx", 1).run(["q"], {"x_v": features_of(model, 3)})
    assert q.shape == (3, 256)
    assert q[:, :16].all()
    assert not q[:, 16:].any()


@pytest.mark.slow
def test_a_loop_that_the_kernel_does_not_run_has_no_graphs_around_it(built, tmp_path):
    names = ("condition.onnx", "finish.onnx", "loop.safetensors")
    assert not any((built("fp32", "fp32")[2] / name).exists() for name in names)
    model = model_of("vit")
    lowered = lower_marnet(model, make_plan(model, "feature"))
    for name in names:  # of an export before
        (tmp_path / name).write_bytes(b"old")
    build_refine(lowered, Types("fp16", "fp16"), tmp_path, Order(targets=["sm80"], buckets=[1]))
    assert not any((tmp_path / name).exists() for name in names)
    (engines,) = read_index(tmp_path)
    assert sorted(engines.engines) == ["refine"]


# --- engines


@pytest.fixture
def payload(built, tmp_path) -> Path:
    """ONNX files of fp16 without engines."""
    for name in ("encoder.onnx", "refine.onnx"):
        shutil.copy(built()[2] / name, tmp_path)
    return tmp_path


def test_engines_are_listed_with_what_they_are_for(built):
    _, _, payload = built()
    (engines,) = read_index(payload)
    assert engines.flavour == "tensorrt_rtx"
    assert engines.version == RTX.version
    assert engines.targets == TARGETS
    assert engines.folder == f"engines/tensorrt_rtx-{RTX.version}-sm80-sm120"
    assert sorted(engines.engines) == ["condition", "encoder", "finish", "refine"]
    for name, engine in engines.engines.items():
        path = engines.file(payload, name)
        assert engine.sha256 == sha256_file(path)
        assert engine.size == path.stat().st_size == read_header(path).size
        assert read_header(path).version == RTX.version
        assert engine.batches == ((1, 1), (4, 4))
        assert engine.onnx_sha256 == sha256_file(payload / f"{name}.onnx")
    assert engines.engines["encoder"].ranges == {}
    assert engines.engines["refine"].ranges == {"steps": (2, 1000), "samples": (1, 16)}
    assert engines.engines["condition"].ranges == {}
    assert engines.engines["finish"].ranges == {"samples": (1, 16)}


@pytest.mark.slow
def test_two_builds_of_an_encoder_are_the_same_bytes(built, payload):
    """Not those of a loop: TensorRT-RTX writes names inside in another order each time."""
    (first,) = read_index(built()[2])
    (second,) = add_engines(payload, TARGETS, buckets=BUCKETS)
    assert second.engines["encoder"] == first.engines["encoder"]
    assert second.engines["refine"].onnx_sha256 == first.engines["refine"].onnx_sha256


def test_engines_for_other_gpus_are_added_to_a_payload(built, payload):
    shutil.copytree(built()[2], payload, dirs_exist_ok=True)
    before = read_index(payload)
    (added,) = add_engines(payload, ["sm89", "sm86", "sm89"], buckets=[2])
    assert added.targets == ("sm86", "sm89")
    assert read_index(payload) == sorted([*before, added], key=lambda one: one.folder)
    assert added.engines["encoder"].batches == ((2, 2),)
    assert {path.name for path in (payload / added.folder).iterdir()} == {
        "condition.engine", "encoder.engine", "finish.engine", "refine.engine",
    }  # fmt: skip


@pytest.mark.slow
def test_only_what_changed_is_built_again(payload):
    (first,) = add_engines(payload, ["sm86"], buckets=[1])
    times = {name: first.file(payload, name).stat().st_mtime_ns for name in first.engines}
    proto = onnx.load(payload / "encoder.onnx")
    proto.graph.initializer[0].raw_data = bytes(len(proto.graph.initializer[0].raw_data))
    onnx.save(proto, payload / "encoder.onnx")
    (second,) = add_engines(payload, ["sm86"], buckets=[1])
    assert read_index(payload) == [second]
    assert second.engines["refine"] == first.engines["refine"]
    assert second.engines["encoder"].sha256 != first.engines["encoder"].sha256
    assert second.file(payload, "refine").stat().st_mtime_ns == times["refine"]
    second.file(payload, "refine").unlink()
    add_engines(payload, ["sm86"], buckets=[1])
    assert second.file(payload, "refine").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "sm90",
            r"does not build for sm90 \(Hopper\): it builds for sm75, sm80.*standard TensorRT",
        ),
        ("sm110", r"does not build for sm110: .*choose another --backend"),
        ("sm8", r"target 'sm8' is unknown: .*Did you mean 'sm8\d'"),
        ("hopper", r"target 'hopper' is unknown: it builds for sm75"),
    ],
)
def test_a_gpu_that_cannot_be_built_for_is_refused_before_anything_is_built(
    target, message, payload
):
    with pytest.raises(ExportError, match=message):
        add_engines(payload, ["sm80", target])
    assert not (payload / "engines").exists()


def test_without_targets_and_without_a_gpu_the_option_is_named(payload):
    try:
        find_device()
    except BackendUnavailable as error:
        message = rf"this one has {re.escape(str(error))}.*--target sm86,sm89$"
        with pytest.raises(ExportError, match=message):
            add_engines(payload)
    else:
        pytest.skip("this machine has a GPU")


@pytest.mark.parametrize("buckets", [(), (0, 1), (4, 4)])
def test_buckets_are_different_batch_sizes(buckets, payload):
    with pytest.raises(InvalidInput, match="different batch sizes from 1"):
        add_engines(payload, TARGETS, buckets=buckets)


def test_a_payload_without_graphs_is_refused(tmp_path):
    with pytest.raises(ExportError, match="has no ONNX files to build engines from"):
        add_engines(tmp_path, TARGETS)


@pytest.mark.parametrize("how", ["damaged", "an operator that it does not have"])
def test_a_graph_that_tensorrt_cannot_read_is_named(how, tmp_path):
    path = tmp_path / "encoder.onnx"
    if how == "damaged":
        path.write_bytes(b"not a graph")
    else:
        node = onnx.helper.make_node("StringConcat", ["pixels", "pixels"], ["x_v"])
        kind = onnx.TensorProto.STRING
        pixels = onnx.helper.make_tensor_value_info("pixels", kind, [1])
        x_v = onnx.helper.make_tensor_value_info("x_v", kind, [1])
        graph = onnx.helper.make_graph([node], "strings", [pixels], [x_v])
        onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(ExportError, match=r"TensorRT-RTX \S+ cannot read encoder.onnx: \w"):
        add_engines(tmp_path, TARGETS)
    assert read_index(tmp_path) == []


def test_without_tensorrt_the_pip_line_is_named(payload, monkeypatch):
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[rtx\]"'):
        add_engines(payload, TARGETS)
