"""SeDA's stage 1, between phases A and B: the semantic learner, and how unsure its vectors are.

Axes: N images, K classes, D_v width of x_v.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from marnet_train.evaluate import Labelled, see
from marnet_train.heads import score, temper
from marnet_train.models.marnet import MARNet
from marnet_train.models.seda import SeDA
from marnet_train.phases import Features, Training
from marnet_train.recipe import Recipe
from marnet_train.refinement import Refiner, train_refinement

_OF_STAGE = ("epochs", "batch", "lr", "weight_decay", "ce_weight", "norm_weight", "patience")


def train_semantic_learner(
    model: SeDA, features: Features, seen: Labelled, training: Training
) -> None:
    """Train stage 1 as phase B is trained, with the centre of its class as an image's target.

    Args:
        features, seen: image features alone, of training and of validation.
    """
    learner, recipe = model.learner, training.recipe
    condition, judged = MARNet.condition(model, features.x_v), MARNet.condition(model, seen.x_v)
    learner.set_centres(condition, features.labels)
    own = {name: getattr(recipe.semantic, name) for name in _OF_STAGE}
    settings = recipe.but(refinement={**own, "pure_noise": 0.0})
    target = replace(features, x_s=learner.centres[features.labels])

    @torch.no_grad()
    def look() -> float:
        return score(learner.classifier(learner(judged)).softmax(dim=1), seen.labels)

    train_refinement(
        Refiner(learner.denoiser, learner.classifier, model.config.semantic_schedule),
        condition,
        target,
        replace(training, recipe=settings),
        "semantic learner",
        look=look,
    )
    temper(learner.classifier, [learner(judged)], seen.labels)


@torch.no_grad()
def with_mistakes(model: SeDA, features: Features, recipe: Recipe, seed: int) -> Features:
    """Put what `see` makes in the place of training features, with s as unsure as on other images.

    A share of `wrong` gets the centre of another class, drawn from the alignment classifier's
    probabilities at temperature 2; all get noise of deviation `jitter`. What stage 1 left stays.
    """
    seen = see(model, features.x_v)
    x_v, s, *left = seen.split(model.vision.dim, dim=1)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(s))
    chances = (model.alignment_logits(x_v) / 2).softmax(dim=1).cpu() + 1e-9
    chances[rows, features.labels.cpu()] = 0
    other = torch.multinomial(chances, 1, generator=generator)[:, 0].to(s.device)
    wrong = torch.rand(len(s), 1, generator=generator) < recipe.semantic.wrong
    s = torch.where(wrong.to(s.device), model.learner.centres[other], s)
    noise = torch.randn(s.shape, generator=generator).to(s)
    return replace(features, x_v=torch.cat([x_v, s + recipe.semantic.jitter * noise, *left], dim=1))
