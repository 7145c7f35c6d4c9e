"""Describe a bundle, and compare it with another.

Needs the SDK, and to run a bundle its backend; neither torch nor the export extra.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from marnet_sdk.backends import why_unavailable
from marnet_sdk.bundle import FIDELITY, GOLDEN_IMAGES, MANIFEST, SOURCE, TEXT, Bundle
from marnet_sdk.classifier import Classifier
from marnet_sdk.environment import versions
from marnet_sdk.errors import MarnetError
from marnet_sdk.noise.tables import Floats


def describe(bundle: Bundle) -> dict[str, Any]:
    """Everything about a bundle that a person asks for, as JSON."""
    manifest = bundle.manifest
    content = json.loads((bundle.path / MANIFEST).read_text("ascii"))
    golden = [name for name in manifest.files if name.startswith(f"{GOLDEN_IMAGES}/")]
    fields = ("method", "labels", "preprocess", "backend", "precision", "sampling", "buckets")
    return {
        "bundle": str(bundle.path),
        **{name: content[name] for name in fields},
        "loop": manifest.loop,
        "golden": {"images": len(golden), "tolerance": manifest.golden_tolerance},
        "fidelity": fidelity_of(bundle),
        "built_for": content["built_for"],
        "here": here(bundle),
        "sizes": sizes(manifest.files),
        "text": bundle.has(TEXT),
        "source": bundle.has(SOURCE),
        "settings": manifest.settings,
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "created": manifest.created,
        "format_version": content["format_version"],
        "digest": content["digest"],
    }


def fidelity_of(bundle: Bundle) -> dict[str, Any]:
    """Read the fidelity that the export measured, as it wrote it."""
    return json.loads(bundle.file(FIDELITY).read_text("utf-8"))


def here(bundle: Bundle) -> dict[str, Any]:
    """This machine, where it is not the one that the bundle was built on.

    Returns:
        machine; differ: package -> [version at the build, version here or None]; unavailable: why
        the backend cannot run, as far as that is known without loading it, or None.
    """
    built = bundle.manifest.built_for
    found = versions(built.packages)
    differ = {
        name: [version, found.get(name)]
        for name, version in built.packages.items()
        if found.get(name) != version
    }
    try:
        reason = why_unavailable(bundle.manifest.backend)
    except MarnetError as error:
        reason = str(error)
    return {"machine": platform.machine(), "differ": differ, "unavailable": reason}


def sizes(files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Number and bytes of the files of each folder; "." holds those beside the manifest."""
    out: dict[str, dict[str, int]] = {}
    for name, entry in files.items():
        folder = name.split("/")[0] + "/" if "/" in name else "."
        total = out.setdefault(folder, {"files": 0, "bytes": 0})
        total["files"] += 1
        total["bytes"] += entry["bytes"]
    return out


def sentence(fidelity: Mapping[str, Any]) -> str:
    """Say in one line what fidelity.json holds."""
    low, high = fidelity["top1_interval"]
    return (
        f"verified on {fidelity['images']} images: top-1 agreement "
        f"{fidelity['top1_agreement']:.2%} (95 % interval {low:.2%} to {high:.2%}), largest logit "
        f"error {fidelity['logit_error_max']:.2g} of {fidelity['largest_logit']:.3g}"
    )


@dataclass(frozen=True)
class Answers:
    """These are the answers of two bundles to the same images."""

    images: int
    differ: list[tuple[str, str, str]]  # image, label of the first, of the second
    largest_logit: float | None  # of the first; None where the labels are not the same
    logit_difference: float | None  # the largest


def differing(a: Bundle, b: Bundle) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Tell in what two bundles differ: manifest, files, receipt and fidelity, by dotted keys.

    Each difference is (of a, of b), with None for what is not there; of files, their bytes.
    """
    one, other = map(_parts, (a, b))
    found = {part: differences(flatten(one[part]), flatten(other[part])) for part in one}
    files = differences(a.manifest.files, b.manifest.files)
    kept = {name: (x and x["bytes"], y and y["bytes"]) for name, (x, y) in sorted(files.items())}
    return {"manifest": found.pop("manifest"), "files": kept, **found}


def _parts(bundle: Bundle) -> dict[str, dict[str, Any]]:
    manifest = json.loads((bundle.path / MANIFEST).read_text("ascii"))
    del manifest["files"], manifest["digest"]
    manifest.pop("batch_times", None)  # these differ each time
    fidelity = fidelity_of(bundle)
    # At the top already.
    fidelity.get("operating_points", {}).pop(bundle.manifest.sampling.default, None)
    receipt = manifest["precision"].pop("receipt")
    return {"manifest": manifest, "receipt": receipt, "fidelity": fidelity}


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys. Lists stay what they are."""
    if not isinstance(content, Mapping) or not content:
        return {prefix: content}
    return {
        key: value
        for name, inner in content.items()
        for key, value in flatten(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ; None stands for a key that is not there."""
    return {
        key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    }


def compare_answers(a: Bundle, b: Bundle) -> Answers:
    """Open both, and let both decode and classify the golden images of both.

    Raises:
        MissingExtra, BackendUnavailable, SelfTestFailed: one cannot be used here.
    """
    paths = _golden_images([a, b])
    one, other = (Classifier(x.path) for x in (a, b))
    logits = [_logits(x, paths) for x in (one, other)]
    labels = [
        [x.labels[i] for i in found.argmax(axis=1)]
        for x, found in zip((one, other), logits, strict=True)
    ]
    differ = [
        (str(path), first, second)
        for path, first, second in zip(paths, *labels, strict=True)
        if first != second
    ]
    if one.labels != other.labels:
        return Answers(len(paths), differ, None, None)
    largest = float(np.abs(logits[0]).max())
    return Answers(len(paths), differ, largest, float(np.abs(logits[0] - logits[1]).max()))


def _golden_images(bundles: Iterable[Bundle]) -> list[Path]:
    """Each image once, whichever bundle has it."""
    found: dict[str, Path] = {}
    for bundle in bundles:
        for name, entry in bundle.manifest.files.items():
            if name.startswith(f"{GOLDEN_IMAGES}/"):
                found.setdefault(entry["sha256"], bundle.path / name)
    return list(found.values())


def _logits(classifier: Classifier, paths: list[Path]) -> Floats:
    return classifier.logits(classifier.preprocess.pixels(paths))
