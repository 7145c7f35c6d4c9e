"""The methods that can be trained: name in config.json -> model class."""

from marnet_train.models.marnet import MARNet

METHODS = {"marnet": MARNet}
