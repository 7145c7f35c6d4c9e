"""The vectors of test images and of texts, side by side: what is drawn, and how aligned they are.

Axes: N images, M training images, K classes, D_v, D_s, D widths of x_v, x_s, x_EMA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from marnet_train.data.examples import Example
from marnet_train.models.marnet import mean_and_scale
from marnet_train.phases import text_features
from marnet_train.tables.similarity import class_cosines, linear_cka, squared_mmd
from marnet_train.tables.subject import Subject, spread
from marnet_train.text import encode

MOST = 2_000  # images whose vectors are kept and compared: distances of all pairs are needed
SPACES = ("x_v of the baseline", "x_v", "x_EMA", "+MLP", "x_CDR")
MODELS = ("baseline", "alignment", "+MLP", "refined", "MARNet")  # whose confidence is kept


@torch.no_grad()
def vectors(s: Subject) -> dict[str, Tensor]:
    """Return the vectors of at most `MOST` test images by space, [N, D], and their labels.

    Beside them stand the probabilities of the true class by model, "p of NAME", [N].
    """
    model, chosen = s.model, _chosen(s).to(s.labels.device)
    x_v, labels = s.test.x_v[chosen], s.test.labels[chosen]
    found = {"labels": labels}
    if s.with_baseline:
        found["x_v of the baseline"] = s.seen(s.trained.baseline, "test").x_v[chosen]
    found["x_v"] = x_v[:, : model.vision.dim]
    found["x_EMA"] = model.align_vision(x_v)
    found["+MLP"] = s.trained.mlp.one_pass(model.condition(x_v))
    found["x_CDR"] = s.refined[0][chosen]
    served = {n: p[: model.config.samples].mean(dim=0) for n, p in s.answers.items()}
    return found | {f"p of {n}": served[n][chosen, labels] for n in MODELS if n in served}


@torch.no_grad()
def similarities(
    s: Subject, examples: Sequence[Example], found: dict[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """Measure how near each space of images is to its texts: space -> figures.

    x_EMA is compared with x_s' = g(E_s(x_s)), eq. (8), everything else with x_s as phase B has it,
    standardised; x_v is standardised, too. An image's text is its own, where the recipe learns from
    texts and all these images have one; else the mean of its class in training. The two measures
    that need one width are None where the widths differ.

    Args:
        examples: the test images.
        found: what `vectors` made of them.
    """
    labels = found["labels"]
    learned = s.own.features.x_s[: len(s.ready.data.labels)]  # [M, D_s]
    own = _own_texts(s, [examples[i] for i in _chosen(s).tolist()])
    figures = {}
    for space in (name for name in SPACES if name in found):
        of_training, of_images, x = learned, own, found[space]
        if space == "x_EMA":
            of_training = _project(s, learned)
            of_images = None if own is None else _project(s, own)
        elif space.startswith("x_v"):
            mean, std = mean_and_scale(x)
            x = (x - mean) / std
        centres = _class_means(s, of_training)
        texts = centres[labels] if of_images is None else of_images
        figures[space] = _figures(x, texts, centres, labels)
    return figures


def _chosen(s: Subject) -> Tensor:
    """Return the rows of the test images that are compared, [N]."""
    return spread(len(s.labels), MOST)


def _figures(x: Tensor, texts: Tensor, centres: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Compare image vectors [N, D] with texts [N, D'] and with those of the classes [K, D']."""
    a, b, c, y = (t.cpu().numpy() for t in (x, texts, centres, labels))
    same = a.shape[1] == b.shape[1]
    own, others = class_cosines(a, c, y) if same else (None, None)
    return {
        "cka": linear_cka(a, b),
        "mmd": squared_mmd(a, b) if same else None,
        "cosine": own,
        "cosine_others": others,
    }


def _project(s: Subject, x_s: Tensor) -> Tensor:
    """Return x_s' of standardised texts, [N, D_s] -> [N, D]."""
    return s.model.align_text(x_s * s.model.text_std + s.model.text_mean)


def _own_texts(s: Subject, examples: Sequence[Example]) -> Tensor | None:
    """Encode the texts of these images, standardised, [N, D_s]; None: see `similarities`."""
    texts = [example.text for example in examples if example.text]
    if s.training.recipe.semantics != "text" or len(texts) < len(examples):
        return None
    ids, mask = encode(s.ready.tokenizer, texts, s.training.recipe.max_tokens)
    data = replace(s.ready.data, input_ids=ids, attention_mask=mask)
    return s.model.standardise_text(text_features(s.model, data))


def _class_means(s: Subject, x: Tensor) -> Tensor:
    """Average vectors of the training images over each class, [M, D] -> [K, D]."""
    labels = s.ready.data.labels.to(x.device)
    classes = len(s.model.config.labels)
    sums = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x)
    return sums / labels.bincount(minlength=classes).clamp(min=1)[:, None]
