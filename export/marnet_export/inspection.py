"""Describe a bundle, check whether it is sound, and compare it with another.

Needs the SDK, and to run a bundle its backend; neither torch nor the export extra.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from marnet_sdk.backends import why_unavailable
from marnet_sdk.bundle import (
    FIDELITY,
    GOLDEN_ANSWERS,
    GOLDEN_IMAGES,
    MANIFEST,
    SOURCE,
    TEXT,
    Bundle,
)
from marnet_sdk.classifier import Classifier
from marnet_sdk.environment import versions
from marnet_sdk.errors import MarnetError, SelfTestFailed, VerificationFailed
from marnet_sdk.noise.tables import Floats

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
_NOT_OPEN = "the bundle refuses to open"
_UNLIKE, _ELSEWHERE = VerificationFailed.exit_code, SelfTestFailed.exit_code


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    outcome: str  # PASSED, FAILED, SKIPPED
    detail: str
    exit_code: int = 0  # 3: not what was verified; 5: right, but not on this machine


def passed(name: str, detail: str) -> Check:
    return Check(name, PASSED, detail)


def failed(name: str, detail: str, exit_code: int = _UNLIKE) -> Check:
    return Check(name, FAILED, detail, exit_code)


# --- what it is


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


# --- whether it is sound


def check_here(bundle: Bundle) -> list[Check]:
    """Check whether a bundle whose bytes are right runs on this machine, as far as it can tell
    itself.

    Raises:
        MissingExtra, BackendUnavailable, BundleFormatError: it cannot be opened at all.
    """
    checks, classifier = check_golden(bundle)
    return [*checks, check_text(bundle, classifier), check_second_process(bundle, classifier)]


def check_golden(bundle: Bundle) -> tuple[list[Check], Classifier | None]:
    """Open the bundle at every operating point, as a deployed process does.

    Returns:
        The checks, and the classifier of the default point, if it opens.

    Raises:
        MissingExtra, BackendUnavailable, BundleFormatError: it cannot be opened at all.
    """
    checks, opened = [], None
    default = bundle.manifest.sampling.default
    for name in bundle.manifest.sampling.points:
        what = f"golden answers, {name}"
        try:
            classifier = Classifier(bundle.path, operating_point=name)
        except SelfTestFailed as error:
            checks.append(failed(what, str(error), _ELSEWHERE))
            continue
        checks.append(passed(what, f"reproduced in {_point(bundle, name)}"))
        opened = classifier if name == default else opened
    return checks, opened


def _point(bundle: Bundle, name: str) -> str:
    point = bundle.manifest.sampling.points[name]
    if not point.timesteps:
        return "no loop"
    return f"{len(point.timesteps)} {point.sampler} steps, samples: {point.samples}"


def check_text(bundle: Bundle, classifier: Classifier | None) -> Check:
    """Open the text encoder, which reproduces its golden embeddings or refuses."""
    name = "golden texts"
    if not bundle.has(TEXT):
        return Check(name, SKIPPED, "the bundle has no text encoder")
    if classifier is None:
        return Check(name, SKIPPED, _NOT_OPEN)
    try:
        width = classifier.embed_text([]).shape[-1]
    except MarnetError as error:
        elsewhere = error.exit_code == _ELSEWHERE
        return failed(name, str(error), _ELSEWHERE if elsewhere else _UNLIKE)
    return passed(name, f"reproduced, embeddings of {width} numbers")


# Everything from the imports on is as in a deployed process.
_SECOND_PROCESS = """
import sys
import tempfile
import numpy as np
from safetensors.numpy import load_file
from marnet_sdk import Classifier
classifier = Classifier(sys.argv[1])
pixels = load_file(classifier.bundle.path / "golden/answers.safetensors")["pixels"]
np.save(sys.argv[2], classifier.logits(pixels))
"""


def check_second_process(bundle: Bundle, classifier: Classifier | None) -> Check:
    """Open the bundle in a fresh process and compare the golden logits with this one's."""
    name = "second process"
    if classifier is None:
        return Check(name, SKIPPED, _NOT_OPEN)
    with tempfile.TemporaryDirectory() as folder:  # what a process prints may be anybody's
        answers = Path(folder) / "logits.npy"
        command = [sys.executable, "-c", _SECOND_PROCESS, bundle.path.absolute(), answers]
        found = subprocess.run(command, capture_output=True, check=False)
        if found.returncode:
            last = found.stderr.decode(errors="replace").strip().splitlines()[-1:]
            return failed(
                name, f"ends with exit code {found.returncode}: {''.join(last) or 'no message'}"
            )
        there = np.load(answers)
    here = classifier.logits(load_file(bundle.file(GOLDEN_ANSWERS))["pixels"])
    difference = float(np.abs(here - there).max())
    bound = bundle.manifest.golden_tolerance * float(np.abs(here).max())
    detail = f"its golden logits differ by up to {difference:.3g} (bound {bound:.3g})"
    return passed(name, detail) if difference <= bound else failed(name, detail)


# --- how two differ


@dataclass(frozen=True)
class Answers:
    """These are the answers of two bundles to the same images."""

    images: int
    differ: list[tuple[str, str, str]]  # image, label of the first, of the second
    largest_logit: float | None  # of the first; None where the labels are not the same
    logit_difference: float | None  # the largest


def manifest_differences(a: Bundle, b: Bundle) -> dict[str, tuple[Any, Any]]:
    """Keys of the manifests, dotted, whose values differ: [of a, of b]. Not of files, receipt."""
    flat = []
    for bundle in (a, b):
        content = json.loads((bundle.path / MANIFEST).read_text("ascii"))
        del content["files"], content["digest"], content["precision"]["receipt"]
        flat.append(flatten(content))
    return differences(*flat)


def receipt_differences(a: Bundle, b: Bundle) -> dict[str, tuple[Any, Any]]:
    """List the shares in which the receipts of two bundles differ."""
    receipts = [x.manifest.precision.receipt for x in (a, b)]
    flat = [flatten({part: asdict(share) for part, share in r.items()}) for r in receipts]
    return differences(*flat)


def fidelity_differences(a: Bundle, b: Bundle) -> dict[str, tuple[Any, Any]]:
    """List the figures in which the measurements of two exports differ."""
    flat = []
    for bundle in (a, b):
        content = fidelity_of(bundle)
        # At the top already.
        content.get("operating_points", {}).pop(bundle.manifest.sampling.default, None)
        flat.append(flatten(content))
    return differences(*flat)


def file_differences(a: Bundle, b: Bundle) -> dict[str, tuple[int | None, int | None]]:
    """Files of other content: their sizes in a and b; None where there is no such file."""
    one, other = a.manifest.files, b.manifest.files
    return {
        name: (one.get(name, {}).get("bytes"), other.get(name, {}).get("bytes"))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    }


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
