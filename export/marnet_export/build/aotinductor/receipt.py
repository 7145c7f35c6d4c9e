"""The receipt of AOTInductor: what the generated code multiplies, read from its source.

torch packs the C++ source beside the library that it was compiled to. It has the calls into torch's
kernels with the sizes and types of what they are given, and the types of the constants in the
library. The weight of a product is the constant of its sizes.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from marnet_export.build.types import Product, Types, Unread
from marnet_sdk.backends.aotinductor import ENCODER, REFINE


def products(payload: Path, types: Types, shape: tuple[int, int, int]) -> list[Product]:
    """List the products that the compiled code calls.

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
