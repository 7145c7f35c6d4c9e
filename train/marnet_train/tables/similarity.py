"""Measures of how alike image vectors and text vectors are: whether alignment aligned them.

Pure functions of float arrays. Axes: N, M vectors, D, E widths, K classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marnet_sdk.errors import InvalidInput

_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernels, times the mean squared distance


def linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Return the linear centred kernel alignment of two descriptions of the same N things.

    CKA = |Y^T X|^2 / (|X^T X| |Y^T Y|) with Frobenius norms and centred columns: Kornblith,
    Norouzi, Lee and Hinton, "Similarity of neural network representations revisited", ICML 2019.
    It is 1 where one is the other rotated, scaled or moved. The widths may differ.

    Args:
        x, y: row n of both describes the same thing, [N, D] and [N, E].

    Returns:
        0 to 1; nan where all rows of one are equal.

    Raises:
        InvalidInput: arrays that do not fit, or values that are not finite.
    """
    a, b = _vectors("x", x), _vectors("y", y)
    if len(a) != len(b):
        raise InvalidInput(f"got {len(a)} and {len(b)} vectors; expected pairs of them")
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    own = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(b.T @ a) ** 2 / own) if own > 0 else float("nan")


def squared_mmd(x: ArrayLike, y: ArrayLike) -> float:
    """Return the squared maximum mean discrepancy of two sets of vectors: 0 for the same law.

    It is the unbiased estimate of Gretton, Borgwardt, Rasch, Schoelkopf and Smola, "A kernel
    two-sample test", JMLR 13, 2012, equation 3, so it may be slightly negative:

        mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean k(x_i, y_j)

    k is the mean of five Gaussian kernels exp(-d^2 / (w g)) with w = 1/4, 1/2, 1, 2 and 4, and g
    the mean squared distance of all vectors, so the unit of the vectors does not matter. It
    compares sets and does not know which vectors belong together.

    Args:
        x, y: [N, D] and [M, D], at least two of each.

    Raises:
        InvalidInput: arrays that do not fit, or values that are not finite.
    """
    a, b = _vectors("x", x), _vectors("y", y)
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InvalidInput(
            f"got vectors {a.shape} and {b.shape}; expected one width, and at least two of each"
        )
    both = np.concatenate([a, b])
    lengths = (both**2).sum(axis=1)
    distances = (lengths[:, None] + lengths - 2 * both @ both.T).clip(min=0)
    np.fill_diagonal(distances, 0)
    scale = distances.sum() / (len(both) * (len(both) - 1)) or 1.0  # all equal: any scale
    kernel = np.zeros_like(distances)
    for width in _WIDTHS:
        kernel += np.exp(-distances / (width * scale)) / len(_WIDTHS)
    n, m = len(a), len(b)
    of_x, of_y = kernel[:n, :n], kernel[n:, n:]
    within = (of_x.sum() - n) / (n * (n - 1)) + (of_y.sum() - m) / (m * (m - 1))
    return float(within - 2 * kernel[:n, n:].mean())


def class_cosines(x: ArrayLike, centres: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """Return the mean cosine of vectors to their own class's text, and to the other classes'.

    Only the distance of both says something: vectors with a common part are near all texts.

    Args:
        x: [N, D]. centres: the text of each class, as one vector, [K, D]. labels: [N].

    Raises:
        InvalidInput: arrays that do not fit, fewer than two classes, or values not finite.
    """
    a, b, own = _vectors("x", x), _vectors("centres", centres), np.asarray(labels)
    fits = a.shape[1] == b.shape[1] and own.shape == (len(a),) and len(b) > 1
    if not fits or own.min() < 0 or own.max() >= len(b):
        raise InvalidInput(
            f"got vectors {a.shape}, centres {b.shape} and labels {own.shape}; expected one "
            "width, at least two classes and a class for each vector"
        )
    cosines = _unit(a) @ _unit(b).T  # [N, K]
    of_own = cosines[np.arange(len(a)), own]
    others = (cosines.sum(axis=1) - of_own) / (len(b) - 1)
    return float(of_own.mean()), float(others.mean())


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)


def _vectors(name: str, x: ArrayLike) -> NDArray[np.float64]:
    """Check vectors and return them, [N, D]."""
    values = np.asarray(x, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise InvalidInput(
            f"{name}: got shape {values.shape}; expected finite vectors, [N, D] with N above 0"
        )
    return values
