"""This module measures how much of an answer is owed to the noise, and to how much of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from marnet_export.prove.built import Built
from marnet_export.prove.fidelity import wilson_interval
from marnet_export.prove.reference import Reference
from marnet_sdk.uncertainty import mean_logits, schedule, settled, softmax, summarise
from marnet_train.diffusion import SamplerTable

# What the instability floor and settling may each cost: seconds for the paper's network.
CHAIN_STEPS = 200_000


def instability_floor(
    reference: Reference,
    table: SamplerTable,
    seed: int,
    samples: int,
    *,
    seeds: int = 5,
    most: int = CHAIN_STEPS,
) -> dict[str, Any]:
    """Share of images whose label depends on the noise seed, in the float32 reference itself.

    No export can be expected to agree with itself at another seed better than this.

    Args:
        most: chain steps to take in all; of more images, the first ones are used.
    """
    count = max(16, most // (seeds * samples * len(table.timesteps)))
    used = [(seed + i) % 2**64 for i in range(seeds)]
    logits = [reference.logits(table, s, samples, limit=count) for s in used]
    labels = np.stack([mean_logits(found).argmax(axis=1) for found in logits])  # [seeds, N]
    changing = (labels != labels[0]).any(axis=0)
    return {
        "seeds": used,
        "images": len(changing),
        "share": float(changing.mean()),
        "interval": wilson_interval(int(changing.sum()), len(changing)),
    }


def settling(
    built: Built, name: str, *, samples: int = 8, most: int = CHAIN_STEPS // 2
) -> dict[str, Any]:
    """Measure how `stop="settled"` does against all of its samples, on these images.

    Returns:
        samples: what there would be; mean_samples: what was drawn; agreement: share of images
        with the label that all samples give, and its interval.
    """
    samples = max(samples, built.sampling.points[name].samples)
    steps = len(built.sampling.points[name].timesteps)
    limit = max(16, most // (samples * steps))
    probabilities = softmax(built.samples(name, samples, limit))  # [N, K, C]
    count = len(probabilities)
    drawn = np.full(count, samples)
    for look in reversed(schedule(samples)):
        drawn[settled(probabilities[:, :look], samples)] = look
    early = summarise(probabilities, drawn).winner
    same = int((early == summarise(probabilities).winner).sum())
    return {
        "samples": samples,
        "images": count,
        "mean_samples": float(drawn.mean()),
        "agreement": same / count,
        "interval": wilson_interval(same, count),
    }
