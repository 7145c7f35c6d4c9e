"""This module shows the metrics of a training in TensorBoard, while it runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marnet_sdk.errors import requires_extra
from marnet_sdk.outputs import writable


class Board:
    """This writes lines of metrics.jsonl as scalars, one for each phase and quantity."""

    def __init__(self, folder: Path) -> None:
        """Write to event files in `folder`, which is made if need be; others there stay.

        Raises:
            MissingExtra: tensorboard is not installed.
            OutputError: the folder must not be written to.
        """
        with requires_extra("tensorboard", "tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        with writable(folder):
            self._writer = SummaryWriter(str(folder))

    def show(self, line: Mapping[str, Any]) -> None:
        """Add the numbers of one epoch; they can be seen at once."""
        phase = re.sub(r"[^\w./-]+", "-", line["phase"]).strip("-")
        for name in line.keys() - {"phase", "epoch"}:
            self._writer.add_scalar(f"{phase}/{name}", line[name], line["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Let go of the event file."""
        self._writer.close()
