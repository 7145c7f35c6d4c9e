"""The model card of a checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marnet_train.report import training_tables, verdicts

_ABOUT = {
    "marnet": "A MARNet image classifier: an image encoder whose features are refined by a small "
    "diffusion\nmodel that was trained with text.",
    "seda": "A SeDA image classifier, by our reading of the paper's abstract: a first diffusion "
    "model leads image\nfeatures to the centre of their class, a second one from there to the "
    "features of a text.",
}


_HANDOVERS = {
    "restart": "Its handover is restart: the second starts from noise of its own.",
    "carry": "Its handover is carry: one chain passes through both.",
}


def model_card(path: Path, training: dict[str, Any], labels: Sequence[str]) -> str:
    """Return README.md of a checkpoint.

    It says what the checkpoint is, how it was trained, how good it is and how to use it.

    Args:
        path: where the checkpoint is written.
    """
    splits = [split for split in training["data"]["images"] if split != "train"]
    tables = "\n\n".join(
        table.markdown() for split in splits for table in training_tables(training, split)
    )
    last = splits[-1]
    samples = training["metrics"]["marnet"][last]["samples"]
    seeds = training["metrics"]["marnet"][last]["top1_over_noise_seeds"]
    by_seed = ", ".join(f"{x:.2%}" for x in seeds)
    settings = ", ".join(f"{name} = {value:.4g}" for name, value in training["chosen"].items())
    images = ", ".join(f"{count} {split}" for split, count in training["data"]["images"].items())
    versions = ", ".join(f"{k} {v}" for k, v in training["versions"].items())
    method = training["settings"]["method"]
    handover = ""
    if method == "seda":
        handover = f" {_HANDOVERS[training['settings']['handover']]}"
    return f"""---
library_name: marnet
license: other
tags: [image-classification, diffusion, privileged-information]
---
# {path.name}

{_ABOUT[method]}{handover} Text is not needed to classify.

- classes: {len(labels)} ({", ".join(labels[:12])}{", ..." if len(labels) > 12 else ""})
- recipe: `{training["recipe"]}`, seed {training["seed"]}, {training["seconds"]} s
- images: {images}
- data SHA-256: `{training["data"]["sha256"]}`

{tables}

{" ".join(verdicts(training, "val"))} Validation also chose {settings or "the epochs"}, so its
figures are a little optimistic; test images chose nothing.

A figure averages the probabilities of K runs of the reverse process, here {samples}. The process
starts from noise, so its seed is part of the model: {last} top-1 at {len(seeds)} noise seeds is
{by_seed}.

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
