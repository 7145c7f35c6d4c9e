"""What AOTInductor compiles is the float32 model, in the types that were asked for."""

from __future__ import annotations

import math
import re
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from compilers import need_compiler
from quick import kept
from tiny import make_model, plain_refine, tables_of
from tolerances import BUILT, FLOAT32_LAYER
from torch import nn
from torch._inductor import config

from marnet_export.build.aotinductor.graphs import (
    build_encoder,
    build_refine,
    build_text,
    products,
)
from marnet_export.build.types import Product, Types, Unread
from marnet_export.lower.methods import Lowered, lower_marnet
from marnet_sdk import Classifier
from marnet_sdk.backends import Backend
from marnet_sdk.backends.aotinductor import ENCODER, REFINE, TEXT, open_payload, open_text
from marnet_sdk.bundle import PAYLOAD, read_bundle
from marnet_sdk.errors import BackendUnavailable, ExportError, InvalidInput
from marnet_sdk.noise.tables import Floats
from marnet_train.diffusion import SAMPLERS, sampler_table
from marnet_train.models.backbones import VisionEncoder, backbone_config, build_backbone
from marnet_train.models.marnet import MARNet

HOW = [("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")]
EACH = kept(HOW, {("fp32", "fp32")}, many=True)
ENCODERS = HOW[::3]  # a compilation takes seconds; the others have the loop alone
KEYS = [5, 2**64 - 4, 5, 0, 7]
SHAPE = (3, 32, 32)
VIT = {"model_type": "vit", "hidden_size": 24, "image_size": 32, "patch_size": 8,
       "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> MARNet:
    return make_model(hidden=48, dim=32)


@pytest.fixture(scope="module")
def lowered(model) -> Lowered:
    return lower_marnet(model)


@pytest.fixture(scope="module")
def vision(model) -> dict[str, nn.Module]:
    """Compute type -> an encoder: one with convolutions, one with attention."""
    torch.manual_seed(0)
    vit = VisionEncoder(build_backbone(backbone_config(VIT))).eval()
    return {"fp32": model.vision, "bf16": vit}


@pytest.fixture(scope="module")
def payload(compiled_bundle, lowered, vision, tmp_path_factory) -> Callable[[str, str], Path]:
    """Storage and compute type -> what was built, once."""
    known = {("fp32", "fp32"): compiled_bundle / PAYLOAD}

    def make(storage: str, compute: str) -> Path:
        if (storage, compute) not in known:
            folder = tmp_path_factory.mktemp("built")
            types = Types(storage, compute)
            build_refine(lowered, types, folder)
            if (storage, compute) in ENCODERS:
                built = replace(lowered, encoder=vision[compute])
                build_encoder(built, torch.rand(2, *SHAPE), types, folder)
            else:
                (folder / ENCODER).symlink_to(make("fp32", "fp32") / ENCODER)
            known[storage, compute] = folder
        return known[storage, compute]

    return make


@pytest.fixture(scope="module")
def opened(payload) -> Callable[[str, str], Backend]:
    known: dict[tuple[str, str], Backend] = {}

    def make(storage: str, compute: str) -> Backend:
        if (storage, compute) not in known:
            known[storage, compute] = open_payload(payload(storage, compute), compute, 1)
        return known[storage, compute]

    return make


def tolerance(storage: str, compute: str) -> float:
    return FLOAT32_LAYER if storage == compute == "fp32" else max(BUILT[storage], BUILT[compute])


def features_of(model: MARNet, count: int) -> Floats:
    """x_v [count, D_v], spread as the model's statistics say."""
    noise = np.random.default_rng(1).standard_normal((count, len(model.vision_mean)))
    return (noise * model.vision_std.numpy() + model.vision_mean.numpy()).astype(np.float32)


def assert_close(got: Floats, want: Floats, tolerance: float) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("storage", "compute"), EACH)
def test_one_file_serves_every_sampler_length_batch_and_kind_of_noise(
    opened, model, lowered, storage, compute, sampler
):
    backend, x_v = opened(storage, compute), features_of(model, 5)
    for steps in (1, 2, 10):
        table = sampler_table(model.config.schedule, sampler, steps)
        for samples in (1, 3):
            for keys in (None, KEYS):
                for batch in (1, 2, 5):
                    noise = {"seed": 9, "samples": samples, "keys": keys and keys[:batch]}
                    tables = tables_of(model, lowered.plan, table, **noise)
                    got = backend.refine(x_v[:batch], tables)
                    want = plain_refine(model, table, x_v[:batch], **noise)
                    for one, other in zip(got, want, strict=True):
                        assert_close(one, other, tolerance(storage, compute))


def test_a_step_that_looks_back_is_enough_to_look_back(opened, model, lowered):
    table = sampler_table(model.config.schedule, "ddpm", 7)
    x_v = features_of(model, 2)
    plain = opened("fp32", "fp32").refine(x_v, tables_of(model, lowered.plan, table))[0]
    for row, differs in ((0, False), (5, True)):  # before the first step there is no estimate
        coefficients = table.coefficients.copy()
        coefficients[row, 2] = 0.5
        changed = tables_of(model, lowered.plan, replace(table, coefficients=coefficients))
        back = opened("fp32", "fp32").refine(x_v, changed)[0]
        assert (np.abs(back - plain).max() > 1e-4) == differs


@pytest.mark.parametrize(("storage", "compute"), EACH[::3])
def test_the_encoder_takes_any_batch(opened, vision, storage, compute):
    pixels = torch.randn(5, *SHAPE)
    with torch.inference_mode():
        want = vision[compute](pixels).numpy()
    for batch in (1, 2, 5):
        got = opened(storage, compute).encode(pixels[:batch].numpy())
        assert_close(got, want[:batch], tolerance(storage, compute))


@pytest.mark.slow
@pytest.mark.parametrize("built", ["text", "payload"])
def test_building_leaves_the_model_as_it_was(built, model, request):
    made = request.getfixturevalue(built)
    if built == "payload":
        made("fp16", "fp32")
    before, after = make_model(hidden=48, dim=32).state_dict(), model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_bundle_of_compiled_code_is_exported_and_opens(compiled_bundle):
    bundle = read_bundle(compiled_bundle)
    receipt = bundle.manifest.precision.receipt["all"]
    assert (bundle.manifest.backend, receipt.compute) == ("aotinductor", {"fp32": 1.0})
    assert bundle.manifest.built_for.targets
    images = sorted((compiled_bundle / "golden/images").iterdir())
    answers = Classifier(compiled_bundle, threads=1).predict(images)
    assert {answer.label for answer in answers} <= set(bundle.manifest.labels)


@pytest.fixture(scope="module")
def text(lowered, tmp_path_factory) -> Path:
    """A payload with a text encoder; while it was built, nothing but the package was left."""
    need_compiler()
    folder = tmp_path_factory.mktemp("text")
    payload, temporary = folder / "payload", folder / "temporary"
    payload.mkdir()
    temporary.mkdir()
    children = psutil.Process().children(recursive=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.chdir(temporary)
        build_text(lowered, Types("fp32", "fp32"), payload)
        open_text(payload, "fp32", 1)
    assert list(temporary.iterdir()) == []
    assert [path.name for path in payload.iterdir()] == [TEXT]
    assert psutil.Process().children(recursive=True) == children
    return payload


@pytest.mark.slow
def test_the_text_encoder_takes_any_batch_and_length(text, model):
    encode = open_text(text, "fp32", 1)
    for batch, length in ((1, 1), (3, 9), (2, 512)):
        ids = torch.randint(0, 8, (batch, length))
        mask = (torch.arange(length) <= torch.arange(batch)[:, None] + length // 2).long()
        with torch.inference_mode():
            want = model.text(ids, mask).numpy()
        assert_close(encode(ids.numpy(), mask.numpy()), want, FLOAT32_LAYER)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 8]], [[1, 1]], "ids from 1 to 8; they must be from 0 to 7"),
        ([[-1, 2]], [[1, 1]], "ids from -1 to 2; they must be from 0 to 7"),
        ([[1, 2]], [[1, 2]], "mask from 1 to 2; they must be from 0 to 1"),
        ([[1, 2]], [[1]], r"\(1, 1\) as mask; it takes int64 \[1, 2\]"),
        ([[1] * 513], [[1] * 513], r"it takes int64 \[batch, length up to 512\]"),
        ([[]], [[]], r"it takes int64 \[batch, length up to 512\]"),
    ],
)
def test_tokens_that_the_text_encoder_does_not_know_are_refused(text, ids, mask, message):
    encode = open_text(text, "fp32", 1)
    with pytest.raises(InvalidInput, match=message):
        encode(np.array(ids, np.int64), np.array(mask, np.int64))


def by_name(found: list[Product]) -> dict[str, Product]:
    return {product.name: product for product in found}


@pytest.mark.parametrize(("storage", "compute"), EACH)
def test_the_receipt_counts_every_product_in_the_types_it_has(
    payload, model, lowered, storage, compute
):
    found = products(payload(storage, compute), Types(storage, compute), SHAPE)
    hidden, latent, image = 48, 32, lowered.image_width
    loop = [product for product in found if product.part == "loop"]
    assert [product.multiply_adds for product in loop] == 3 * [hidden**2]
    once = sum(product.multiply_adds for product in found if product.part == "head")
    head = model.project_vision.weight.numel() + model.classifier.weight.numel()
    assert once == image * hidden + 2 * hidden**2 + hidden * latent + head
    of_loop = {(p.storage, p.compute) for p in loop}
    assert of_loop == {(storage, compute)}
    last = max(i for i, p in enumerate(found) if p.part == "head")
    assert (found[last].storage, found[last].compute) == (storage, "fp32")  # the classifier


def test_the_receipt_of_an_encoder_with_convolutions(payload, vision):
    found = products(payload("fp32", "fp32"), Types("fp32", "fp32"), SHAPE)
    of_encoder = [product for product in found if product.part == "encoder"]
    assert {(p.storage, p.compute) for p in of_encoder} == {("fp32", "fp32")}
    assert sum(p.multiply_adds for p in of_encoder) == convolutions(vision["fp32"])


def convolutions(module: nn.Module) -> int:
    """Multiply-adds of the convolutions that a module runs for one image."""
    counted = []

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        counted.append(layer.weight.numel() * out[0, 0].numel())

    hooks = [
        layer.register_forward_hook(count)
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.inference_mode():
        module(torch.zeros(1, *SHAPE))
    for hook in hooks:
        hook.remove()
    return sum(counted)


@pytest.mark.slow
def test_a_vision_transformer_multiplies_in_bfloat16_and_attends_in_float32(payload):
    found = products(payload("bf16", "bf16"), Types("bf16", "bf16"), SHAPE)
    found = [product for product in found if product.part == "encoder"]
    attention = [p for p in found if p.storage == "activation"]
    tokens, width = 17, 24
    assert [(p.multiply_adds, p.compute) for p in attention] == [(2 * tokens**2 * width, "fp32")]
    patches = by_name(found)["backbone.embeddings.patch_embeddings.projection.matrix"]
    assert patches.multiply_adds == 16 * width * 3 * 8 * 8
    assert {(p.storage, p.compute) for p in found if p not in attention} == {("bf16", "bf16")}
    layers = tokens * (4 * width**2 + 2 * width * 48)
    of_weights = sum(p.multiply_adds for p in found if p not in attention)
    assert of_weights == patches.multiply_adds + layers


def as_for_a_gpu(source: str) -> str:
    """The generated code in the spelling of one for a GPU: torch's other kernels, and in the place
    of kernels in C++ those of Triton, whose declarations name what is read and written."""
    declared: list[str] = []

    def turn(match: re.Match[str]) -> str:
        pointers = re.findall(r"\((const )?[\w:]+\*\)\((\w+)\.data_ptr\(\)\)", match[2])
        name = f"call_triton_poi_{match[1]}_{len(declared)}"
        roles = [f"{'in' if const else 'in_out'}_ptr{i}" for i, (const, _) in enumerate(pointers)]
        types = [f"const {role}_type_& {role}" for role in roles]
        more = ["int64_t xnumel", "int32_t device_idx_", "cudaStream_t stream_"]
        more += ["kernels_type_& kernels_", "const std::optional<std::string>& cubin_dir_ = {}"]
        declared.append(f"static void {name}(\n    {', '.join(types + more)}\n){{\n}}\n")
        given = [argument for _, argument in pointers]
        given += ["5120L", "this->device_idx_", "stream", "kernels", "this->cubin_dir_"]
        return f"{name}({', '.join(given)});"

    turned = re.sub(r"\bcpp_(fused\w+)\((\(.*)\);", turn, source)
    return "".join(declared) + turned.replace("aoti_torch_cpu_", "aoti_torch_cuda_")


def turned(folder: Path, target: Path, change: Callable[[str], str]) -> Path:
    """A payload with other source in its packages."""
    for name in (ENCODER, REFINE):
        with zipfile.ZipFile(folder / name) as old, zipfile.ZipFile(target / name, "w") as new:
            for entry in old.infolist():
                if entry.filename.endswith("wrapper.cpp"):
                    new.writestr(entry.filename, change(old.read(entry).decode()))
    return target


@pytest.mark.parametrize(("storage", "compute"), EACH)
def test_the_receipt_of_code_for_a_gpu_is_read_the_same_way(payload, storage, compute, tmp_path):
    types = Types(storage, compute)
    folder = payload(storage, compute)
    found = products(turned(folder, tmp_path, as_for_a_gpu), types, SHAPE)
    assert found == products(folder, types, SHAPE)


@pytest.mark.slow
def test_a_product_that_is_compiled_for_a_gpu_with_the_rest_is_not_overlooked(payload, tmp_path):
    def hide(source: str) -> str:
        return as_for_a_gpu(source).replace("call_triton_poi_", "call_triton_tem_")

    folder = turned(payload("fp32", "fp32"), tmp_path, hide)
    with pytest.raises(Unread, match=r"calls call_triton_tem_fused.* not counted yet"):
        products(folder, Types("fp32", "fp32"), SHAPE)


def test_without_a_compiler_the_export_says_what_to_install(lowered, tmp_path):
    message = "there is none here; install g\\+\\+, name another compiler in CXX, or choose"
    with (
        config.patch({"cpp.cxx": (None, str(tmp_path / "no-such-compiler"))}),
        pytest.raises(BackendUnavailable, match=message),
    ):
        build_refine(lowered, Types("fp32", "fp32"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_torch_whose_compiler_cannot_do_loops_is_refused_before_it_tries(
    lowered, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", "2.12.0+cu130")
    message = r"with torch 2.13 or newer, got 2.12.0\+cu130, whose.* choose --backend torchscript"
    with pytest.raises(BackendUnavailable, match=message):
        build_encoder(lowered, torch.zeros(2, *SHAPE), Types("fp32", "fp32"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_is_reported_in_one_line(lowered, tmp_path, monkeypatch, capfd):
    need_compiler()
    compiler, temporary, payload = (tmp_path / name for name in ("g++", "temporary", "payload"))
    temporary.mkdir()
    payload.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    compiler.write_text(
        '#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] && exec g++ --version\n'
        'echo "g++: fatal error: out of patience" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    small = replace(lowered, encoder=nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 4)))
    with (
        config.patch({"cpp.cxx": (None, str(compiler)), "cpp.vec_isa_ok": True}),
        pytest.raises(ExportError, match=r"could not compile encoder.pt2: .*out of patience$") as e,
    ):
        build_encoder(small, torch.rand(2, *SHAPE), Types("fp32", "fp32"), payload)
    assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")
    assert list(temporary.iterdir()) == list(payload.iterdir()) == []


def test_a_full_disk_is_an_exception_that_the_process_survives(
    payload, lowered, tmp_path, monkeypatch
):
    """Compiled before, because that takes seconds; what is written is a package."""
    sound = (payload("fp32", "fp32") / ENCODER).read_bytes()
    pixels = torch.rand(2, *SHAPE)
    monkeypatch.setattr(
        torch._inductor,
        "aoti_compile_and_package",
        lambda _, package_path: package_path.write(sound),
    )
    build_encoder(lowered, pixels, Types("fp32", "fp32"), tmp_path)
    assert (tmp_path / ENCODER).read_bytes() == sound
    (tmp_path / ENCODER).unlink()
    (tmp_path / ENCODER).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        build_encoder(lowered, pixels, Types("fp32", "fp32"), tmp_path)
