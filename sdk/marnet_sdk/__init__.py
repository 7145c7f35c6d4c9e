"""Classify images with a bundle: `Classifier("x.marnet").predict("image.jpg")`."""

from marnet_sdk.classifier import Classifier, Prediction, Score
from marnet_sdk.errors import ImageError, InvalidImages, MarnetError

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
