"""A failed export is told which layer, step or part is to blame, and nothing else is accused."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from quick import kept
from tiny import make_model, sampling_of
from torch import nn

from marnet_export.build.builder import USUAL, builder
from marnet_export.build.types import Arithmetic, Types
from marnet_export.lower.methods import lower
from marnet_export.prove import departure as diagnosis
from marnet_export.prove.departure import Departure, diagnose, relative_errors
from marnet_export.prove.reference import Reference
from marnet_export.prove.trial import Built, Trial
from marnet_sdk.backends import open_backend
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import SamplerTable, sampler_table
from marnet_train.models.marnet import MARNet

BACKENDS = ("torchscript", "onnxruntime", "openvino")
FP32 = Types("fp32", "fp32")
_SIZES = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {"model_type": "vit", "hidden_size": 24, "image_size": 32, "patch_size": 8, **_SIZES}
PIXELS = np.random.default_rng(0).standard_normal((12, 3, 32, 32)).astype(np.float32)
RESNET_LAYER = "backbone.encoder.stages.0.layers.0.shortcut.convolution"
VIT_LAYER = "backbone.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def models() -> dict[str, MARNet]:
    made = {"resnet": make_model(), "vit": make_model(vision=VIT, condition=24)}
    for model in made.values():
        _amplify(model)
    return made


@torch.no_grad()
def _amplify(model: MARNet) -> None:
    """Fresh weights make so little of the state that no step would show in the answer."""
    network = model.denoiser
    network.layer1.weight[:, : network.dim] *= 3
    for layer in (network.layer2, network.layer3, network.layer4):
        layer.weight *= 3


@pytest.fixture(scope="module")
def loops(tmp_path_factory) -> Callable[[str, MARNet, str, Types], Path]:
    """A payload with the loop of a model that nothing was done to, built once."""
    known: dict[tuple, Path] = {}

    def make(kind: str, model: MARNet, backend: str, types: Types) -> Path:
        key = kind, backend, types
        if key not in known:
            known[key] = tmp_path_factory.mktemp("loop") / "payload"
            known[key].mkdir()
            builder(backend).build_refine(lower(model), types, known[key])
        return known[key]

    return make


def trial_of(reference: Reference, built: Built, table: SamplerTable) -> Trial:
    tables = {"default": table}
    return Trial(reference, built, None, tables, min_agreement=0.999, row_tolerance=0.02)


class Case:
    """An export of a model, to be spoilt, and its diagnosis."""

    def __init__(self, model: MARNet, folder: Path, loop: Callable, steps: int = 10) -> None:
        """loop: of the model as it is, from backend and types."""
        self.model, self.payload, self.loop = model, folder / "payload", loop
        self.table = sampler_table(model.config.schedule, "ddim", steps)
        self.lowered = lower(model)
        self.arrays = self.lowered.plan.tensors({"default": self.table})
        self.samples = 1
        self.noise = "shared"
        self.behind_is_spoilt = False

    def built(self, backend: str, types: Types) -> Built:
        shutil.copytree(self.loop(backend, types), self.payload)
        module = builder(backend)
        module.build_encoder(self.lowered, torch.from_numpy(PIXELS[:2]), types, self.payload)
        if self.behind_is_spoilt:
            module.build_refine(self.lowered, types, self.payload)
        opened = open_backend(backend, self.payload, types.compute, 1)
        sampling = sampling_of(self.model, self.table, samples=self.samples, noise=self.noise)
        return Built(opened, self.arrays, sampling, PIXELS)

    def departure(self, backend: str = "torchscript", types: Types = FP32) -> Departure:
        return self.diagnosed(self.built(backend, types), backend, types)

    def diagnosed(self, built: Built, backend: str, types: Types) -> Departure:
        reference = Reference(self.model, PIXELS, by_image=self.noise == "image")
        trial = trial_of(reference, built, self.table)
        what = (self.payload, self.lowered, backend, Arithmetic(types, types), USUAL)
        return diagnose(trial, "default", *what)

    def spoil_encoder(self, layer: str, change: Callable[[nn.Module], None]) -> None:
        self.lowered = replace(self.lowered, encoder=copy.deepcopy(self.lowered.encoder))
        with torch.no_grad():
            change(self.lowered.encoder.get_submodule(layer))

    def spoil_step(self, step: int) -> None:
        spoilt = self.arrays["coefficients.default"].copy()  # the reference has the same array
        spoilt[step - 1, :3] *= -3
        self.arrays["coefficients.default"] = spoilt


@pytest.fixture
def case(models, loops, tmp_path) -> Callable[..., Case]:
    def make(kind: str = "resnet", **how: int) -> Case:
        model = models[kind]
        return Case(model, tmp_path, lambda *which: loops(kind, model, *which), **how)

    return make


def scaled(factor: float) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        layer.weight *= factor

    return change


# --- the encoder


@pytest.mark.parametrize(
    ("kind", "layer", "before"),
    [
        ("resnet", RESNET_LAYER, "backbone.encoder.stages.0.layers.0.layer.1.normalization"),
        ("vit", VIT_LAYER, "backbone.layers.1.layernorm_after"),
    ],
    ids=["resnet", "vit"],
)
@pytest.mark.parametrize("backend", kept(BACKENDS, {"torchscript"}))
def test_the_first_layer_that_departs_is_named_with_the_one_before(
    backend, kind, layer, before, case
):
    spoilt = case(kind)
    spoilt.spoil_encoder(layer, scaled(3))
    found = spoilt.departure(backend)
    assert (found.part, found.name, found.before) == ("encoder", layer, before)
    assert found.error == pytest.approx(2, rel=1e-3)
    assert found.error_before < 1e-5
    assert found.sentence.startswith(
        f"the first layer that departs is the encoder's {layer} (relative error 2, bound 0.001; "
    )
    assert found.sentence.endswith(f" before it, at {before})")


@pytest.mark.parametrize(
    "types", kept([Types("bf16", "bf16"), Types("fp16", "fp32")], {Types("fp16", "fp32")}), ids=str
)
def test_rounding_is_not_blamed(types, case):
    spoilt = case("vit")
    spoilt.spoil_encoder(VIT_LAYER, scaled(3))
    found = spoilt.departure("torchscript", types)
    assert found.name == VIT_LAYER
    assert 1e-5 < found.error_before < found.bound


@pytest.mark.parametrize(
    "layer",
    ["backbone.embeddings.patch_embeddings.projection", "backbone.layers.0.attention.k_proj"],
)
def test_the_first_of_layers_side_by_side_and_the_first_of_all_are_found(layer, case):
    """q, k and v are done in this order, and v of a wrong k is right."""
    spoilt = case("vit")
    spoilt.spoil_encoder(layer, scaled(40))
    found = spoilt.departure()
    assert found.name == layer
    assert bool(found.before) == ("k_proj" in layer)


def test_of_two_layers_that_depart_the_first_is_named(case):
    spoilt = case("vit")
    spoilt.spoil_encoder("backbone.layers.2.mlp.fc2", scaled(3))
    spoilt.spoil_encoder(VIT_LAYER, scaled(3))
    assert spoilt.departure().name == VIT_LAYER


def test_what_happens_between_layers_is_blamed_on_the_module_that_does_it(case):
    spoilt = case("vit")

    def change(embeddings: nn.Module) -> None:
        embeddings.position_embeddings[..., 0] += 5

    spoilt.spoil_encoder("backbone.embeddings", change)
    assert spoilt.departure().name == "backbone.embeddings"


@pytest.mark.parametrize("backend", kept(BACKENDS, {"torchscript"}))
def test_a_layer_that_overflows_is_named_with_an_infinite_error(backend, case):
    spoilt = case("vit")
    spoilt.model = copy.deepcopy(spoilt.model)  # float32 holds them, so the reference has them too
    with torch.no_grad():
        spoilt.model.vision.get_submodule(VIT_LAYER).weight.mul_(1e6)
    spoilt.lowered = lower(spoilt.model)
    found = spoilt.departure(backend, Types("fp16", "fp32"))
    assert found.name == VIT_LAYER
    assert math.isinf(found.error)
    assert "(relative error infinite, bound 0.02; " in found.sentence


@pytest.mark.slow
def test_few_outputs_are_kept_at_a_time_where_they_are_large(case, monkeypatch):
    monkeypatch.setattr(diagnosis, "_FLOATS", 3000)  # a few layers at a time
    spoilt = case("vit")
    spoilt.spoil_encoder(VIT_LAYER, scaled(3))
    found = spoilt.departure()
    assert (found.name, found.before) == (VIT_LAYER, "backbone.layers.1.layernorm_after")


# --- the loop and the head


@pytest.mark.parametrize("step", kept([1, 2, 6, 9], {2}))
def test_the_first_step_that_departs_is_named(step, case):
    """Coefficients take effect in the estimate after."""
    spoilt = case()
    spoilt.spoil_step(step)
    found = spoilt.departure()
    t = 100 - 10 * step
    assert (found.part, found.name) == ("loop", f"step {step + 1} of 10 (t = {t})")
    assert found.error_before < 1e-4 < found.bound < found.error
    assert found.sentence.startswith(
        "the encoder agrees; the reverse loop or the head behind it departs from "
        f"step {step + 1} of 10 (t = {t}) on (relative error "
    )
    assert f"before it, at step {step} of 10 (t = {t + 10})" in found.sentence


@pytest.mark.parametrize("backend", kept(["onnxruntime", "openvino"], {"openvino"}))
def test_a_loop_that_is_wrong_throughout_departs_at_its_first_step(backend, case):
    spoilt = case()
    wrong = copy.deepcopy(spoilt.model)
    with torch.no_grad():
        wrong.denoiser.layer2.weight.mul_(-1)
    spoilt.lowered, spoilt.behind_is_spoilt = lower(wrong), True
    found = spoilt.departure(backend)
    assert (found.part, found.name, found.before) == ("loop", "step 1 of 10 (t = 100)", "")


@pytest.mark.slow
def test_of_many_steps_few_are_looked_at(case, monkeypatch):
    monkeypatch.setattr(diagnosis, "STEPS", 12)
    spoilt = case(steps=100)
    spoilt.spoil_step(61)
    found = spoilt.departure()
    assert (found.part, found.name) == ("loop", "step 64 of 100 (t = 37)")
    assert found.before == "step 55 of 100 (t = 46)"


@pytest.mark.parametrize("noise", ["shared", "image"])
def test_a_step_is_found_with_several_samples_and_either_noise(noise, case):
    spoilt = case()
    spoilt.samples, spoilt.noise = 3, noise
    spoilt.spoil_step(6)
    found = spoilt.departure()
    assert (found.part, found.name) == ("loop", "step 7 of 10 (t = 40)")


@pytest.mark.parametrize("layer", ["classifier", "project_vision"])
@pytest.mark.parametrize("backend", kept(["torchscript", "openvino"], {"torchscript"}))
def test_a_wrong_head_departs_from_the_first_step_on(backend, layer, case):
    spoilt = case()
    spoilt.lowered = replace(spoilt.lowered, head=copy.deepcopy(spoilt.lowered.head))
    spoilt.behind_is_spoilt = True
    with torch.no_grad():
        spoilt.lowered.head.get_submodule(layer).weight.mul_(-1)
    found = spoilt.departure(backend)
    assert (found.part, found.name) == ("loop", "step 1 of 10 (t = 100)")
    assert "the reverse loop or the head behind it departs from step 1" in found.sentence


# --- nothing to name


@pytest.mark.parametrize("backend", kept(["torchscript", "openvino"], {"torchscript"}))
def test_a_sound_export_is_told_how_far_its_parts_are_off(backend, case):
    found = case("vit").departure(backend)
    assert found.part == "none"
    assert found.sentence.startswith("no layer or step departs by more than its types explain: fea")
    assert "(bound 0.001)" in found.sentence
    assert "(bound 0.02)" in found.sentence


@pytest.mark.slow
@pytest.mark.parametrize("types", [FP32, Types("fp16", "fp32"), Types("bf16", "bf16")], ids=str)
def test_a_trained_loop_of_a_hundred_steps_is_within_the_bounds(types, checkpoint, tmp_path):
    """It is no contraction, and its rounding grows."""
    loaded = load_checkpoint(checkpoint)
    pixels = loaded.preprocess.pixels(sorted(loaded.samples.glob("*.png"))[:64])
    table = sampler_table(loaded.model.config.schedule, "ddpm")
    lowered = lower(loaded.model)
    module = builder("torchscript")
    module.build_encoder(lowered, torch.from_numpy(pixels[:2]), types, tmp_path)
    module.build_refine(lowered, types, tmp_path)
    opened = open_backend("torchscript", tmp_path, types.compute, 1)
    arrays = lowered.plan.tensors({"default": table})
    built = Built(opened, arrays, sampling_of(loaded.model, table), pixels)
    trial = trial_of(Reference(loaded.model, pixels), built, table)
    what = (tmp_path, lowered, "torchscript", Arithmetic(types, types), USUAL)
    assert diagnose(trial, "default", *what).part == "none"


def test_what_cannot_be_built_apart_does_not_hide_the_failure(case):
    """Here a runtime that does not have the type: the failing payload was opened in another."""
    spoilt = case("vit")
    spoilt.spoil_encoder(VIT_LAYER, scaled(3))
    built = spoilt.built("torchscript", FP32)
    found = spoilt.diagnosed(built, "torchscript", Types("fp32", "fp16"))
    assert (found.part, found.name) == ("encoder", "")
    assert found.sentence.startswith("the encoder departs (relative error ")
    assert "where could not be found: BackendUnavailable: torchscript computes in" in found.sentence


def test_an_encoder_that_is_right_when_it_is_built_again_is_said_to_be(case):
    """A payload that was damaged, say: no layer is to blame."""
    spoilt = case("vit")
    sound = spoilt.lowered
    spoilt.spoil_encoder(VIT_LAYER, scaled(3))
    built = spoilt.built("torchscript", FP32)
    spoilt.lowered = sound
    found = spoilt.diagnosed(built, "torchscript", FP32)
    assert (found.part, found.name) == ("encoder", "")
    assert found.sentence.endswith("; built once more, it agrees with the reference")


def test_errors_are_by_image_and_a_value_that_is_not_finite_is_infinitely_wrong():
    want = np.array([[3, 4], [3, 4], [0, 0], [0, 0], [1, 1], [np.inf, 1]], np.float32)
    got = np.array([[3, 4], [3, 3], [0, 0], [1, 0], [np.nan, 1], [np.inf, 1]], np.float32)
    assert relative_errors(got, want).tolist() == [0, 0.2, 0, math.inf, math.inf, math.inf]
