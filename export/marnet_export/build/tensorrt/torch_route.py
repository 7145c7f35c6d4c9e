"""A second route to the encoder's TensorRT engine: torch-tensorrt, where that can be imported.

The default route, through ONNX, builds everything. This one converts the encoder's aten graph,
operator by operator, for models that TensorRT does badly with as an ONNX file. It is for the
encoder alone: torch-tensorrt has no scan, so the reverse loop stays on the ONNX route, and so does
the text encoder. It builds with standard TensorRT, for the GPU that is there. The ONNX file is
written all the same: it is what the receipt is read from, and what engines are rebuilt from.

torch-tensorrt 2.13 cannot be imported without a GPU, so that what it builds has not been run yet;
its functions and their arguments are those of the 2.13.0 wheel.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from marnet_export.build.tracing import quiet
from marnet_export.lower.modules import OneType
from marnet_sdk.errors import BackendUnavailable, ExportError, MissingExtra

NAME, RTX = "torch-tensorrt", "torch-tensorrt-rtx"
_OLDEST = (2, 13)  # before, engines had the types that a setting named, not those of the module
_INSTEAD = "use the ONNX route, which is the default"


def load_torch_tensorrt() -> ModuleType:
    """The package torch_tensorrt.

    Raises:
        MissingExtra: it is not installed.
        BackendUnavailable: it is, but cannot be imported here, is too old, or is the one for
            TensorRT-RTX.
    """
    if _is_installed(RTX):  # once imported, it poses as standard TensorRT to all that import that
        raise BackendUnavailable(
            f"{RTX} is installed, expected {NAME}: for engines of TensorRT-RTX, {_INSTEAD}"
        )
    try:
        with _silent():
            module = import_module("torch_tensorrt")
            version = module.__version__
            module.dynamo.convert_exported_program_to_serialized_trt_engine  # noqa: B018
    except Exception as error:  # it raises AssertionError and bare Exception, too
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_tensorrt":
            raise MissingExtra(
                f'{NAME} is not installed; run: pip install "marnet[{NAME}]", or {_INSTEAD}'
            ) from error
        raise BackendUnavailable(
            f"{NAME} is installed but cannot be imported here ({_first_line(error)}); it needs a "
            f"GPU, torch with CUDA and the TensorRT it was built for; or {_INSTEAD}"
        ) from error
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise BackendUnavailable(
            f"{NAME} {version} is installed, expected {oldest} or newer, whose engines have the "
            f"types of the model; run: pip install --upgrade {NAME}, or {_INSTEAD}"
        )
    return module


def encoder_engine(
    module: nn.Module, pixels: Tensor, buckets: Sequence[int], compute: torch.dtype
) -> bytes:
    """An engine of one profile, from one image to the largest bucket, with tensors pixels and
    output0.

    Args:
        module: pixels [B, 3, H, W] -> x_v [B, D_v], as `with_compute` makes it: an engine has
            the types of its module. pixels: an example, B >= 2. compute: for the products of
            activations, as in attention, which have no module.
    """
    package, most = load_torch_tensorrt(), max(buckets)
    sizes = {"min_shape": 1, "opt_shape": min(8, most), "max_shape": most}
    shapes = {name: (size, *pixels.shape[1:]) for name, size in sizes.items()}
    try:
        with _silent():
            return bytes(
                package.dynamo.convert_exported_program_to_serialized_trt_engine(
                    export_program(module, pixels, compute),
                    arg_inputs=[package.Input(**shapes, dtype=torch.float32)],
                    disable_tf32=True,  # it keeps ten bits of float32's twenty-three
                    # Not every GPU has a fused kernel for attention in float32; several will do.
                    decompose_attention=compute == torch.float32,
                )
            )
    except Exception as error:  # whatever its converters raise
        raise ExportError(
            f"{NAME} {package.__version__} cannot build the encoder ({_first_line(error)}); "
            f"{_INSTEAD}"
        ) from error


def export_program(
    module: nn.Module, pixels: Tensor, compute: torch.dtype
) -> torch.export.ExportedProgram:
    """The encoder with a free batch, on the GPU, every product in `compute`."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    with torch.no_grad(), _Typed(compute):
        return torch.export.export(
            _Encoder(module).to(place).eval(),
            (pixels.to(place),),
            dynamic_shapes=({0: batch},),
            strict=False,
        )


class _Encoder(nn.Module):
    """Gives the input its name: that of an argument becomes that of the engine's tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixels: Tensor) -> Tensor:
        return self.module(pixels)


class _Typed(OneType):
    """Products of float32 activations have factors in `compute` and a result in float32, as
    `typed_onnx.type_products` has it."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in self.PRODUCTS or args[0].dtype != torch.float32:
            return function(*args, **kwargs)
        named = {name: self.cast(value) for name, value in kwargs.items()}
        return function(*map(self.cast, args), **named).float()


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no reason is given"]
    return f"{type(error).__name__}: {lines[0][:300]}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """It prints why it cannot be imported, and logs tracebacks of what it then raises."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
