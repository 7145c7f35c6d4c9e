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
from torch._higher_order_ops.scan import scan

from marnet_export.build.builder import USUAL, Builder, Order
from marnet_export.build.tracing import example_texts, quiet
from marnet_export.build.types import TORCH_TYPES, Product, Types, Unread
from marnet_export.lower.methods import Lowered
from marnet_export.lower.modules import Step, on_device
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
from marnet_sdk.gpu.torch_stream import exact_float32

_OLDEST = (2, 13)  # torch; 2.11 and 2.12 cannot write a `scan` in C++
_LARGEST = 1 << 20  # of every size that is free

# What a graph takes: name, example, its sizes in order (an int, or the name of a free one).
Inputs = Sequence[tuple[str, Tensor, Sequence[int | str]]]


def targets(payload: Path) -> list[str]:
    """The instruction sets that the code in the payload uses."""
    return read_metadata(payload / ENCODER)[CPU_FLAGS].split()


def build_encoder(
    lowered: Lowered,
    pixels: Tensor,
    types: Types,
    payload: Path,
    order: Order = USUAL,
) -> None:
    """Write payload/encoder.pt2. `pixels` [B, 3, H, W] is the example that is traced, B >= 2.

    Raises:
        BackendUnavailable: this machine has no C++ compiler, or too old a torch.
        ExportError: the compiler failed, or does not store matrices in this type.
    """
    encoder = on_device(lowered.encoder, _compute(types, order.device), order.device, pixels)
    inputs = [("pixels", pixels, ("batch", *pixels.shape[1:]))]
    _build(encoder, inputs, types, payload / ENCODER, device=order.device)


def build_refine(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/refine.pt2; as `build_encoder`."""
    module = _Refine(lowered.step(_compute(types, order.device)), copy.deepcopy(lowered.head))
    # No size of the example is kept but the widths; each is different, so that none is mistaken.
    x_v, row = torch.zeros(2, lowered.image_width), torch.zeros(2, dtype=torch.int64)
    table, width = torch.zeros(4, 7, 5, lowered.row_width), lowered.row_width
    inputs = [
        ("x_v", x_v, ("batch", lowered.image_width)),
        ("coefficients", torch.zeros(4, 3), (STEPS, 3)),
        ("bias", table, (STEPS, "rows", "samples", width)),
        ("the last bias", table[-1].clone(), ("rows", "samples", width)),
        ("row", row, ("batch",)),
    ]
    _build(module, inputs, types, payload / REFINE, device=order.device)


def build_text(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/text.pt2; as `build_encoder`."""
    assert lowered.text is not None
    ids, mask = example_texts()
    encoder = on_device(lowered.text, _compute(types, order.device), order.device, ids, mask)
    inputs = [("ids", ids, ("batch", "length")), ("mask", mask, ("batch", "length"))]
    _build(encoder, inputs, types, payload / TEXT, _text_limits(lowered.text), order.device)


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
    limits = {"mask": 1}
    for module in text.modules():
        if get := getattr(module, "get_input_embeddings", None):
            limits["ids"] = get().num_embeddings - 1
            longest = getattr(module.config, "max_position_embeddings", None)
            if isinstance(longest, int) and longest > 0:
                limits["length"] = longest
            return limits
    raise ExportError("aotinductor cannot tell how many tokens this text encoder knows")


class _Refine(nn.Module):
    """This is `ScanLoop` and the head; each image says which row of the table is its noise."""

    def __init__(self, step: Step, head: nn.Module) -> None:
        super().__init__()
        self.step, self.head = step, head

    def forward(
        self, x_v: Tensor, coefficients: Tensor, bias: Tensor, last: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map x_v [B, D_v], coefficients [S - 1, 3], bias [S - 1, N, K, R] and that of the last
        step [N, K, R], and row [B] to logits [B, K, C] and features [B, K, D_f].
        """
        q = self.step.condition(x_v)
        # Computed of both, so that the compiler sees where its shape comes from.
        zero = (q[:, :, :1] + last.index_select(0, row)[:, :, :1]) * 0.0  # [B, K, 1]
        state = zero + torch.zeros(self.step.width, device=x_v.device)

        def step(
            carried: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]
        ) -> tuple[tuple[Tensor, Tensor], Tensor]:
            state, previous = carried
            c, b = given
            gained = self.step.gain(state, q, b.index_select(0, row))
            of_state, of_gained, of_previous = c.split(1)
            state = of_state * state + of_gained * gained + of_previous * previous
            return (state, gained.clone()), c.clone()  # scan must emit something

        (state, _), _ = scan(step, (state, torch.zeros_like(state)), (coefficients, bias))
        logits, fused = self.head(x_v, self.step.finish(state, q, last.index_select(0, row)))
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
    inputs: Inputs,
    types: Types,
    path: Path,
    limits: Mapping[str, int] | None = None,
    device: str = "cpu",
) -> None:
    """Compile `module`, which is changed, and write the package."""
    from torch._inductor import config

    limits = dict(limits or {})
    stored = _Stored(module.eval(), TORCH_TYPES[types.storage]).to(device)
    inputs = [(name, example.to(device), sizes) for name, example, sizes in inputs]
    package = io.BytesIO()  # on a full disk, torch's own writer would end the process
    with torch.no_grad(), quiet(), exact_float32(), _private_compiler(path):
        program = _export(stored, inputs, limits)
        metadata = {
            CPU_FLAGS: " ".join(_code_flags()),
            INPUTS: json.dumps([[n, str(t.dtype).removeprefix("torch."), s] for n, t, s in inputs]),
            LIMITS: json.dumps(limits),
            TORCH: torch.__version__,
        }
        if device == "cuda":
            metadata[GPU] = gpu_name()[0]
        settings = {**_settings(), "aot_inductor.metadata": metadata}
        settings["aot_inductor.use_runtime_constant_folding"] = stored.casts
        with config.patch(settings):
            torch._inductor.aoti_compile_and_package(program, package_path=package)
    path.write_bytes(package.getbuffer())


def _export(module: nn.Module, inputs: Inputs, limits: Mapping[str, int]) -> Any:
    names = dict.fromkeys(s for _, _, shape in inputs for s in shape if isinstance(s, str))
    sizes = {
        size: torch.export.Dim(f"size{i}", min=1, max=limits.get(size, _LARGEST))
        for i, size in enumerate(names)
    }
    # Of a module that takes any number of arguments, their shapes come as one tuple.
    shapes = tuple(
        {axis: sizes[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for _, _, shape in inputs
    )
    example = tuple(tensor for _, tensor, _ in inputs)
    return torch.export.export(module, example, dynamic_shapes=(shapes,), strict=False)


def _settings() -> dict[str, Any]:
    from torch._inductor import config

    settings: dict[str, Any] = {
        "cpp.dynamic_threads": True,  # else the number of threads of this process is compiled in
        "compile_threads": 1,  # in this process: a pool would outlive the call
        "aot_inductor.precompile_headers": False,  # takes longer than it saves in one compilation
    }
    if hasattr(config.cpp, "march"):
        settings["cpp.march"] = ""  # only instruction sets that `_code_flags` names
    return settings


def _code_flags() -> list[str]:
    """The instruction sets that the compiler may use, as its options name them."""
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = str(pick_vec_isa().build_arch_flags()).split()
    if not hasattr(config.cpp, "march") or any(o.startswith("-march") for o in options):
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
    in the library. A weight that is cast or laid out anew on its way to a product is followed back
    to its constant. "loop" is one step, the body of the loop; "head" is all that refine.pt2 does
    once per image: the condition, the last step and the head.

    Args:
        types, shape: not needed; the source says both.

    Raises:
        Unread: the source is not like any that torch was known to write.
    """
    files = ((ENCODER, "encoder"), (REFINE, "head"))
    try:
        return [p for name, once in files for p in _Source(payload / name).products(once)]
    except (LookupError, ValueError) as error:
        raise Unread(
            f"the source in {payload} is not as known versions of torch write it, so what was "
            f"built cannot be told: {error!r}"
        ) from error


_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
_ARRAY = r"int64_t \*?(\w+)(?:\[\] = \{(.*?)\}|=nullptr)"
_EMPTY = r"aoti_torch_empty_strided\(\d+, (\w+), \w+, cached_torch_dtype_(\w+),.*&(\w+)_handle\)"
_VIEW = r"reinterpret_tensor_wrapper\((\w+), \d+, (\w+), \w+, [^()]*\)"
_SAME = (
    r"aoti_torch_(?:assign_tensors_out|new_tensor_handle|clone)\((?P<old>\w+), "
    r"&(?P<new>\w+(?:\[\d+\])?)\)",
    r"(?:auto )?(?P<new>[\w\[\]]+) = (?:std::move|RAIIAtenTensorHandle)\((?P<old>\w+)\)",
    r"(?P<new>output_handles\[\d+\]) = (?P<old>\w+)\.release\(\)",
    r"RAIIAtenTensorHandle (?P<new>\w+)\((?P<old>\w+)_handle\)",
)
_KERNEL = r"\bcpp_\w+\((\(.*)\);"
_POINTER = r"\((const )?[\w:]+\*\)\((\w+)\.data_ptr\(\)\)"
_CALL = r"aoti_torch_(?:cpu|cuda)_(\w+)\((.*)\)\);"
# Kernels of a GPU are declared with the names of what they read and write.
_DECLARED = r"\bvoid (call_triton_\w+)\((.*?)\)\s*\{"
_LAUNCHED = r"^\s*(call_triton_\w+)\((.*)\);"
_PRODUCT = re.compile("mm|linear|conv|attention|dot|gemm|einsum|bilinear|_mv|addr|_rnn|lstm")


@dataclass(frozen=True)
class _Array:
    """A tensor of the generated code."""

    sizes: tuple[int, ...]  # with one image and one sample
    dtype: str
    weights: frozenset[str] = frozenset()  # the constants that it was made of
    computed: bool = False  # of something else, too


@dataclass(frozen=True)
class _Called:
    """A product in the generated code."""

    looping: bool
    function: str
    multiply_adds: int
    right: _Array  # the factor that may be a weight


class _Source:
    """The source of a package, followed line by line."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("wrapper.cpp"))
            source = archive.read(name).decode()
        self.path = path
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.arrays: dict[str, _Array] = {}
        self.found: list[_Called] = []
        self.kernels = {
            name: re.findall(r"(\w+)\s*(?:,|$)", parameters)
            for name, parameters in re.findall(_DECLARED, source, re.DOTALL)
        }
        self.fqns = self._read_constants(source)
        folding = source.partition("AOTInductorModel::_const_run_impl(")[2]
        self._read(folding.partition("} // AOTInductorModel::_const_run_impl")[0])
        folded = re.findall(r'folded_constants_map\["(\w+)"\] = (output_handles\[\d+\])', source)
        for constant, output in folded:
            made = self.arrays[output]
            self.arrays[constant] = replace(self.arrays[constant], weights=made.weights)
        self.found.clear()
        self._read(source.partition("void AOTInductorModel::run_impl(")[2])

    def _read_constants(self, source: str) -> dict[str, str]:
        fqns = {}
        fields = (
            r'constants_info_\[\d+\]\.name = "(\w+)"',
            r"dtype = cached_torch_dtype_(\w+)",
            r"shape = \{(.*?)\}",
            r'original_fqn = "(.*?)"',
        )
        pattern = ";.*?".join(fields)
        for name, dtype, shape, fqn in re.findall(pattern, source, re.DOTALL):
            weights = frozenset([name])
            self.arrays[name] = _Array(self._numbers(shape), dtype, weights)
            fqns[name] = fqn
        return fqns

    def _numbers(self, text: str) -> tuple[int, ...]:
        """Sizes; those that are free are 1."""
        plain = re.sub(r"\b[su]\d+\b", "1", re.sub(r"(\d)L\b", r"\1", text))
        return tuple(self._value(term) for term in plain.split(",") if term.strip())

    def _value(self, term: str) -> int:
        total = 0
        for part in term.replace("(", "").replace(")", "").split("+"):
            factors = part.split("*")
            if not all(factor.strip().lstrip("-").isdigit() for factor in factors):
                return 0  # a stride, or a size that nothing we count has; else `_count` refuses
            total += prod(int(factor) for factor in factors)
        return total

    def _read(self, source: str) -> None:
        for line in source.splitlines():
            if match := re.search(_ARRAY, line):
                self.sizes[match[1]] = self._numbers(match[2] or "")
            elif match := re.search(_EMPTY, line):
                self.arrays[match[3]] = _Array(self.sizes[match[1]], match[2])
            elif match := re.search(_KERNEL, line):
                self._run_kernel(match[1])
            elif match := re.search(_LAUNCHED, line):
                self._launch(match[1], match[2])
            elif match := re.search(_CALL, line):
                self._run_call(match[1], match[2])
            elif (match := re.search(_VIEW, line)) and (new := re.search(r"auto (\w+) = ", line)):
                self.arrays[new[1]] = self._operand(match[0])
            else:
                self._rename(line)

    def _rename(self, line: str) -> None:
        for pattern in _SAME:
            if (match := re.search(pattern, line)) and match["old"] in self.arrays:
                self.arrays[match["new"].removesuffix("_handle")] = self.arrays[match["old"]]

    def _run_kernel(self, arguments: str) -> None:
        """A kernel of pointwise and reducing operations: what it writes is made of all it reads."""
        pointers = re.findall(_POINTER, arguments)
        written = [name for const, name in pointers if not const]
        self._write([self._known(name) for const, name in pointers if const], written)

    def _known(self, name: str) -> _Array:
        return self.arrays.get(name) or _Array((), "float32", computed=True)  # an input

    def _write(self, read: Sequence[_Array], names: Sequence[str]) -> None:
        """Note what a kernel wrote to: all that it had and all that was read is in it."""
        read = [*read, *(self.arrays[name] for name in names if name in self.arrays)]
        for name in names:
            if name in self.arrays:
                self.arrays[name] = replace(
                    self.arrays[name],
                    weights=frozenset().union(*(array.weights for array in read)),
                    computed=any(array.computed for array in read),
                )

    def _launch(self, kernel: str, text: str) -> None:
        """A kernel of a GPU."""
        if "triton_tem_" in kernel:  # of torch's templates, which are for products
            raise Unread(f"{self.path.name} calls {kernel}, a product that is not counted yet")
        roles = self.kernels[kernel]
        read, written = [], []
        for role, argument in zip(roles, _arguments(text), strict=False):
            if role.startswith("in_ptr"):
                read.append(self._operand(argument))
            elif role.startswith(("out_ptr", "in_out_ptr")):
                written.append(argument.strip())
        self._write(read, written)

    def _operand(self, text: str) -> _Array:
        """An argument of a call: a name, or a view of one."""
        if match := re.search(_VIEW, text):
            viewed = self.arrays.get(match[1]) or _Array((), "float32", computed=True)
            return replace(viewed, sizes=self.sizes[match[2]])
        name = re.sub(r"&?temporary_reference\((\w+)\.get\(\)\)", r"\1", text.strip())
        if name not in self.arrays:  # an input
            return _Array((), "float32", computed=True)
        return self.arrays[name]

    def _run_call(self, function: str, text: str) -> None:
        arguments = _arguments(text)
        looping = "while_loop_body" in text
        match function:
            case "mm_out" | "addmm_out" | "bmm_out" | "baddbmm_out":
                out = arguments[0].strip()
                given = arguments[1:3] if function in ("mm_out", "bmm_out") else arguments[2:4]
                right = self._operand(given[1])
                size = prod(self.arrays[out].sizes) * right.sizes[-2]
                self.found.append(_Called(looping, function, size, right))
                self.arrays[out] = replace(self.arrays[out], computed=True)
            case "convolution":
                self._convolve(looping, arguments)
            case _ if function.startswith("_scaled_dot_product_"):
                query, key = map(self._operand, arguments[:2])
                size = 2 * prod(query.sizes) * key.sizes[-2]
                self.found.append(_Called(looping, "attention", size, key))
                # The first of what it gives is the answer; the others are for training.
                self._define(next(a for a in arguments if a.strip().endswith("_handle")), query)
            case _ if _PRODUCT.search(function):
                raise Unread(f"{self.path.name} calls {function}, which is not counted yet")

    def _convolve(self, looping: bool, arguments: list[str]) -> None:
        image, weight = map(self._operand, arguments[:2])
        stride, padding, dilation = (
            self._numbers(re.findall(r"\{(.*?)\}", arguments[i])[0]) for i in (3, 5, 7)
        )
        kernel = weight.sizes[2:]
        spatial = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                image.sizes[2:], kernel, stride, padding, dilation, strict=True
            )
        ]
        size = prod(spatial) * prod(weight.sizes)
        self.found.append(_Called(looping, "convolution", size, weight))
        sizes = (1, weight.sizes[0], *spatial)
        self._define(arguments[-1], replace(weight, sizes=sizes))

    def _define(self, handle: str, like: _Array) -> None:
        name = handle.strip().removeprefix("&").removesuffix("_handle")
        self.arrays[name] = replace(like, weights=frozenset(), computed=True)

    def products(self, once: str) -> list[Product]:
        """List the products in the order of execution; `once` is the part that is not in a loop."""
        return [
            self._count(i, "loop" if called.looping else once, called)
            for i, called in enumerate(self.found)
        ]

    def _count(self, index: int, part: str, called: _Called) -> Product:
        right, number = called.right, f"{called.function} {index}"
        if called.multiply_adds <= 0 or right.dtype not in _TYPES:
            raise Unread(f"{self.path.name}: the sizes of product {number} cannot be read")
        compute = _TYPES[right.dtype]
        # One kernel may cast and lay out several constants, and compute activations beside; what
        # became of a constant has its sizes, in this or another order.
        fitting = [
            name
            for name in sorted(right.weights)
            if len(self.arrays[name].sizes) > 1
            and sorted(self.arrays[name].sizes) == sorted(right.sizes)
        ]
        if not fitting and (right.computed or not right.weights):
            return Product(part, number, called.multiply_adds, "activation", compute)
        storage = {self.arrays[name].dtype for name in fitting}
        if len(storage) != 1:
            raise Unread(
                f"{self.path.name}: the weight of product {number} cannot be told from "
                f"{', '.join(sorted(right.weights))}"
            )
        name = self.fqns[fitting[0]].removeprefix("module.") if len(fitting) == 1 else number
        return Product(part, name, called.multiply_adds, _TYPES[storage.pop()], compute)


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
