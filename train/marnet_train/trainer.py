"""From a data set and a recipe to a checkpoint: the three phases, the baseline, the evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from marnet_sdk.console import nearest, say
from marnet_sdk.environment import versions
from marnet_sdk.errors import DataError, EnvironmentMismatch, InvalidInput, RecipeError
from marnet_sdk.files import atomic_directory
from marnet_sdk.preprocess import Preprocess
from marnet_train.card import model_card
from marnet_train.checkpoint import (
    SAMPLES,
    TRAINING,
    load_checkpoint,
    write_json,
    write_model,
)
from marnet_train.data.imagefolder import (
    Example,
    ImageFolder,
    data_hash,
    read_image_folder,
    read_split,
    write_split,
)
from marnet_train.data.pixels import PixelStore
from marnet_train.evaluate import (
    accuracy,
    evaluate_branches,
    label_tensor,
    visual_features,
)
from marnet_train.models.backbones import backbone_config, load_backbone
from marnet_train.models.marnet import MARNet, MarnetConfig
from marnet_train.phases import (
    TrainingSet,
    cache_features,
    train_alignment,
    train_baseline,
    train_fusion,
    train_refinement,
)
from marnet_train.recipe import Recipe
from marnet_train.text import encode, load_tokenizer, train_tokenizer

MAX_SAMPLES = 512
PACKAGES = ("marnet", "torch", "transformers", "tokenizers", "numpy", "pillow")
NOISE_SEEDS = (0, 1, 2, 3, 4)  # accuracy is reported over these; 0 is the one that is served


class Logger:
    """Appends one line per epoch to metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)


def fit(
    data: Path,
    recipe: Recipe,
    out: Path,
    *,
    name: str = "custom",
    seed: int = 0,
    device: str = "auto",
    keep_samples: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train on `data` and write a checkpoint to `out`.

    Returns:
        The content of training.json: recipe, seed, metrics, data hash, seconds, versions.

    Raises:
        DataError, RecipeError, OutputExists: before any training.
    """
    started = time.perf_counter()
    with atomic_directory(out, overwrite=overwrite) as fresh:
        folder = read_image_folder(data)
        tokenizer, preprocess = _tokenizer(recipe, folder), _preprocess(recipe)
        target, log = pick_device(device), Logger(fresh / "metrics.jsonl")
        model, metrics = _train_both(folder, tokenizer, preprocess, recipe, seed, target, log)
        training = {
            "recipe": name,
            "seed": seed,
            "seconds": round(time.perf_counter() - started, 1),
            "metrics": metrics,
            "data": {
                "sha256": data_hash(folder),
                "images": {split: len(rows) for split, rows in folder.splits.items()},
            },
            "versions": versions(PACKAGES),
            "settings": recipe.to_dict(),
        }
        write_model(fresh, model, preprocess)
        tokenizer.save_pretrained(fresh)
        write_json(fresh / TRAINING, training)
        if keep_samples:
            _write_samples(fresh / SAMPLES, folder.splits["val"], seed)
        (fresh / "README.md").write_text(model_card(out.name, training, folder.labels), "utf-8")
    return training


def _train_both(
    folder: ImageFolder,
    tokenizer: PreTrainedTokenizerBase,
    preprocess: Preprocess,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    log: Logger,
) -> tuple[MARNet, dict[str, Any]]:
    """The image-only baseline, then MARNet from the same initial weights; and both's metrics."""
    # Built first: what is wrong with a recipe should show before every image has been decoded.
    baseline = build_model(recipe, folder.labels, tokenizer, seed).to(device)
    training_set = _training_set(folder, preprocess, tokenizer, recipe)
    stores = {
        split: PixelStore(examples, preprocess, split)
        for split, examples in folder.splits.items()
        if split != "train"
    }
    train_baseline(baseline, training_set, recipe, seed, log)
    metrics = {"baseline": _evaluate_baseline(baseline, folder, stores)}
    say(_line("baseline", metrics["baseline"]))
    del baseline  # its memory is wanted
    model = build_model(recipe, folder.labels, tokenizer, seed).to(device)
    train_marnet(model, training_set, recipe, seed, log)
    metrics |= _evaluate_marnet(model, folder, stores)
    for branch in ("alignment", "refined", "marnet"):
        say(_line(branch, metrics[branch]))
    return model, metrics


def train_marnet(model: MARNet, data: TrainingSet, recipe: Recipe, seed: int, log: Logger) -> None:
    """Phases A, B and C, in order."""
    train_alignment(model, data, recipe, seed, log, "alignment")
    features = cache_features(model, data, recipe, seed)
    train_refinement(model, features, recipe, seed, log)
    train_fusion(model, features, recipe, seed, log)


def build_model(
    recipe: Recipe, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> MARNet:
    """The model of a recipe; the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    text = dict(recipe.text)
    if "pretrained" not in text:
        text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    vision_backbone, text_backbone = load_backbone(recipe.vision), load_backbone(text)
    config = MarnetConfig(
        vision=_plain(vision_backbone.config),
        text=_plain(text_backbone.config),
        labels=tuple(labels),
        dim=recipe.dim,
        hidden=recipe.hidden,
        time_dim=recipe.time_dim,
        fusion=recipe.fusion,
        schedule=recipe.schedule,
    )
    return MARNet(config, vision_backbone, text_backbone)


def _plain(config: Any) -> dict[str, Any]:
    """A transformers configuration as JSON data, without what concerns heads we do not use."""
    content = json.loads(config.to_json_string(use_diff=False))
    unused = ("architectures", "id2label", "label2id", "loss_type")
    return {k: v for k, v in content.items() if k not in unused}


def pick_device(name: str) -> torch.device:
    """`auto` is the CUDA device if there is one, else the CPU.

    Raises:
        EnvironmentMismatch: a CUDA device is asked for where there is none.
        InvalidInput: not the name of a device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentMismatch(
            f"--device {name}: no CUDA device that torch {torch.__version__} can use; "
            "choose --device cpu, or install a CUDA build of torch"
        )
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidInput(f"--device {name!r} is unknown; choose auto, cpu or cuda") from error


def _tokenizer(recipe: Recipe, folder: ImageFolder) -> PreTrainedTokenizerBase:
    limit = getattr(backbone_config(recipe.text), "max_position_embeddings", recipe.max_tokens)
    if recipe.max_tokens > limit:
        raise RecipeError(
            f"max_tokens is {recipe.max_tokens}, but the text encoder has "
            f"max_position_embeddings = {limit}"
        )
    if "pretrained" in recipe.text:
        settings = {k: v for k, v in recipe.text.items() if k != "pretrained"}
        return load_tokenizer(recipe.text["pretrained"], **settings)
    return train_tokenizer(example.text or "" for example in folder.splits["train"])


def _preprocess(recipe: Recipe) -> Preprocess:
    if recipe.image is not None:
        preprocess = Preprocess.from_dict(recipe.image)
        known = {*preprocess.to_dict(), "crop_size"}
        for key in sorted(set(recipe.image) - known):
            raise RecipeError(f"[image]: unknown setting {key!r}.{nearest(key, sorted(known))}")
        return preprocess
    if "pretrained" not in recipe.vision:
        raise RecipeError("a vision encoder from scratch needs an [image] table in the recipe")
    settings = {k: v for k, v in recipe.vision.items() if k != "pretrained"}
    content, _ = ImageProcessingMixin.get_image_processor_dict(
        recipe.vision["pretrained"], **settings
    )
    return Preprocess.from_dict(content)


def _training_set(
    folder: ImageFolder,
    preprocess: Preprocess,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> TrainingSet:
    examples = folder.splits["train"]
    ids, mask = encode(tokenizer, [example.text or "" for example in examples], recipe.max_tokens)
    store = PixelStore(examples, preprocess, "train")
    return TrainingSet(store, label_tensor(examples, folder.labels), ids, mask)


def _evaluate_baseline(
    model: MARNet, folder: ImageFolder, stores: dict[str, PixelStore]
) -> dict[str, Any]:
    """split -> top1, top5, images of the image-only baseline."""
    out = {}
    for split, store in stores.items():
        with torch.no_grad():
            x_v = visual_features(model, store)
            logits = model.alignment_classifier(model.align_vision(x_v))
        labels = label_tensor(folder.splits[split], folder.labels)
        out[split] = asdict(accuracy(logits.cpu(), labels))
    return out


def _evaluate_marnet(
    model: MARNet, folder: ImageFolder, stores: dict[str, PixelStore]
) -> dict[str, Any]:
    """branch -> split -> what `_branches` gives."""
    out: dict[str, Any] = {}
    for split, store in stores.items():
        for branch, found in _branches(model, store, folder.splits[split]).items():
            out.setdefault(branch, {})[split] = found
    return out


def _branches(
    model: MARNet, store: PixelStore, examples: Sequence[Example]
) -> dict[str, dict[str, Any]]:
    """branch -> top1, top5 at the served noise seed, and top-1 at each of `NOISE_SEEDS`."""
    labels = label_tensor(examples, model.config.labels).to(model.vision_mean.device)
    found = evaluate_branches(model, visual_features(model, store), labels, NOISE_SEEDS)
    return {
        branch: asdict(per_seed[0]) | {"top1_over_noise_seeds": [m.top1 for m in per_seed]}
        for branch, per_seed in found.items()
    }


def evaluate_checkpoint(
    path: Path, data: Path, split: str, device: str = "auto"
) -> dict[str, dict[str, Any]]:
    """Accuracy of each branch of a checkpoint on one split of a data set.

    Raises:
        DataError: the split is missing or has a class that the checkpoint does not know.
    """
    checkpoint = load_checkpoint(path)
    examples = read_split(data / split, needs_text=False)
    if unknown := sorted({e.label for e in examples} - set(checkpoint.labels)):
        raise DataError(
            f"{data / split} has classes that {path} was not trained on: {unknown[:5]}; "
            f"it knows {list(checkpoint.labels)[:5]} ..."
        )
    store = PixelStore(examples, checkpoint.preprocess, split)
    return _branches(checkpoint.model.to(pick_device(device)), store, examples)


def _line(branch: str, splits: dict[str, Any]) -> str:
    parts = [f"{s} top-1 {m['top1']:.2%} top-5 {m['top5']:.2%}" for s, m in splits.items()]
    return f"{branch:<10} " + ", ".join(parts)


def _write_samples(target: Path, examples: Sequence[Example], seed: int) -> None:
    """Copy up to `MAX_SAMPLES` validation images with their labels and texts."""
    chosen = np.random.default_rng(seed).permutation(len(examples))[:MAX_SAMPLES]
    rows = ((i, examples[i]) for i in sorted(chosen))
    # Numbered: images of different sub-folders may share a name.
    write_split(
        target,
        ((f"{i:06d}{e.image.suffix}", e.image.read_bytes(), e.label, e.text) for i, e in rows),
    )
