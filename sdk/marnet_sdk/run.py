"""One batch, from pixels to what its noise samples say, and that in words: `Runner` and `Batch`.

The loop's tables are made here, the backend is called here, and numbers that are none are refused
here, with the name of the image and the step.

Axes: B batch, K noise samples, C classes, D_v encoder features, D_f fused features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.backends import Backend, DeviceRows
from marnet_sdk.backends.guarded import Guarded
from marnet_sdk.bundle import Sampling
from marnet_sdk.errors import InferenceError, InvalidInput, brief
from marnet_sdk.noise.tables import Floats, Tables, make_tables
from marnet_sdk.prediction import Prediction, predictions
from marnet_sdk.uncertainty import Answers, mean_logits, schedule, settled, softmax, summarise


@dataclass(frozen=True, eq=False)
class Batch:
    """All that came out for a batch."""

    samples: Floats  # logits [B, K, C]; NaN where an image stopped before
    drawn: np.ndarray  # [B] samples of each image
    features: Floats  # [B, D_f] mean over its samples
    operating_point: str  # at which it came out
    abstain_below: float | None  # the score below which answers abstain; None: they do not say

    @property
    def answers(self) -> Answers:
        """The probabilities of each image, and how sure they are."""
        return summarise(softmax(self.samples), self.drawn)

    @property
    def logits(self) -> Floats:
        """The logits [B, C] of the one sample, or the logarithm of the mean probabilities."""
        return mean_logits(self.samples)

    def predictions(self, labels: tuple[str, ...], top_k: int | Sequence[int]) -> list[Prediction]:
        """Name what was found for each image.

        Args:
            top_k: how many classes `Prediction.top` holds, of all answers or of each.
        """
        point = self.operating_point
        return predictions(self.answers, labels, top_k, self.abstain_below, point)


class Runner:
    """Runs batches with one backend, at one operating point, with the noise of one seed."""

    def __init__(
        self,
        guard: Guarded,
        plan: Mapping[str, NDArray],
        sampling: Sampling,
        operating_point: str,
        seed: int,
    ) -> None:
        """Make the tables of one sample, which refuses a bad seed.

        Args:
            plan: the arrays of plan.safetensors.

        Raises:
            InvalidInput: no such seed.
        """
        self.operating_point, self.seed = operating_point, seed
        self.point = sampling.points[operating_point]
        self._guard, self._sampling = guard, sampling
        self._make_tables = partial(make_tables, plan, sampling, operating_point, seed=seed)
        # Tables of one number of samples each; they are large.
        self._shared = lru_cache(maxsize=4)(self._make_tables)
        self._make_tables(samples=1)

    @property
    def by_image(self) -> bool:
        """Tell whether each image meets noise of its own; without the loop none meets any."""
        return self._sampling.noise == "image" and bool(self.point.timesteps)

    def check_draws(self, samples: int, stop: str | None = None) -> None:
        """Refuse what a loop is needed for where there is none, and `stop` with nothing to stop.

        Raises:
            InvalidInput: several samples or `stop` without the loop, too few samples to stop, or
                a `stop` that does not exist.
        """
        if stop not in (None, "settled"):
            raise InvalidInput(f'stop must be "settled" or None, got {brief(stop)}')
        got = f"samples: got {samples}" if samples > 1 else f"stop: got {stop!r}"
        if (samples > 1 or stop) and not self.point.timesteps:
            raise InvalidInput(
                f"{got}, but operating point {self.operating_point!r} has no reverse loop, and so "
                "no noise to draw; leave it out, or choose "
                f"operating_point={self._sampling.with_loop!r}"
            )
        if stop and len(schedule(samples)) == 1:
            raise InvalidInput(
                f"stop={stop!r} looks after {schedule(99)[0]} samples for the first time, so it "
                f"needs more than that, got samples={samples}; ask for more, or leave stop out"
            )

    def _abstain_below(self, samples: int, stop: str | None) -> float | None:
        """The threshold that export found, if it was found for this very way of answering."""
        same = (samples, stop) == (self.point.samples, None)
        same = same and (self.seed == self._sampling.seed or not self.point.timesteps)
        return self.point.abstain_below if same else None

    def __call__(
        self,
        pixels: Floats | DeviceRows,
        names: Sequence[str] = (),
        *,
        samples: int,
        stop: str | None = None,
    ) -> Batch:
        """Answer a batch of images that are preprocessed, at least one.

        Args:
            names: what an error calls the images; by default their rows.
            samples: K, how many each image draws.
            stop: "settled": images draw no more once their answer is predicted to stay.

        Raises:
            InferenceError: the model gives NaN or infinity; names the images.
        """
        with self._guard.calling() as backend:
            if stop or self.by_image:
                assert isinstance(pixels, np.ndarray)
                found = self._in_looks(backend, pixels, names, samples, stop)
            else:
                tables = self._shared(samples=samples)
                logits, fused = backend.run(pixels, tables)
                if not np.isfinite(logits).all():
                    rows, encode = np.arange(len(pixels)), partial(_encode_row, backend, pixels)
                    _refuse(backend, logits, encode, tables, rows, names)
                features = fused.mean(axis=1, dtype=np.float64).astype(np.float32)
                found = logits, np.full(len(pixels), samples), features
        return Batch(*found, self.operating_point, self._abstain_below(samples, stop))

    def _in_looks(
        self, backend: Backend, pixels: Floats, names: Sequence[str], count: int, stop: str | None
    ) -> tuple[Floats, np.ndarray, Floats]:
        """Draw until all images are settled; once, all samples, where nothing stops.

        Returns:
            Logits, samples and features, as a `Batch` has them.
        """
        x_v = backend.encode(pixels)
        drawn = np.zeros(len(pixels), np.int64)
        active = np.arange(len(pixels))  # images that still draw
        logits = features = np.empty(0, np.float32)
        for start, end in pairwise([0, *(schedule(count) if stop else [count])]):
            tables = self._tables(pixels[active], start, end, count)
            given = x_v[active]
            got, fused = backend.refine(given, tables)
            if not np.isfinite(got).all():
                _refuse(backend, got, lambda i, x=given: x[i : i + 1], tables, active, names)
            if start == 0:
                logits = np.full((len(pixels), count, got.shape[2]), np.nan, np.float32)
                features = np.zeros((len(pixels), fused.shape[2]))
            logits[active, start:end] = got
            features[active] += fused.sum(axis=1)
            drawn[active] = end
            if end < count:
                active = active[~settled(softmax(logits[active, :end]), count)]
            if not len(active):
                break
        return logits, drawn, (features / drawn[:, None]).astype(np.float32)

    def _tables(self, pixels: Floats, start: int, end: int, total: int) -> Tables:
        """Make the loop's tables for samples start .. end of a batch.

        They are the same for all of its images, or keyed by what the model sees.
        """
        if self.by_image:
            keys = [pixel_key(row) for row in pixels]
            return self._make_tables(samples=end - start, first=start, keys=keys)
        whole = self._shared(samples=total)
        return whole if (start, end) == (0, total) else whole.samples(start, end)

    def encode(self, pixels: Floats, names: Sequence[str]) -> Floats:
        """Encode one batch to x_v [B, D_v].

        Raises:
            InferenceError: the encoder gives NaN or infinity; names the images.
        """
        with self._guard.calling() as backend:
            x_v = backend.encode(pixels)
        if len(bad := np.flatnonzero(~np.isfinite(x_v).all(axis=1))):
            shown = [names[i] for i in bad.tolist()]
            raise InferenceError(_not_finite(shown, "from the encoder on", "features"))
        return x_v

    def device_rows(self, pixels: Any) -> DeviceRows:
        """Take a caller's array on the GPU as a batch.

        Raises:
            InvalidInput: the backend cannot read it, or noise is keyed by the bytes of an image.
        """
        with self._guard.calling() as backend:
            rows = backend.device_rows(pixels)
        if self.by_image:
            raise InvalidInput(
                "this bundle keys its noise by the bytes of an image, which must be in the host's "
                "memory for that; pass a NumPy array"
            )
        return rows


def pixel_key(pixels: Floats) -> int:
    """The key of an image's own noise: 64 bits of the BLAKE2b hash of the model's input."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels, "<f4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _encode_row(backend: Backend, pixels: Any, row: int) -> Floats:
    """Encode one row to x_v [1, D_v], wherever the batch lies."""
    return backend.encode(pixels[row : row + 1])


def _refuse(
    backend: Backend,
    logits: Floats,
    features: Callable[[int], Floats],
    tables: Tables,
    rows: np.ndarray,
    names: Sequence[str],
) -> None:
    """Name the rows whose logits are no numbers, and where they stopped being some.

    Args:
        features: x_v [1, D_v] of one of these images.
        rows: of these images, in the caller's batch.

    Raises:
        InferenceError: always.
    """
    bad, steps = np.flatnonzero(~np.isfinite(logits).all(axis=(1, 2))), tables.steps
    x_v = features(int(bad[0]))
    if not np.isfinite(x_v).all():
        where = "from the encoder on"
    elif not steps:
        where = "in the alignment branch behind the encoder"
    else:
        step = _first_bad_step(backend, x_v, tables.rows(bad[:1]))
        where = f"from step {step} of {steps} of the reverse loop on"
    shown = [str(names[i]) if names else f"row {i}" for i in rows[bad].tolist()]
    raise InferenceError(_not_finite(shown, where))


def _first_bad_step(backend: Backend, x_v: Floats, tables: Tables) -> int:
    """Find the step, from 1 on, by bisection: a chain that left the finite numbers stays so."""
    good, bad = 0, tables.steps
    while bad - good > 1:
        middle = (good + bad) // 2
        logits, _ = backend.refine(x_v, tables.first_steps(middle))
        good, bad = (middle, bad) if np.isfinite(logits).all() else (good, middle)
    return bad


def _not_finite(names: Sequence[str], where: str, what: str = "logits") -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"the {what} of {shown} hold NaN or infinity, {where}; expected finite numbers: check the "
        "pixels for NaN if they were made elsewhere, else export the bundle again with "
        "--precision fp32"
    )
