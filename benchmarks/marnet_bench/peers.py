"""What a bundle is measured against: the same checkpoint in plain, eager PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from marnet_sdk.backends import Floats
from marnet_sdk.bundle import Manifest, Sampling
from marnet_sdk.errors import NotFound
from marnet_sdk.trajectory import draw_trajectory
from marnet_train.checkpoint import Checkpoint, checkpoint_hash, is_checkpoint, load_checkpoint
from marnet_train.diffusion import sampler_table, trajectory_tensors


def find_checkpoint(sha256: str, runs: Path = Path("runs")) -> Path:
    """The checkpoint under `runs` that a bundle was made from, recognised by its content.

    Raises:
        NotFound: it is not there.
    """
    folders = sorted(runs.iterdir()) if runs.is_dir() else []
    for folder in folders:
        if is_checkpoint(folder) and checkpoint_hash(folder) == sha256:
            return folder
    raise NotFound(
        f"the checkpoint of this bundle (SHA-256 {sha256[:12]}...) is not under "
        f"{os.path.join('.', runs)}; name it with "
        "--checkpoint, or measure the bundle alone with --no-peer"
    )


class PlainTorch:
    """The model as trained, float32, with the loop as the paper writes it and the same noise."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        sampling = manifest.sampling
        self.model = checkpoint.model
        self.table = sampler_table(
            self.model.config.schedule, sampling.sampler, len(sampling.timesteps)
        )
        self.trajectory = draw_trajectory(
            sampling.seed, sampling.timesteps, sampling.train_steps, sampling.width
        )

    def logits(self, pixels: Floats) -> Floats:
        """[B, 3, H, W] -> [B, K]."""
        with torch.inference_mode():
            batch = torch.from_numpy(pixels)
            initial, noise = trajectory_tensors(self.trajectory, len(batch), batch)
            return self.model(batch, self.table, initial, noise)[0].numpy()


def load_peer(
    path: Path, manifest: Manifest, threads: int | None = None
) -> tuple[Checkpoint, PlainTorch]:
    """Load the checkpoint of a bundle as its peer.

    Args:
        threads: cores for torch in this process; None leaves its default.

    Raises:
        NotFound: `path` holds another checkpoint than the one that the bundle was made from.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = load_checkpoint(path)
    if checkpoint.sha256 != manifest.checkpoint_sha256:
        raise NotFound(
            f"{path} is not the checkpoint of this bundle (SHA-256 {checkpoint.sha256[:12]}..., "
            f"the bundle was made from {manifest.checkpoint_sha256[:12]}...); name the right one "
            "with --checkpoint, or measure the bundle alone with --no-peer"
        )
    return checkpoint, PlainTorch(checkpoint, manifest)


def measured_accuracy(training: dict[str, Any], sampling: Sampling) -> dict[str, Any] | None:
    """Accuracy of a checkpoint as far as its training measured it for this reverse process.

    Training measures all T ddpm steps, top-1 at a few noise seeds and top-5 at the first. What was
    not measured is None: a bundle of another seed or number of steps is another classifier.

    Returns:
        split, and top1 and top5 of "baseline" and "marnet"; None without metrics.
    """
    metrics = training.get("metrics")
    if not metrics:
        return None
    split = "test" if "test" in metrics["marnet"] else "val"
    found = metrics["marnet"][split]
    by_seed = found["top1_over_noise_seeds"]
    whole = sampling.sampler == "ddpm" and len(sampling.timesteps) == sampling.train_steps
    known = whole and sampling.seed < len(by_seed)
    marnet = {
        "top1": by_seed[sampling.seed] if known else None,
        "top5": found["top5"] if known and sampling.seed == 0 else None,
    }
    baseline = {name: metrics["baseline"][split][name] for name in ("top1", "top5")}
    return {"split": split, "baseline": baseline, "marnet": marnet}
