"""The noise at the ends of its range, and what is refused."""

import numpy as np
import pytest

from marnet_sdk.errors import InvalidInput
from marnet_sdk.noise.philox import philox4x32, standard_normal


def test_extreme_words_give_finite_normals():
    """Counters whose first word is next to 0 and to 2^32: u1 at its ends, found by search."""
    counters = np.zeros((2**19, 4), np.uint32)
    counters[:, 0] = np.arange(2**19)
    first = philox4x32(counters, (0, 0))[:, 0] >> 8
    order = np.argsort(first)
    normals = standard_normal(0, 0, 4 * 2**19).reshape(-1, 4)
    assert np.isfinite(normals).all()
    assert abs(normals[order[:16], :2]).max() > 3.5
    assert abs(normals[order[-16:], :2]).max() < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counter": [0, 0, 0]}, r"counter: got shape \(3,\); expected four words"),
        ({"counter": [0, 0, 0, -1]}, "counter: got -1; expected integers"),
        ({"key": (1, 2, 3)}, r"key: got shape \(3,\); expected two words"),
    ],
)
def test_it_refuses_what_is_not_words(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        philox4x32(**{"counter": [0, 0, 0, 0], "key": (0, 0), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 2**64}, "seed: got 18446744073709551616; expected"),
        ({"trajectory": -1}, "trajectory: got -1; expected"),
        ({"width": 0.5}, r"width: got 0\.5 \(float\); expected an integer"),
        ({"step": [[1]]}, r"step: got shape \(1, 1\); expected one step or a row"),
    ],
)
def test_it_refuses_arguments_out_of_range(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        standard_normal(**{"seed": 0, "step": 0, "width": 4, **arguments})
