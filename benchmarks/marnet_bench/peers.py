"""What a bundle is measured against: the same checkpoint in plain, eager PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from marnet_sdk.backends import Floats
from marnet_sdk.bundle import Manifest
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
        f"the checkpoint of this bundle (SHA-256 {sha256[:12]}...) is not under {os.path.join('.', runs)}; "
        "name it with --checkpoint, or measure the bundle alone with --no-peer"
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


def load_peer(path: Path, manifest: Manifest) -> tuple[Checkpoint, PlainTorch]:
    """Load the checkpoint of a bundle as its peer.

    Raises:
        NotFound: `path` holds another checkpoint than the one that the bundle was made from.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.sha256 != manifest.checkpoint_sha256:
        raise NotFound(
            f"{path} is not the checkpoint of this bundle (SHA-256 {checkpoint.sha256[:12]}..., "
            f"the bundle was made from {manifest.checkpoint_sha256[:12]}...)"
        )
    return checkpoint, PlainTorch(checkpoint, manifest)
