"""Is a bundle sound on this machine? Golden answers, text, a second process.

Needs the SDK, and to run a bundle its backend; neither torch nor the export extra.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from marnet_sdk.bundle import GOLDEN_ANSWERS, TEXT, Bundle
from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import MarnetError, SelfTestFailed, VerificationFailed

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
