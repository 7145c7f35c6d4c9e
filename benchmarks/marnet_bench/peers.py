"""A bundle is measured against this peer: the same checkpoint in plain, eager PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marnet_export.lower.zero_steps import process_table
from marnet_sdk.backends.torch_cpu import use_threads
from marnet_sdk.bundle import SOURCE, Bundle, Manifest, Sampling
from marnet_sdk.errors import NotFound
from marnet_sdk.noise.tables import Floats
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_sdk.run import pixel_key
from marnet_sdk.uncertainty import mean_logits
from marnet_train.checkpoint import Checkpoint, checkpoint_hash, is_checkpoint, load_checkpoint


def find_checkpoint(bundle: Bundle, runs: Path = Path("runs")) -> Path:
    """The checkpoint that a bundle was made from: the one under `runs`, recognised by its content,
    or the bundle's own.

    Raises:
        NotFound: there is none.
        BundleCorrupt: a file of the bundle's is not what was written.
    """
    sha256 = bundle.manifest.checkpoint_sha256
    folders = sorted(runs.iterdir()) if runs.is_dir() else []
    for folder in folders:
        if is_checkpoint(folder) and checkpoint_hash(folder) == sha256:
            return folder
    if bundle.has(SOURCE):
        return bundle.check(SOURCE)
    raise NotFound(
        f"the checkpoint of this bundle (SHA-256 {sha256[:12]}...) is neither in it nor under "
        f"{os.path.join('.', runs)}; name it with "
        "--checkpoint, or measure the bundle alone with --no-peer"
    )


class PlainTorch:
    """The model as trained, float32, with the loop as the paper writes it and the same noise."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        sampling = manifest.sampling
        point = sampling.point
        self.model, self.sampling, self.samples = checkpoint.model, sampling, point.samples
        self.table = process_table(
            self.model.config.schedule, point.sampler, len(point.timesteps), point.eta
        )
        self.shared = [self._noise([k]) for k in range(self.samples)] if point.timesteps else []

    def _noise(self, keys: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw x_T [1 or B, D] and the noise of each step [S, 1 or B, D]."""
        sampling, table = self.sampling, self.table
        drawn = [
            draw_trajectory(
                sampling.seed,
                table.timesteps,
                table.train_steps,
                sampling.width,
                trajectory=key % 2**64,
            )
            for key in keys
        ]
        initial = np.stack([t.initial for t in drawn])
        steps = np.stack([t.steps for t in drawn], axis=1)
        return torch.from_numpy(initial).float(), torch.from_numpy(steps).float()

    def logits(self, pixels: Floats) -> Floats:
        """Map pixels [B, 3, H, W] to logits [B, C]."""
        if not self.table.timesteps:
            with torch.inference_mode():
                x_v = self.model.see(self.model.vision(torch.from_numpy(pixels)))
                return self.model.alignment_classifier(self.model.align_vision(x_v)).numpy()
        chains = self.shared
        if self.sampling.noise == "image":
            keys = [pixel_key(row) for row in pixels]
            chains = [self._noise([key + k for key in keys]) for k in range(self.samples)]
        with torch.inference_mode():
            x_v = self.model.see(self.model.vision(torch.from_numpy(pixels)))
            logits = []
            for initial, noise in chains:
                initial = initial.expand(len(x_v), -1)
                x_cdr = self.model.refine(x_v, self.table, initial, noise)
                logits.append(self.model.classifier(self.model.fuse(x_v, x_cdr)))
            return mean_logits(torch.stack(logits, dim=1).numpy())


def load_peer(
    path: Path, manifest: Manifest, threads: int | None = None
) -> tuple[Checkpoint, PlainTorch]:
    """Load the checkpoint of a bundle as its peer.

    Args:
        threads: cores for torch in this process; None: as many as it may use.

    Raises:
        NotFound: `path` holds another checkpoint than the one that the bundle was made from.
    """
    use_threads(threads)
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

    Training measures all T ddpm steps with its own number of noise samples (top-1 at a few noise
    seeds, top-5 as their mean), and the alignment branch without any. What was not measured is
    None: a bundle of another seed, or of another number of steps or samples, is another classifier.

    Returns:
        split, and top1 and top5 of "baseline" and "marnet"; None without metrics.
    """
    metrics = training.get("metrics")
    if not metrics:
        return None
    split = "test" if "test" in metrics["marnet"] else "val"
    found = metrics["marnet"][split]
    by_seed = found["top1_over_noise_seeds"]
    point = sampling.point
    whole = point.sampler == "ddpm" and len(point.timesteps) == sampling.train_steps
    samples = found.get("samples", 1)  # older versions had one, and top-5 of the first seed alone
    as_trained = whole and point.samples == samples and sampling.noise == "shared"
    known = as_trained and sampling.seed < len(by_seed)
    marnet: dict[str, Any] = {
        "top1": by_seed[sampling.seed] if known else None,
        "top5": found["top5"] if known and ("samples" in found or sampling.seed == 0) else None,
    }
    if not point.timesteps:
        marnet = {name: metrics["alignment"][split][name] for name in ("top1", "top5")}
    baseline = {name: metrics["baseline"][split][name] for name in ("top1", "top5")}
    return {"split": split, "baseline": baseline, "marnet": marnet}
