"""Classify images with a bundle: `Classifier("x.marnet").predict("image.jpg")`."""

import os

# OpenBLAS reads it when NumPy is loaded. Behind a product its threads wait for about a millisecond
# then (2 ** 21 cycles of the processor's clock), and sleep. Without it they keep cores that the
# next call of an encoder needs for some 50 milliseconds.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "21")

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
