"""The packed sampling loop: its layout against slow plain loops, its twin against the formulas."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import TWIN_LAYER, TWIN_LOOP

from marnet_kernels import reverse_sampler as rs

WIDTHS = [1, 96, 250, 256, 257, 1000, 1024]
TYPES = ["fp16", "bf16"]
NUMPY_TYPE = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def parts(hidden, seed=0, scale=1.0):
    """Random matrices and biases that keep activations of order 1, as keywords of pack."""
    rng = np.random.default_rng(seed)

    def matrix():
        return rng.standard_normal((hidden, hidden), np.float32) * np.float32(scale / hidden**0.5)

    def bias():
        return rng.standard_normal(hidden, np.float32)

    return {"hidden2": (matrix(), bias()), "hidden3": (matrix(), bias()), "carry": matrix()}


def tables(hidden, images, samples, noises, steps, seed=1):
    """Random q [B, H], coefficients [S, 3] without a zero, and bias [S, N, K, H]."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((images, hidden), np.float32)
    coefficients = rng.uniform(0.1, 0.5, (steps, 3)).astype(np.float32)
    return q, coefficients, rng.standard_normal((steps, noises, samples, hidden), np.float32)


def run(packed, q, coefficients, bias, slope=0.01):
    """The twin from unpadded inputs."""
    return rs.reverse_sampler_reference(
        packed, rs.pack_condition(q), *rs.pack_tables(coefficients, bias), slope
    )


def rounded(values, dtype):
    return values.astype(NUMPY_TYPE[dtype]).astype(np.float32)


# Rounding


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
@example([0.0, -0.0, 2.0**-24, -(2.0**-149), 65504.0, 65519.0, 65520.0, float("inf")])
@example([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11])  # ties
def test_rounding_is_that_of_other_libraries(values):
    array = np.array(values, np.float32)
    for dtype in TYPES:
        with np.errstate(over="ignore"):
            want = array.astype(NUMPY_TYPE[dtype])
        bits = rs.to_bits(array, dtype)
        np.testing.assert_array_equal(bits, want.view(np.uint16))
        np.testing.assert_array_equal(rs.from_bits(bits, dtype), want.astype(np.float32))


@pytest.mark.parametrize("dtype", TYPES)
def test_every_16_bit_value_survives_and_nan_stays_nan(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    values = rs.from_bits(bits, dtype)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(rs.to_bits(values[number], dtype), bits[number])
    narrowest = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    for nan in (values[~number], narrowest):
        assert np.isnan(rs.from_bits(rs.to_bits(nan, dtype), dtype)).all()


# Layout


def test_a_thread_keeps_48_registers_of_weights_at_width_1024():
    plan = rs.layout(1024)
    assert plan.weight_registers == 48
    assert (plan.padded, plan.ctas, plan.threads, plan.groups) == (1024, 128, 256, 4)
    # Every 16-bit value of the three matrices is in exactly one register of one thread.
    assert plan.ctas * plan.threads * plan.weight_registers * 2 == 3 * 1024**2


@pytest.mark.parametrize(
    ("hidden", "padded"),
    [(1, 256), (96, 256), (250, 256), (256, 256), (257, 512), (1000, 1024), (1025, 1280)],
)
def test_width_is_padded_to_the_next_multiple_of_256(hidden, padded):
    plan = rs.layout(hidden)
    assert (plan.hidden, plan.padded, plan.ctas) == (hidden, padded, padded // 8)
    assert plan.weight_registers == 12 * padded // 256


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("hidden", WIDTHS)
def test_unpack_gives_back_the_rounded_values(hidden, dtype):
    given_parts = parts(hidden)
    matrices, biases = rs.unpack(rs.pack(**given_parts, dtype=dtype))
    want = given_parts["hidden2"][0], given_parts["hidden3"][0], given_parts["carry"]
    for got, matrix in zip(matrices, want, strict=True):
        np.testing.assert_array_equal(got, rounded(matrix, dtype))
    np.testing.assert_array_equal(biases, [given_parts["hidden2"][1], given_parts["hidden3"][1]])


@pytest.mark.parametrize("hidden", [96, 257])
def test_every_place_holds_what_the_formula_says(hidden):
    """One slow loop over all places, with numbers that say which row and column they are."""
    given_parts = parts(hidden)
    packed = rs.pack(**given_parts)
    plan = packed.layout
    flat = packed.weights.ravel()
    want = np.zeros((3, plan.padded, plan.padded), np.float32)
    want[:, :hidden, :hidden] = rs.unpack(packed)[0]
    seen = np.zeros((plan.padded, plan.padded), int)
    per_layer = flat.size // 3
    index = 0
    for cta in range(plan.ctas):
        for warp in range(8):
            for group in range(plan.groups):
                for lane in range(32):
                    for half in range(8):
                        n = 8 * cta + lane // 4
                        k = 32 * (warp * plan.groups + group) + 8 * (lane % 4) + half
                        seen[n, k] += 1
                        for layer in range(3):
                            got = flat[layer * per_layer + index : layer * per_layer + index + 1]
                            assert rs.from_bits(got, "fp16")[0] == want[layer, n, k]
                        index += 1
    assert (seen == 1).all()
    assert np.count_nonzero(flat) == np.count_nonzero(want)  # so all padding is zero


@given(st.integers(1, 1100), st.data())
def test_offset_and_element_agree_with_the_packed_array(hidden, data):
    plan = rs.layout(hidden)
    place = [data.draw(st.integers(0, size - 1)) for size in plan.weight_shape]
    layer, cta, warp, group, lane, half = place
    n, k = plan.element(cta, warp, group, lane, half)
    assert (n, k) == (
        8 * cta + lane // 4,
        32 * (warp * plan.groups + group) + 8 * (lane % 4) + half,
    )
    strides = np.empty(plan.weight_shape, np.uint16).strides
    assert plan.offset(*place) == np.dot(place, strides)
    assert plan.offset(layer, cta, warp, group, lane, 0) % 16 == 0


def test_loads_of_a_warp_are_512_contiguous_bytes():
    plan = rs.layout(600)
    for place in [(0, 0, 0, 0), (1, 5, 3, 2), (2, plan.ctas - 1, 7, plan.groups - 1)]:
        starts = [plan.offset(*place, lane, 0) for lane in range(32)]
        assert starts[0] % 512 == 0
        assert starts == list(range(starts[0], starts[0] + 512, 16))
        assert plan.offset(*place, 31, 7) == starts[0] + 510


def test_packed_weights_are_the_bytes_that_the_offsets_count():
    packed = rs.pack(**parts(300))
    raw = packed.weights.tobytes()
    place = (2, 7, 4, 0, 19, 5)
    at = packed.layout.offset(*place)
    n, k = packed.layout.element(*place[1:])
    matrices, _ = rs.unpack(packed)
    assert np.frombuffer(raw[at : at + 2], "<f2")[0] == matrices[2, n, k] != 0


def mma_m16n8k16(a, b):
    """D [16, 8] of one mma from the registers of 32 lanes: a [32][8] and b [32][4] elements.

    The indices are those of PTX ISA 9.7.14.5.8, "Matrix Fragments for mma.m16n8k16 with floating
    point type".
    """
    A, B = np.full((16, 16), np.nan), np.full((16, 8), np.nan)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            A[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)] = a[lane][i]
        for i in range(4):
            B[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group] = b[lane][i]
    return A @ B


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_fragments_of_a_tile_give_the_product(layer):
    """As the kernel reads: 16 bytes of each of two CTAs and of the activations feed two mma."""
    packed = rs.pack(**parts(500))
    plan, cta = packed.layout, 22
    words = packed.weights.view(np.uint32)  # [layer, CTA, warp, group, lane, word x y z w]
    rng = np.random.default_rng(3)
    rows = rounded(rng.standard_normal((8, plan.padded), np.float32), "fp16")
    total = np.zeros((16, 8))
    for warp in range(plan.warps):
        for group in range(plan.groups):
            operands = {0: ([], []), 1: ([], [])}
            for lane in range(32):
                low, high = (words[layer, cta + up, warp, group, lane] for up in (0, 1))
                start = 32 * (warp * plan.groups + group) + 8 * (lane % 4)
                for mma, (a, b) in operands.items():
                    x, y = 2 * mma, 2 * mma + 1
                    a.append(np.stack([low[x], high[x], low[y], high[y]]).view(np.float16))
                    b.append(rows[lane // 4, start + 4 * mma : start + 4 * mma + 4])
            total += sum(mma_m16n8k16(*registers) for registers in operands.values())
    matrix = np.zeros((plan.padded, plan.padded))
    matrix[:500, :500] = rs.unpack(packed)[0][layer]
    want = (matrix @ rows.T.astype(np.float64))[8 * cta : 8 * cta + 16]
    np.testing.assert_allclose(total, want, atol=1e-12)


def test_buffers_are_the_sizes_of_the_arrays():
    plan = rs.layout(300)
    packed = rs.pack(**parts(300))
    q, coefficients, bias = tables(300, images=5, samples=7, noises=5, steps=3)
    coefficients, bias = rs.pack_tables(coefficients, bias)
    sizes = plan.buffers(images=5, samples=7, noises=5, steps=3)
    assert list(sizes) == list(rs.POINTERS)
    assert sizes == {
        "weights": packed.weights.nbytes,
        "biases": packed.biases.nbytes,
        "coefficients": coefficients.nbytes,
        "bias": bias.nbytes,
        "condition": rs.pack_condition(q).nbytes,
        "exchange": 3 * 2 * 35 * 512 * 2,  # two copies
        "counter": 16 * 128,  # sixteen groups of rows
        "out": 35 * 512 * 4,
    }
    assert plan.total_bytes(5, 7, 5, 3) == sum(sizes.values())
    # One allocation after another, each a multiple of 128 bytes or rounded up by the caller.
    assert all(sizes[name] % alignment == 0 for name, alignment in rs.POINTERS.items())


# The twin


def plain_layers(packed):
    matrices, biases = (array.astype(np.float64) for array in rs.unpack(packed))
    return {"hidden2": (matrices[0], biases[0]), "hidden3": (matrices[1], biases[1])}, matrices[2]


def leaky(values, slope):
    return np.maximum(values, 0) + slope * np.minimum(values, 0)


def plain_loop(packed, q, coefficients, bias, slope, operand):
    """The loop in float64, one row after another; `operand` rounds h1, h2, h3 before a product."""
    layers, carry = plain_layers(packed)
    steps, noises, samples, _ = bias.shape
    out = np.empty((len(q), samples, q.shape[1]))
    for b in range(len(q)):
        for k in range(samples):
            p = g_previous = np.zeros(q.shape[1])
            for i in range(steps):
                h1 = leaky(p + q[b] + bias[i, b if noises > 1 else 0, k], slope)
                h2 = leaky(layers["hidden2"][0] @ operand(h1) + layers["hidden2"][1], slope)
                h3 = leaky(layers["hidden3"][0] @ operand(h2) + layers["hidden3"][1], slope)
                g = carry @ operand(h3)
                A, B, C = coefficients[i].astype(np.float64)
                p, g_previous = A * p + B * g + C * g_previous, g
            out[b, k] = h3
    return out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_twin_is_the_plain_loop(steps, samples, per_image, dtype):
    images, hidden, slope = 3, 96, 0.2
    packed = rs.pack(**parts(hidden), dtype=dtype)
    inputs = tables(hidden, images, samples, images if per_image else 1, steps)
    got = run(packed, *inputs, slope)
    want = plain_loop(packed, *inputs, slope, lambda h: rounded(h, dtype).astype(np.float64))
    assert got.dtype == np.float32
    assert got.shape == (images, samples, hidden)
    np.testing.assert_allclose(got, want, rtol=0, atol=TWIN_LOOP[dtype] * np.abs(want).max())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("hidden", [250, 1024])
def test_each_layer_alone_is_the_plain_layer(hidden, dtype):
    packed = rs.pack(**parts(hidden), dtype=dtype)
    layers, carry = plain_layers(packed)
    activations = np.random.default_rng(2).standard_normal((2, 9, hidden), np.float32)
    operand = rounded(activations, dtype).astype(np.float64)
    padded = np.zeros((2, 9, packed.layout.padded), np.float32)
    padded[..., :hidden] = activations
    want = {"carry": operand @ carry.T}
    for name, (matrix, bias) in layers.items():
        want[name] = leaky(operand @ matrix.T + bias, 0.3)
    for name in rs.LAYERS:
        got = rs.layer_reference(packed, name, padded, slope=0.3)
        assert got.shape == padded.shape
        np.testing.assert_allclose(got[..., :hidden], want[name], rtol=0, atol=TWIN_LAYER)
        assert not got[..., hidden:].any()


@pytest.mark.parametrize(
    ("features", "total"),
    [
        ((0, 32, 64), 0),  # mma 0 of the warp's three groups: one accumulator, 2^24 + 1 is 2^24
        ((0, 36, 64), 1),  # mma 1 of the second group: the other accumulator
        ((0, 9, 27), 1),  # all in one mma, which rounds once
        ((0, 4, 1), 1),  # the second mma of the group has the 1 alone
        ((0, 100, 200), 0),  # warps 0, 1, 2
        ((0, 96, 100), 1),  # both accumulators of warp 1 before the 2^24 of warp 0
        ((0, 200, 100), 1),  # 2^24 of warp 0 and -2^24 of warp 1 before the 1 of warp 2
    ],
)
def test_additions_are_float32_and_in_the_documented_order(features, total):
    """2^24 + 1 - 2^24 is 0 or 1 in float32: it depends on which two are added first."""
    carry, activations = np.zeros((768, 768)), np.zeros((1, 768), np.float32)
    carry[5, features] = 4096, 1, -4096
    activations[0, features] = 4096, 1, 4096
    zeros = (np.zeros((768, 768)), np.zeros(768))
    got = rs.layer_reference(rs.pack(zeros, zeros, carry), "carry", activations)
    assert got[0, 5] == total
    assert np.count_nonzero(got) == total


@pytest.mark.parametrize("dtype", TYPES)
def test_a_layer_rounds_its_input_and_not_its_output(dtype):
    packed = rs.pack(**parts(256), dtype=dtype)
    activations = np.random.default_rng(2).standard_normal((9, 256), np.float32)
    got = rs.layer_reference(packed, "carry", activations)
    np.testing.assert_array_equal(
        got, rs.layer_reference(packed, "carry", rounded(activations, dtype))
    )
    assert np.abs(got - activations @ plain_layers(packed)[1].T).max() > 50 * TWIN_LAYER
    assert np.mean(got == rounded(got, dtype)) < 0.1


def test_layers_chained_by_hand_are_the_loop_to_the_bit():
    """A kernel tested layer by layer is tested against the numbers of the whole twin."""
    packed = rs.pack(**parts(256))
    q, coefficients, bias = tables(256, 2, 3, 2, 4)
    state = previous = h3 = np.zeros((2, 3, 256), np.float32)
    for step, (a, b, c) in enumerate(coefficients):
        before = state + q[:, None] + bias[step]
        h1 = np.where(before > 0, before, np.float32(0.01) * before)
        h3 = rs.layer_reference(packed, "hidden3", rs.layer_reference(packed, "hidden2", h1))
        update = rs.layer_reference(packed, "carry", h3)
        state = a * state + b * update + c * previous
        previous = update
    np.testing.assert_array_equal(run(packed, q, coefficients, bias), h3)


@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from(TYPES))
def test_a_row_does_not_depend_on_the_batch(images, seed, dtype):
    packed = rs.pack(**parts(96), dtype=dtype)
    q, coefficients, bias = tables(96, images, 2, images, 2, seed)
    whole = run(packed, q, coefficients, bias)
    b = seed % images
    np.testing.assert_array_equal(
        run(packed, q[b : b + 1], coefficients, bias[:, b : b + 1])[0], whole[b]
    )
    order = np.random.default_rng(seed).permutation(images)
    np.testing.assert_array_equal(run(packed, q[order], coefficients, bias[:, order]), whole[order])
    one = run(packed, q, coefficients, bias[:, :, :1])
    np.testing.assert_array_equal(one[:, 0], whole[:, 0])


@pytest.mark.parametrize("images", [2, 3])
def test_shared_noise_is_the_same_noise_for_each_image(images):
    packed = rs.pack(**parts(96))
    q, coefficients, bias = tables(96, images, 2, 1, 3)
    np.testing.assert_array_equal(
        run(packed, q, coefficients, bias),
        run(packed, q, coefficients, np.repeat(bias, images, axis=1)),
    )


def widened(array, width, axes):
    """Zeros after the values, up to this width on the last `axes` axes."""
    pads = [(0, 0)] * (array.ndim - axes) + [(0, width - size) for size in array.shape[-axes:]]
    return np.pad(array, pads)


def widened_parts(hidden, width):
    given_parts = parts(hidden)
    wide = {
        name: (widened(given_parts[name][0], width, 2), widened(given_parts[name][1], width, 1))
        for name in ("hidden2", "hidden3")
    }
    return wide | {"carry": widened(given_parts["carry"], width, 2)}


@pytest.mark.parametrize("dtype", TYPES)
def test_padding_by_hand_changes_no_bit_of_the_result(dtype):
    q, coefficients, bias = tables(250, 2, 2, 1, 3)
    narrow = run(rs.pack(**parts(250), dtype=dtype), q, coefficients, bias)
    packed = rs.pack(**widened_parts(250, 256), dtype=dtype)
    wide = run(packed, widened(q, 256, 1), coefficients, widened(bias, 256, 1))
    np.testing.assert_array_equal(wide[..., :250], narrow)
    assert not wide[..., 250:].any()


def test_a_wider_padding_changes_only_the_order_of_additions():
    activations = np.random.default_rng(0).standard_normal((4, 250), np.float32)
    narrow, wide = (
        rs.layer_reference(
            rs.pack(**widened_parts(250, width)), "hidden3", widened(activations, width, 1)
        )
        for width in (256, 512)
    )
    np.testing.assert_allclose(wide[:, :256], narrow, rtol=0, atol=TWIN_LAYER)
    assert not wide[:, 256:].any()


def test_activations_that_overflow_fp16_show_in_the_result_and_not_in_bf16():
    one = (np.eye(4), np.zeros(4))
    q, coefficients, bias = tables(4, 1, 1, 1, 1)
    q[:] = 1e5
    results = {t: run(rs.pack(one, one, np.eye(4), t), q, coefficients, bias) for t in TYPES}
    assert not np.isfinite(results["fp16"]).any()
    np.testing.assert_allclose(results["bf16"], 1e5, rtol=2**-8)


def test_inputs_are_left_as_they_were():
    packed = rs.pack(**parts(96))
    q, coefficients, bias = tables(96, 2, 2, 1, 3)
    arrays = [packed.weights, packed.biases, q, coefficients, bias]
    before = [array.copy() for array in arrays]
    run(packed, q, coefficients, bias)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


# What is refused


def changed(name, place, value):
    """parts(96) with one value changed; name as in the messages of pack."""
    given_parts = parts(96)
    matrix, bias = given_parts[name.split()[0]] if name != "carry" else (given_parts["carry"], None)
    (bias if "bias" in name else matrix)[place] = value
    return given_parts


@pytest.mark.parametrize(
    ("name", "value", "dtype", "message"),
    [
        ("hidden2", 7e4, "fp16", "hidden2: got a weight of size 70000, expected at most 65504, the "
         "largest fp16; use dtype='bf16' or scale it down"),
        ("carry", -1e30, "fp16", r"carry: got a weight of size 1e\+30, expected at most 65504"),
        ("hidden3", 65520, "fp16", "hidden3: got a weight of size 65520"),
        ("hidden3", 3.4e38, "bf16", r"hidden3: got a weight of size 3.4e\+38, expected at most "
         r"3.38953e\+38, the largest bf16; scale it down"),
        ("hidden3", np.nan, "fp16", "hidden3: got nan, expected finite values; check the check"),
        ("carry", -np.inf, "bf16", "carry: got -inf, expected finite values"),
        ("hidden2 bias", np.inf, "bf16", "hidden2 bias: got inf, expected finite values"),
        ("hidden3 bias", np.nan, "fp16", "hidden3 bias: got nan, expected finite values"),
    ],
)  # fmt: skip
def test_values_that_the_type_cannot_hold_are_refused(name, value, dtype, message):
    place = 5 if "bias" in name else (95, 3)
    with pytest.raises(ValueError, match=message):
        rs.pack(**changed(name, place, value), dtype=dtype)


def test_the_largest_values_that_round_into_the_type_are_packed():
    matrices, _ = rs.unpack(rs.pack(**changed("hidden2", (0, 0), 65519.0)))
    assert matrices[0, 0, 0] == 65504
    matrices, _ = rs.unpack(rs.pack(**changed("hidden2", (0, 0), 7e4), dtype="bf16"))
    assert matrices[0, 0, 0] == 70144  # bfloat16 has steps of 512 there


def test_a_float64_beyond_float32_is_refused_and_named():
    matrix = np.eye(4) * -1e300
    with pytest.raises(ValueError, match=r"carry: got a value of size 1e\+300, expected at most 3"):
        rs.pack((np.eye(4), np.zeros(4)), (np.eye(4), np.zeros(4)), matrix, "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden2": (np.ones((96, 95)), np.ones(96))}, r"hidden2: got shape \(96, 95\), expected"
         r" \(96, 96\); the loop has three square matrices of one size"),
        ({"hidden3": (np.ones((95, 95)), np.ones(95))}, r"hidden3: got shape \(95, 95\), expected"),
        ({"carry": np.ones(96)}, r"carry: got shape \(96,\), expected \(96, 96\)"),
        ({"hidden2": (np.float32(1), np.ones(96))}, "hidden: got 0, expected at least 1"),
        ({"hidden3": (np.ones((96, 96)), np.ones(97))}, r"hidden3 bias: got shape \(97,\), expected"
         r" \(96,\); its matrix has one row a value"),
        ({"dtype": "fp8"}, "dtype: got 'fp8', expected 'fp16' or 'bf16'; choose one"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rs.pack(**(parts(96) | change))


def test_tables_that_do_not_fit_are_refused():
    q, coefficients, bias = tables(96, 2, 3, 1, 4)
    with pytest.raises(ValueError, match=r"coefficients: got shape \(3, 3\), expected \(4, 3\); b"):
        rs.pack_tables(coefficients[1:], bias)
    with pytest.raises(ValueError, match=r"bias: got shape \(4, 3, 96\), expected \[steps, noises"):
        rs.pack_tables(coefficients, bias[:, 0])
    with pytest.raises(ValueError, match="none of them 0; with one noise trajectory"):
        rs.pack_tables(coefficients[:0], bias[:0])
    with pytest.raises(ValueError, match="coefficients: got nan, expected finite values"):
        rs.pack_tables(coefficients * np.nan, bias)
    with pytest.raises(ValueError, match=r"q: got shape \(2, 1, 96\), expected \[images, hidden\]"):
        rs.pack_condition(q[:, None])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q[:, :96], r"q: got shape \(2, 96\), expected \(2, 256\); use pack_cond"),
        ("q", lambda q: q.astype(float), "q: got float64, expected float32; use pack_condition"),
        ("q", lambda q: q[0], r"q and bias: got shapes \(256,\) and \(4, 1, 3, 256\), expected"),
        ("q", lambda q: q[:0], "none of them 0; use pack_condition and pack_tables"),
        ("coefficients", lambda c: c[:, :3], r"coefficients: got shape \(4, 3\), expected \(4, 4"),
        ("coefficients", lambda c: c[1:], r"coefficients: got shape \(3, 4\), expected \(4, 4\)"),
        ("bias", lambda t: t[..., :96], r"bias: got shape \(4, 1, 3, 96\), expected \(4, 1, 3, 25"),
        ("bias", lambda t: np.repeat(t, 3, 1), "noises: got 3 for 2 images, expected 1 or 2; give"),
    ],
)
def test_the_twin_refuses_what_is_not_packed(name, change, message):
    q, coefficients, bias = tables(96, 2, 3, 1, 4)
    coefficients, bias = rs.pack_tables(coefficients, bias)
    inputs = {"q": rs.pack_condition(q), "coefficients": coefficients, "bias": bias}
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        rs.reverse_sampler_reference(rs.pack(**parts(96)), **inputs)


def test_other_wrong_arguments_are_refused():
    packed = rs.pack(**parts(96))
    with pytest.raises(ValueError, match="layer: got 'out', expected one of hidden2, hidden3, car"):
        rs.layer_reference(packed, "out", np.zeros((1, 256), np.float32))
    with pytest.raises(ValueError, match=r"activations: got shape \(1, 96\), expected \(1, 256\)"):
        rs.layer_reference(packed, "carry", np.zeros((1, 96), np.float32))
    with pytest.raises(ValueError, match=r"weights: got shape .*expected \(3, 64, 8, 2, 32, 8\)"):
        replace(packed, layout=rs.layout(300))
    with pytest.raises(ValueError, match="weights: got float16, expected uint16; pack makes them"):
        replace(packed, weights=packed.weights.view(np.float16))
    with pytest.raises(ValueError, match="hidden: got -3, expected at least 1"):
        rs.layout(-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "images: got 0, expected at least 1"),
        ({"samples": -1}, "samples: got -1, expected at least 1"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"noises": 3}, "noises: got 3 for 2 images, expected 1 or 2"),
        ({"steps": 11184811}, "steps: got 11184811, expected at most 11184810; the counter of ex"),
    ],
)
def test_launches_of_wrong_sizes_are_refused(change, message):
    sizes = {"images": 2, "samples": 1, "noises": 1, "steps": 4} | change
    with pytest.raises(ValueError, match=message):
        rs.layout(1024).buffers(**sizes)
