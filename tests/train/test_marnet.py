"""The whole model: its configuration, its shapes, its standardisation, its equations.

Axes: B batch, S sampling steps, K classes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerances import FLOAT64
from torch import Tensor

from marnet_sdk.errors import InvalidInput, RecipeError
from marnet_train.diffusion import SamplerTable, ScheduleConfig, sampler_table
from marnet_train.models.backbones import backbone_config
from marnet_train.models.fusion import FUSIONS
from marnet_train.models.marnet import Baseline, MARNet, MarnetConfig

VISION = {
    "model_type": "resnet",
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "layer_type": "basic",
}
TEXT = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
CONFIG = MarnetConfig(
    vision=VISION,
    text=TEXT,
    labels=("cat", "dog", "Apfel ä"),
    dim=6,
    hidden=10,
    time_dim=4,
    schedule=ScheduleConfig(steps=5, offset=0.01, max_beta=0.99),
)


def build(config: MarnetConfig = CONFIG) -> MARNet:
    torch.manual_seed(0)
    return MARNet(config).eval().double()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def table() -> SamplerTable:
    return sampler_table(CONFIG.schedule, "ddpm")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_configuration_survives_its_way_through_json(fusion: str) -> None:
    config = replace(CONFIG, fusion=fusion)
    content = json.loads(json.dumps(config.to_dict()))
    assert content["method"] == "marnet"
    assert content["samples"] == 1
    assert content["id2label"] == {"0": "cat", "1": "dog", "2": "Apfel ä"}
    assert MarnetConfig.from_dict(content) == config


def test_the_number_of_samples_is_one_unless_the_configuration_says_more() -> None:
    content = CONFIG.to_dict()
    assert MarnetConfig.from_dict(content | {"samples": 4}).samples == 4
    del content["samples"]  # as older versions wrote it
    assert MarnetConfig.from_dict(content) == CONFIG


def test_more_than_ten_labels_keep_their_order_in_json() -> None:
    config = replace(CONFIG, labels=tuple(f"class {i}" for i in range(120)))
    content = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    assert MarnetConfig.from_dict(content).labels == config.labels


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_images_and_noise_become_logits_and_a_fused_vector(
    fusion: str, batch: int, table: SamplerTable
) -> None:
    model = build(replace(CONFIG, fusion=fusion))
    logits, fused = model(draw(batch, 3, 16, 16), table, draw(batch, 6), draw(5, 1, 6))
    assert logits.shape == (batch, 3)
    assert fused.shape == (batch, 12 if fusion == "concat" else 6)
    torch.testing.assert_close(logits, model.classifier(fused), rtol=0, atol=0)


@torch.no_grad()
def test_the_forward_pass_is_the_six_steps_of_the_paper(table: SamplerTable) -> None:
    """Section 1.5, with the loop written out."""
    model = build()
    model.vision_mean += 0.3
    model.vision_std *= 2.0
    pixels, initial, noise = draw(2, 3, 16, 16), draw(2, 6), draw(5, 2, 6)
    x_v = model.vision(pixels)
    linear = x_v @ model.project_vision.weight.T + model.project_vision.bias
    x_ema = torch.maximum(linear, 0.01 * linear)
    condition, z = (x_v - 0.3) / 2, initial
    for i, t in enumerate((5, 4, 3, 2, 1)):
        c2, c1, _, sigma = table.coefficients[i]
        z = c1 * model.denoiser(z, torch.full((2,), t), condition) + c2 * z + sigma * noise[i]
    logits = model.classifier(torch.cat([x_ema, z], dim=1))
    found, _ = model(pixels, table, initial, noise)
    torch.testing.assert_close(found, logits, rtol=FLOAT64, atol=FLOAT64)


@torch.no_grad()
def test_the_alignment_branch_sees_features_that_are_not_standardised() -> None:
    """x_EMA is g(E_v(x_v)) of the raw x_v: phase A trains E_v before any statistics exist."""
    model, x_v = build(), draw(2, 8)
    before = model.align_vision(x_v)
    model.vision_mean += 5
    assert torch.equal(model.align_vision(x_v), before)


@torch.no_grad()
def test_text_is_projected_by_its_own_head() -> None:
    model, x_s = build(), draw(4, 6)
    linear = x_s @ model.project_text.weight.T + model.project_text.bias
    torch.testing.assert_close(model.align_text(x_s), torch.maximum(linear, 0.01 * linear))


@torch.no_grad()
def test_features_are_standardised_with_the_stored_statistics() -> None:
    model, x_v, x_s = build(), draw(50, 8), 3 + 4 * draw(50, 6)
    model.vision_mean.copy_(x_v.mean(dim=0))
    model.vision_std.copy_(x_v.std(dim=0, correction=0))
    model.text_mean.copy_(x_s.mean(dim=0))
    model.text_std.copy_(x_s.std(dim=0, correction=0))
    for standard in (model.condition(x_v), model.standardise_text(x_s)):
        zeros = torch.zeros(standard.shape[1], dtype=torch.float64)
        torch.testing.assert_close(standard.mean(dim=0), zeros, rtol=0, atol=FLOAT64)
        torch.testing.assert_close(standard.square().mean(dim=0), zeros + 1, rtol=FLOAT64, atol=0)


FUSED = {"aligned_mean", "aligned_std", "refined_mean", "refined_std"}


def test_the_statistics_travel_with_the_weights() -> None:
    names = set(build().state_dict())
    assert {"vision_mean", "vision_std", "text_mean", "text_std"} <= names
    assert not FUSED & names
    assert set(build(replace(CONFIG, fusion="mul")).state_dict()) >= FUSED


@pytest.mark.parametrize("fusion", sorted(set(FUSIONS) - {"concat"}))
@torch.no_grad()
def test_elementwise_fusions_see_both_branches_standardised(fusion: str) -> None:
    """So that neither drowns the other: a product or a sum depends on their scales."""
    model = build(replace(CONFIG, fusion=fusion))
    x_v, x_cdr = 50 + 30 * draw(40, 8), 0.01 * draw(40, 6, seed=2)
    aligned = model.align_vision(x_v)
    model.set_statistics("aligned", aligned)
    model.set_statistics("refined", x_cdr)
    standard = [(x - x.mean(dim=0)) / x.std(dim=0, correction=0) for x in (aligned, x_cdr)]
    expected = FUSIONS[fusion](*standard)
    torch.testing.assert_close(model.fuse(x_v, x_cdr), expected, rtol=FLOAT64, atol=FLOAT64)


@torch.no_grad()
def test_concat_takes_both_branches_raw() -> None:
    model, x_v, x_cdr = build(), draw(4, 8), draw(4, 6, seed=2)
    expected = torch.cat([model.align_vision(x_v), x_cdr], dim=1)
    assert torch.equal(model.fuse(x_v, x_cdr), expected)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_at_logit_level_the_logits_of_both_branches_are_fused(fusion: str) -> None:
    """Widths of features need not be equal then: both branches have as many logits."""
    model = build(replace(CONFIG, fusion=fusion, fusion_level="logit", dim=7))
    x_v, x_cdr = draw(40, 8), draw(40, 6, seed=2)
    logits = [model.alignment_logits(x_v), model.semantic_classifier(x_cdr)]
    if fusion != "concat":
        model.set_statistics("aligned", logits[0])
        model.set_statistics("refined", logits[1])
        logits = [(x - x.mean(dim=0)) / x.std(dim=0, correction=0) for x in logits]
    expected = FUSIONS[fusion](*logits)
    torch.testing.assert_close(model.fuse(x_v, x_cdr), expected, rtol=FLOAT64, atol=FLOAT64)
    assert model.classifier.in_features == expected.shape[1] == (6 if fusion == "concat" else 3)


def test_an_unknown_level_or_pooling_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"fusion_level 'logits' is unknown; choose .*'logit'"):
        replace(CONFIG, fusion_level="logits")
    with pytest.raises(RecipeError, match=r"text_pooling 'frist'.*first"):
        MARNet(replace(CONFIG, text_pooling="frist"))


@torch.no_grad()
def test_the_baseline_is_a_copy_of_the_image_branch() -> None:
    model, x_v = build(), draw(4, 8)
    baseline = Baseline(model)
    expected = model.alignment_logits(x_v)
    assert torch.equal(baseline.alignment_logits(x_v), expected)
    assert torch.equal(expected, model.alignment_classifier(model.align_vision(x_v)))
    baseline.project_vision.weight.zero_()
    assert torch.equal(model.alignment_logits(x_v), expected)
    parts = {name.split(".")[0] for name in baseline.state_dict()}
    assert parts == {"vision", "project_vision", "alignment_classifier"}


@pytest.mark.parametrize("fusion", sorted(set(FUSIONS) - {"concat"}))
def test_elementwise_fusion_of_unequal_widths_is_refused(fusion: str) -> None:
    message = rf"'{fusion}' .* dim \(7\) must equal the width of the text features \(6\).* concat"
    with pytest.raises(RecipeError, match=message):
        MARNet(replace(CONFIG, fusion=fusion, dim=7))


def test_concat_takes_unequal_widths() -> None:
    assert MARNet(replace(CONFIG, dim=7)).classifier.in_features == 7 + 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "cat"}, r"fusion 'cat' is unknown; choose from \['add', 'concat', 'hm'"),
        ({"time_dim": 5}, "time_dim must be even and at least 2, got 5"),
        ({"time_dim": 0}, "time_dim must be even and at least 2, got 0"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"samples": 1.0}, "samples must be an integer of at least 1, got 1.0"),
        ({"samples": True}, "samples must be an integer of at least 1, got True"),
        ({"samples": "auto"}, "samples must be an integer of at least 1, got 'auto'"),
        ({"labels": ("one",)}, "labels must be at least two classes, got 1"),
        ({"vision": {"pretrained": "some/model"}}, "vision must be a whole configuration"),
        ({"text": {"pretrained": "some/model"}}, "text must be a whole configuration"),
    ],
)
def test_an_impossible_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(CONFIG, **change)


def test_an_impossible_schedule_in_a_configuration_is_refused() -> None:
    content = CONFIG.to_dict()
    content["schedule"]["steps"] = 0
    with pytest.raises(InvalidInput, match="at least 1 step"):
        MarnetConfig.from_dict(content)


def test_the_papers_size_has_the_parameters_that_the_paper_implies() -> None:
    """ViT-B/16 and BERT-base without poolers, 2 projectors of 590,592, 4.53 M denoiser."""
    with torch.device("meta"):
        vision, text = {"model_type": "vit"}, {"model_type": "bert"}
        model = MARNet(MarnetConfig(vision, text, tuple(map(str, range(172)))))

    def millions(part: torch.nn.Module) -> float:
        return round(sum(p.numel() for p in part.parameters()) / 1e6, 2)

    assert millions(model.vision) == 85.80
    assert millions(model.text) == 108.89
    assert millions(model.denoiser) == 4.53
    assert sum(p.numel() for p in model.project_vision.parameters()) == 590_592
    assert model.classifier.in_features == 1536
    assert backbone_config({"model_type": "vit"}).patch_size == 16
