"""The methods that can be trained: name in config.json -> model class.

The image encoders that are written here are made known to transformers, so a recipe names them by
`model_type` as it does any other.
"""

from transformers import AutoConfig, AutoModel

from marnet_train.models.marnet import MARNet
from marnet_train.models.repmlpnet import RepMLPNet, RepMLPNetConfig
from marnet_train.models.seda import SeDA
from marnet_train.models.wiser import Wiser, WiserConfig

METHODS: dict[str, type[MARNet]] = {"marnet": MARNet, "seda": SeDA}

for _config, _model in ((RepMLPNetConfig, RepMLPNet), (WiserConfig, Wiser)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
