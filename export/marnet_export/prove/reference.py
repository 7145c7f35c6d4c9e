"""The float32 checkpoint on real images, with the loop as the paper writes it.

Axes: N images, K noise samples, C classes, S steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from marnet_export.lower.plan import check_step
from marnet_sdk.console import track
from marnet_sdk.errors import ExportError
from marnet_sdk.noise.tables import Floats
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_sdk.outputs import atomic_file
from marnet_sdk.run import pixel_key
from marnet_train.diffusion import SamplerTable
from marnet_train.models.marnet import MARNet


@dataclass(frozen=True)
class Store:
    """Answers of one checkpoint on disk, for all processes of an export; the first computes."""

    folder: Path
    checkpoint_sha256: str

    def get(self, of: dict[str, object], compute: Callable[[], Floats]) -> Floats:
        """The array that is kept for `of`, or else what `compute` gives, which is kept then.

        Args:
            of: all that the array depends on besides the checkpoint, as JSON has it.
        """
        key = json.dumps(of | {"checkpoint": self.checkpoint_sha256}, sort_keys=True)
        path = self.folder / f"{sha256(key.encode()).hexdigest()}.safetensors"
        if path.exists():
            with safe_open(path, "np") as file:
                assert (file.metadata() or {}).get("of") == key, path
                return file.get_tensor("array")
        array = np.ascontiguousarray(compute())
        self.folder.mkdir(exist_ok=True)
        with atomic_file(path) as temporary:
            save_file({"array": array}, temporary, {"of": key})
        return array


class Reference:
    """The float32 checkpoint on the images of a verification, with the loop as the paper has it."""

    def __init__(
        self,
        model: MARNet,
        pixels: Floats,
        *,
        by_image: bool = False,
        batch: int = 64,
        store: Store | None = None,
    ) -> None:
        """Encode the images, once.

        Args:
            pixels: [N, 3, H, W]. by_image: key the noise by them; else all meet the same.
            store: keeps what is computed, for other processes.
        """
        self.model, self.batch, self.count = model, batch, len(pixels)
        keys = [pixel_key(row) for row in pixels] if by_image else None
        self._keys = None if keys is None else np.array(keys, np.uint64)
        self._store = store
        self._of = {"pixels": sha256(pixels.tobytes()).hexdigest()} if store else {}
        x_v = self._stored({"what": "x_v"}, lambda: self._encode(pixels))
        self.x_v = torch.from_numpy(x_v)  # [N, D_v]
        self._known: dict[tuple, Floats] = {}  # the logits of the last process that was asked for

    def _chunks(self, title: str, limit: int | None = None) -> Iterator[slice]:
        count = self.count if limit is None else min(limit, self.count)
        for start in track(range(0, count, self.batch), title):
            yield slice(start, min(start + self.batch, count))

    def _stored(self, of: dict[str, object], compute: Callable[[], Floats]) -> Floats:
        return self._store.get(self._of | of, compute) if self._store else compute()

    @torch.inference_mode()
    def _encode(self, pixels: Floats) -> Floats:
        rows = [torch.from_numpy(pixels[chunk]) for chunk in self._chunks("encode")]
        x_v = torch.cat([self.model.see(self.model.vision(batch)) for batch in rows]).numpy()
        _check_finite(x_v, "image encoder")
        return x_v

    def logits(
        self, table: SamplerTable, seed: int, samples: int = 1, *, limit: int | None = None
    ) -> Floats:
        """Compute the logits of every image (or the first `limit`) and noise sample, [N, K, C]; of
        a table without a step, the alignment branch's, [N, 1, C].

        Raises:
            ExportError: a chain leaves the finite numbers; names the step, or the head.
        """
        if not table.timesteps:
            return self._without_loop(limit)
        asked = (table.sampler, table.eta, table.timesteps, seed, samples)
        if asked in self._known:
            return self._known[asked][:limit]
        of: dict[str, object] = {"what": "logits", "process": asked, "limit": limit}
        of["by_image"] = self._keys is not None
        logits = self._stored(of, lambda: self._run(table, seed, samples, limit))
        if limit is None:
            self._known = {asked: logits}
        return logits

    @torch.inference_mode()
    def _run(self, table: SamplerTable, seed: int, samples: int, limit: int | None) -> Floats:
        """The logits behind the loop, [N, K, C]."""
        out = []
        for rows in self._chunks("reference", limit):
            chains = [
                self._chain(table, seed, k, rows, lambda i, x0: check_step(x0, table, i))
                for k in range(samples)
            ]
            out.append(torch.stack(chains, dim=1).numpy())
        logits = np.concatenate(out)
        _check_finite(logits, "head, behind the reverse chain,")
        return logits

    @torch.inference_mode()
    def _without_loop(self, limit: int | None) -> Floats:
        """The alignment branch's logits, [N, 1, C]."""
        aligned = self.model.align_vision(self.x_v[:limit])
        logits = self.model.alignment_classifier(aligned)[:, None].numpy()
        _check_finite(logits, "alignment branch")
        return logits

    @torch.inference_mode()
    def estimates(self, table: SamplerTable, seed: int, rows: NDArray[np.intp]) -> Floats:
        """Compute the head's answer to each step's estimate, some images only: [S, B, C]."""
        found: list[Floats] = []
        self._chain(table, seed, 0, rows, lambda _, x0: found.append(self._head(rows, x0).numpy()))
        return np.stack(found)

    def _head(self, rows: slice | NDArray[np.intp], x_cdr: torch.Tensor) -> torch.Tensor:
        return self.model.head(self.x_v[rows], x_cdr)[0]

    def _chain(
        self,
        table: SamplerTable,
        seed: int,
        sample: int,
        rows: slice | NDArray[np.intp],
        watch: Callable[[int, torch.Tensor], None],
    ) -> torch.Tensor:
        """Logits [B, C] of one chain of each image."""
        x_v = self.x_v[rows]
        trajectories = [
            draw_trajectory(
                seed,
                table.timesteps,
                table.train_steps,
                self.model.latent_width,
                trajectory=(int(key) + sample) % 2**64,
            )
            for key in ([0] if self._keys is None else self._keys[rows])
        ]
        initial = torch.as_tensor(np.stack([t.initial for t in trajectories])).to(
            x_v
        )  # [1 or B, D]
        noise = torch.as_tensor(np.stack([t.steps for t in trajectories], axis=1)).to(x_v)
        x_cdr = self.model.refine(x_v, table, initial.expand(len(x_v), -1), noise, watch)
        return self._head(rows, x_cdr)


def _check_finite(rows: Floats, part: str) -> None:
    """Refuse rows [N, ...], one for each image, that are not finite."""
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    if not finite.all():
        raise ExportError(
            f"the {part} of the float32 checkpoint gives NaN or infinity for {(~finite).sum()} of "
            f"{len(rows)} images, so no precision will do; train it again, or take an earlier "
            "checkpoint"
        )
