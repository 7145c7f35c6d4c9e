"""Checkpoints: what training writes and export reads. A directory in the Hugging Face layout.

config.json             architecture, method, schedule, fusion, id2label
model.safetensors       all weights, float32
baseline.safetensors    the image-only baseline: encoder, projection, classifier
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
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from marnet_sdk.errors import (
    CheckpointError,
    EnvironmentMismatch,
    InvalidInput,
    MarnetError,
    NotFound,
)
from marnet_sdk.files import newest, sha256_file
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.inputs.processors import PreprocessError
from marnet_sdk.outputs import atomic_directory
from marnet_train.hub import download, files_of, is_hub_id, upload
from marnet_train.models import METHODS
from marnet_train.models.marnet import Baseline, MARNet

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
BASELINE = "baseline.safetensors"
TRAINING, SAMPLES = "training.json", "samples"
_HOW_TO_GET_ONE = (
    "train one with: marnet-train fit --data DATA --recipe digits --out runs/NAME, "
    "or name one with --checkpoint"
)


@dataclass(frozen=True)
class Checkpoint:
    """This is a checkpoint in memory; the model is in evaluation mode on the CPU.

    sha256 is that of the files, `revision` the commit on the hub if they came from there.
    """

    path: Path
    model: MARNet
    preprocess: Preprocess
    training: dict[str, Any]
    sha256: str
    revision: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Checkpoint:
        """Load a directory, or ORG/NAME from the Hugging Face Hub; see `find_checkpoint`.

        Raises:
            NotFound, InvalidInput, HubError: as of `find_checkpoint`.
            CheckpointError: as of `load_checkpoint`.
        """
        path = find_checkpoint(path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir)
        local = Path(path_or_hub_id).is_dir()
        return replace(load_checkpoint(path), revision=None if local else path.name)

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write a complete checkpoint: the model as it is in memory, the other files from `path`.

        Raises:
            OutputExists: `directory` exists, and `overwrite` is False or it is no checkpoint.
        """
        directory = Path(directory)
        with atomic_directory(directory, overwrite=overwrite, replaceable=is_checkpoint) as fresh:
            copy_files(self.path, fresh)
            write_model(fresh, self.model, self.preprocess)
        return directory

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a marnet checkpoint",
        token: str | None = None,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes, in one commit.

        Args:
            revision: the branch, made if need be; None: main.
            private: whether a repository that is made is private; None: its owner's default.

        Raises:
            InvalidInput, NotFound, HubError: as of `marnet_train.hub.upload`.
        """
        with tempfile.TemporaryDirectory() as folder:
            return upload(
                self.save_pretrained(Path(folder) / "checkpoint"),
                repo_id,
                private=private,
                revision=revision,
                message=commit_message,
                token=token,
            )

    @property
    def labels(self) -> tuple[str, ...]:
        return self.model.config.labels

    @property
    def samples(self) -> Path:
        """Name the folder of validation images, in the image-folder layout of one split."""
        return self.path / SAMPLES


def is_checkpoint(path: Path) -> bool:
    """Tell whether a directory looks like a checkpoint of ours."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """Find the most recently written checkpoint under `runs`.

    Raises:
        NotFound: there is none; the message holds the command that makes one.
    """
    if (found := newest(runs, is_checkpoint)) is None:
        raise NotFound(f"no checkpoint under {os.path.join('.', runs)}; {_HOW_TO_GET_ONE}")
    return found


def find_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Find a checkpoint's directory: `source` if that is one here, else downloaded from the hub.

    Only a string of the form ORG/NAME that is no directory is looked for on the hub; a `Path` and
    strings like `./runs/digits` never are.

    Args:
        revision: branch, tag or commit on the hub; None: main.
        token: for a private repository; None: HF_TOKEN, or the one of `hf auth login`.
        cache_dir: where downloads are kept; None: the hub's cache (HF_HOME).

    Raises:
        NotFound: neither reading finds a checkpoint.
        InvalidInput: a revision of a directory.
        HubError: the hub refuses, cannot be reached, or the transfer breaks off.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise InvalidInput(
                f"revision {revision!r} of {source}, which is a folder: expected ORG/NAME on the "
                "hub; leave the revision out, or name the repository"
            )
        return Path(source)
    if isinstance(source, Path) or not is_hub_id(source):
        raise NotFound(
            f"{source} is neither a folder here nor ORG/NAME on the hub; {_HOW_TO_GET_ONE}"
        )
    path = download(source, revision=revision, token=token, cache_dir=cache_dir)
    if not is_checkpoint(path):
        raise NotFound(
            f"{source} on the hub (commit {path.name}) is not a checkpoint: it needs {CONFIG} and "
            f"{WEIGHTS}; {_HOW_TO_GET_ONE}"
        )
    return path


def checkpoint_hash(path: Path) -> str:
    """Return the SHA-256 of all that decides the answers: config, weights, preprocessing."""
    digests = [sha256_file(path / name) for name in (CONFIG, WEIGHTS, PREPROCESSOR)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def copy_files(source: Path, target: Path, without: Collection[str] = ()) -> None:
    """Copy everything that a checkpoint is made of, but for the files named in `without`."""
    for name in sorted({*files_of(source)} - {*without}):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def write_model(path: Path, model: MARNet, preprocess: Preprocess) -> None:
    """Write config, weights and preprocessing into an existing directory."""
    write_json(path / CONFIG, model.config.to_dict())
    write_json(path / PREPROCESSOR, preprocess.to_dict())
    _save_weights(model, path / WEIGHTS)


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write the weights of the image-only baseline into an existing directory."""
    _save_weights(baseline, path / BASELINE)


def _save_weights(model: torch.nn.Module, path: Path) -> None:
    state = {n: tensor.detach().cpu().contiguous() for n, tensor in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


def load_baseline(checkpoint: Checkpoint) -> Baseline:
    """Load the image-only baseline that was trained beside a model, in evaluation mode on the CPU.

    Raises:
        NotFound: the checkpoint has none: bundles do not keep it.
        CheckpointError: the file is damaged, or does not fit the configuration.
    """
    path = checkpoint.path / BASELINE
    if not path.is_file():
        raise NotFound(
            f"{path} is missing, as it is in bundles; load the checkpoint that training wrote"
        )
    baseline = Baseline(checkpoint.model)
    _load_weights(baseline, path)
    return baseline.eval()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint directory.

    Raises:
        NotFound: not a checkpoint directory.
        CheckpointError: a file is damaged or missing, the method is unknown, or weights and
            configuration do not belong together.
        EnvironmentMismatch: the encoder needs a package that is missing here, such as timm.
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
    except EnvironmentMismatch:  # the files are sound, a package of the encoder is missing here
        raise
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
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy or train it again") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit its {CONFIG}: {_why_unfit(model, state, error)}"
        ) from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values")


def _why_unfit(model: torch.nn.Module, state: dict[str, torch.Tensor], error: RuntimeError) -> str:
    """Return what torch says, of hundreds of weights maybe, or a known cause; and a way out."""
    expected = model.state_dict()
    unfit = [n for n, x in expected.items() if n not in state or state[n].shape != x.shape]
    name, advice = "classifier.bias", "take both from the same checkpoint"
    if name in unfit and name in state:
        own, found = len(expected[name]), len(state[name])
        return f"id2label names {own} classes, the weights have {found}; {advice}"
    return f"{' '.join(str(error).split())[:600]}; {advice}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

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
    """Write readable JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
