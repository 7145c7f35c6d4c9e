"""Compiles the native loop that a wheel ships: `python -m marnet_kernels.native`."""

import platform
import shutil

from marnet_kernels.native.library import MACHINES, SHIPPED, build, compiler_for


def main() -> None:
    """Compile it beside its source, and remove older ones.

    It is also compiled for the other kinds of machine for which there is a cross compiler.
    """
    for old in SHIPPED.glob("libmarnet_loop-*.so"):
        old.unlink()
    print(build(SHIPPED))
    for machine in MACHINES:
        if machine == platform.machine():
            continue
        if shutil.which(compiler_for(machine)) is None:
            print(f"none for {machine}: {compiler_for(machine)} is not installed")
        else:
            print(build(SHIPPED, machine=machine))


if __name__ == "__main__":
    main()
