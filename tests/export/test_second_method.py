"""A method that is not MARNet, written in this file alone, is exported and served."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from quick import kept
from tiny import RESNET
from tolerances import BUILT
from torch import Tensor, nn

from marnet_export.job import export_bundle
from marnet_export.lower.methods import LOWERINGS, Lowered
from marnet_export.lower.modules import Step
from marnet_export.settings import Settings
from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import ExportError
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.checkpoint import load_checkpoint, write_model
from marnet_train.diffusion import (
    SamplerTable,
    ScheduleConfig,
    sample,
    sampler_table,
    trajectory_tensors,
)
from marnet_train.models import METHODS
from marnet_train.models.backbones import VisionEncoder, backbone_config, build_backbone
from marnet_train.models.denoiser import sinusoidal_embedding

WIDTH, TIME = 6, 4  # D, E
VISION = {**RESNET, "hidden_sizes": [5]}


@dataclass(frozen=True)
class GatedConfig:
    labels: tuple[str, ...]
    schedule: ScheduleConfig
    method: ClassVar[str] = "gated"

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> GatedConfig:
        return cls(tuple(content["labels"]), ScheduleConfig(**content["schedule"]))


class Gated(nn.Module):
    """Time opens and shuts gates, so that no product of one step can be merged with the next's."""

    config_type = GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(build_backbone(backbone_config(VISION)))
        self.latent_width = WIDTH
        self.mix = nn.Linear(WIDTH + self.vision.dim, 9)
        self.gate = nn.Linear(TIME, 9)
        self.back = nn.Linear(9, WIDTH)
        self.classifier = nn.Linear(WIDTH + self.vision.dim, len(config.labels))

    def see(self, x_v: Tensor) -> Tensor:
        return x_v

    def denoise(self, x: Tensor, tau: Tensor, x_v: Tensor) -> Tensor:
        gates = torch.sigmoid(self.gate(tau))
        return self.back(torch.tanh(self.mix(torch.cat([x, x_v], dim=-1))) * gates)

    def refine(
        self, x_v: Tensor, table: SamplerTable, initial: Tensor, noise: Tensor, watch=lambda i, x: 0
    ) -> Tensor:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.denoise(x, sinusoidal_embedding(t, TIME), x_v)

        return sample(denoise, table, initial, noise, watch)

    def head(self, x_v: Tensor, x_cdr: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.cat([x_cdr, x_v], dim=-1)
        return self.classifier(features), features


class GatedPlan:
    """The chain is linear in x, so x = p + w: the table's rows hold w and the time, the loop p."""

    def __init__(self, model: Gated) -> None:
        self.model = model

    def tensors(self, tables: dict[str, SamplerTable]) -> dict[str, np.ndarray]:
        steps = torch.arange(1, self.model.config.schedule.steps + 1)
        tau = sinusoidal_embedding(steps, TIME).numpy()
        time = np.concatenate([np.zeros((len(tau), WIDTH)), tau], axis=1)
        arrays = {
            "time_bias": time,
            "input_weight": np.eye(WIDTH + TIME, WIDTH),
            "output_bias": np.zeros(WIDTH),
        }
        found = {name: array.astype(np.float32) for name, array in arrays.items()}
        return found | {f"coefficients.{name}": t.coefficients for name, t in tables.items()}

    def matrices(self) -> dict[str, np.ndarray]:
        layers = {"mix": self.model.mix, "gate": self.model.gate, "back": self.model.back}
        return {name: layer.weight.detach().double().numpy() for name, layer in layers.items()}

    def sentence(self, table: SamplerTable, samples: int = 1) -> str:
        return f"gated loop: {len(table.timesteps)} steps"

    def noise_cost(self, table: SamplerTable) -> str:
        return "gated noise"

    def explain(self, compute: str) -> list[tuple[str, str, str]]:
        return []


class GatedStep(Step):
    def __init__(self, model: Gated) -> None:
        super().__init__(width=WIDTH)
        self.mix, self.gate, self.back = model.mix, model.gate, model.back

    def condition(self, x_v: Tensor) -> Tensor:
        return x_v.unsqueeze(1)

    def gain(self, state: Tensor, q: Tensor, row: Tensor) -> Tensor:
        w, tau = row.split([6, 4], dim=-1)
        x = state + w
        gates = torch.sigmoid(self.gate(tau))
        both = torch.cat([x, q.expand(-1, x.shape[1], -1)], dim=-1)
        return self.back(torch.tanh(self.mix(both)) * gates)

    def finish(self, state: Tensor, q: Tensor, row: Tensor) -> Tensor:
        return self.gain(state, q, row)


class GatedHead(nn.Module):
    def __init__(self, model: Gated) -> None:
        super().__init__()
        self.classifier = model.classifier

    def forward(self, x_v: Tensor, x_cdr: Tensor) -> tuple[Tensor, Tensor]:
        wide = x_v.unsqueeze(1).expand(-1, x_cdr.shape[1], -1)
        features = torch.cat([x_cdr, wide], dim=-1)
        return self.classifier(features), features


def lower_gated(model: Gated) -> Lowered:
    return Lowered(
        encoder=model.vision.eval(),
        plan=GatedPlan(model),
        step=lambda compute: GatedStep(model).eval(),
        head=GatedHead(model).eval(),
        image_width=model.vision.dim,
        latent_width=WIDTH,
        row_width=WIDTH + TIME,
    )


@pytest.fixture(scope="module")
def gated(checkpoint: Path, tmp_path_factory) -> Path:
    """A checkpoint of the method, with fresh weights, and the images of another."""
    torch.manual_seed(0)
    model = Gated(GatedConfig(tuple("0123456789"), ScheduleConfig(steps=20)))
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # answers that are far apart
    folder = tmp_path_factory.mktemp("gated") / "checkpoint"
    source = load_checkpoint(checkpoint)
    folder.mkdir()
    write_model(folder, model, source.preprocess)  # pyright: ignore[reportArgumentType]
    (folder / "samples").symlink_to(source.samples.absolute())
    return folder


@pytest.fixture
def registered(monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "gated", Gated)  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(LOWERINGS, "gated", lower_gated)


@torch.inference_mode()
def plain_logits(model: Gated, pixels: np.ndarray) -> np.ndarray:
    table = sampler_table(model.config.schedule, "dpmpp", 10)
    x_v = model.vision(torch.from_numpy(pixels))
    trajectory = draw_trajectory(0, table.timesteps, table.train_steps, WIDTH)
    initial, noise = trajectory_tensors(trajectory, len(x_v), x_v)
    return model.head(x_v, model.refine(x_v, table, initial, noise))[0].numpy()


@pytest.mark.parametrize(
    "backend", kept(["torchscript", "onnxruntime", "openvino"], {"torchscript"})
)
@pytest.mark.usefixtures("registered")
def test_a_second_method_is_exported_and_served(backend, gated, tmp_path):
    settings = Settings(backend, sampler="dpmpp", steps=10, min_agreement=0.99)
    fidelity = export_bundle(gated, tmp_path / "gated.marnet", settings)
    assert fidelity.top1_agreement >= 0.99
    classifier = Classifier(tmp_path / "gated.marnet")
    manifest = classifier.bundle.manifest
    assert (manifest.method, manifest.backend) == ("gated", backend)
    assert not classifier.bundle.has("text")  # the method has no texts
    images = sorted((gated / "samples").glob("*.png"))[:5]
    pixels = classifier.preprocess.pixels(images)
    want = plain_logits(load_checkpoint(gated).model, pixels)  # pyright: ignore[reportArgumentType]
    got = classifier.logits(pixels)
    assert np.abs(got - want).max() <= BUILT["fp32"] * np.abs(want).max()
    assert [answer.index for answer in classifier.predict(images)] == want.argmax(axis=1).tolist()


@pytest.mark.usefixtures("registered")
def test_a_method_without_an_alignment_branch_has_no_zero_steps(gated, tmp_path):
    with pytest.raises(ExportError, match=r"--steps 0 .* 'gated' has none; choose 1 or"):
        export_bundle(gated, tmp_path / "b", Settings("torchscript", steps=0))


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_a_sweep_of_a_method_without_an_alignment_branch_compares_loops_alone(gated, tmp_path):
    swept = Settings("torchscript", steps="auto", sampler="ddim", samples=1, max_drop=0.05)
    export_bundle(gated, tmp_path / "b", swept)
    report = json.loads((tmp_path / "b/pareto.json").read_text())
    assert min(row["steps"] for row in report["candidates"]) == 1
    assert {row["over_zero"] for row in report["candidates"]} == {None}
    assert "zero" not in report["points"]
    assert report["picked"] == "fast"
    assert not (tmp_path / "b/payload/alignment.safetensors").exists()


def test_a_method_that_can_only_be_trained_is_named(gated, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "gated", Gated)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ExportError, match=r"'gated' can be trained but not exported .*marnet"):
        export_bundle(gated, tmp_path / "b", Settings("torchscript"))
    assert list(tmp_path.iterdir()) == []
