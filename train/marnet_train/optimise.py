"""This module holds what every training loop shares: batches, learning rates, AdamW and the best
weights so far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from marnet_sdk.errors import RecipeError
from marnet_train.models.denoiser import TimeEmbedding
from marnet_train.parallel import average

_BEST = "best."


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield row indices of one epoch in random order; a last batch of one row is left out, because
    neither batch normalisation nor a contrastive loss is defined on it."""
    if min(count, size) < 2:
        raise RecipeError(f"training needs 2 images and a batch of 2, got {count} and {size}")
    for rows in torch.randperm(count, generator=generator).split(size):
        if len(rows) > 1:
            yield rows


def balanced_batches(
    labels: Tensor, size: int, per_class: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield row indices of one epoch in which a batch has a few classes, several images of each.

    There are as many batches as of `batches`; an image may come twice in an epoch, or not at all.

    Args:
        labels: of all rows, [N].
        size: of a batch at most. per_class: images of a class, fewer where it has fewer.
    """
    rows_of = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    for _ in range(0, len(labels), size):
        chosen = torch.randperm(len(rows_of), generator=generator)[: max(1, size // per_class)]
        yield torch.cat([_some(rows_of[k], per_class, generator) for k in chosen.tolist()])


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Return the learning-rate factor: linear warm-up, then a half cosine to 0.

    The warm-up takes `warmup * total` steps.
    """
    rise = max(1, int(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def parameter_groups(module: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters of a module for AdamW, with their learning rate.

    Only matrices and kernels decay: not biases, norms, temperatures or embeddings (of words,
    positions, class tokens and time), which a pull towards zero would only distort.
    """
    decayed, free = [], []
    embeddings = tuple(
        name for name, part in module.named_modules() if isinstance(part, TimeEmbedding)
    )
    for name, part in module.named_modules():
        embeds = isinstance(part, nn.Embedding) or (embeddings and name.startswith(embeddings))
        for own, parameter in part.named_parameters(recurse=False):
            is_token = any(word in own for word in ("embed", "token", "bias"))  # tables of them too
            decays = parameter.ndim >= 2 and not embeds and not is_token
            (decayed if decays else free).append(parameter)
    groups = ((decayed, weight_decay), (free, 0.0))
    return [{"params": p, "lr": rate, "weight_decay": d} for p, d in groups if p]


class Learner:
    """This holds what a phase trains: modules, their AdamW and its learning-rate schedule.

    It can remember the weights that scored best on validation, and go back to them.
    """

    def __init__(
        self,
        parts: Sequence[tuple[nn.Module, float]],
        weight_decay: float,
        total: int,
        warmup: float = 0.1,
        *,
        title: str = "training",
        clip_norm: float | None = None,
        patience: int | None = None,
    ) -> None:
        """Train `parts`, pairs of a module and its learning rate, for `total` steps.

        Args:
            warmup: share of the steps in which the learning rate rises.
            title: how messages call it.
            clip_norm: gradients whose norm, over all parameters, is larger are scaled down to it.
            patience: so many scores in a row without a better one are enough; see `is_done`.
        """
        self.modules = nn.ModuleList([module for module, _ in parts])
        groups = [g for module, rate in parts for g in parameter_groups(module, rate, weight_decay)]
        self.optimizer = torch.optim.AdamW(groups)
        self._moving = [  # averages of batch normalisation, which saw the rows of one process
            value for name, value in self.modules.named_buffers() if ".running_" in name
        ]
        self.total, self.warmup = total, warmup
        self.title, self.clip_norm, self.patience = title, clip_norm, patience
        self.rates = [group["lr"] for group in groups]
        self.steps = 0
        self.score, self.best = -math.inf, dict[str, Tensor]()
        self.waited = 0  # scores since the best one

    def step(self, loss: Tensor) -> float:
        """Follow the gradient of the loss once, and return the loss.

        Raises:
            RecipeError: loss or gradients are NaN or infinite; says in which step and where. The
                weights are as they were before the step.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"the loss became {value}")
        factor = warmup_cosine(self.steps, self.total, self.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        loss.backward()
        learning = [p for p in self.modules.parameters() if p.grad is not None]
        gradients = [p.grad for p in learning if p.grad is not None]
        average([*gradients, *self._moving])
        norm = get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            raise self._diverged(f"the loss was {value:.4g}, but its gradient is not finite")
        if self.clip_norm is not None:
            clip_grads_with_norm_(learning, self.clip_norm, norm)
        self.optimizer.step()
        self.steps += 1
        return value

    def _diverged(self, what: str) -> RecipeError:
        """Make the error that says where numbers are not finite."""
        named = [(name.partition(".")[2], p) for name, p in self.modules.named_parameters()]
        weights = [name for name, p in named if not p.isfinite().all()]
        gradients = [n for n, p in named if p.grad is not None and not p.grad.isfinite().all()]
        places = [
            f"NaN or infinite {kind}: {len(names)} of {len(named)} tensors, such as {names[-1]}"
            for kind, names in (("weights", weights), ("gradients", gradients))
            if names
        ]
        found = "; ".join(places) or "all weights are finite"
        return RecipeError(
            f"{self.title}, step {self.steps + 1} of {self.total}: {what} ({found}); lower the "
            "learning rates of the recipe or set clip_norm = 1.0, and train with --restart"
        )

    def consider(self, score: float) -> None:
        """Remember the weights as they are if they score higher than any before."""
        self.waited += 1
        if score > self.score:
            self.score, self.best = score, copy.deepcopy(dict(self.modules.state_dict()))
            self.waited = 0

    @property
    def is_done(self) -> bool:
        """Tell whether `patience` scores in a row were no better than the best."""
        return self.patience is not None and self.waited >= self.patience

    def take_best(self) -> None:
        """Go back to the weights that scored best, if any were considered."""
        if self.best:
            self.modules.load_state_dict(self.best)

    def state(self) -> dict[str, Tensor]:
        """Return all that a step changes."""
        state = {f"modules.{name}": value for name, value in self.modules.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        state |= {f"{_BEST}{name}": value for name, value in self.best.items()}
        state["score"] = torch.tensor(self.score, dtype=torch.float64)
        counts = {"steps": self.steps, "waited": self.waited}
        return state | {name: torch.tensor(count) for name, count in counts.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go back to where `state` was taken. Entries with other names are left alone."""
        self.steps, self.waited = int(state["steps"]), int(state["waited"])
        self.score = float(state["score"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.modules.load_state_dict(_below("modules.", state))
        self.best = _below(_BEST, state)


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
