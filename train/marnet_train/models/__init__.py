"""The methods that can be trained: name in config.json -> model class."""

from marnet_train.models.marnet import MARNet
from marnet_train.models.seda import SeDA

METHODS: dict[str, type[MARNet]] = {"marnet": MARNet, "seda": SeDA}
