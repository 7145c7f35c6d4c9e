"""The test that a bundle answers here as it did when it was built, on its golden images."""

from __future__ import annotations

import platform

import numpy as np
from safetensors.numpy import load_file

from marnet_sdk.bundle import GOLDEN_ANSWERS, Bundle, Manifest
from marnet_sdk.environment import versions
from marnet_sdk.errors import BundleFormatError, InferenceError, SelfTestFailed
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.noise.tables import Floats
from marnet_sdk.run import Batch, Runner

# Two decoders may round a pixel to neighbouring grey levels; more is another image.
_GREY_LEVELS = 1.5


def self_test(bundle: Bundle, preprocess: Preprocess, run: Runner) -> Batch:
    """Answer the golden images at an operating point, and refuse other answers than the golden.

    Raises:
        BundleFormatError: the golden answers do not fit the manifest.
        SelfTestFailed: this machine decodes or answers otherwise.
    """
    manifest, golden = bundle.manifest, load_file(bundle.file(GOLDEN_ANSWERS))
    images = bundle.golden_images()
    pixels = preprocess.pixels(images)
    key = golden_key(manifest, run.operating_point)
    expected = (pixels.shape, (len(images), len(manifest.labels)))
    if key not in golden or (golden["pixels"].shape, golden[key].shape) != expected:
        raise BundleFormatError(
            f"{bundle.path}: its golden answers do not fit the labels and the preprocessing of "
            "its manifest; export it again"
        )
    level = _GREY_LEVELS * preprocess.rescale_factor / min(preprocess.std)
    if (error := float(np.abs(pixels - golden["pixels"]).max())) > level:
        what = f"decoded golden images differ by {error:.3g} (bound {level:.3g})"
        raise SelfTestFailed(mismatch(bundle, what))
    try:
        batch = run(golden["pixels"], samples=run.point.samples)
    except InferenceError as error:
        raise SelfTestFailed(mismatch(bundle, str(error))) from error
    _check_logits(bundle, batch.logits, golden[key])
    return batch


def golden_key(manifest: Manifest, operating_point: str) -> str:
    """The name of an operating point's logits among the golden answers."""
    default = operating_point == manifest.sampling.default
    return "logits" if default else f"logits.{operating_point}"


def _check_logits(bundle: Bundle, logits: Floats, golden: Floats) -> None:
    bound = bundle.manifest.golden_tolerance * float(np.abs(golden).max())
    error = float(np.abs(logits - golden).max())
    labels_differ = logits.argmax(axis=1) != golden.argmax(axis=1)
    # Written so that NaN fails too.
    if not error <= bound or labels_differ.any():
        what = (
            f"golden logits differ by {error:.3g} (bound {bound:.3g}), "
            f"{int(labels_differ.sum())} of {len(logits)} labels differ"
        )
        raise SelfTestFailed(mismatch(bundle, what))


def mismatch(bundle: Bundle, what: str) -> str:
    """Write the message for golden answers that are not reproduced: what differs, what to do."""
    built = bundle.manifest.built_for
    here = versions(built.packages)
    different = [
        f"{name} {version} (here {here[name]})"
        for name, version in built.packages.items()
        if here.get(name, version) != version
    ]
    device = f" --device {built.device}" if built.device != "cpu" else ""
    return (
        f"{bundle.path} does not reproduce its golden answers on this machine: {what}. "
        f"Built for {built.device} {built.machine}; running on {platform.machine()}; "
        f"versions that differ: {', '.join(different) or 'none'}. Export it again on this "
        f"machine: marnet-export --backend {bundle.manifest.backend} "
        f"--precision {bundle.manifest.precision.asked}{device}"
    )
