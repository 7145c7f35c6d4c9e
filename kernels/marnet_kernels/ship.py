"""Compiles the kernels that the wheel ships: `python -m marnet_kernels.ship [FOLDER]`.

Run it before building a wheel or source archive, on any machine with NVRTC; no GPU is needed. In a
package built without it there is no shipped code, and every kernel is compiled where it runs, which
takes `pip install "marnet[cuda]"` there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from marnet_kernels import persistent
from marnet_kernels.compile import SHIPPED, TARGETS, Cubin, ship_cubin, source

Variant = tuple[str, tuple[str, ...]]


def shipped_variants() -> list[Variant]:
    """Return (kernel, options) of all that is shipped, each for every one of TARGETS."""
    return [("reverse_sampler", options) for options in persistent.shipped_options()]


def ship(
    folder: Path, variants: Sequence[Variant], targets: Sequence[str] = TARGETS
) -> dict[tuple[Variant, str], Cubin]:
    """Compile all variants into the folder and remove whatever else of a .cubin lies there.

    Raises OSError where the folder cannot be written, RuntimeError without NVRTC.
    """
    for old in folder.glob("*.cubin"):
        old.unlink()
    return {  # not in threads: NVRTC compiles one program at a time
        ((name, options), target): ship_cubin(source(name), target, options, folder)
        for name, options in variants
        for target in targets
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m marnet_kernels.ship",
        description="Compile the kernels that the wheel ships.",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=SHIPPED, help="default: %(default)s"
    )
    folder = parser.parse_args(arguments).folder
    cubins = ship(folder, shipped_variants())
    for ((name, options), target), cubin in cubins.items():
        print(
            f"{name} {target}: {cubin.registers} registers, {cubin.spill_bytes} bytes spilled, "
            f"{len(cubin.code)} bytes  {' '.join(options)}".rstrip()
        )
    total = sum(len(cubin.code) for cubin in cubins.values())
    print(f"{len(cubins)} files, {total / 2**20:.1f} MiB in {folder}")


if __name__ == "__main__":
    main()
