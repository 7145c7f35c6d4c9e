"""Classify images with a bundle: `Classifier("x.marnet").predict("image.jpg")`."""

from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import ImageError, InvalidImages, MarnetError
from marnet_sdk.prediction import Prediction, Score

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "ImageError",
    "InvalidImages",
    "MarnetError",
    "Prediction",
    "Score",
    "__version__",
]
