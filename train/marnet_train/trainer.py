"""From a data set and a recipe to a checkpoint: the three phases, the baseline, the evaluation."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from marnet_sdk.console import nearest, say
from marnet_sdk.environment import versions
from marnet_sdk.errors import DataError, EnvironmentMismatch, InvalidInput, NotFound, RecipeError
from marnet_sdk.files import atomic_directory
from marnet_sdk.preprocess import Preprocess
from marnet_train.card import model_card
from marnet_train.checkpoint import (
    SAMPLES,
    TRAINING,
    is_checkpoint,
    load_checkpoint,
    write_json,
    write_model,
)
from marnet_train.data.imagefolder import (
    METADATA,
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
from marnet_train.text import check_vocabulary, encode, load_tokenizer, train_tokenizer

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
    threads: int | None = None,
    device: str = "auto",
    keep_samples: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train on `data` and write a checkpoint to `out`.

    On the CPU, the same seed, threads, processor and versions give the same weights.

    Args:
        threads: CPU threads to compute with; None leaves torch's own number.
        overwrite: replace the checkpoint at `out`.

    Returns:
        The content of training.json: recipe, seed, metrics, data hash, seconds, machine, versions.

    Raises:
        DataError, RecipeError, InvalidInput, OutputExists: before any training.
    """
    started = time.perf_counter()
    _check_apart(data, out)
    with (
        _threads(threads),
        atomic_directory(out, overwrite=overwrite, replaceable=is_checkpoint) as fresh,
    ):
        target, log = pick_device(device), Logger(fresh / "metrics.jsonl")
        folder = read_image_folder(data)
        tokenizer, preprocess = _tokenizer(recipe, folder), _preprocess(recipe)
        model, metrics = _train_both(folder, tokenizer, preprocess, recipe, seed, target, log)
        training = {
            "recipe": name,
            "seed": seed,
            "seconds": round(time.perf_counter() - started, 1),
            "metrics": metrics,
            **_provenance(folder, target),
            "settings": recipe.to_dict(),
        }
        write_model(fresh, model, preprocess)
        tokenizer.save_pretrained(fresh)
        write_json(fresh / TRAINING, training)
        if keep_samples:
            _write_samples(fresh / SAMPLES, folder.splits["val"], seed)
        (fresh / "README.md").write_text(model_card(out, training, folder.labels), "utf-8")
    return training


def _provenance(folder: ImageFolder, device: torch.device) -> dict[str, Any]:
    """What beside recipe and seed decides the weights: data, machine and versions."""
    return {
        "data": {
            "sha256": data_hash(folder),
            "images": {split: len(rows) for split, rows in folder.splits.items()},
        },
        "machine": {
            "threads": torch.get_num_threads(),
            "device": str(device),
            "processor": platform.machine(),
        },
        "versions": versions(PACKAGES),
    }


def _check_apart(data: Path, out: Path) -> None:
    """`out` may be replaced, so the data must be neither in it nor around it."""
    source, target = data.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise InvalidInput(
            f"--out {out} and --data {data} are, or lie in, the same folder; expected two folders "
            "apart: choose another --out, such as runs/NAME"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch compute with that many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    """auto, cpu, cuda or cuda:N; `auto` is the CUDA device if there is one, else the CPU.

    Raises:
        EnvironmentMismatch: a CUDA device is asked for where there is none.
        InvalidInput: none of these names.
    """
    if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]?))?", name):  # not torch's mps, meta, ...
        raise InvalidInput(f"--device {name!r} is unknown; choose auto, cpu, cuda or cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentMismatch(
            f"--device {name}: no CUDA device that torch {torch.__version__} can use; "
            "choose --device cpu, or install a CUDA build of torch"
        )
    return torch.device(name)


def _tokenizer(recipe: Recipe, folder: ImageFolder) -> PreTrainedTokenizerBase:
    limit = getattr(backbone_config(recipe.text), "max_position_embeddings", recipe.max_tokens)
    if recipe.max_tokens > limit:
        raise RecipeError(
            f"max_tokens is {recipe.max_tokens}, but the text encoder has "
            f"max_position_embeddings = {limit}"
        )
    texts = [example.text or "" for example in folder.splits["train"]]
    if "pretrained" in recipe.text:
        settings = {k: v for k, v in recipe.text.items() if k != "pretrained"}
        tokenizer = load_tokenizer(recipe.text["pretrained"], **settings)
        check_vocabulary(tokenizer, texts, recipe.text["pretrained"])
        return tokenizer
    return train_tokenizer(texts)


def _preprocess(recipe: Recipe) -> Preprocess:
    if recipe.image is not None:
        preprocess = Preprocess.from_dict(recipe.image)
        known = {*preprocess.to_dict(), "crop_size"}
        for key in sorted(set(recipe.image) - known):
            raise RecipeError(f"[image]: unknown setting {key!r}.{nearest(key, sorted(known))}")
        return preprocess
    if "pretrained" not in recipe.vision:
        raise RecipeError("a vision encoder from scratch needs an [image] table in the recipe")
    name = recipe.vision["pretrained"]
    settings = {k: v for k, v in recipe.vision.items() if k != "pretrained"}
    try:
        content, _ = ImageProcessingMixin.get_image_processor_dict(name, **settings)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"no preprocessor_config.json could be read from {name!r} ({error}); write an [image] "
            "table (size, image_mean, image_std, ...) in the recipe"
        ) from error
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
        NotFound: there is no such checkpoint, data set or split.
        DataError: the split has a class that the checkpoint does not know.
    """
    _check_split(data, split)
    checkpoint = load_checkpoint(path)
    examples = read_split(data / split, needs_text=False)
    if unknown := sorted({e.label for e in examples} - set(checkpoint.labels)):
        raise DataError(
            f"{data / split} has classes that {path} was not trained on: {unknown[:5]}; "
            f"it knows {list(checkpoint.labels)[:5]} ..."
        )
    store = PixelStore(examples, checkpoint.preprocess, split)
    return _branches(checkpoint.model.to(pick_device(device)), store, examples)


def _check_split(data: Path, split: str) -> None:
    if not data.is_dir():
        raise NotFound(f"--data {data}: no such folder; expected one that holds {split}/")
    if not (data / split).is_dir():
        found = sorted(path.parent.name for path in data.glob(f"*/{METADATA}"))
        raise NotFound(
            f"{data} has no split {split!r}; choose --split from: {', '.join(found) or 'none'}."
            f"{nearest(split, found)}"
        )


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
