"""One export at work: the folder that becomes the bundle, and what all of its steps need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from marnet_export.build.builder import Order, builder
from marnet_export.build.opened import open_built
from marnet_export.build.types import Arithmetic, Calibration
from marnet_export.choose.sweep import as_points
from marnet_export.lower.methods import Lowered, lower
from marnet_export.lower.zero_steps import process_table
from marnet_export.prove.fidelity import MIN_AGREEMENT, ROW_TOLERANCE
from marnet_export.prove.images import Images, load_images
from marnet_export.prove.reference import Reference, Store
from marnet_export.prove.trial import Built, Trial
from marnet_export.settings import Say, Settings, order_for
from marnet_sdk.backends.torch_cpu import use_threads
from marnet_sdk.bundle import FIDELITY, PAYLOAD, Sampling, is_bundle
from marnet_sdk.noise.tables import make_tables
from marnet_sdk.outputs import atomic_directory, check_output, exclusive
from marnet_train.checkpoint import Checkpoint, load_checkpoint, write_json
from marnet_train.diffusion import SamplerTable

DEFAULT = "default"  # the operating point of a bundle that has one
CALIBRATION = 256  # images that the ranges of int8 are measured on


@contextmanager
def at_work(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write a bundle into, which becomes `output`; one export at a time.

    Raises:
        OutputExists: something is there. OutputBusy: another export is at work there; names it.
        OutputError: no space, or the folder must not be written to.
    """
    check_output(output, overwrite=overwrite, replaceable=is_bundle)
    use_threads(None)
    lock = output.absolute().parent / f".{output.name}.lock"
    with exclusive(lock):
        try:
            with atomic_directory(output, overwrite=overwrite, replaceable=is_bundle) as fresh:
                yield fresh
        finally:
            lock.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Points:
    """The operating points of a bundle, and the tables of their loops."""

    tables: Mapping[str, SamplerTable]
    sampling: Sampling
    plan: dict[str, NDArray]  # plan.safetensors

    @property
    def table(self) -> SamplerTable:
        """Return the table of the point that answers."""
        return self.tables[self.sampling.default]


@dataclass(frozen=True)
class Kept:
    """The layers of an int8 encoder that stay float."""

    layers: Mapping[str, str]  # name -> why
    share: float  # of the encoder's multiply-adds


@dataclass(eq=False)
class Job:
    """This is what all steps of one export need."""

    fresh: Path  # the folder that becomes the bundle
    checkpoint: Checkpoint
    lowered: Lowered
    settings: Settings
    images: Images  # that it is verified on
    fitted: Images  # that int8 is fitted to: not the images of --data, if there are others
    say: Say
    store: Store | None = None  # of what the reference answers
    kept: Kept = Kept({}, 0.0)

    @classmethod
    def load(
        cls,
        fresh: Path,
        checkpoint_path: Path,
        settings: Settings,
        data: Path | None,
        say: Say,
        answers: Path | None = None,
    ) -> Job:
        """Load the checkpoint and the images, and lower the model; see `export_bundle`."""
        checkpoint = load_checkpoint(checkpoint_path)
        images = fitted = load_images(data, checkpoint, say)
        if data is not None and checkpoint.samples.is_dir():
            fitted = load_images(None, checkpoint, say)
        store = None if answers is None else Store(answers, checkpoint.sha256)
        return cls(fresh, checkpoint, lower(checkpoint.model), settings, images, fitted, say, store)

    @property
    def payload(self) -> Path:
        return self.fresh / PAYLOAD

    @property
    def example(self) -> torch.Tensor:
        """Return the images that the encoder is traced with, [2, 3, H, W]."""
        pixels = self.images.pixels
        return torch.from_numpy(np.resize(pixels, (2, *pixels.shape[1:])))

    @cached_property
    def reference(self) -> Reference:
        """The float32 checkpoint on the images that are verified on."""
        return self._reference(self.images)

    @cached_property
    def fitted_reference(self) -> Reference:
        """The float32 checkpoint on the images that int8 is fitted to."""
        return self.reference if self.fitted is self.images else self._reference(self.fitted)

    def _reference(self, images: Images) -> Reference:
        by_image = self.settings.noise == "image"
        model = self.checkpoint.model
        return Reference(model, images.pixels, by_image=by_image, store=self.store)

    @property
    def trained_samples(self) -> int:
        return trained_samples(self.checkpoint.model.config)

    def table(self, steps: int | None = None) -> SamplerTable:
        """The sampler that is asked for, with so many steps (None: as trained)."""
        asked = self.settings
        schedule = self.checkpoint.model.config.schedule
        return process_table(schedule, asked.sampler, steps, asked.eta)

    def points(
        self, tables: Mapping[str, SamplerTable], samples: Mapping[str, int], default: str
    ) -> Points:
        """Operating points with these samplers and numbers of noise samples."""
        model = self.checkpoint.model
        sampling = Sampling(
            points=as_points(tables, samples),
            default=default,
            train_steps=model.config.schedule.steps,
            noise=self.settings.noise,
            seed=self.settings.seed,
            width=model.latent_width,
        )
        return Points(tables, sampling, self.lowered.plan.tensors(dict(tables)))

    def calibration(self, points: Points) -> Calibration:
        """Return the arrays that ranges of activations are measured on."""
        images, sampling = slice(0, CALIBRATION), points.sampling
        name, seed = sampling.with_loop, sampling.seed
        tables = make_tables(points.plan, sampling, name, seed=seed, samples=1)
        return Calibration(
            self.fitted.pixels[images],
            self.fitted_reference.x_v[images].numpy(),
            tables.coefficients,
            tables.bias,
            tuple(self.kept.layers),
        )

    def order(self, points: Points) -> Order:
        """Return what the builder is told besides model and types."""
        return order_for(self.settings, self.calibration(points))

    def opened(self, payload: Path, types: Arithmetic, points: Points) -> Built:
        """A payload as the SDK opens it, on the images of the verification."""
        asked = self.settings
        backend = open_built(asked.backend, payload, types.encoder.compute, asked.device)
        return Built(backend, points.plan, points.sampling, self.images.pixels)

    def trial(self, built: Built, types: Arithmetic, points: Points) -> Trial:
        """Return what was built beside the reference, with the bounds that it is held to."""
        kind = "int8" if "int8" in types.storages else types.encoder.compute
        return Trial(
            self.reference,
            built,
            self.images.labels,
            points.tables,
            min_agreement=self.min_agreement(types),
            row_tolerance=ROW_TOLERANCE[kind],
            buckets=builder(self.settings.backend).buckets,
        )

    def min_agreement(self, types: Arithmetic) -> float:
        """The share of labels that must not change."""
        if (asked := self.settings.min_agreement) is not None:
            return asked
        return min(MIN_AGREEMENT[storage] for storage in types.storages)

    def report(self, **found: Any) -> None:
        """Put more into fidelity.json."""
        add_to_report(self.fresh, **found)


def trained_samples(config: Any) -> int:
    """Count the noise samples that an image meets in the process as trained."""
    return getattr(config, "samples", 1)


def add_to_report(folder: Path, **found: Any) -> None:
    """Put more into a bundle's fidelity.json."""
    path = folder / FIDELITY
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    write_json(path, known | found)
