"""Torch on a GPU: encoder, reverse loop and head of a shape captured as one CUDA graph.

For both backends that run with torch. A batch is copied in, the graph is replayed once, and logits
and features are copied out, with one wait. Graphs are captured for the batches in `BUCKETS`; other
batches are padded and split by `marnet_sdk.gpu.captured`. The graphs are those of
`marnet_sdk.gpu.torch_programs`.

Inside, the loop is either the operators of the bundle's own graph, or, where the bundle computes in
16 bits and its loop is MARNet's, the persistent kernel of `marnet_kernels` between the two halves
of the graph. `RuntimeReport.loop` says which, and why.
Axes: B batch, K noise samples, S steps, R row of the table, H hidden.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from marnet_sdk.backends import DeviceRows, RuntimeReport, TextEncoder
from marnet_sdk.errors import InvalidInput, one_line
from marnet_sdk.gpu.captured import (
    MOST_LANES,
    Answer,
    CapturedPipeline,
    Loops,
    Program,
    Shape,
    report,
)
from marnet_sdk.gpu.persistent_loop import LoopWeights
from marnet_sdk.gpu.torch_programs import (
    MakeKernel,
    Model,
    Parts,
    TorchKernels,
    TorchLane,
    TorchProgram,
)
from marnet_sdk.gpu.torch_stream import Cuda, Rows, exact_float32
from marnet_sdk.noise.tables import Floats, Integers, Tables

# One image as it comes, and batches up to the 64 that `predict` makes when it is not told another
# number. Between them, padding at most doubles a batch, and each graph costs memory.
BUCKETS = (1, 8, 16, 32, 64)


def loop_parts(refine: Any, compute: str) -> Parts | str:
    """The parts of a loaded refine.pt, which is not frozen; or why it has none to take."""
    step: Any = getattr(getattr(refine, "loop", None), "step", None)
    names = ("condition", "hidden2", "hidden3", "carry", "output", "slope")
    if not hasattr(refine, "head") or not all(hasattr(step, name) for name in names):
        return "the bundle's loop is not that of MARNet's plan"
    if hasattr(getattr(step, "input", None), "matrix"):
        return "the bundle's loop carries the feature and not the hidden state"
    if step.carry.matrix.shape[0] > step.carry.matrix.shape[1]:
        return "the bundle's denoiser is progressive, and the persistent kernel feeds nothing back"
    if hasattr(getattr(step, "into_start", None), "matrix"):
        return "the bundle's chain starts from what stage 1 left, the persistent kernel from noise"
    if compute not in ("fp16", "bf16"):
        return f"the persistent kernel multiplies in fp16 or bf16, the bundle in {compute}"

    def array(tensor: Any) -> Floats:
        return tensor.detach().float().cpu().numpy()

    layers = {"hidden2": step.hidden2, "hidden3": step.hidden3, "carry": step.carry}
    return Parts(
        condition=step.condition,
        finish=lambda x_v, h3: refine.head(x_v, step.output(h3)),
        weights=LoopWeights(
            matrices={name: array(layer.matrix) for name, layer in layers.items()},
            biases={name: array(layers[name].bias) for name in ("hidden2", "hidden3")},
            slope=float(step.slope),
            operand=compute,
        ),
    )


class TorchOnCuda:
    """A `Backend` that runs a model of torch on a GPU."""

    def __init__(
        self,
        model: Model,
        make_gpu: Callable[[], Cuda] = Cuda,
        *,
        buckets: Sequence[int] = BUCKETS,
        make_kernel: MakeKernel | None = None,
    ) -> None:
        """Make the lanes.

        Args:
            make_gpu: makes a stream; called once for each lane.
            make_kernel: makes the loop's kernel for a shape, or raises, saying why it cannot.
                None: the one of `marnet_kernels`.
        """
        self._model, self._make_kernel = model, make_kernel or TorchKernels()
        self._lanes = [TorchLane(make_gpu()) for _ in range(MOST_LANES)]
        self._live: Counter[tuple[Shape, int]] = Counter()  # programs of a shape in a lane
        self._sizes: tuple[int, ...] | None = None
        self._loops = Loops("batches of {}")
        self._pipeline = CapturedPipeline(self._capture, self._run_plainly, buckets)

    def encode(self, pixels: Any) -> Floats:
        with self._lanes[0].taken(pixels) as gpu, exact_float32():
            return gpu.download(self._model.encode(_on_device(gpu, pixels)))

    def refine(self, x_v: Floats, tables: Tables) -> Answer:
        with self._lanes[0].taken() as gpu, exact_float32():
            given = map(gpu.upload, (x_v, tables.coefficients, tables.bias))
            logits, features = self._model.refine(*given)
            return gpu.download(logits), gpu.download(features)

    def run(self, pixels: Any, tables: Tables) -> Answer:
        shape = tables.bias.shape
        if len(shape) != 4 or tables.coefficients.shape != (shape[0], 3):
            raise InvalidInput(
                f"got tables {tables.coefficients.shape} and {shape}, expected [steps, 3] and "
                "[steps, 1 or images, samples, width]; make them with make_tables"
            )
        sizes = (*pixels.shape[1:], shape[-1])
        self._sizes = self._sizes or sizes
        if sizes != self._sizes:
            raise InvalidInput(
                f"got images and tables of sizes {sizes} (channels, height, width, table), expected"
                f" {self._sizes}, as in the first call; open the bundle again for others"
            )
        return self._pipeline(pixels, tables)

    def device_rows(self, array: Any) -> DeviceRows:
        """Take a caller's array on the GPU.

        Raises:
            InvalidInput: not float32 [B, 3, height, width] in the memory of this backend's GPU.
        """
        import torch

        device = self._lanes[0].gpu.device
        try:
            tensor = array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)
        except (AttributeError, TypeError, RuntimeError, BufferError) as error:
            raise InvalidInput(
                f"got {type(array).__name__}, which torch cannot read ({one_line(error)}); "
                "pass an array that has __dlpack__, or a NumPy array"
            ) from error
        if tensor.device != device or tensor.dtype != torch.float32 or tensor.ndim != 4:
            raise InvalidInput(
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
                f"torch.float32 [B, 3, height, width] on {device}"
            )
        return Rows(tensor.detach().contiguous())

    def report(self) -> RuntimeReport:
        counts, programs = self._pipeline.report(), self._pipeline.programs()
        own = [program for program in programs if isinstance(program, TorchProgram)]
        memory = {
            "images and answers": sum(program.nbytes for program in own),
            "tables": sum(lane.table_bytes() for lane in self._lanes),
            "persistent kernel": sum((p.kernel_nbytes for p in own), self._make_kernel.nbytes),
            "torch, all of this process": self._lanes[0].gpu.reserved(),
        }
        return report(
            counts,
            device=self._lanes[0].gpu.name,
            loop=self._loop(),
            buckets=self._pipeline.buckets,
            memory=memory,
        )

    def _loop(self) -> str:
        parts = self._model.parts
        nothing = "nothing is captured yet" + (f"; {parts}" if isinstance(parts, str) else "")
        return str(self._loops) or nothing

    def _run_plainly(self, pixels: Any, tables: Tables) -> Answer:
        with self._lanes[0].taken(pixels) as gpu, exact_float32():
            x_v = self._model.encode(_on_device(gpu, pixels))
            arrays = map(gpu.upload, (tables.coefficients, tables.bias))
            logits, features = self._model.refine(x_v, *arrays)
            return gpu.download(logits), gpu.download(features)

    def _capture(self, shape: Shape) -> Program:
        """Capture with the persistent kernel where it can run, else with the bundle's own loop."""
        # Programs of one shape go to different streams, so that they can run at the same time.
        number = min(range(len(self._lanes)), key=lambda i: self._live[shape, i])
        self._live[shape, number] += 1
        try:
            program = self._capture_in(self._lanes[number], shape)
        except BaseException:
            self._live[shape, number] -= 1
            raise
        weakref.finalize(program, self._live.subtract, [(shape, number)])
        return program

    def _capture_in(self, lane: TorchLane, shape: Shape) -> Program:
        assert self._sizes is not None
        program = partial(TorchProgram, lane, self._model, shape, self._sizes)
        with lane.taken() as gpu, exact_float32():

            def with_kernel(parts: Parts) -> tuple[Program, str]:
                kernel = self._make_kernel(parts, shape, gpu)
                return program(kernel), kernel.description

            parts = self._model.parts
            kernel = parts if isinstance(parts, str) else partial(with_kernel, parts)
            return self._loops.capture(shape.batch, kernel, partial(program, None))


def _on_device(gpu: Cuda, pixels: Any) -> Any:
    return pixels.tensor if isinstance(pixels, Rows) else gpu.upload(pixels)


def plain_text(module: Callable[[Any, Any], Any], gpu: Cuda | None = None) -> TextEncoder:
    """A text encoder on the GPU, which is not captured: texts have any length.

    Args:
        module: ids and mask [B, L] -> x_s [B, D_s], as tensors on the device.
    """
    lane = TorchLane(gpu or Cuda())

    def encode(ids: Integers, mask: Integers) -> Floats:
        with lane.taken() as gpu, exact_float32():
            return gpu.download(module(gpu.upload(ids), gpu.upload(mask)))

    return encode
