"""AOTInductor: torch.export programs, compiled to machine code for the processor of this machine,
or for its GPU.

The loop is torch's `scan`, which becomes one loop of any length. The table of noise comes as it is
and with the row of each image, so that one row for all images is looked up and not copied.
Matrices that are stored in another type than they are multiplied in are cast by a graph of its own,
which runs once when the code is loaded (inductor's runtime constant folding).
"""

from __future__ import annotations

import copy
import io
import json
import logging
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marnet_export.build.builder import USUAL, Builder, Order
from marnet_export.build.tracing import (
    Signature,
    encoder_signature,
    most_tokens,
    text_signature,
    tracing,
)
from marnet_export.build.types import TORCH_TYPES, Product, Types, Unread
from marnet_export.lower.methods import Lowered
from marnet_export.lower.modules import ScanLoop, Step, on_device
from marnet_sdk.backends.aotinductor import (
    CPU_FLAGS,
    ENCODER,
    GPU,
    INPUTS,
    LIMITS,
    REFINE,
    STEPS,
    TEXT,
    TORCH,
    host_flags,
    read_metadata,
)
from marnet_sdk.backends.torch_device import gpu_name
from marnet_sdk.errors import BackendUnavailable, ExportError

_OLDEST = (2, 13)  # torch; 2.11 and 2.12 cannot write a `scan` in C++


def targets(payload: Path) -> list[str]:
    """The instruction sets that the code in the payload uses."""
    return read_metadata(payload / ENCODER)[CPU_FLAGS].split()


def build_encoder(
    lowered: Lowered, pixels: Tensor, types: Types, payload: Path, order: Order = USUAL
) -> None:
    """Write payload/encoder.pt2. `pixels` [B, 3, H, W] is the example that is traced, B >= 2.

    Raises:
        BackendUnavailable: this machine has no C++ compiler, or too old a torch.
        ExportError: the compiler failed, or does not store matrices in this type.
    """
    encoder = on_device(lowered.encoder, _compute(types, order.device), order.device, pixels)
    _build(encoder, encoder_signature(pixels), types, payload / ENCODER, device=order.device)


def build_refine(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/refine.pt2; as `build_encoder`."""
    module = _Refine(lowered.step(_compute(types, order.device)), copy.deepcopy(lowered.head))
    image, width = lowered.image_width, lowered.row_width
    table = torch.zeros(4, 7, 5, width)
    inputs = {
        "x_v": (torch.zeros(2, image), ("batch", image)),
        "coefficients": (torch.zeros(4, 3), (STEPS, 3)),
        "bias": (table, (STEPS, "rows", "samples", width)),
        "the last bias": (table[-1].clone(), ("rows", "samples", width)),
        "row": (torch.zeros(2, dtype=torch.int64), ("batch",)),
    }
    signature = Signature(inputs, ("logits", "features"))
    _build(module, signature, types, payload / REFINE, device=order.device)


def build_text(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/text.pt2; as `build_encoder`."""
    assert lowered.text is not None
    signature, compute = text_signature(), _compute(types, order.device)
    encoder = on_device(lowered.text, compute, order.device, *signature.example)
    limits = _text_limits(lowered.text)
    _build(encoder, signature, types, payload / TEXT, limits, order.device)


def _compute(types: Types, device: str) -> torch.dtype:
    computes = BUILDER.computes(device)
    if types.storage not in BUILDER.storage or types.compute not in computes:
        raise ExportError(
            f"aotinductor stores {', '.join(BUILDER.storage)} and computes in "
            f"{' or '.join(computes)}, not {types.storage} and {types.compute}; --backend openvino "
            "has int8"
        )
    return TORCH_TYPES[types.compute]


def _text_limits(text: nn.Module) -> dict[str, int]:
    """The largest token and the longest text, beyond which compiled code would read anything."""
    longest = most_tokens(text)
    for module in text.modules():
        if get := getattr(module, "get_input_embeddings", None):
            limits = {"mask": 1, "ids": get().num_embeddings - 1}
            return limits | ({"length": longest} if longest else {})
    raise ExportError("aotinductor cannot tell how many tokens this text encoder knows")


class _Refine(nn.Module):
    """This is `ScanLoop` and the head; each image says which row of the table is its noise."""

    def __init__(self, step: Step, head: nn.Module) -> None:
        super().__init__()
        self.loop, self.head = ScanLoop(step), head

    def forward(
        self, x_v: Tensor, coefficients: Tensor, bias: Tensor, last: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map x_v [B, D_v], coefficients [S - 1, 3], bias [S - 1, N, K, R] and that of the last
        step [N, K, R], and row [B] to logits [B, K, C] and features [B, K, D_f].
        """
        own = last.index_select(0, row)
        q, state = self.loop.start(x_v, own)
        state = self.loop.repeated(state, q, coefficients, bias, lambda b: b.index_select(0, row))
        logits, fused = self.head(x_v, self.loop.step.finish(state, q, own))
        return logits, fused


class _Stored(nn.Module):
    """A module whose matrices are stored in another type than they are multiplied in."""

    def __init__(self, module: nn.Module, storage: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.types: dict[str, torch.dtype] = {}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(False)
            if parameter.ndim >= 2 and parameter.is_floating_point():
                self.types[name] = parameter.dtype
                parameter.data = parameter.data.to(storage)

    @property
    def casts(self) -> bool:
        stored = dict(self.module.named_parameters())
        return any(stored[name].dtype != wanted for name, wanted in self.types.items())

    def forward(self, *arguments: Tensor) -> Any:
        stored = dict(self.module.named_parameters())
        used = {name: stored[name].to(wanted) for name, wanted in self.types.items()}
        return torch.func.functional_call(self.module, used, arguments)


def _build(
    module: nn.Module,
    signature: Signature,
    types: Types,
    path: Path,
    limits: Mapping[str, int] | None = None,
    device: str = "cpu",
) -> None:
    """Compile `module`, which is changed, and write the package."""
    from torch._inductor import config

    stored = _Stored(module.eval(), TORCH_TYPES[types.storage]).to(device)
    inputs = signature.inputs.items()
    kinds = [[name, str(x.dtype).removeprefix("torch."), sizes] for name, (x, sizes) in inputs]
    example = tuple(tensor.to(device) for tensor in signature.example)
    # Of a module that takes any number of arguments, their shapes come as one tuple.
    shapes = (signature.free(limits),)
    package = io.BytesIO()  # on a full disk, torch's own writer would end the process
    with tracing(), _private_compiler(path):
        program = torch.export.export(stored, example, dynamic_shapes=shapes, strict=False)
        metadata = {
            CPU_FLAGS: " ".join(_code_flags()),
            INPUTS: json.dumps(kinds),
            LIMITS: json.dumps(limits or {}),
            TORCH: torch.__version__,
        }
        if device == "cuda":
            metadata[GPU] = gpu_name()[0]
        settings = _SETTINGS | {"aot_inductor.metadata": metadata}
        settings["aot_inductor.use_runtime_constant_folding"] = stored.casts
        with config.patch(settings):
            torch._inductor.aoti_compile_and_package(program, package_path=package)
    path.write_bytes(package.getbuffer())


_SETTINGS: dict[str, Any] = {
    "cpp.dynamic_threads": True,  # else the number of threads of this process is compiled in
    "cpp.march": "",  # only instruction sets that `_code_flags` names
    "compile_threads": 1,  # in this process: a pool would outlive the call
    "aot_inductor.precompile_headers": False,  # takes longer than it saves in one compilation
}


def _code_flags() -> list[str]:
    """The instruction sets that the compiler may use, as its options name them."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = str(pick_vec_isa().build_arch_flags()).split()
    if any(option.startswith("-march") for option in options):
        return sorted(host_flags())  # whatever this processor has
    return sorted({option.removeprefix("-m") for option in options})


@contextmanager
def _private_compiler(path: Path) -> Iterator[None]:
    """A compiler whose files are gone afterwards; its errors in one line.

    Raises:
        BackendUnavailable: there is none, or this torch cannot use it for a loop.
        ExportError: it failed.
    """
    from torch._inductor import cpp_builder, exc
    from torch._inductor.utils import fresh_cache

    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:
        raise BackendUnavailable(
            f"aotinductor exports with torch {'.'.join(map(str, _OLDEST))} or newer, got "
            f"{torch.__version__}, whose compiler fails at the loop; upgrade torch, or choose "
            "--backend torchscript"
        )
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise BackendUnavailable(
            "aotinductor compiles with g++ when it exports, and there is none here; install g++, "
            "name another compiler in CXX, or choose --backend torchscript"
        ) from error
    logger = logging.getLogger("torch")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # it logs where it left files, which are gone by then
        with tempfile.TemporaryDirectory(prefix="marnet-") as folder, fresh_cache(dir=folder):
            yield
    except (exc.CppCompileError, exc.InductorError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])
        raise ExportError(f"aotinductor could not compile {path.name}: {reason.strip()}") from error
    finally:
        logger.setLevel(level)


# --- the receipt: what the generated code does, read from its source in the package


def products(payload: Path, types: Types, shape: tuple[int, int, int]) -> list[Product]:
    """Every matrix product and convolution that the compiled code calls, for one image.

    Read from the C++ source that torch packs beside the library it was compiled to: the calls into
    torch's kernels with the sizes and types of what they are given, and the types of the constants
    in the library. The weight of a product is the constant of its sizes. "loop" is one step, the
    body of the loop; "head" is all that refine.pt2 does once per image: the condition, the last
    step and the head.

    Args:
        types, shape: not needed; the source says both.

    Raises:
        Unread: the source is not like any that torch was known to write.
    """
    files = ((ENCODER, "encoder"), (REFINE, "head"))
    try:
        return [p for name, once in files for p in _Source(payload / name, once).products]
    except (LookupError, ValueError) as error:
        raise Unread(
            f"the source in {payload} is not as known versions of torch write it, so what was "
            f"built cannot be told: {error!r}"
        ) from error


_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
_CONSTANT = ";.*?".join(
    (
        r'constants_info_\[\d+\]\.name = "(\w+)"',
        r"dtype = cached_torch_dtype_(\w+)",
        r"shape = \{(.*?)\}",
        r'original_fqn = "(.*?)"',
    )
)
_FOLDED = r'folded_constants_map\["(\w+)"\]'  # constants that are made of others
_SIZES = r"int64_t \*?(\w+)(?:\[\] = \{(.*?)\}|=nullptr)"
_EMPTY = r"aoti_torch_empty_strided\(\d+, (\w+), \w+, cached_torch_dtype_(\w+),.*&(\w+)_handle\)"
_VIEW = r"reinterpret_tensor_wrapper\((\w+), \d+, (\w+), \w+, [^()]*\)"
_SAME = (
    r"aoti_torch_(?:assign_tensors_out|new_tensor_handle|clone)\((?P<old>\w+), &(?P<new>\w+)\)",
    r"(?:auto )?(?P<new>\w+) = (?:std::move|RAIIAtenTensorHandle)\((?P<old>\w+)\)",
    r"RAIIAtenTensorHandle (?P<new>\w+)\((?P<old>\w+)_handle\)",
)
_CALL = r"aoti_torch_(?:cpu|cuda)_(\w+)\((.*)\)\);"
_TEMPLATE = (
    r"\bcall_triton_tem_\w+"  # kernels of a GPU from torch's templates, which are for products
)
_PRODUCT = re.compile("mm|linear|conv|attention|dot|gemm|einsum|bilinear|_mv|addr|_rnn|lstm")


@dataclass(frozen=True)
class _Array:
    """A tensor of the generated code."""

    sizes: tuple[int, ...]  # with one image and one sample
    dtype: str


_INPUT = _Array((), "float32")


class _Source:
    """The source of a package, followed line by line."""

    def __init__(self, path: Path, once: str) -> None:
        """Read it; `once` is the part that is not in a loop."""
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("wrapper.cpp"))
            source = archive.read(name).decode()
        self.path, self.once = path, once
        self.products: list[Product] = []  # in the order of execution
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.arrays: dict[str, _Array] = {}
        self.stored: dict[str, _Array] = {}  # by their names in the module
        folded = set(re.findall(_FOLDED, source))
        for name, dtype, shape, fqn in re.findall(_CONSTANT, source, re.DOTALL):
            self.arrays[name] = array = _Array(_numbers(shape), dtype)
            if name not in folded:
                self.stored[fqn.removeprefix("module.")] = array
        for line in source.partition("void AOTInductorModel::run_impl(")[2].splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        if match := re.search(_TEMPLATE, line):
            raise Unread(f"{self.path.name} calls {match[0]}, a product that is not counted yet")
        if match := re.search(_SIZES, line):
            self.sizes[match[1]] = _numbers(match[2] or "")
        elif match := re.search(_EMPTY, line):
            self.arrays[match[3]] = _Array(self.sizes[match[1]], match[2])
        elif match := re.search(_CALL, line):
            self._call(match[1], _arguments(match[2]), looping="while_loop_body" in match[2])
        elif (match := re.search(_VIEW, line)) and (new := re.search(r"auto (\w+) = ", line)):
            self.arrays[new[1]] = self._operand(match[0])
        else:
            for pattern in _SAME:
                if (match := re.search(pattern, line)) and match["old"] in self.arrays:
                    self.arrays[match["new"].removesuffix("_handle")] = self.arrays[match["old"]]

    def _operand(self, text: str) -> _Array:
        """An argument of a call: a name, or a view of one."""
        if match := re.search(_VIEW, text):
            return replace(self.arrays.get(match[1], _INPUT), sizes=self.sizes[match[2]])
        name = re.sub(r"&?temporary_reference\((\w+)\.get\(\)\)", r"\1", text.strip())
        return self.arrays.get(name, _INPUT)

    def _call(self, function: str, arguments: list[str], *, looping: bool) -> None:
        match function:
            case "mm_out" | "addmm_out" | "bmm_out" | "baddbmm_out":
                out = self.arrays[arguments[0].strip()]
                factor = self._operand(arguments[2 if function in ("mm_out", "bmm_out") else 3])
                count = prod(out.sizes) * factor.sizes[-2]
                self._note(function, count, factor, looping, weight=not function.startswith("b"))
            case "convolution":
                image, factor = map(self._operand, arguments[:2])
                spatial = _convolved(image, factor, arguments)
                self._define(arguments[-1], (1, factor.sizes[0], *spatial), factor.dtype)
                count = prod(spatial) * prod(factor.sizes)
                self._note(function, count, factor, looping, weight=True)
            case _ if function.startswith("_scaled_dot_product_"):
                query, key = map(self._operand, arguments[:2])
                # The first of what it gives is the answer; the others are for training.
                handle = next(a for a in arguments if a.strip().endswith("_handle"))
                self._define(handle, query.sizes, query.dtype)
                count = 2 * prod(query.sizes) * key.sizes[-2]
                self._note("attention", count, key, looping, weight=False)
            case _ if _PRODUCT.search(function):
                raise Unread(f"{self.path.name} calls {function}, which is not counted yet")

    def _define(self, handle: str, sizes: tuple[int, ...], dtype: str) -> None:
        name = handle.strip().removeprefix("&").removesuffix("_handle")
        self.arrays[name] = _Array(sizes, dtype)

    def _note(self, name: str, count: int, factor: _Array, looping: bool, *, weight: bool) -> None:
        part, name = "loop" if looping else self.once, f"{name} {len(self.products)}"
        if count <= 0 or factor.dtype not in _TYPES:
            raise Unread(f"{self.path.name}: the sizes of product {name} cannot be read")
        storage = "activation"
        if weight:  # it may be cast or laid out anew on its way to the product
            sizes = sorted(factor.sizes)
            fitting = {k: a.dtype for k, a in self.stored.items() if sorted(a.sizes) == sizes}
            if len(set(fitting.values())) != 1:
                raise Unread(
                    f"{self.path.name}: the weight {list(factor.sizes)} of product {name} cannot "
                    f"be told from {', '.join(fitting) or 'any of its constants'}"
                )
            storage = _TYPES[next(iter(fitting.values()))]
            name = next(iter(fitting)) if len(fitting) == 1 else name
        self.products.append(Product(part, name, count, storage, _TYPES[factor.dtype]))


def _numbers(text: str) -> tuple[int, ...]:
    """Sizes; those that are free are 1."""
    plain = re.sub(r"\b[su]\d+\b", "1", re.sub(r"(\d)L\b", r"\1", text))
    return tuple(_value(term) for term in plain.split(",") if term.strip())


def _value(term: str) -> int:
    total = 0
    for part in term.replace("(", "").replace(")", "").split("+"):
        factors = part.split("*")
        if not all(factor.strip().lstrip("-").isdigit() for factor in factors):
            return 0  # a stride, or a size that nothing we count has; else `_note` refuses
        total += prod(int(factor) for factor in factors)
    return total


def _convolved(image: _Array, weight: _Array, arguments: Sequence[str]) -> list[int]:
    """The sizes of the image that a convolution gives."""
    stride, padding, dilation = (
        _numbers(re.findall(r"\{(.*?)\}", arguments[i])[0]) for i in (3, 5, 7)
    )
    sizes = zip(image.sizes[2:], weight.sizes[2:], stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]


def _arguments(text: str) -> list[str]:
    """The arguments of a call, split at the commas that are in no bracket."""
    depth, found = 0, [""]
    for character in text:
        depth += (character in "({[<") - (character in ")}]>")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found


BUILDER = Builder(
    name="aotinductor",
    storage=("fp32", "bf16", "fp16"),
    compute=("fp32", "bf16"),
    build_encoder=build_encoder,
    build_refine=build_refine,
    build_text=build_text,
    products=products,
    packages=("aotinductor",),
    cuda_compute=("fp32", "bf16", "fp16"),
    targets=targets,
)
