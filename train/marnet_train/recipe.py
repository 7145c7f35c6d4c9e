"""Recipes: small TOML files that say how to train. Checked when read; unknown keys are errors."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from marnet_sdk.errors import MarnetError, RecipeError, nearest
from marnet_train.diffusion import SCHEDULE_PRESETS, ScheduleConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Augment:
    """This is the random geometry of training images; each is drawn per image and view."""

    rotate: float = 0.0  # largest angle, degrees
    shift: float = 0.0  # largest shift, fraction of the side
    scale: float = 0.0  # scale is drawn from 1 - this to 1 + this
    flip: bool = False  # mirror left-right half of the time


METHODS = {"marnet": "MARNet", "seda": "SeDA"}  # name of a method -> how it is written
Auto = Literal["auto"]  # training tries a few values and keeps the one that is best on validation
SEMANTICS = ("text", "labels", "random", "shuffled")
HANDOVERS = ("restart", "carry")  # from SeDA's stage 1 to its stage 2: see models/seda.py
ALIGNMENTS = ("ita", "swd", "ssan", "cdd", "sdm", "team")  # see losses/alignment.py


TUNING = ("head_epochs", "learn_from", "keep_statistics", "crop")  # of an encoder that learns


@dataclass(frozen=True)
class TextPhase:
    """This phase comes before phase A, for a text encoder from scratch: F_s and a linear head learn
    the class from the text, by cross-entropy. With `lr_text = 0` the encoder is frozen afterwards.
    """

    epochs: int = 12
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05


@dataclass(frozen=True)
class AlignmentPhase:
    """Phase A trains encoders, projectors and the alignment classifier, on L_EMA (eq. 13)."""

    epochs: int = 10
    batch: int = 64
    lr_backbone: float = 5e-5  # 0 keeps the image encoder frozen: its features are computed once
    lr_heads: float = 5e-4
    lr_text: float = 0.0  # 0 keeps the text encoder frozen
    head_epochs: int | None = None  # first the heads alone learn, on the encoder as it came
    learn_from: str | None = None  # the first part of the image encoder that learns; none: all do
    keep_statistics: bool = False  # those of batch normalisation, as a pretrained encoder has them
    crop: int | None = None  # side of the random squares that it learns on; none: whole images
    weight_decay: float = 0.05
    warmup: float = 0.1  # fraction of all steps
    dropout: float = 0.0  # of x_v before its projection, in training
    ce_weight: float = 1.0  # alpha_1
    loss: str = "ita"  # what aligns images and texts: one of `ALIGNMENTS`
    ita_weight: float | Auto = 0.5  # beta, of that loss
    temperature: float = 0.07  # tau
    learn_temperature: bool = False  # start at `temperature`; 1 / tau stays at most 100
    dedup_negatives: bool = False  # pairs of the same text are no negatives; team always has it so
    per_class: int = 1  # images of a class in a batch; 1: batches are drawn at random
    joint: bool = False  # minimise L_EMA + L_CDR (eq. 20), the latter through the encoder as well
    keep_best: bool = False  # keep the weights that are best on validation, and not the last ones
    patience: int | None = None  # with keep_best: stop after so many looks without a better one
    bf16: bool = False  # autocast on CUDA devices

    @property
    def frozen(self) -> bool:
        """Tell whether the image encoder stays as it is."""
        return self.lr_backbone == 0

    @property
    def reads_tokens(self) -> bool:
        """Tell whether the loss reads the vectors of single tokens."""
        return self.loss == "team"


@dataclass(frozen=True)
class RefinementPhase:
    """Phase B trains the denoiser and its classifier on cached features, on L_CDR (eq. 20)."""

    epochs: int = 200  # at most: the weights are kept that are best on validation
    batch: int = 1024
    lr: float = 1e-3
    weight_decay: float = 0.05
    views: int = 4  # augmented views of each training image that are cached
    dropout: float = 0.0  # of the condition, in training
    pure_noise: float = 0.0  # share of the rows at t = T; the others have t ~ Uniform{1..T}
    patience: int | None = None  # stop after so many looks at validation without a better one
    ce_weight: float = 1.0  # alpha_2
    norm_weight: float | Auto = 1.0  # gamma, of the squared norm (eq. 19): a sum over dimensions


@dataclass(frozen=True)
class SemanticPhase:
    """SeDA's stage 1 trains the semantic learner between phases A and B, on cached features.

    On training images the learner is nearly always right, and the translator would learn to trust
    it. So a share of its vectors is replaced by the centre of another class in phase B.
    """

    epochs: int = 100  # at most, as in phase B
    batch: int = 1024
    lr: float = 1e-3
    weight_decay: float = 0.05
    ce_weight: float = 1.0
    norm_weight: float = 1.0  # of the squared distance to the centre: a sum over dimensions
    wrong: float = 0.15  # share of the training vectors that are another class's centre
    jitter: float = 0.1  # standard deviation of what is added to training vectors
    patience: int | None = None  # as in phase B


@dataclass(frozen=True)
class FusionPhase:
    """Phase C trains the final classifier on cached features, with everything else frozen."""

    epochs: int = 100  # at most, as in phase B
    batch: int = 1024
    lr: float = 1e-2
    weight_decay: float = 1e-3
    draws: int = 2  # noise draws of x_CDR per cached view
    patience: int | None = None  # as in phase B


@dataclass(frozen=True)
class Recipe:
    """This is one training run, whole. `vision` and `text` are described in models/backbones.py."""

    vision: dict[str, Any]
    text: dict[str, Any]
    method: str = "marnet"
    dim: int = 768
    hidden: int = 1024
    time_dim: int = 64
    fusion: str = "concat"
    fusion_level: str = "feature"  # or "logit": the logits of both branches are fused
    text_pooling: str = "mean"  # or "first": the vector of [CLS] is x_s
    max_tokens: int = 64
    samples: int | Auto = 1  # K, noise samples whose probabilities are averaged when classifying
    progressive: bool = False  # a denoiser also sees its own estimate of the step before
    clip_norm: float | None = None  # of gradients, over all that a phase trains; none: not clipped
    semantics: str = "text"  # what plays x_s: the text, or a control (see semantics.py)
    image: dict[str, Any] | None = None  # preprocessor_config.json keys; None: the checkpoint's
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    semantic_schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(steps=50))
    semantic_steps: int = 10  # these two are of seda's first stage
    handover: str = "restart"  # or "carry": one chain passes through both stages of seda
    augment: Augment = field(default_factory=Augment)
    text_phase: TextPhase | None = None
    alignment: AlignmentPhase = field(default_factory=AlignmentPhase)
    semantic: SemanticPhase = field(default_factory=SemanticPhase)
    refinement: RefinementPhase = field(default_factory=RefinementPhase)
    fusion_phase: FusionPhase = field(default_factory=FusionPhase)

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("semantics", self.semantics, SEMANTICS)
        check_choice("handover", self.handover, HANDOVERS)
        _check_alignment(self.alignment, self.semantics)
        for phase in (self.alignment, self.refinement):
            if phase.dropout >= 1:
                raise RecipeError(f"dropout must be below 1, got {phase.dropout}")
        if self.alignment.patience is not None and not self.alignment.keep_best:
            raise RecipeError("patience of [alignment] needs keep_best = true there")
        if self.clip_norm == 0:
            raise RecipeError("clip_norm must be above 0, got 0.0; leave it out not to clip")
        if self.alignment.temperature == 0:
            raise RecipeError("temperature must be above 0, got 0.0")
        shares = {
            "warmup": self.alignment.warmup,
            "pure_noise": self.refinement.pure_noise,
            "wrong": self.semantic.wrong,
        }
        for name, share in shares.items():
            if share > 1:
                raise RecipeError(f"{name} must be at most 1, got {share}")
        if self.alignment.joint and self.method != "marnet":
            raise RecipeError(f"joint training is MARNet's; set joint = false for {self.method}")
        if self.alignment.joint and self.alignment.lr_text > 0:
            raise RecipeError(
                "joint training needs a text encoder that stands still: set lr_text = 0"
            )

    def but(self, **phases: Mapping[str, Any]) -> Recipe:
        """Return the recipe with other settings of some phases: `but(alignment={"epochs": 3})`."""
        return replace(self, **{n: replace(getattr(self, n), **s) for n, s in phases.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, for training.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Read what `to_dict` wrote, or the tables of a recipe file.

        Raises:
            RecipeError: an unknown key or a value of the wrong type; names `where`.
        """
        return _build(cls, content, where)


def check_choice(what: str, value: str, choices: Collection[str]) -> None:
    """Check that a setting names one of some choices.

    Raises:
        RecipeError: it does not; the message has the nearest of them.
    """
    if value not in choices:
        raise RecipeError(
            f"{what} {value!r} is unknown.{nearest(value, list(choices))} Choose from "
            f"{', '.join(choices)}"
        )


def _check_alignment(phase: AlignmentPhase, semantics: str) -> None:
    check_choice("alignment loss", phase.loss, ALIGNMENTS)
    if 2 * phase.per_class > max(2, phase.batch):
        raise RecipeError(
            f"per_class is {phase.per_class}, but a batch of {phase.batch} must hold two classes "
            f"or more; set it to at most {phase.batch // 2}"
        )
    if phase.loss == "cdd" and phase.per_class < 2:
        raise RecipeError(
            "the alignment loss cdd compares images within classes, so batches must hold several "
            f"of each: set per_class = {min(6, max(2, phase.batch // 2))}"
        )
    if phase.frozen and (set_ones := [name for name in TUNING if getattr(phase, name)]):
        raise RecipeError(
            f"{' and '.join(set_ones)}: only an image encoder that learns has that, and with "
            "lr_backbone = 0 it is frozen: set lr_backbone above 0, such as 5e-5, or leave it out"
        )
    if phase.reads_tokens and phase.frozen:
        raise RecipeError(
            f"the alignment loss {phase.loss} reads the tokens of images, and of a frozen image "
            "encoder (lr_backbone = 0) only x_v is kept: set lr_backbone above 0, such as 5e-5, or "
            "choose another loss"
        )
    if phase.reads_tokens and semantics != "text":
        raise RecipeError(
            f"the alignment loss {phase.loss} reads the tokens of each image's own text, which "
            f'semantics = "{semantics}" replaces by vectors: set semantics = "text" or choose '
            "another loss"
        )


def chosen(asked: Recipe, resolved: Recipe) -> dict[str, Any]:
    """Return what took the place of every "auto": name of the setting -> value."""
    leaves = _leaves(asked.to_dict(), resolved.to_dict())
    return {name: after for name, before, after in leaves if before == "auto"}


def _leaves(
    one: Mapping[str, Any], other: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings of two recipes side by side: (dotted name, value, value)."""
    for key, value in one.items():
        if isinstance(value, dict) and isinstance(other[key], dict):
            yield from _leaves(value, other[key], f"{where}{key}.")
        else:
            yield f"{where}{key}", value, other[key]


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    folder = resources.files("marnet_train") / "recipes"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_recipe(name: str) -> Recipe:
    """Read a recipe by the name of one that comes with the package, or from a .toml file.

    Raises:
        RecipeError: no such recipe, malformed TOML, an unknown key or a value of the wrong type.
    """
    if name in recipe_names():
        content = (resources.files("marnet_train") / "recipes" / f"{name}.toml").read_bytes()
    elif name.endswith(".toml") and Path(name).is_file():
        content = Path(name).read_bytes()
    else:
        raise RecipeError(
            f"no recipe {name!r}.{nearest(name, recipe_names())} The package has "
            f"{', '.join(recipe_names())}; or give the path of a .toml file"
        )
    try:
        table = tomllib.loads(content.decode("utf-8-sig"))
    # Not only TOMLDecodeError: text that is not UTF-8, numbers of 5,000 digits, endless brackets.
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{name}: not valid TOML: {error}") from error
    return Recipe.from_dict(table, name)


def _build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from a TOML table, recursively, checking every key and value."""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}: unknown setting {key!r}.{nearest(key, list(known))}")
    for name, spec in known.items():
        required = spec.default is MISSING and spec.default_factory is MISSING
        if required and name not in table:
            raise RecipeError(f"{where}: the setting {name!r} is missing")
    given = {k: v for k, v in table.items() if v is not None}  # as `to_dict` writes a default
    values = {k: _value(hints[k], v, f"{where}: {k}") for k, v in given.items()}
    try:
        return cls(**values)
    except MarnetError as error:
        raise RecipeError(f"{where}: {error}") from error


def _value(expected: Any, value: Any, where: str) -> Any:
    if expected is ScheduleConfig and isinstance(value, str):
        if value not in SCHEDULE_PRESETS:
            near = nearest(value, list(SCHEDULE_PRESETS))
            raise RecipeError(
                f"{where}: no schedule {value!r}.{near} Choose from {', '.join(SCHEDULE_PRESETS)}, "
                "or describe one in a [schedule] table"
            )
        return SCHEDULE_PRESETS[value]
    choices = [choice for choice in get_args(expected) if choice is not NoneType]
    if get_origin(expected) is not dict and choices:  # X | None, or X | "auto"
        if value == "auto" and Auto in choices:
            return value
        expected = choices[0]
    if expected not in (int, float, bool, str):  # a table: of ours, or of somebody else's keys
        if not isinstance(value, dict):
            raise RecipeError(f"{where} must be a table, got {value!r}")
        if is_dataclass(expected) and isinstance(expected, type):
            return _build(expected, value, where)
        return value
    if expected is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not expected:
        kind = f'{expected.__name__} or "auto"' if Auto in choices else expected.__name__
        raise RecipeError(f"{where} must be {kind}, got {value!r}")
    least = 1 if expected is int else 0
    if expected is not bool and isinstance(value, int | float) and not least <= value < math.inf:
        raise RecipeError(f"{where} must be finite and at least {least}, got {value!r}")
    return value
