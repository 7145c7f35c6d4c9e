"""Measure the way from photographs to pixels: resizing and normalising on the GPU and on the CPU,
and decoding.

What every way gives is held to Pillow's answer, in grey levels: the model was trained on that.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gpu_sections.measure import Job, Machine
from gpu_sections.models import photographs, preprocessing
from marnet_sdk.inputs.images import decode
from marnet_sdk.inputs.preprocess import Preprocess

BATCH, SIZE = 64, (640, 480)  # photographs, and their width and height
TINY_BATCH, TINY_SIZE = 2, (40, 30)
QUALITY = 90  # of the JPEG files
INTERPOLATE = "torch interpolate, antialias"


def run(job: Job) -> None:
    """Resizing first, then decoding."""
    batch, size = (TINY_BATCH, TINY_SIZE) if job.tiny else (BATCH, SIZE)
    pictures, preprocess = photographs(batch, *size), preprocessing(tiny=job.tiny)
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        if not job.was_measured(line=INTERPOLATE):
            with job.attempt("preprocess"):
                _resizing(job, pictures, preprocess, pool, threads)
        with job.attempt("JPEG"):
            _decoding(job, pictures, pool, threads)


# --- resizing and normalising


def _resizing(
    job: Job,
    pictures: list[Image.Image],
    preprocess: Preprocess,
    pool: ThreadPoolExecutor,
    threads: int,
) -> None:
    arrays = [np.asarray(picture) for picture in pictures]
    wanted = torch.from_numpy(np.stack([preprocess(picture) for picture in pictures]))
    grey = preprocess.rescale_factor / min(preprocess.std)
    calls: dict[str, Callable[[], Any]] = {}
    errors = {}
    ways = dict(_on_device(job.machine, arrays, preprocess))
    on_host = f"Pillow and table look-up, {threads} threads"
    ways[on_host] = lambda: partial(_on_host, pictures, preprocess, pool)
    for name, prepare in ways.items():
        if job.was_lost(name, batch=len(pictures)):
            continue
        with job.attempt(name, batch=len(pictures)):
            call = prepare() if name == on_host else job.machine.capture(prepare())
            difference = (call().float().cpu() - wanted).abs().max()
            errors[name] = {"grey_levels": round(float(difference) / grey, 3), "against": "Pillow"}
            calls[name] = call
    keys = {"batch": len(pictures), "size": f"{pictures[0].width}x{pictures[0].height}"}
    if job.was_lost("timing", **keys):
        return
    with job.attempt("timing", **keys):
        here = {name: calls.pop(name) for name in (on_host,) if name in calls}
        slow = job.wall(here, 2.0) if here else {}
        fast = job.measure(calls, 3.0) if calls else {}
        for name, taken in (fast | slow).items():
            rates = 1e3 * len(pictures) / taken
            job.add(name, rates, "images/s", errors[name], **keys)


def _on_host(
    pictures: list[Image.Image], preprocess: Preprocess, pool: ThreadPoolExecutor
) -> Tensor:
    return torch.from_numpy(np.stack(list(pool.map(preprocess, pictures))))


def _on_device(
    machine: Machine, arrays: list[NDArray[np.uint8]], preprocess: Preprocess
) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    """Names, and what makes each ready; the photographs lie on the device."""
    yield INTERPOLATE, partial(_interpolate, machine, arrays, preprocess)
    yield "torchvision resize, antialias", partial(_torchvision, machine, arrays, preprocess)


def _planes(machine: Machine, arrays: list[NDArray[np.uint8]]) -> Tensor:
    """Copy arrays to the device as uint8 [B, 3, h, w]."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(machine.device)


def _normaliser(machine: Machine, preprocess: Preprocess) -> Callable[[Tensor], Tensor]:
    """Grey levels [B, 3, H, W], rounded as bytes are -> pixels."""
    mean, std = (
        torch.tensor(values, device=machine.device)[:, None, None]
        for values in (preprocess.mean, preprocess.std)
    )
    return lambda grey: (grey.float() * preprocess.rescale_factor - mean) / std


def _interpolate(
    machine: Machine, arrays: list[NDArray[np.uint8]], preprocess: Preprocess
) -> Callable[[], Tensor]:
    source, size = _planes(machine, arrays), list(preprocess.output_shape[1:])
    normalise = _normaliser(machine, preprocess)

    def call() -> Tensor:
        resized = F.interpolate(source.float(), size, mode="bilinear", antialias=True)
        return normalise(resized.round())

    return call


def _torchvision(
    machine: Machine, arrays: list[NDArray[np.uint8]], preprocess: Preprocess
) -> Callable[[], Tensor]:
    from torchvision.transforms.v2 import functional  # pyright: ignore[reportMissingImports]

    source, size = _planes(machine, arrays), list(preprocess.output_shape[1:])
    normalise = _normaliser(machine, preprocess)
    return lambda: normalise(functional.resize(source, size, antialias=True))


# --- decoding


def _decoding(
    job: Job, pictures: list[Image.Image], pool: ThreadPoolExecutor, threads: int
) -> None:
    files = [_jpeg(picture) for picture in pictures]
    wanted = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    ways: dict[str, Callable[[], list[Image.Image]]] = {
        "JPEG decoding, 1 thread": lambda: [decode(file) for file in files],
        f"JPEG decoding, {threads} threads": lambda: list(pool.map(decode, files)),
    }
    keys = {"batch": len(files), "size": f"{pictures[0].width}x{pictures[0].height}"}
    mean_bytes = round(sum(map(len, files)) / len(files))
    for name, taken in job.wall(ways, 3.0).items():
        found = map(np.asarray, ways[name]())
        equal = all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        rates = 1e3 * len(files) / taken
        fidelity = {"equal": equal, "against": "Pillow, one at a time"}
        job.add(name, rates, "images/s", fidelity, **keys, file_bytes=mean_bytes)


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
