"""Export a bundle again from the checkpoint that travels in it, or add engines to it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from marnet_export.build.builder import ROUTES
from marnet_export.build.tensorrt.engines import BUCKETS, add_engines
from marnet_export.choose.race import export_fastest
from marnet_export.job import export_bundle
from marnet_export.settings import AUTO, Say, Settings
from marnet_export.work import at_work
from marnet_sdk.bundle import PAYLOAD, SOURCE, TEXT, Bundle, Manifest, read_bundle, seal_bundle
from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import (
    BundleFormatError,
    EnvironmentMismatch,
    InvalidInput,
    NotFound,
    VerificationFailed,
)
from marnet_sdk.gpu.tensorrt_library import read_index
from marnet_train.checkpoint import checkpoint_hash, find_checkpoint

_TENSORRT = "tensorrt"


def source_of(bundle: Bundle, named: str | None) -> Path:
    """The folder of the checkpoint that a bundle was made from.

    Args:
        named: a folder, or ORG/NAME on the hub; None: what travels in the bundle, whose bytes are
            checked.

    Raises:
        NotFound: the bundle has none and none is named.
        BundleCorrupt: a file of the bundle's is not what was written.
        InvalidInput: the one that is named is another checkpoint.
        VerificationFailed: the bundle's own is another checkpoint.
    """
    wanted = bundle.manifest.checkpoint_sha256
    if named is None:
        if not bundle.has(SOURCE):
            raise NotFound(
                f"{bundle.path} holds no checkpoint: it was exported with --no-source. Name the "
                f"one that it was made from (SHA-256 {wanted[:12]}...) with --checkpoint"
            )
        path, error = bundle.check(SOURCE), VerificationFailed
    else:
        path, error = find_checkpoint(named), InvalidInput
    if (found := checkpoint_hash(path)) != wanted:
        raise error(
            f"{path} is another checkpoint than {bundle.path} was made from: its SHA-256 is "
            f"{found[:12]}..., the manifest says {wanted[:12]}...; name the right one with "
            "--checkpoint, or make a new bundle with marnet-export"
        )
    return path


def rebuild(
    path: Path,
    output: Path,
    changes: Mapping[str, Any],
    *,
    checkpoint: str | None = None,
    data: Path | None = None,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> Settings:
    """Export a bundle's checkpoint again, with the bundle's settings but for `changes`.

    Raises:
        NotFound, InvalidInput: the checkpoint is not there; see `source_of`.
        OutputExists: `output` is there, and `overwrite` is False.
        ExportError, VerificationFailed: as of `export_bundle`. What was at `output` is still there.
    """
    bundle = read_bundle(path, lazily=True)
    settings = changed_settings(bundle, changes)
    source = source_of(bundle, checkpoint)
    if data is None and checkpoint is None and not (source / "samples").is_dir():
        raise NotFound(
            f"{path} holds no images to verify on: its checkpoint was trained with --no-samples. "
            "Name a data set with --data"
        )
    export = export_fastest if settings.backend == AUTO else export_bundle
    export(source, output, settings, data=data, overwrite=overwrite, say=say)
    return settings


def changed_settings(bundle: Bundle, changes: Mapping[str, Any]) -> Settings:
    """The settings of a bundle's export, but for some.

    Raises:
        BundleFormatError: the manifest has settings that this version does not know.
        InvalidInput: they do not go together.
    """
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        for name, value in bundle.manifest.settings.items()
    }
    if changes.get("backend", settings["backend"]) != settings["backend"]:
        # Those are another's.
        settings |= {"targets": (), "route": ROUTES[0], "device": None, "loop": AUTO}
    if settings["steps"] == AUTO and changes.get("steps", AUTO) != AUTO:  # those are of a sweep
        settings["latency_budget_ms"] = None
        if settings["precision"] == AUTO:
            settings["precision"] = bundle.manifest.precision.asked
        if changes.get("sampler", settings["sampler"]) != "ddim":
            settings["eta"] = 0.0
    if changes.get("steps") == 0:
        settings |= {"sampler": None, "eta": 0.0, "samples": None}  # those are of a loop
    try:
        return Settings(**settings | dict(changes))
    except TypeError as error:
        raise BundleFormatError(
            f"{bundle.path} was exported with settings that this version does not know ({error}); "
            "upgrade marnet, or export its source/ with marnet-export --checkpoint"
        ) from error


def add_targets(
    path: Path,
    output: Path,
    targets: Sequence[str],
    *,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> None:
    """Build engines for more GPUs into a bundle of TensorRT; everything else stays.

    Raises:
        InvalidInput: a bundle of another backend.
        ExportError, MissingExtra: the engines cannot be built. `path` is what it was.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    if manifest.backend != _TENSORRT:
        raise InvalidInput(
            f"--target adds engines to a bundle of tensorrt, and {path} is one of "
            f"{manifest.backend}; make one with: marnet-bundle rebuild {path} --backend tensorrt"
        )
    with at_work(output, overwrite=overwrite) as fresh:
        shutil.copytree(path, fresh, dirs_exist_ok=True)
        buckets = manifest.buckets or BUCKETS
        for folder in (fresh / PAYLOAD, fresh / TEXT):
            if any(folder.glob("*.onnx")):
                add_engines(folder, targets, buckets=buckets)
        sets = read_index(fresh / PAYLOAD)
        built = [str(one) for one in sets]
        say(f"has engines: {'; '.join(built)}")
        names = sorted({name for one in sets for name in one.targets}, key=lambda n: (len(n), n))
        kept = {f.name: getattr(manifest, f.name) for f in fields(Manifest) if f.name != "files"}
        kept["built_for"] = replace(manifest.built_for, targets=tuple(built))
        kept["settings"] = manifest.settings | {"targets": names}
        seal_bundle(fresh, kept)
        try:
            Classifier(fresh)
        except EnvironmentMismatch as error:
            say(f"not tried, because it does not run here: {error}")
