"""The CUDA sources of this package, each as the one text that is compiled.

`compile_cubin` refuses include paths, because its key covers the source alone. So what kernels
share is put before them here.
"""

from importlib.resources import files


def source(name: str) -> str:
    """csrc/NAME.cu after csrc/device.cuh and csrc/philox.cuh, as NVRTC compiles it."""
    return _text("device.cuh") + portable_source(name)


def portable_source(name: str) -> str:
    """The same without csrc/device.cuh, which holds all that is written in PTX."""
    return _text("philox.cuh") + _text(f"{name}.cu")


def _text(file: str) -> str:
    # With the line directive, compilers name the file and its own line numbers in their messages.
    text = (files("marnet_kernels") / "csrc" / file).read_text("utf-8")
    return f'#line 1 "{file}"\n{text}'
