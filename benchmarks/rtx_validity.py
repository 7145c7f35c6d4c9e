"""Ask TensorRT-RTX whether it runs an engine on this machine's GPU, and keep what it says.

    python benchmarks/rtx_validity.py --output FILE.json

Its documentation lists GPUs; some that it does not list may run engines all the same. A small
engine is built for the default target, which is any GPU from Ampere on, and the runtime is asked
without loading it. Runs from a checkout, and needs tensorrt_rtx and NumPy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("sdk", "kernels")]

from marnet_sdk.environment import versions  # noqa: E402
from marnet_sdk.errors import BackendUnavailable, ExportError, MarnetError  # noqa: E402
from marnet_sdk.gpu.tensorrt_library import (  # noqa: E402
    RTX,
    Library,
    describe_invalidity,
    find_device,
    load_library,
    make_log,
)

WIDTH = 64  # of the one layer of the engine


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--engine", type=Path, help="ask about this one; default: build one")
    parser.add_argument("--target", nargs="+", default=[], help="build for these, as in sm86")
    asked = parser.parse_args(arguments)
    try:
        device = find_device()  # without a driver, the runtime would crash
        library = load_library(RTX)
        engine = asked.engine.read_bytes() if asked.engine else build_engine(library, asked.target)
    except MarnetError as error:
        why = f"no GPU to ask about: {error}" if isinstance(error, BackendUnavailable) else error
        print(why, file=sys.stderr)
        return error.exit_code
    report = {
        "gpu": asdict(device),
        "library": str(library),
        "packages": versions(("tensorrt_rtx", "numpy")),
        "engine": {
            "from": str(asked.engine or "built here"),
            "targets": asked.target or "default",
            "bytes": len(engine),
        },
        **validity(library, engine),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    asked.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(f"{device}: {report['answer']} ({report['words']})")
    return 0


def build_engine(library: Library, targets: Sequence[str] = ()) -> bytes:
    """Build an engine that multiplies x [1, WIDTH] with a matrix, in fp16; this needs no GPU.

    Args:
        targets: compute capabilities, as in "sm86"; none: what TensorRT-RTX takes by default.

    Raises:
        ExportError: it cannot be built.
    """
    trt: Any = library.module
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    matrix = np.eye(WIDTH, dtype=np.float16)
    x = network.add_input("x", trt.float16, (1, WIDTH))
    weight = network.add_constant(matrix.shape, trt.Weights(matrix)).get_output(0)
    plain = trt.MatrixOperation.NONE
    network.mark_output(network.add_matrix_multiply(x, plain, weight, plain).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        found = getattr(trt.ComputeCapability, target.upper(), None)
        if found is None or not config.set_compute_capability(found, i):
            raise ExportError(f"{library} does not build for {target}; leave it out of --target")
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise ExportError(f"{library} cannot build the engine: {log.sentence()}; update it")
    return bytes(built)


def validity(library: Library, engine: bytes) -> dict[str, Any]:
    """Return what the runtime says of an engine. There must be a driver."""
    trt: Any = library.module
    log = make_log(trt)
    answer, mask = trt.Runtime(log).get_engine_validity(engine)
    return {
        "answer": answer.name,
        "mask": int(mask),
        "words": describe_invalidity(trt, int(mask)),
        "errors": list(log.errors),
    }


if __name__ == "__main__":
    sys.exit(main())
