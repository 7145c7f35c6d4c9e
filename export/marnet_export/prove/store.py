"""Answers of the float32 reference on disk, for the processes of one export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from marnet_sdk.noise.tables import Floats
from marnet_sdk.outputs import atomic_file


@dataclass(frozen=True)
class Store:
    """Arrays of one checkpoint by what they are of; whoever needs one first computes it."""

    folder: Path
    checkpoint_sha256: str

    def get(self, of: dict[str, object], compute: Callable[[], Floats]) -> Floats:
        """The array that is kept for `of`, or else what `compute` gives, which is kept then.

        Args:
            of: all that the array depends on besides the checkpoint, as JSON has it.
        """
        key = json.dumps(of | {"checkpoint": self.checkpoint_sha256}, sort_keys=True)
        path = self.folder / f"{sha256(key.encode()).hexdigest()}.safetensors"
        if path.exists():
            with safe_open(path, "np") as file:
                assert (file.metadata() or {}).get("of") == key, path
                return file.get_tensor("array")
        array = np.ascontiguousarray(compute())
        self.folder.mkdir(exist_ok=True)
        with atomic_file(path) as temporary:
            save_file({"array": array}, temporary, {"of": key})
        return array
