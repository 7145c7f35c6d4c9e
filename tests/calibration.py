"""Calibration of a model for int8, as an export makes it."""

from __future__ import annotations

import numpy as np
import torch
from tiny import tables_of

from marnet_export.build.types import Calibration
from marnet_export.lower.plan import SamplingPlan, make_plan
from marnet_sdk.noise.tables import Floats
from marnet_train.diffusion import sampler_table
from marnet_train.models.marnet import MARNet


@torch.inference_mode()
def calibrate(
    model: MARNet,
    pixels: Floats | None = None,
    *,
    plan: SamplingPlan | None = None,
    sampler: str = "ddpm",
    steps: int | None = None,
    samples: int = 1,
) -> Calibration:
    """pixels: of images; None: 40 of noise, 32 x 32. steps: None: as many as were trained."""
    if pixels is None:
        pixels = np.random.default_rng(0).standard_normal((40, 3, 32, 32)).astype(np.float32)
    table = sampler_table(model.config.schedule, sampler, steps)
    tables = tables_of(model, plan or make_plan(model), table, samples=samples)
    x_v = model.vision(torch.from_numpy(pixels)).numpy()
    return Calibration(pixels, x_v, tables.coefficients, tables.bias)
