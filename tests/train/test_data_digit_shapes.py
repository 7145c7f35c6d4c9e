"""Measurements of one picture, on pictures whose answer is plain to see."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from marnet_train.data import digit_shapes
from marnet_train.data.digit_shapes import Picture

pytest.importorskip("scipy")


def draw(*rows: str) -> Picture:
    """Eight rows of text: '#' is full ink, '+' half, everything else paper."""
    ink = {"#": 16.0, "+": 8.0}
    return np.array([[ink.get(mark, 0.0) for mark in row.ljust(8)] for row in rows])


RING = draw("", "  ####", "  #  #", "  #  #", "  #  #", "  #  #", "  ####", "")
STACK = draw("  ####", "  #  #", "  #  #", "  ####", "  #  #", "  #  #", "  ####", "")
CUP = draw("  ####", "  #", "  #", "  #", "  #", "  #", "  #", "  ####")  # open to the right
ZIGZAG = draw("  ####", "  #", "  #", "  ####", "     #", "     #", "     #", "  ####")
SLASH = draw("       #", "      #", "     #", "    #", "   #", "  #", " #", "#")

pictures = arrays(np.float64, (8, 8), elements=st.integers(0, 16).map(float))


def test_rows_of_the_drawings_are_eight() -> None:
    assert all(picture.shape == (8, 8) for picture in (RING, STACK, CUP, ZIGZAG, SLASH))


def test_loops_are_counted_from_the_top() -> None:
    assert [loop.row for loop in digit_shapes.find_loops(STACK)] == [1.5, 4.5]
    assert [loop.pixels for loop in digit_shapes.find_loops(RING)] == [8]
    assert digit_shapes.find_loops(CUP) == ()


def test_a_faint_ring_is_a_loop_and_a_gap_is_none() -> None:
    assert len(digit_shapes.find_loops(RING / 4)) == 1
    gap = RING.copy()
    gap[3, 2] = 0.0
    assert digit_shapes.find_loops(gap) == ()


def test_ink_holds_water_across_corners() -> None:
    diamond = draw("", "   #", "  # #", " #   #", "  # #", "   #", "", "")
    assert [loop.pixels for loop in digit_shapes.find_loops(diamond)] == [5]


def test_openings_name_side_and_half() -> None:
    assert digit_shapes.find_openings(CUP) == ("upper right", "lower right")
    assert digit_shapes.find_openings(ZIGZAG) == ("lower left", "upper right")
    assert digit_shapes.find_openings(ZIGZAG[:, ::-1]) == ("upper left", "lower right")
    assert digit_shapes.find_openings(np.rot90(CUP)) == ("top",)
    assert digit_shapes.find_openings(RING) == ()


def test_bars_need_five_pixels_side_by_side() -> None:
    picture = draw("", "", "", "  #####", "", "", "", "## #####")
    assert digit_shapes.find_bars(picture) == ("middle", "base")
    assert digit_shapes.find_bars(RING) == ()


def test_slant_is_columns_to_the_right_per_row_up() -> None:
    # The own moment of a pixel, 1/12 beside 63/12, takes 1.6 % off the true slope of 1.
    assert digit_shapes.measure(SLASH).slant == pytest.approx(63 / 64)
    assert digit_shapes.measure(SLASH[:, ::-1]).slant == pytest.approx(-63 / 64)
    assert digit_shapes.measure(RING).slant == pytest.approx(0)


def test_aspect_compares_width_with_height() -> None:
    assert digit_shapes.measure(SLASH).aspect == pytest.approx(1)
    assert digit_shapes.measure(RING).aspect < 1 < digit_shapes.measure(RING.T).aspect


def test_mass_and_balance() -> None:
    corner = draw(" +", "", "", "", "", "", "", "")
    shape = digit_shapes.measure(corner)
    assert shape.mass == 0.5
    assert shape.balance == (-2.5, -3.5)
    assert shape.aspect == 1  # a single pixel is as wide as it is tall


@given(pictures)
def test_puddles_agree_with_filling_holes_level_by_level(picture: Picture) -> None:
    from scipy import ndimage

    filled = np.zeros((8, 8))
    for level in range(1, 17):
        filled[np.asarray(ndimage.binary_fill_holes(picture >= level))] = level
    np.testing.assert_array_equal(digit_shapes.puddles(picture), filled - picture)


@given(pictures, st.integers(0, 7), st.integers(0, 7))
def test_seen_towards_is_the_maximum_of_a_ray(picture: Picture, row: int, column: int) -> None:
    rays = {
        "left": picture[row, :column],
        "right": picture[row, column + 1 :],
        "top": picture[:row, column],
        "bottom": picture[row + 1 :, column],
    }
    for side, ray in rays.items():
        assert digit_shapes.seen_towards(picture, side)[row, column] == max(ray, default=0)


@given(pictures.filter(np.any))
def test_a_mirror_image_mirrors_the_measurements(picture: Picture) -> None:
    shape, mirrored = digit_shapes.measure(picture), digit_shapes.measure(picture[:, ::-1])
    assert mirrored.slant == pytest.approx(-shape.slant)
    assert mirrored.aspect == pytest.approx(shape.aspect)
    assert mirrored.balance == pytest.approx((-shape.balance[0], shape.balance[1]), abs=1e-9)
    assert Counter(mirrored.loops) == Counter(shape.loops)  # loops of one row change places
    assert mirrored.bars == shape.bars
    swap = {"left": "right", "right": "left"}
    turned = {" ".join(swap.get(word, word) for word in s.split()) for s in shape.openings}
    assert set(mirrored.openings) == turned
