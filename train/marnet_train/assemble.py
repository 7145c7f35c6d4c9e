"""This module makes the parts of a training run from a recipe and a data set: tokenizer,
preprocessing, model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from marnet_sdk.errors import RecipeError, nearest
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.data.examples import DataSet
from marnet_train.evaluate import label_tensor
from marnet_train.features import Images
from marnet_train.models import METHODS
from marnet_train.models.backbones import (
    VisionEncoder,
    backbone_config,
    check_takes,
    load_backbone,
    parts_before,
    plain_config,
)
from marnet_train.models.marnet import MARNet
from marnet_train.phases import TrainingSet
from marnet_train.recipe import AlignmentPhase, Recipe
from marnet_train.stages import Split
from marnet_train.text import check_vocabulary, encode, load_tokenizer, train_tokenizer


def build_model(
    recipe: Recipe, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> MARNet:
    """Build the model of a recipe; the same seed gives the same initial weights.

    Raises:
        RecipeError: a setting that the method does not have, or a model that cannot be.
    """
    if recipe.handover != "restart" and recipe.method != "seda":
        raise RecipeError(
            f"handover {recipe.handover!r} leads from one stage of SeDA to the other, and the "
            f"method is {recipe.method}; add --method seda, or leave handover out"
        )
    torch.manual_seed(seed)
    text = dict(recipe.text)
    if "pretrained" not in text:
        text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    vision_backbone, text_backbone = load_backbone(recipe.vision), load_backbone(text)
    model_type = METHODS[recipe.method]
    own = {field.name for field in fields(model_type.config_type)}
    shared = own & {field.name for field in fields(Recipe)} - {"vision", "text", "samples"}
    config = model_type.config_type(
        vision=plain_config(vision_backbone),
        text=plain_config(text_backbone),
        labels=tuple(labels),
        **{name: getattr(recipe, name) for name in shared},
    )
    return model_type(config, vision_backbone, text_backbone)


def make_tokenizer(recipe: Recipe, folder: DataSet) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a pretrained text encoder, or train one on the training texts.

    Raises:
        RecipeError: none can be loaded, it does not know the texts, or max_tokens is too large.
    """
    limit = getattr(backbone_config(recipe.text), "max_position_embeddings", recipe.max_tokens)
    if 0 < limit < recipe.max_tokens:  # XLNet says -1: none
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


def make_preprocess(recipe: Recipe) -> Preprocess:
    """Read the recipe's [image] table, or what a pretrained vision encoder comes with.

    Raises:
        RecipeError: neither, or an unknown setting.
    """
    if recipe.image is not None:
        preprocess = Preprocess.from_dict(recipe.image)
        known = {*preprocess.to_dict(), "crop_size"}
        for key in sorted(set(recipe.image) - known):
            raise RecipeError(f"[image]: unknown setting {key!r}.{nearest(key, sorted(known))}")
        return preprocess
    source = recipe.vision.get("trunk") or recipe.vision  # a trunk is WISeR's
    if "pretrained" not in source:
        raise RecipeError("a vision encoder from scratch needs an [image] table in the recipe")
    if (of_timm := getattr(backbone_config(source), "pretrained_cfg", None)) is not None:
        processor = {"image_processor_type": "TimmWrapperImageProcessor"}
        return Preprocess.from_dict({**processor, "pretrained_cfg": of_timm})
    name = source["pretrained"]
    settings = {k: v for k, v in source.items() if k != "pretrained"}
    try:
        content, _ = ImageProcessingMixin.get_image_processor_dict(name, **settings)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"no preprocessor_config.json could be read from {name!r} ({error}); write an [image] "
            "table (size, image_mean, image_std, ...) in the recipe"
        ) from error
    return Preprocess.from_dict(content)


def make_training_set(
    folder: DataSet,
    preprocess: Preprocess,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> TrainingSet:
    """Return the training images, and their texts encoded."""
    examples = folder.splits["train"]
    ids, mask = encode(tokenizer, [example.text or "" for example in examples], recipe.max_tokens)
    images = Images(examples, preprocess, "train")
    return TrainingSet(images, label_tensor(examples, folder.labels), ids, mask)


def _check_tuning(vision: VisionEncoder, preprocess: Preprocess, phase: AlignmentPhase) -> None:
    """Check the settings of a phase A in which the image encoder learns."""
    if phase.learn_from is not None:
        parts_before(vision.backbone, phase.learn_from)
    if phase.crop is not None:
        height, width = preprocess.output_shape[1:]
        if phase.crop > min(height, width):
            raise RecipeError(
                f"crop is {phase.crop}, but images are {height} x {width} pixels; expected at most "
                f"{min(height, width)}, or no crop, and the encoder learns on whole images"
            )
        check_takes(vision, phase.crop)


@dataclass(frozen=True, eq=False)
class Prepared:
    """This is a training that can begin."""

    tokenizer: PreTrainedTokenizerBase
    preprocess: Preprocess
    model: MARNet
    data: TrainingSet
    splits: dict[str, Split]  # val and, where there is one, test


def prepare(folder: DataSet, recipe: Recipe, seed: int, device: torch.device) -> Prepared:
    """Make everything that a training needs; the same seed gives the same initial weights.

    Raises:
        RecipeError: the recipe cannot be followed. DataError: an image cannot be decoded.
    """
    tokenizer, preprocess = make_tokenizer(recipe, folder), make_preprocess(recipe)
    # Built first: what is wrong with a recipe should show before every image has been decoded.
    model = build_model(recipe, folder.labels, tokenizer, seed).to(device)
    _check_tuning(model.vision, preprocess, recipe.alignment)
    data = make_training_set(folder, preprocess, tokenizer, recipe)
    splits = {
        name: Split(Images(examples, preprocess, name), label_tensor(examples, folder.labels))
        for name, examples in folder.splits.items()
        if name != "train"
    }
    if not recipe.alignment.frozen:  # images that cannot be decoded should show now
        for images in (data.images, *(split.images for split in splits.values())):
            _ = images.store
    return Prepared(tokenizer, preprocess, model, data, splits)
