"""The score under which each operating point should abstain, found on the images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from marnet_export.choose.charts import plot_risk_coverage
from marnet_export.choose.risk import risk_coverage, threshold_for_risk
from marnet_export.prove.built import Built
from marnet_export.work import Job
from marnet_sdk.bundle import Sampling
from marnet_sdk.errors import DataError
from marnet_sdk.uncertainty import softmax
from marnet_train.checkpoint import write_json

RISK, RISK_PLOT = "risk_coverage.json", "risk_coverage.png"


def with_thresholds(job: Job, built: Built) -> Sampling:
    """Find the score under which each point should abstain; write the risk-coverage curve."""
    sampling, truth = built.sampling, job.images.labels
    target = job.settings.target_risk
    if truth is None:
        if target is not None:
            raise DataError("--target-risk needs images whose classes the checkpoint knows")
        return sampling
    points, curves = dict(sampling.points), {}
    for name, point in sampling.points.items():
        probabilities = softmax(built.samples(name, point.samples)).mean(axis=1)
        scores, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
        curve = risk_coverage(scores, correct)
        curves[name] = {
            key: np.asarray(getattr(curve, key)).tolist()
            for key in ("threshold", "coverage", "risk")
        }
        if target is not None:
            found = threshold_for_risk(scores, correct, target)
            points[name] = replace(point, abstain_below=found.threshold)
            curves[name]["chosen"] = found._asdict() | {"target": target}
            job.say(
                f"{name}: scores below {found.threshold:.4f} are not to be relied on; on "
                f"{len(truth)} images the others ({found.coverage:.1%}) are wrong in "
                f"{found.risk:.2%}, at most {found.upper_bound:.2%} with 95 % confidence"
                + (" if they had not also chosen the point" if len(points) > 1 else "")
            )
            if name == sampling.default:
                plot_risk_coverage(curve, job.fresh / RISK_PLOT, target=target, chosen=found)
    write_json(job.fresh / RISK, {"images": len(truth), "operating_points": curves})
    return replace(sampling, points=points)
