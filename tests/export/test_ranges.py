"""What does not fit a type is found before anything is built, and named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_model, tables_of
from torch import nn

from marnet_export.build.types import Calibration
from marnet_export.lower.methods import Lowered, lower
from marnet_export.lower.modules import with_compute
from marnet_export.lower.plan import make_plan
from marnet_export.prove.overflow import check_activations, check_weights, watch_products
from marnet_sdk.errors import ExportError
from marnet_train.diffusion import sampler_table
from marnet_train.models.marnet import MARNet

TRANSFORMER = {
    "model_type": "vit", "hidden_size": 24, "image_size": 32, "patch_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip


@pytest.fixture
def model() -> MARNet:
    return make_model(hidden=16, dim=64, vision=TRANSFORMER)


def calibration_of(model: MARNet, *, samples: int = 1, keys: list[int] | None = None):
    pixels = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    table = sampler_table(model.config.schedule, "ddpm", 20)
    tables = tables_of(model, make_plan(model), table, samples=samples, keys=keys)
    with torch.inference_mode():
        x_v = model.vision(pixels).numpy()
    return Calibration(pixels.numpy(), x_v, tables.coefficients, tables.bias)


def layer(model: MARNet, name: str) -> nn.Linear:
    return model.get_submodule(name)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def scale(model: MARNet, name: str, factor: float) -> None:
    layer(model, name).weight.mul_(factor)


# --- weights


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("vision.backbone.layers.1.mlp.fc1", r"encoder.backbone.layers.1.mlp.fc1.weight"),
        ("project_vision", "head.project_vision.weight"),
        ("classifier", "head.classifier.weight"),
        ("denoiser.layer2", "loop.hidden2"),
        ("text.backbone.encoder.layer.0.intermediate.dense", "text.backbone.encoder.layer.0"),
    ],
)
def test_a_matrix_that_the_storage_type_cannot_hold_is_named(model, place, named):
    with torch.no_grad():
        layer(model, place).weight[0, 0] = 7e4
    lowered = lower(model)
    message = rf"{named}.* holds \S+e\+0\d, beyond the largest fp16 value \(6.55e\+04\); use --prec"
    with pytest.raises(ExportError, match=message):
        check_weights(lowered, "fp16")
    for storage in ("bf16", "fp32", "int8"):
        check_weights(lowered, storage)


def test_the_rewritten_loop_is_what_is_looked_at(model):
    """Wx and W4 fit, their product does not."""
    scale(model, "denoiser.layer4", 3e4)
    scale(model, "denoiser.layer1", 1e4)
    with pytest.raises(ExportError, match=r"loop.carry holds .* beyond the largest fp16"):
        check_weights(lower(model), "fp16")


def test_a_matrix_that_holds_no_number_is_refused(model):
    with torch.no_grad():
        model.classifier.weight[1, 1] = torch.nan
    with pytest.raises(ExportError, match=r"head\.classifier\.weight holds nan"):
        check_weights(lower(model), "fp32")


def test_a_parameter_without_elements_is_no_obstacle(model):
    """DINOv3 without registers has one of shape [1, 0, D]."""
    model.vision.register_parameter("registers", torch.nn.Parameter(torch.zeros(1, 0, 8)))
    check_weights(lower(model), "fp16")


def test_vectors_are_float32_and_may_be_large(model):
    with torch.no_grad():
        model.classifier.bias[0] = 1e30
    check_weights(lower(model), "fp16")


# --- activations


@pytest.mark.parametrize(
    ("place", "factor", "named"),
    [
        ("vision.backbone.layers.0.mlp.fc1", 1e6, "encoder.backbone.layers.0.mlp.fc1"),
        ("vision.backbone.layers.1.attention.v_proj", 1e6, "encoder.*layers.1.attention.v_proj"),
        ("denoiser.layer2", 1e6, "loop.step.hidden2"),
        ("project_vision", 1e6, "head.project_vision"),
        ("classifier", 1e6, "head.classifier"),
    ],
)
def test_the_first_layer_that_overflows_is_named(model, place, factor, named):
    scale(model, place, factor)
    calibration = calibration_of(model)
    message = rf"^{named} reaches \S+ on 20 images, beyond the largest fp16 value \(6.55e\+04\)"
    with pytest.raises(ExportError, match=message + ".*use --precision bf16 or fp32"):
        check_activations(lower(model), calibration, "fp16")
    for compute in ("bf16", "fp32"):
        assert check_activations(lower(model), calibration, compute) is None


@pytest.mark.parametrize(("part_of_limit", "fits"), [(0.98, True), (1.05, False)])
def test_what_is_refused_is_what_overflows_in_fp16(model, part_of_limit, fits):
    place = "vision.backbone.layers.0.mlp.fc1"
    pixels = torch.from_numpy(calibration_of(model).pixels)
    results: list[torch.Tensor] = []
    layer(model, place).register_forward_hook(lambda m, _, y: results.append(y - m.bias))
    with torch.inference_mode():
        model.vision(pixels)
    changed = make_model(hidden=16, dim=64, vision=TRANSFORMER)
    scale(changed, place, part_of_limit * 65504 / float(results[0].abs().max()))
    with torch.inference_mode():
        in_fp16 = with_compute(changed.vision, torch.float16).eval()(pixels)
    assert bool(in_fp16.isfinite().all()) == fits
    lowered, calibration = lower(changed), calibration_of(changed)
    if fits:
        assert check_activations(lowered, calibration, "fp16") is not None
    else:
        with pytest.raises(ExportError, match=r"layers\.0\.mlp\.fc1 reaches 6\.8\d+e\+04"):
            check_activations(lowered, calibration, "fp16")


def test_headroom_names_the_largest_and_says_when_it_is_little(model):
    calibration = calibration_of(model, samples=2)
    found = check_activations(lower(model), calibration, "fp16")
    assert found is not None
    assert not found.is_tight
    assert found.images == 20
    assert found.sentence().startswith("largest activation on 20 images: ")
    assert found.sentence().endswith(f" at {found.layer}; fp16 holds up to 65,504")
    scale(model, "classifier", 65504 / 2 / reach(lower(model), calibration, "head.classifier"))
    tight = check_activations(lower(model), calibration, "fp16")
    assert tight is not None
    assert tight.is_tight
    assert tight.layer == "head.classifier"
    assert tight.largest == pytest.approx(65504 / 2, rel=1e-3)
    assert tight.sentence().endswith("other images may exceed; --precision bf16 has no such limit")


@torch.inference_mode()
def reach(lowered: Lowered, calibration: Calibration, name: str) -> float:
    """The largest number of one layer, through the head alone: the largest of its results."""
    found: list[torch.Tensor] = []
    classifier = lowered.head.get_submodule(name.removeprefix("head."))
    hook = classifier.register_forward_hook(lambda m, _, y: found.append((y - m.bias).abs().max()))
    check_activations(lowered, calibration, "fp16")
    hook.remove()
    return float(torch.stack(found).max())


def test_attention_scores_count(model):
    """Queries and keys that fit may have products that do not."""
    for name in ("q_proj", "k_proj"):
        scale(model, f"vision.backbone.layers.0.attention.{name}", 1e4)
    with pytest.raises(ExportError, match=r"encoder.backbone.layers.0.attention reaches"):
        check_activations(lower(model), calibration_of(model), "fp16")


def test_products_outside_layers_and_their_factors_count():
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (0.01 * x @ x) @ torch.bmm(x[None], 0.01 * x[None])[0]

    watched, found = Bare(), {}
    with watch_products({"bare": watched}, found):
        Bare()(1e9 * torch.eye(3))  # another one
        watched(torch.eye(3))
        watched(-500 * torch.eye(3))
    assert found == {"bare": pytest.approx(2500**2)}


def test_every_image_sample_and_step_is_looked_at(model):
    keys = [*range(1, 20), 2**63]
    calibration = calibration_of(model, samples=3, keys=keys)
    assert calibration.bias.shape[1:3] == (20, 3)
    quiet = check_activations(lower(model), calibration, "fp16")
    assert quiet is not None
    loud = calibration.bias.copy()
    loud[-2, -1, -1] = 1e6  # one row of noise
    with pytest.raises(ExportError, match=r"loop\.step\.hidden2 reaches 1\.\d+e\+06 on 20"):
        check_activations(lower(model), replace(calibration, bias=loud), "fp16")


def test_a_model_that_gives_no_number_is_refused(model):
    calibration = calibration_of(model)
    pixels = calibration.pixels.copy()
    pixels[17, 0, 0, 0] = np.nan
    with pytest.raises(ExportError, match="projection reaches nan on 20 images"):
        check_activations(lower(model), replace(calibration, pixels=pixels), "fp16")


def test_the_model_is_left_as_it_was(model):
    lowered, calibration = lower(model), calibration_of(model)
    check_activations(lowered, calibration, "fp16")
    for module in (*lowered.encoder.modules(), *lowered.head.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with torch.inference_mode():
        again = model.vision(torch.from_numpy(calibration.pixels)).numpy()
    np.testing.assert_array_equal(again, calibration.x_v)
