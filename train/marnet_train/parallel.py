"""Several processes that train one model, each of which encodes its share of every batch.

The loss is that of the whole batch, because every other pair in it is a negative of ITA. So each
process computes x_v of its own rows, is given the others', and computes the whole loss. Averaged
over the processes, gradients are then those that one process has. Batch normalisation is the
exception, as usual: it sees the rows of its own process. (Wrappers such as DistributedDataParallel,
which `accelerate` uses too, average the losses of the shares: each pair would have the negatives of
its own process alone.)

`torchrun` starts the processes; where there is one alone, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def started() -> tuple[int, int]:
    """Return the number of this process and how many torchrun started, by its environment."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]), count) if count > 1 else (0, 1)


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Train together with the other processes that torchrun started, inside the block.

    Yields:
        The device of this process: on GPUs, one each.
    """
    if started()[1] == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; process 0 writes what is written."""
    return dist.get_rank() if dist.is_initialized() else 0


def _bounds(count: int) -> list[int]:
    """Return where the share of each process begins, and the end: [processes + 1]."""
    return [k * count // size() for k in range(size() + 1)]


def own_rows(count: int) -> slice:
    """Return which rows of a batch this process encodes; all, if there are fewer than processes."""
    if count < size():
        return slice(0, count)
    return slice(*_bounds(count)[rank() : rank() + 2])


def gathered(x: Tensor, count: int) -> Tensor:
    """Return the rows of all processes in order, [B_own, ...] -> [B, ...].

    The gradient goes into this process's own rows, times the number of processes: `average` over
    all then makes the gradient of the whole batch.
    """
    if size() == 1 or count < size():
        return x
    lengths = [b - a for a, b in pairwise(_bounds(count))]
    behind = (0, 0) * (x.ndim - 1) + (0, max(lengths) - len(x))  # from the last axis to the first
    padded = F.pad(x.detach(), behind).contiguous()
    parts = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    found = [part[:length] for part, length in zip(parts, lengths, strict=True)]
    found[rank()] = x + (size() - 1) * (x - x.detach())  # its value is x
    return torch.cat(found)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, which must name the same ones."""
    if size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def agreed(value: float) -> float:
    """Return the value of process 0, so that all decide the same."""
    if size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    said = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(said, src=0)
    return float(said)
