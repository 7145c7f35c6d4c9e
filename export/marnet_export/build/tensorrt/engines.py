"""Engines of TensorRT, built from the strongly typed ONNX files of a payload.

TensorRT-RTX builds for GPUs by name, without one. Standard TensorRT builds for the one it runs on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from marnet_sdk.errors import BackendUnavailable, ExportError, InvalidInput, MissingExtra, nearest
from marnet_sdk.files import sha256_file
from marnet_sdk.gpu.tensorrt_library import (
    RTX,
    STANDARD,
    Device,
    Engine,
    EngineSet,
    Library,
    find_device,
    load_library,
    make_log,
    read_cached,
    read_index,
    timing_cache_path,
    write_cached,
    write_index,
)
from marnet_sdk.outputs import atomic_file

ENCODER, REFINE, TEXT = "encoder.onnx", "refine.onnx", "text.onnx"
# Refine in two halves, around the loop that a kernel runs; where that cannot, refine does it all.
CONDITION, FINISH = "condition.onnx", "finish.onnx"
_FILES = (ENCODER, REFINE, CONDITION, FINISH, TEXT)
BUCKETS = (1, 8, 16, 32, 64)
# Least, fastest, most. An engine reserves memory for the most, so the runtime splits what is more.
STEPS, SAMPLES = (2, 50, 1000), (1, 1, 16)
TOKEN_LIMIT = "marnet.tokens"  # the key under which text.onnx says how many it takes
# Which size each dynamic dimension of an input is, in order.
INPUT_SIZES = {
    "pixels": ("batch",),
    "x_v": ("batch",),
    "coefficients": ("steps",),
    "bias": ("steps", "samples"),
    "h3": ("batch", "samples"),
    "ids": ("batch", "tokens"),
    "mask": ("batch", "tokens"),
}


def add_engines(
    payload: Path, targets: Sequence[str] = (), *, buckets: Sequence[int] = BUCKETS
) -> list[EngineSet]:
    """Build engines from the ONNX files of a payload, and list them in payload/engines.json.

    What was built before from the same files is kept, so this can be called again after a file was
    added, and for other GPUs.

    Args:
        targets: compute capabilities, as in "sm86"; none: the GPU of this machine.
        buckets: batch sizes; each has an optimisation profile of its own.

    Returns:
        What was added: a set for each flavour of TensorRT that was needed.

    Raises:
        ExportError: it cannot be built for these GPUs.
        MissingExtra: TensorRT is not installed.
    """
    if not buckets or min(buckets) < 1 or len(set(buckets)) < len(buckets):
        raise InvalidInput(f"buckets: got {tuple(buckets)}, expected different batch sizes from 1")
    graphs = {path.stem: path for path in map(payload.joinpath, _FILES)}
    graphs = {name: path for name, path in graphs.items() if path.exists()}
    if not graphs:
        raise ExportError(f"{payload} has no ONNX files to build engines from; export it again")
    added = []
    for job in _jobs(targets):
        known = {one.folder: one for one in read_index(payload)}
        empty = EngineSet(job.library.flavour, job.library.version, job.targets, {})
        old = known.get(empty.folder, empty)
        engines = {
            name: _up_to_date(job, path, old.file(payload, name), old.engines.get(name), buckets)
            for name, path in graphs.items()
        }
        added.append(replace(empty, engines=engines))
        write_index(payload, [*(known | {empty.folder: added[-1]}).values()])
    return added


def _up_to_date(
    job: _Job, path: Path, file: Path, engine: Engine | None, buckets: Sequence[int]
) -> Engine:
    """The engine of an ONNX file, built unless it is there."""
    profiles = _profiles(path, sorted(buckets))
    wanted = _describe(profiles, onnx_sha256=sha256_file(path))
    if file.exists() and engine is not None and _same(engine, wanted):
        return engine
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        temporary.write_bytes(job.build(path, profiles))
    return replace(wanted, sha256=sha256_file(file), size=file.stat().st_size)


Profile = dict[str, tuple[int, int, int]]  # size -> least, fastest, most


def _profiles(path: Path, buckets: Sequence[int]) -> list[Profile]:
    """A profile for each bucket, whose batch is fixed; one for texts, in which everything varies.

    A fixed batch gives kernels for just that size, and TensorRT-RTX 1.7 cannot compile some small
    encoders for a range of batches.
    """
    if path.name == TEXT:
        props = onnx.load(path, load_external_data=False).metadata_props
        limit = int(next(prop.value for prop in props if prop.key == TOKEN_LIMIT))
        most = buckets[-1]
        return [{"batch": (1, min(8, most), most), "tokens": (1, min(32, limit), limit)}]
    more = {REFINE: {"steps": STEPS, "samples": SAMPLES}, FINISH: {"samples": SAMPLES}}
    more = more.get(path.name, {})
    return [{"batch": (bucket, bucket, bucket), **more} for bucket in buckets]


def _describe(profiles: Sequence[Profile], onnx_sha256: str) -> Engine:
    ranges = {name: (size[0], size[2]) for name, size in profiles[0].items() if name != "batch"}
    batches = tuple((profile["batch"][0], profile["batch"][2]) for profile in profiles)
    return Engine("", 0, onnx_sha256, batches, ranges)


def _same(engine: Engine, wanted: Engine) -> bool:
    """One profile for all batches, which `replace_engine` leaves, serves as well as several."""
    one = replace(wanted, batches=((1, wanted.largest),))
    return replace(engine, sha256="", size=0) in (wanted, one)


def replace_engine(
    payload: Path, engines: EngineSet, graph: str, content: bytes, batches: tuple[int, int]
) -> EngineSet:
    """Put an engine that something else built from the same graph in the place of another.

    Args:
        engines: a set of the payload. batches: least and most of its one profile.
    """
    file = engines.file(payload, graph)
    with atomic_file(file) as temporary:
        temporary.write_bytes(content)
    engine = replace(
        engines.engines[graph], sha256=sha256_file(file), size=len(content), batches=(batches,)
    )
    changed = replace(engines, engines=engines.engines | {graph: engine})
    others = (one for one in read_index(payload) if one.folder != engines.folder)
    write_index(payload, [*others, changed])
    return changed


@dataclass(frozen=True)
class _Job:
    """One library builds for some GPUs, on one of them if it needs one."""

    library: Library
    targets: tuple[str, ...]
    device: Device | None = None

    def build(self, path: Path, profiles: Sequence[Profile]) -> bytes:
        """One engine.

        TensorRT-RTX gives the same bytes again where only the batch is dynamic, as in the encoder.
        With more dynamic sizes, names inside the engine come in another order each time.
        """
        trt, log = self.library.module, make_log(self.library.module)
        builder = trt.Builder(log)
        network, _parser = parse_network(self.library, builder, log, path)
        config = builder.create_builder_config()
        # TF32 keeps ten bits of float32's twenty-three, and is the default.
        config.clear_flag(trt.BuilderFlag.TF32)
        for profile in profiles:
            config.add_optimization_profile(_shapes(builder, network, profile))
        if self.library.is_rtx:
            config.num_compute_capabilities = len(self.targets)
            for i, target in enumerate(self.targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
        with self._timings(config):
            built = builder.build_serialized_network(network, config)
        if built is None:
            raise ExportError(
                f"{self.library} cannot build {path.name} for {', '.join(self.targets)}: "
                f"{log.sentence()}"
            )
        return bytes(built)

    @contextmanager
    def _timings(self, config: Any) -> Iterator[None]:
        """Standard TensorRT times kernels, which is most of its work; what it learns is kept."""
        if self.device is None or self.library.is_rtx:
            yield
            return
        path = timing_cache_path(self.library, self.device)
        cache = config.create_timing_cache(read_cached(path))
        config.set_timing_cache(cache, False)
        yield
        write_cached(path, bytes(cache.serialize()))


def check_targets(targets: Sequence[str]) -> None:
    """Refuse what `add_engines` would, before there is anything to build from."""
    _jobs(targets)


def _jobs(targets: Sequence[str]) -> list[_Job]:
    """Decide which library builds for which of the targets."""
    if not targets:
        return [_present()]
    rtx = load_library(RTX)
    known = _rtx_targets(rtx)
    asked = sorted(set(targets), key=_number)
    jobs = [_Job(rtx, tuple(t for t in asked if t in known))]
    jobs += [_job_on_this_gpu(target, known) for target in asked if target not in known]
    return [job for job in jobs if job.targets]


def _number(target: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", target)
    return int(digits or 0), target


def _rtx_targets(rtx: Library) -> list[str]:
    names = [name for name in dir(rtx.module.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    return sorted((name.lower() for name in names), key=_number)


def _present() -> _Job:
    """The GPU of this machine, with standard TensorRT where it is installed."""
    try:
        device = find_device()
    except BackendUnavailable as error:
        raise ExportError(
            f"engines are built for the GPU of this machine unless others are named, and this one "
            f"has {error}; name them, as in --target sm86,sm89"
        ) from error
    try:
        return _Job(load_library(STANDARD), (device.target,), device)
    except (MissingExtra, BackendUnavailable) as error:
        if device.target in _NOT_RTX:
            raise
        missing = error
    rtx = load_library(RTX)
    if device.target in _rtx_targets(rtx):
        return _Job(rtx, (device.target,), device)
    raise ExportError(_unsupported(device.target, _rtx_targets(rtx))) from missing


def _job_on_this_gpu(target: str, known: Sequence[str]) -> _Job:
    """A target that TensorRT-RTX does not build for, and this machine's GPU may be."""
    try:
        device = find_device()
        if device.target == target:
            return _Job(load_library(STANDARD), (target,), device)
    except (MissingExtra, BackendUnavailable):
        pass
    raise ExportError(_unsupported(target, known))


_NOT_RTX = {"sm70": "Volta", "sm87": "Orin", "sm90": "Hopper", "sm100": "Blackwell (data centre)"}


def _unsupported(target: str, known: Sequence[str]) -> str:
    choices = f"it builds for {', '.join(known)}"
    if not re.fullmatch(r"sm\d{2,3}", target):
        return f"target {target!r} is unknown: {choices}.{nearest(target, list(known))}"
    generation = f" ({_NOT_RTX[target]})" if target in _NOT_RTX else ""
    return (
        f"TensorRT-RTX does not build for {target}{generation}: {choices}."
        f"{nearest(target, list(known))} For {target}, install standard TensorRT on a machine with "
        "such a GPU and export there without --target, or choose another --backend"
    )


def parse_network(library: Library, builder: Any, log: Any, path: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, and its parser, which owns the weights as long as it lives."""
    trt = library.module
    flags = 0
    if int(library.version.split(".")[0]) == 10 and not library.is_rtx:  # later ones know no other
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):  # by its path, so that data beside it is found
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(f"{e.node_operator()} {e.desc()}".strip() for e in errors[:3])
        raise ExportError(f"{library} cannot read {path.name}: {said or log.sentence()}")
    for layer in layers_of(network):
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            # Where a GPU has no fused kernel for its size or type, as for float32, several will do.
            cast_layer(trt.IAttentionOutputLayer, layer).attention.decomposable = True
    return network, parser


def layers_of(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


def cast_layer(kind: Any, layer: Any) -> Any:
    """A layer as what it is: the network hands out the base class."""
    layer.__class__ = kind
    return layer


def _shapes(builder: Any, network: Any, sizes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        names = iter(INPUT_SIZES[tensor.name])
        dims = [next(names) if size == -1 else size for size in tensor.shape]
        profile.set_shape(
            tensor.name,
            *([sizes[d][which] if isinstance(d, str) else d for d in dims] for which in range(3)),
        )
    return profile
