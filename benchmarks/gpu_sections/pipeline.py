"""The whole pipeline, pixels on the device to logits: ViT-B/16 and the paper's loop of 100 steps.

Latency is what a caller waits, on the host's clock, one batch at a time. Every form answers the
same pictures, and its labels are held to those of the float32 model. The encoder's own rate stands
beside what a plain matrix product of its type reaches on the same card.
Axes: B batch, C classes.
"""

from __future__ import annotations

import copy
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor, nn

from gpu_sections import ceilings
from gpu_sections.measure import NO_DEVICE, Job, Machine, compiled, reason
from gpu_sections.models import (
    TINY_VIT,
    VIT,
    PlainSteps,
    crops,
    make_model,
    preprocessing,
    spread_out,
)
from marnet_bench.plain_loop import PlainLoop, make_problem
from marnet_export.build.builder import Order, builder
from marnet_export.build.types import TORCH_TYPES, Types
from marnet_export.lower.class_token import for_class_token
from marnet_export.lower.methods import lower_marnet
from marnet_export.lower.modules import Head, with_compute, with_rounded_results
from marnet_sdk.bundle import (
    GOLDEN_ANSWERS,
    GOLDEN_IMAGES,
    PAYLOAD,
    PLAN,
    BuiltFor,
    OperatingPoint,
    Precision,
    Sampling,
    seal_bundle,
)
from marnet_sdk.classifier import Classifier
from marnet_sdk.environment import versions
from marnet_sdk.gpu.tensorrt_library import RTX, STANDARD, load_library
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.models.marnet import MARNet

BATCHES, TINY_BATCHES = (1, 64, 256), (1, 2)
STEPS, TINY_STEPS = 100, 4
CHECKED, TINY_CHECKED = 256, 8  # pictures whose labels are compared
GOLDEN = 4
EAGER, ENCODER = "torch eager", "encoder, plain torch in a CUDA graph"  # measured in every run
_SECONDS = 4.0  # for all forms at one batch
_COMPILATION = 60.0  # seconds that torch.compile may need for one encoder
_TOLERANCE = 0.1  # of golden logits, relative: fidelity is measured, and not asked for here

Answer = Callable[[Tensor], Any]  # pixels [B, 3, H, W] on the device -> logits [B, C]


def run(job: Job) -> None:
    """Every form in both types, at every batch."""
    setup = _set_up(job)
    for precision in ("fp16", "bf16"):
        if not job.was_measured(line=ENCODER, precision=precision):
            with job.attempt("encoder", precision=precision), torch.no_grad():
                _encoder_rates(job, setup, precision)
        batches = [
            batch
            for batch in (TINY_BATCHES if job.tiny else BATCHES)
            if not job.was_measured(line=EAGER, precision=precision, batch=batch)
            and not job.was_lost("timing", precision=precision, batch=batch)
        ]
        with ExitStack() as stack, torch.no_grad():
            opened = list(_open(job, setup, precision, stack)) if batches else []
            for batch in batches:
                job.say(f"  pipeline: {precision}, batch {batch}")
                _measure(job, setup, opened, precision, batch)


class Setup(NamedTuple):
    """The model, what it is asked, and what it should answer."""

    model: MARNet
    steps: int
    pictures: list[Image.Image]
    pixels: Tensor  # [N, 3, H, W] on the device
    wanted: Tensor  # [N, C], of the float32 model
    on_host: np.ndarray  # the pixels again
    preprocess: Preprocess


def _set_up(job: Job) -> Setup:
    steps, count = (TINY_STEPS, TINY_CHECKED) if job.tiny else (STEPS, CHECKED)
    model = make_model(TINY_VIT if job.tiny else VIT, steps, tiny=job.tiny)
    preprocess = preprocessing(tiny=job.tiny)
    pictures = crops(count, preprocess.output_shape[1])
    on_host = preprocess.pixels(pictures)
    pixels = torch.from_numpy(on_host).to(job.machine.device)
    with torch.no_grad():
        here = copy.deepcopy(model).to(job.machine.device)
        spread_out(here, pixels[: len(pixels) // 2])
        x_v = torch.cat([here.vision(part) for part in pixels.split(64)])
        problem = make_problem(model, "ddpm", steps)
        initial, noise = (t.to(job.machine.device) for t in (problem.initial, problem.noise))
        x_cdr = here.refine(x_v, problem.table, initial.expand(len(x_v), -1), noise)
        logits = here.head(x_v, x_cdr)[0]
        shared = logits.mean(dim=0)  # without it, fresh weights call all pictures the same
        here.classifier.bias.sub_(shared)
        wanted = (logits - shared).cpu()
        model.load_state_dict(here.state_dict())
    return Setup(model, steps, pictures, pixels, wanted, on_host, preprocess)


def _measure(job: Job, setup: Setup, opened: list[Form], precision: str, batch: int) -> None:
    """All forms at one batch, in turn."""
    keys = {"batch": batch, "precision": precision}
    pixels = setup.pixels[:batch].clone()
    calls: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    runtimes = {form.name: form.runtime for form in opened}
    for name, prepare, _ in opened:
        if job.left() < 5 and not job.tiny:
            job.miss(name, "no time is left", **keys)
            continue
        if job.was_lost(name, **keys):
            continue
        with job.attempt(name, **keys):
            call = prepare(pixels)
            found[name] = _fidelity(call, pixels, setup)
            calls[name] = call
    with job.attempt("timing", **keys):
        for name, taken in job.wall(calls, _SECONDS).items():
            rate = float(f"{1e3 * batch / np.median(taken):.4g}")
            more = keys | {"images_per_s": rate} | runtimes[name]()
            job.add(name, taken, "ms", found[name], **more)


def _fidelity(call: Callable[[], Any], pixels: Tensor, setup: Setup) -> dict[str, Any]:
    """Labels and logits of as many pictures as whole batches hold (at most 16 batches)."""
    batch = len(pixels)
    count = min(len(setup.pixels) // batch, 16) * batch
    answers = []
    for start in range(0, count, batch):
        pixels.copy_(setup.pixels[start : start + batch])
        answers.append(torch.as_tensor(call()).detach().float().cpu().clone())
    got, wanted = torch.cat(answers), setup.wanted[:count]
    largest = wanted.abs().max()
    return {
        "agreement": float((got.argmax(dim=1) == wanted.argmax(dim=1)).double().mean()),
        "relative_error": float((got - wanted).abs().max() / largest),
        "against": "float32",
        "pictures": count,
        "labels": len(wanted.argmax(dim=1).unique()),
    }


# --- the forms


class Form(NamedTuple):
    """One way from pixels to logits."""

    name: str
    prepare: Callable[[Tensor], Callable[[], Any]]  # pixels that stay where they are -> the call
    runtime: Callable[[], dict[str, Any]] = dict  # how it ran, for its line


def _open(job: Job, setup: Setup, precision: str, stack: ExitStack) -> Iterator[Form]:
    machine, graph = job.machine, job.machine.capture
    plain = _plain(machine, setup, TORCH_TYPES[precision])
    yield Form(EAGER, lambda pixels: partial(plain, pixels))
    yield Form("CUDA graph of plain torch", lambda pixels: graph(partial(plain, pixels)))
    yield Form(
        "torch.compile, in a CUDA graph",
        lambda pixels: graph(partial(_compiled(job, setup, precision), pixels)),
    )
    for backend in job.backends:
        name = f"marnet {backend}"
        if job.was_lost(name, precision=precision):
            continue
        with job.attempt(name, precision=precision):
            if backend == "tensorrt" and (why := _no_tensorrt(machine)):
                job.miss(name, why, precision=precision)
                continue
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "suite.marnet"
            yield _open_bundle(machine, setup, backend, precision, folder)


def _plain(machine: Machine, setup: Setup, dtype: torch.dtype) -> Answer:
    """Encoder and denoiser in `dtype`, state and head in float32, operator by operator."""
    encoder = copy.deepcopy(setup.model.vision).to(machine.device, dtype)
    return partial(_answer, encoder, *_loop_and_head(machine, setup, dtype), None)


def _loop_and_head(machine: Machine, setup: Setup, dtype: torch.dtype) -> tuple[PlainSteps, Head]:
    problem = make_problem(setup.model, "ddpm", setup.steps)
    loop = PlainLoop(problem, dtype).eval().to(machine.device)
    return PlainSteps(loop), Head(setup.model).eval().to(machine.device)


def _answer(encoder: Any, loop: PlainSteps, head: Head, step: Any, pixels: Tensor) -> Tensor:
    x_v = encoder(pixels.to(loop.plain.tau.dtype)).float()
    return head(x_v, loop(x_v, step)[:, None])[0][:, 0]


def _compiled(job: Job, setup: Setup, precision: str) -> Answer:
    """Return the plain pipeline with the encoder and a step through torch.compile.

    Raises:
        RuntimeError: there is no time left to compile it.
    """
    if not job.tiny and job.left() < _COMPILATION:
        raise RuntimeError(f"{job.left():.0f} s are left, and compiling may take {_COMPILATION:g}")
    dtype = TORCH_TYPES[precision]
    encoder = copy.deepcopy(setup.model.vision).to(job.machine.device, dtype)
    loop, head = _loop_and_head(job.machine, setup, dtype)
    encoder, step = compiled(job.machine, encoder), compiled(job.machine, loop.plain.step)
    return partial(_answer, encoder, loop, head, step)


def _no_tensorrt(machine: Machine) -> str | None:
    if not machine.is_cuda:
        return NO_DEVICE
    for flavour in (RTX, STANDARD):
        try:
            load_library(flavour)
            import_module("onnx")  # which builds the graphs of its engines
            return None
        except Exception as error:  # whatever keeps them from being imported
            why = reason(error)
    return why


# --- a bundle, made on the spot


def _open_bundle(
    machine: Machine, setup: Setup, backend: str, precision: str, folder: Path
) -> Form:
    """Build a bundle and open it as a deployed process does.

    Pixels are passed where they lie; logits come back on the host.
    """
    device = machine.device.type
    write_bundle(setup, backend, precision, folder, device)
    classifier = Classifier(folder, device=device)

    def prepare(pixels: Tensor) -> Callable[[], Any]:
        return partial(classifier.logits, pixels if machine.is_cuda else pixels.numpy())

    def runtime() -> dict[str, Any]:
        return {"runtime": asdict(classifier.runtime)} if classifier.runtime else {}

    return Form(f"marnet {backend}", prepare, runtime)


def write_bundle(setup: Setup, backend: str, precision: str, folder: Path, device: str) -> None:
    """A bundle as `marnet-export` writes one, but for what no measurement reads."""
    builds, lowered = builder(backend), lower_marnet(setup.model)
    types = Types(precision, precision if device == "cuda" else "fp32")
    payload = folder / PAYLOAD
    payload.mkdir(parents=True)
    example = torch.from_numpy(setup.on_host[:2])
    order = Order(device)
    builds.build_encoder(lowered, example, types, payload, order)
    builds.build_refine(lowered, types, payload, order)
    table = make_problem(setup.model, "ddpm", setup.steps).table
    save_file(lowered.plan.tensors({"default": table}), folder / PLAN)
    rows = _clear_rows(setup.wanted)
    _write_golden(folder, setup, rows)
    point = OperatingPoint(table.sampler, table.eta, table.timesteps, 1, None)
    width = setup.model.denoiser.dim
    packages = versions(("torch", "transformers", "numpy", backend))
    seal_bundle(
        folder,
        {
            "method": "marnet",
            "labels": setup.model.config.labels,
            "preprocess": setup.preprocess.to_dict(),
            "backend": backend,
            "precision": Precision(types.storage, types.storage, types.compute, {}),
            "sampling": Sampling(
                {"default": point}, "default", table.train_steps, "shared", 0, width
            ),
            "buckets": builds.buckets,
            "golden_tolerance": _TOLERANCE,
            "built_for": BuiltFor(device, platform.machine(), packages),
            "settings": {},
            "checkpoint_sha256": "",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def _clear_rows(logits: Tensor) -> list[int]:
    """The pictures whose labels are the least in doubt."""
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    return (first - second).argsort(descending=True)[:GOLDEN].tolist()


def _write_golden(folder: Path, setup: Setup, rows: list[int]) -> None:
    (folder / GOLDEN_IMAGES).mkdir(parents=True)
    for i, row in enumerate(rows):
        setup.pictures[row].save(folder / GOLDEN_IMAGES / f"{i}.png")
    answers = {"pixels": setup.on_host[rows], "logits": setup.wanted[rows].numpy()}
    save_file(
        {k: np.ascontiguousarray(v, np.float32) for k, v in answers.items()},
        folder / GOLDEN_ANSWERS,
    )


# --- the encoder alone


def _encoder_rates(job: Job, setup: Setup, precision: str) -> None:
    """Its multiply-adds a second at batch 64, as a share of the matrix rate of the same minute."""
    machine, dtype = job.machine, TORCH_TYPES[precision]
    batch, side = (2, 64) if job.tiny else (64, ceilings.SIDE)
    pixels = setup.pixels[:batch].clone()
    wanted = _features(setup.model.vision, pixels)
    plain = copy.deepcopy(setup.model.vision).to(machine.device, dtype)
    encoder = for_class_token(setup.model.vision)
    exported = with_rounded_results(encoder, dtype).eval().to(machine.device)
    careful = with_compute(encoder, dtype).eval().to(machine.device)
    forms = {
        ENCODER: lambda: plain(pixels.to(dtype)).float(),
        "encoder as exported (float32 norms and sums), in a CUDA graph": lambda: exported(pixels),
        "encoder, float32 between products, in a CUDA graph": lambda: careful(pixels),
    }
    calls: dict[str, Callable[[], Any]] = {}
    errors = {}
    for name, call in forms.items():
        if job.was_lost(name, precision=precision, batch=batch):
            continue
        with job.attempt(name, precision=precision, batch=batch):
            calls[name] = machine.capture(call)
            difference = (calls[name]().float().cpu() - wanted).abs().max() / wanted.abs().max()
            errors[name] = {"relative_error": float(difference), "against": "float32"}
    calls["product"] = ceilings.matrix_product(machine, dtype, side)[0]
    if job.was_lost("encoder: timing", precision=precision):
        return
    with job.attempt("encoder: timing", precision=precision):
        taken = job.measure(calls, 2.0)
        best = side**3 / float(np.median(taken.pop("product")))
        for name, values in taken.items():
            work = batch * vit_multiply_adds(setup.model, for_class_token=name != ENCODER)
            share = round(work / float(np.median(values)) / best, 4)
            keys = {"precision": precision, "batch": batch, "share_of_matrix_rate": share}
            job.add(name, values, "ms", errors[name], **keys, multiply_adds=work)


def _features(encoder: nn.Module, pixels: Tensor) -> Tensor:
    return copy.deepcopy(encoder).to(pixels.device)(pixels).cpu()


def vit_multiply_adds(model: MARNet, *, for_class_token: bool) -> int:
    """Count the multiply-adds of a ViT for one image: patches, projections, attention and MLPs.

    Args:
        for_class_token: of the last layer, only what that needs.
    """
    c: Any = model.vision.backbone.config
    patches = (c.image_size // c.patch_size) ** 2
    tokens, width = patches + 1, c.hidden_size
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * c.intermediate_size
    unread = patches * (2 * width**2 + 2 * tokens * width + 2 * width * c.intermediate_size)
    layers = c.num_hidden_layers * layer - for_class_token * unread
    return patches * width * c.num_channels * c.patch_size**2 + layers
