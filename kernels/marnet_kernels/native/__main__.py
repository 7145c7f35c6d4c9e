"""Compiles the native loop that a wheel ships: `python -m marnet_kernels.native`."""

from marnet_kernels.native.library import SHIPPED, build


def main() -> None:
    """Compile it beside its source, and remove older ones."""
    for old in SHIPPED.glob("libmarnet_loop-*.so"):
        old.unlink()
    print(build(SHIPPED))


if __name__ == "__main__":
    main()
