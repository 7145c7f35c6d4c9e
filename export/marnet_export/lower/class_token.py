"""The last layer of a vision transformer, for the one token of it that is read.

MARNet's image features are the class token behind the last layer (`VisionEncoder`). What that layer
computes for the other tokens nobody reads, but for the keys and values of its attention. Without
it a layer multiplies about a sixth as much; in ViT-B/16 that is a fourteenth of the encoder.
Axes: B batch, T tokens, W width, h heads.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marnet_train.models.backbones import VisionEncoder

_TOLERANCE = 1e-4  # of the largest value: the order of additions in float32, and nothing else


def for_class_token(vision: VisionEncoder) -> nn.Module:
    """Return the encoder, pixels [B, 3, H, W] -> x_v [B, D_v], without what is not read.

    Its parameters are shared. An encoder that reads more than the class token, or whose last layer
    is not recognised by its parts or does not give the same numbers, is returned as it is.
    """
    backbone = vision.backbone
    lists = [name for name, m in backbone.named_modules() if isinstance(m, nn.ModuleList)]
    if not vision.uses_class_token or len(lists) != 1:
        return vision
    layers = backbone.get_submodule(lists[0])
    assert isinstance(layers, nn.ModuleList)
    old, parts = layers[-1], _Parts(layers[-1])
    heads = getattr(backbone.config, "num_attention_heads", 0)
    if not parts.are_usual(old, heads):
        return vision
    new = ClassTokenLayer(old, parts, heads).train(old.training)
    if not _is_same(old, new, vision.dim):
        return vision
    return _with_child(vision, ["backbone", *lists[0].split("."), str(len(layers) - 1)], new)


class ClassTokenLayer(nn.Module):
    """A pre-norm transformer layer [B, T, W] of which the first token comes out, [B, 1, W].

    It has the modules of the layer that it stands for, under their names.
    """

    def __init__(self, layer: nn.Module, parts: _Parts, heads: int) -> None:
        """Take the layer to stand for, its parts, and the number of heads, h."""
        super().__init__()
        self._modules.update(layer._modules)
        self.parts, self.heads = parts, heads

    def forward(self, tokens: Tensor, *unused: object, **also_unused: object) -> Tensor:
        part, parts = self.get_submodule, self.parts
        norm_before, norm_after = map(part, parts.norms)
        query, key, value, projection, fc1, fc2 = map(part, parts.linears)
        (activation,) = map(part, parts.rest)
        normed = norm_before(tokens)
        q, k, v = query(normed[:, :1]), key(normed), value(normed)
        # In float32, also where layers hand on 16 bits: one query costs little.
        q, k, v = (x.to(tokens.dtype) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        # Written out: TensorRT-RTX 1.7 has no fused attention for a single query.
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)  # [B, h, 1, T]
        read = F.softmax(scores, dim=-1) @ v  # [B, h, 1, W / h]
        y = projection(read.transpose(1, 2).flatten(2))
        x = tokens[:, :1] + (part(parts.scales[0])(y) if parts.scales else y)
        y = fc2(activation(fc1(norm_after(x))))
        return x + (part(parts.scales[1])(y) if parts.scales else y)


class _Parts:
    """Names of the modules of a layer that have none of their own, in the order of definition.

    Linear: query, key, value, projection and the two of the MLP. Norms: before the attention, and
    behind it; DINOv2's scales likewise. The rest is the activation.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.norms: list[str] = []
        self.linears: list[str] = []
        self.scales: list[str] = []
        self.rest: list[str] = []
        for name, module in layer.named_modules():
            empty = isinstance(module, nn.Dropout | nn.Identity) or "Drop" in type(module).__name__
            if empty or any(True for _ in module.children()):
                continue
            if isinstance(module, nn.Linear):
                self.linears.append(name)
            elif type(module) is nn.LayerNorm:
                self.norms.append(name)
            elif len(list(module.parameters())) == 1:
                self.scales.append(name)
            else:
                self.rest.append(name)

    def are_usual(self, layer: nn.Module, heads: int) -> bool:
        """Tell whether the layer has these parts and no other, as `ClassTokenLayer` computes it."""
        counts = tuple(map(len, (self.norms, self.linears, self.rest)))
        if counts != (2, 6, 1) or len(self.scales) not in (0, 2) or heads < 1:
            return False
        parts = [layer.get_submodule(n) for n in (*self.norms, *self.linears, *self.scales)]
        if sum(len(list(m.parameters())) for m in parts) != len(list(layer.parameters())):
            return False
        weights = [layer.get_parameter(f"{name}.weight") for name in self.linears]
        found = [tuple(weight.shape) for weight in weights]
        width, inner = found[0][1], found[4][0]
        return (
            found == [(width, width)] * 4 + [(inner, width), (width, inner)] and not width % heads
        )


@torch.no_grad()
def _is_same(old: nn.Module, new: nn.Module, width: int) -> bool:
    """Tell whether both give the first token the same numbers; not where a weight is NaN."""
    like = next(old.parameters())
    tokens = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        wanted, got = old(tokens)[:, :1], new(tokens)
    except (TypeError, RuntimeError, IndexError):  # it wants to be called in another way
        return False
    return bool((wanted - got).abs().max() <= _TOLERANCE * wanted.abs().max())


def _with_child(module: nn.Module, path: list[str], child: nn.Module) -> nn.Module:
    """A copy that shares everything but what is on the path to the new child."""
    twin, (name, *rest) = copy.copy(module), path
    twin._modules = dict(module._modules)
    old = module._modules[name]
    assert old is not None
    twin._modules[name] = _with_child(old, rest, child) if rest else child
    return twin
