"""The pictures of an export can be drawn of what a sweep and a risk curve give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from marnet_export.choose.candidates import Candidate, evaluate_candidate, evaluate_exact
from marnet_export.choose.charts import plot_pareto, plot_risk_coverage
from marnet_export.choose.points import choose, pareto_report
from marnet_export.choose.risk import RiskThreshold, risk_coverage


def measured() -> tuple[list[Candidate], Candidate]:
    """A sweep of 500 images, of which the exact process has nine of ten right."""
    rng = np.random.default_rng(0)
    truth = np.zeros(500, np.int64)
    exact = (rng.random(500) < 0.1).astype(np.int64)
    found, process = [], dict[str, Any]()
    for sampler in ("ddpm", "ddim"):
        for steps in (1, 10, 50):
            for samples in (1, 4):
                labels = np.where(rng.random(500) < 0.3 / steps, 1, exact)
                process = {"sampler": sampler, "steps": steps, "samples": samples}
                process |= {"eta": None, "precision": "fp32", "max_drop": 0.01}
                latency = 0.2 * steps * samples
                found.append(
                    evaluate_candidate(labels, exact, truth, latency_ms=latency, **process)
                )
    zero = {"sampler": "none", "steps": 0, "samples": 1, "latency_ms": 0.1, "max_drop": 0.01}
    found.append(evaluate_candidate(exact, exact, truth, **zero))
    process = {"sampler": "ddpm", "steps": 100, "samples": 1, "eta": None, "precision": "fp32"}
    return found, evaluate_exact(exact, truth, latency_ms=20.0, max_drop=0.01, **process)


def colours_of(path: Path) -> int:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000
        assert picture.height >= 600
        return len(picture.convert("RGB").getcolors(2**20) or [])


@pytest.mark.parametrize("few", [True, False])
def test_the_picture_of_a_report_is_one(tmp_path, few):
    pytest.importorskip("matplotlib")
    found, exact = measured()
    found = [] if few else found  # the exact process alone is a picture, too
    report = pareto_report(found, choose(found, exact, 0.01))
    plot_pareto(json.loads(json.dumps(report)), tmp_path / "pareto.png")
    assert colours_of(tmp_path / "pareto.png") > 20  # not an empty sheet


def test_the_picture_of_the_risk_is_one(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    scores = rng.random(300)
    correct = rng.random(300) < 0.8 + 0.2 * scores
    chosen = RiskThreshold(0.5, 0.5, 0.01, 0.04)
    curve = risk_coverage(scores, correct)
    plot_risk_coverage(curve, tmp_path / "risk.png", target=0.05, chosen=chosen)
    assert colours_of(tmp_path / "risk.png") > 20
