"""The model card of a checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def model_card(path: Path, training: dict[str, Any], labels: Sequence[str]) -> str:
    """README.md of a checkpoint: what it is, how it was trained, how good it is, how to use it.

    Args:
        path: where the checkpoint is written.
    """
    metrics = training["metrics"]
    splits = list(metrics["marnet"])
    rows = [
        f"| {title} | "
        + " | ".join(
            f"{metrics[branch][split]['top1']:.2%} | {metrics[branch][split]['top5']:.2%}"
            for split in splits
        )
        + " |"
        for branch, title in (
            ("baseline", "image-only baseline"),
            ("alignment", "alignment branch alone"),
            ("refined", "refined features alone"),
            ("marnet", "MARNet"),
        )
    ]
    header = "| model | " + " | ".join(f"{split} top-1 | {split} top-5" for split in splits) + " |"
    seeds = ", ".join(f"{x:.2%}" for x in metrics["marnet"][splits[-1]]["top1_over_noise_seeds"])
    images = ", ".join(f"{count} {split}" for split, count in training["data"]["images"].items())
    versions = ", ".join(f"{k} {v}" for k, v in training["versions"].items())
    return f"""---
library_name: marnet
license: other
tags: [image-classification, diffusion, privileged-information]
---
# {path.name}

A MARNet image classifier: an image encoder whose features are refined by a small diffusion model
that was trained with text. Text is not needed to classify.

- classes: {len(labels)} ({", ".join(labels[:12])}{", ..." if len(labels) > 12 else ""})
- recipe: `{training["recipe"]}`, seed {training["seed"]}, {training["seconds"]} s
- images: {images}
- data SHA-256: `{training["data"]["sha256"]}`

{header}
|---|{"---|" * (2 * len(splits))}
{chr(10).join(rows)}

The reverse process starts from noise, so its seed is part of the model. {splits[-1]} top-1 at five
noise seeds: {seeds}.

`samples/` holds validation images with their labels; an export is verified on them.

```
marnet-export --checkpoint {shlex.quote(str(path))} --precision fp16
```

In Python; on the hub, ORG/NAME takes the place of the folder, here and above:

```python
from marnet_train.checkpoint import Checkpoint

checkpoint = Checkpoint.from_pretrained({str(path)!r})
```

Versions: {versions}.
"""
