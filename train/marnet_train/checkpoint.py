"""Checkpoints: what training writes and export reads. A directory in the Hugging Face layout.

config.json             architecture, method, schedule, fusion, id2label
model.safetensors       all weights, float32
preprocessor_config.json, tokenizer files
training.json           recipe, seed, metrics, data hash, versions
samples/                up to 512 validation images with labels: what an export is verified on
metrics.jsonl           one line per epoch
README.md               the model card
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from marnet_sdk.errors import CheckpointError, MarnetError, NotFound
from marnet_sdk.files import newest, sha256_file
from marnet_sdk.preprocess import Preprocess, PreprocessError
from marnet_train.models import METHODS
from marnet_train.models.marnet import MARNet

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
TRAINING, SAMPLES = "training.json", "samples"
_HOW_TO_GET_ONE = (
    "train one with: marnet-train fit --data DATA --recipe digits --out runs/NAME, "
    "or name one with --checkpoint"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; the model is in evaluation mode on the CPU."""

    path: Path
    model: MARNet
    preprocess: Preprocess
    training: dict[str, Any]
    sha256: str

    @property
    def labels(self) -> tuple[str, ...]:
        return self.model.config.labels

    @property
    def samples(self) -> Path:
        """The folder of validation images, in the image-folder layout of one split."""
        return self.path / SAMPLES


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like a checkpoint of ours."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """The most recently written checkpoint under `runs`.

    Raises:
        NotFound: there is none; the message holds the command that makes one.
    """
    if (found := newest(runs, is_checkpoint)) is None:
        raise NotFound(f"no checkpoint under {os.path.join('.', runs)}; {_HOW_TO_GET_ONE}")
    return found


def checkpoint_hash(path: Path) -> str:
    """SHA-256 over everything that decides the model's answers: config, weights, preprocessing."""
    digests = [sha256_file(path / name) for name in (CONFIG, WEIGHTS, PREPROCESSOR)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def write_model(path: Path, model: MARNet, preprocess: Preprocess) -> None:
    """Write config, weights and preprocessing into an existing directory."""
    write_json(path / CONFIG, model.config.to_dict())
    write_json(path / PREPROCESSOR, preprocess.to_dict())
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(state, path / WEIGHTS, metadata={"format": "pt"})


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint directory.

    Raises:
        NotFound: not a checkpoint directory.
        CheckpointError: a file is damaged or missing, the method is unknown, or weights and
            configuration do not belong together.
    """
    path = Path(path)
    if not is_checkpoint(path):
        raise NotFound(
            f"{path} is not a checkpoint: it needs {CONFIG} and {WEIGHTS}; {_HOW_TO_GET_ONE}"
        )
    content = read_json(path / CONFIG)
    method = content.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"{path / CONFIG}: method {method!r} is unknown; this version has {sorted(METHODS)}"
        )
    model_class = METHODS[method]
    try:
        config = model_class.config_type.from_dict(content)
        model = model_class(config)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, MarnetError) as error:
        raise CheckpointError(f"{path / CONFIG}: incomplete or malformed: {error}") from error
    _load_weights(model, path / WEIGHTS)
    settings = read_json(path / PREPROCESSOR)
    try:
        preprocess = Preprocess.from_dict(settings)
    except PreprocessError as error:
        raise CheckpointError(f"{path / PREPROCESSOR}: {error}") from error
    training = read_json(path / TRAINING) if (path / TRAINING).is_file() else {}
    return Checkpoint(path, model.eval(), preprocess, training, checkpoint_hash(path))


def _load_weights(model: torch.nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
        model.load_state_dict(state)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy or train it again") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its {CONFIG}: {error}") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing from the checkpoint") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Readable JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
