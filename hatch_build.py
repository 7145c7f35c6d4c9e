"""Compiles the native loop for a wheel that is being built, where there is a compiler of C++."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileNativeLoop(BuildHookInterface):
    """Puts the library into the source tree, from where the wheel takes it."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile it, unless it is there or this is an editable installation.

        A checkout compiles it with its first export, and `make native` has compiled it for other
        machines, too.
        """
        library = _library(Path(self.root))
        if version == "editable" or (library.SHIPPED / library.file_name()).is_file():
            return
        try:
            library.build(library.SHIPPED)
        except RuntimeError as error:
            self.app.display_warning(f"the wheel has no native loop: {error}")


def _library(root: Path) -> ModuleType:
    """Load the one module that compiles it, without the packages that the others need."""
    path = root / "kernels/marnet_kernels/native/library.py"
    spec = importlib.util.spec_from_file_location("library", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
