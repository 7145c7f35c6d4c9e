"""The head behind the loop, and the condition before it: packing, twin, and the kernels."""

import copy
import ctypes
from dataclasses import replace

import numpy as np
import pytest
from emulate import Cpu, emulate
from fenced import Fenced
from tolerances import BUILT, FLOAT64, HEAD, HEAD_MODEL

from marnet_kernels import fuse_head
from marnet_kernels.compile import TARGETS, compile_cubin
from marnet_kernels.fuse_head import (
    FUSIONS,
    ConditionArguments,
    ConditionLayout,
    FuseHead,
    FuseHeadArguments,
    HeadLayout,
    HeadVariant,
    choose_head_variant,
    condition_reference,
    fuse_reference,
    head_reference,
    pack_condition_layer,
    pack_head,
    shipped_options,
)
from marnet_kernels.loader import DeviceInfo
from marnet_kernels.reverse_sampler import from_bits, to_bits
from marnet_kernels.source import source

H100 = DeviceInfo(capability=(9, 0), multiprocessors=132, shared_bytes=232_448, cooperative=True)


def linear(rng, outputs, inputs):
    """(weight, bias) that give outputs of order 1."""
    weight = rng.standard_normal((outputs, inputs)) / np.sqrt(inputs)
    return weight.astype(np.float32), rng.standard_normal(outputs).astype(np.float32)


def head(vision, aligned, semantic, hidden, classes, fusion, dtype="fp16", seed=0):
    rng = np.random.default_rng(seed)
    fused = aligned + semantic if fusion == "concat" else aligned
    layers = [(aligned, vision), (semantic, hidden), (classes, fused)]
    return pack_head(*(linear(rng, *shape) for shape in layers), fusion=fusion, dtype=dtype)


def inputs(packed, images, samples, seed=1, scale=1.0):
    """x_v [B, D_v] and h3 [B, K, Hp], whose padding is zero as the loop leaves it."""
    rng, plan = np.random.default_rng(seed), packed.layout
    x_v = scale * rng.standard_normal((images, plan.vision)).astype(np.float32)
    h3 = np.zeros((images, samples, plan.padded), np.float32)
    h3[..., : plan.hidden] = scale * rng.standard_normal((images, samples, plan.hidden))
    return x_v, h3


# --- twin and packing -----------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_twin_is_the_plain_formula(fusion):
    packed = head(6, 4, 4, 5, 3, fusion)
    x_v, h3 = (x.astype(np.float64) for x in inputs(packed, 2, 3))
    logits, fused = head_reference(packed, x_v, h3, slope=0.2)
    plan, weights = packed.layout, from_bits(packed.weights, "fp16").astype(np.float64)
    project, rest = weights[: 4 * 8].reshape(4, 8), weights[4 * 8 :]
    output, classifier = rest[: 4 * 256].reshape(4, 256), rest[4 * 256 :].reshape(3, -1)
    for b in range(2):
        for k in range(3):
            a = np.array([project[d, :6] @ x_v[b] + packed.biases[d] for d in range(4)])
            a = np.array([x if x > 0 else 0.2 * x for x in a])
            refined = output @ h3[b, k] + packed.biases[4:8]
            want = fuse_reference(fusion, a, refined)
            np.testing.assert_allclose(fused[b, k], want, rtol=FLOAT64)
            want = classifier[:, : plan.fused] @ want + packed.biases[8:]
            np.testing.assert_allclose(logits[b, k], want, rtol=FLOAT64)


def test_fusions_equal_those_that_are_trained():
    torch = pytest.importorskip("torch")
    trained = pytest.importorskip("marnet_train.models.fusion").FUSIONS
    assert tuple(trained) == FUSIONS
    grid = np.array([-800.0, -30.0, -1.0, 0.0, 1e-9, 2.0, 40.0, 700.0])
    a, b = (x.reshape(1, -1) for x in np.meshgrid(grid, grid))
    for name, fusion in trained.items():
        want = fusion(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        got = fuse_reference(name, a, b)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=FLOAT64, atol=FLOAT64)


def test_weights_are_rounded_and_padded_with_zeros():
    for dtype in ("fp16", "bf16"):
        packed = head(10, 5, 9, 12, 3, "concat", dtype)
        plan = packed.layout
        assert plan.shapes == ((5, 16), (9, 256), (3, 16))
        assert plan.buffers(2, 3) == {
            "weights": packed.weights.nbytes,
            "biases": packed.biases.nbytes,
            "vision": 4 * 2 * 10,
            "hidden": 4 * 6 * 256,
            "counter": 128,
            "logits": 4 * 6 * 3,
            "fused": 4 * 6 * 14,
        }
        rng = np.random.default_rng(0)
        project, output = linear(rng, 5, 10), linear(rng, 9, 12)
        rows = packed.weights[: 5 * 16].reshape(5, 16)
        np.testing.assert_array_equal(rows[:, :10], to_bits(project[0], dtype))
        assert not rows[:, 10:].any()
        rows = packed.weights[5 * 16 : 5 * 16 + 9 * 256].reshape(9, 256)
        np.testing.assert_array_equal(rows[:, :12], to_bits(output[0], dtype))
        assert not rows[:, 12:].any()
        np.testing.assert_array_equal(packed.biases[:14], [*project[1], *output[1]])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_condition_is_folded_without_loss(dtype):
    """Features far from zero: what rounds a weight must not be multiplied with their mean."""
    rng = np.random.default_rng(0)
    weight, _ = linear(rng, 20, 50)
    mean, std = 40 + 5 * rng.standard_normal(50), 0.1 + rng.random(50)
    packed = pack_condition_layer(weight, mean, std, dtype)
    x_v = mean + std * rng.standard_normal((7, 50))
    got = condition_reference(packed, x_v)
    assert got.shape == (7, 256)
    assert not got[:, 20:].any()
    want = (x_v - mean) / std @ weight.T
    error = {"fp16": 1e-3, "bf16": 8e-3}[dtype]  # half a unit in the last place of a weight, twice
    np.testing.assert_allclose(got[:, :20], want, atol=error * np.abs(want).max())
    np.testing.assert_allclose(condition_reference(packed, mean[None]), 0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": 0}, "vision: got 0, expected at least 1"),
        ({"classes": 0}, "classes: got 0, expected at least 1"),
        ({"hidden": 0}, "hidden: got 0, expected at least 1"),
        ({"fusion": "max"}, "fusion: got 'max', expected one of concat, add, mul, sum, hm"),
        ({"semantic": 9}, "got 8 and 9, expected equal widths for fusion 'add'; use concat"),
        ({"dtype": "fp32"}, "dtype: got 'fp32', expected 'fp16' or 'bf16'"),
        ({"vision": 2**28}, r"sizes: got matrices of .*, expected less than 2\*\*30 values"),
    ],
)
def test_wrong_layouts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(HeadLayout(8, 8, 8, 8, 3, "add"), **change)


def test_wrong_weights_are_refused():
    ones = np.ones((4, 6)), np.ones(4)
    square = np.ones((4, 4)), np.ones(4)
    with pytest.raises(ValueError, match="classifier: got 4 inputs, expected 8 for fusion 'conc"):
        pack_head(ones, ones, square, "concat")
    with pytest.raises(ValueError, match=r"output bias: got shape \(3,\), expected \(4,\); its"):
        pack_head(ones, (ones[0], np.ones(3)), square, "add")
    with pytest.raises(ValueError, match=r"project: got shape \(6,\), expected \[out, in\]"):
        pack_head((np.ones(6), np.ones(1)), ones, square, "add")
    with pytest.raises(ValueError, match=r"project: got a weight of size 70000.*use dtype='bf16'"):
        pack_head((70_000 * ones[0], ones[1]), ones, square, "add")
    with pytest.raises(ValueError, match="classifier: got nan, expected finite values"):
        pack_head(ones, ones, (np.nan * square[0], square[1]), "add")
    with pytest.raises(ValueError, match=r"mean: got shape \(4,\), expected \(6,\); it has one"):
        pack_condition_layer(ones[0], np.zeros(4), np.ones(6))
    with pytest.raises(ValueError, match=r"mean, std: got .* a std that is not positive; expected"):
        pack_condition_layer(ones[0], np.zeros(6), np.zeros(6))
    with pytest.raises(ValueError, match=r"weight / std: got a weight of size 1e.06.*'bf16' or"):
        pack_condition_layer(ones[0], np.zeros(6), np.full(6, 1e-6))
    with pytest.raises(ValueError, match="vision: got 0, expected at least 1"):
        ConditionLayout(0, 4)
    with pytest.raises(ValueError, match=r"got a matrix of \(1024, 1048576\), expected less than"):
        ConditionLayout(2**20, 1024)


# --- which variant --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "samples", "rows"), [(1, 1, 1), (2, 1, 4), (1, 4, 4), (4, 4, 4)]
)
def test_variant_is_chosen_by_the_rows(images, samples, rows):
    variant = choose_head_variant("bf16", images, samples, H100)
    assert variant == HeadVariant(rows, "bf16")
    assert variant.options() in shipped_options()


@pytest.mark.parametrize(
    ("images", "samples", "device", "message"),
    [
        (17, 1, H100, "got 17 images of 1 samples, expected 1 to 16 rows; .* engines or operators"),
        (9, 2, H100, "got 9 images of 2 samples, expected 1 to 16 rows"),
        (0, 1, H100, "got 0 images of 1 samples, expected 1 to 16 rows"),
        (1, 1, replace(H100, cooperative=False), "got a GPU without cooperative launches"),
        (1, 1, replace(H100, capability=(7, 5)), r"compute capability: got 7\.5, expected a GPU"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(images, samples, device, message):
    with pytest.raises(ValueError, match=message):
        choose_head_variant("fp16", images, samples, device)


PLACES = dict.fromkeys(fuse_head.POINTERS, 128)
GOOD = FuseHeadArguments(layout=HeadLayout(8, 8, 8, 8, 3, "add"), images=2, samples=3, **PLACES)
CONDITION = ConditionArguments(
    layout=ConditionLayout(8, 8), images=2, weights=16, biases=16, vision=16, condition=16
)


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        (GOOD, {"images": 0}, "images, samples: got 0 and 3, expected at least 1 each"),
        (GOOD, {"images": 6}, "images, samples: got 6 and 3, .* at most 16 rows; use the engines"),
        (GOOD, {"counter": 64}, "counter: got address 0x40, expected a multiple of 128"),
        (GOOD, {"vision": 0}, "vision: got address 0x0, expected a multiple of 16 that is not 0"),
        (GOOD, {"fused": 24}, "fused: got address 0x18, expected a multiple of 16"),
        (CONDITION, {"images": 17}, "images, samples: got 17 and 1, .* at most 16 rows"),
        (CONDITION, {"condition": 8}, "condition: got address 0x8, expected a multiple of 16"),
    ],
)
def test_wrong_arguments_are_refused(arguments, change, message):
    with pytest.raises(ValueError, match=message):
        replace(arguments, **change)


def test_parameters_have_the_size_that_the_kernel_asserts():
    assert ctypes.sizeof(GOOD.parameters()) == 96
    assert ctypes.sizeof(CONDITION.parameters()) == 48
    text = "sizeof(Arguments) == 96 && sizeof(ConditionArguments) == 48"
    assert text in source("fuse_head")


# --- the kernels ----------------------------------------------------------------------------------


def place(machine, packed, x_v, h3):
    """Arguments for these arrays, all on the device."""
    plan, (images, samples) = packed.layout, h3.shape[:2]
    given = {"weights": packed.weights, "biases": packed.biases, "vision": x_v, "hidden": h3}
    sizes = plan.buffers(images, samples)
    addresses = {name: machine.put(array) for name, array in given.items()}
    for name in ("counter", "logits", "fused"):
        addresses[name] = machine.empty(sizes[name])
    return FuseHeadArguments(layout=plan, images=images, samples=samples, **addresses)


def launch(machine, arguments, variant=None, seed=0, multiprocessors=7):
    plan = arguments.layout
    variant = variant or choose_head_variant(plan.dtype, arguments.images, arguments.samples, H100)
    if isinstance(machine, Cpu):
        ctypes.memset(arguments.counter, 0, 4)
        emulate("fuse_head", variant.options()).launch(
            "fuse_head",
            arguments.parameters(),
            grid=arguments.blocks(multiprocessors),
            block=256,
            seed=seed,
        )
    else:
        FuseHead(variant).launch(int(machine.stream), arguments)
        machine.wait()


def results(machine, arguments):
    """(logits [B, K, C], fused [B, K, D_f])."""
    plan, rows = arguments.layout, (arguments.images, arguments.samples)
    return (
        machine.get(arguments.logits, (*rows, plan.classes)),
        machine.get(arguments.fused, (*rows, plan.fused)),
    )


def run(machine, packed, x_v, h3, **how):
    arguments = place(machine, packed, x_v, h3)
    launch(machine, arguments, **how)
    return results(machine, arguments)


def check(got, want):
    for name, values, expected in zip(("logits", "fused"), got, want, strict=True):
        assert np.isfinite(values).all(), name
        error = np.abs(values - expected).max() / np.abs(expected).max()
        assert error <= HEAD, f"{name}: {error:.1e} of the largest value"


SIZES = [  # vision, aligned, semantic, hidden, classes
    (768, 96, 96, 1024, 101),
    (10, 24, 24, 12, 3),  # rows of x_v that are not aligned to 16 bytes
    (12, 7, 7, 300, 1),  # a tail of 4, and so few classes that most warps have none
    (2052, 31, 31, 1100, 37),  # more than one chunk of weights, with a tail
    (1, 1, 1, 1, 2),
]


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("images", "samples"), [(1, 1), (2, 2), (3, 5)])
def test_kernel_matches_its_twin(machine, sizes, fusion, images, samples):
    packed = head(*sizes, fusion)
    x_v, h3 = inputs(packed, images, samples)
    check(run(machine, packed, x_v, h3), head_reference(packed, x_v, h3))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("images", "samples"), [(1, 1), (4, 1), (16, 1), (1, 16), (1, 3)])
def test_kernel_matches_its_twin_with_different_widths(machine, dtype, images, samples):
    for aligned, semantic in [(20, 33), (33, 20), (700, 700)]:
        packed = head(36, aligned, semantic, 64, 11, "concat", dtype)
        x_v, h3 = inputs(packed, images, samples)
        got = run(machine, packed, x_v, h3, seed=images)
        check(got, head_reference(packed, x_v, h3))


def test_no_answer_depends_on_the_batch_the_variant_or_the_device(machine):
    """Each row alone, in every variant and on any number of multiprocessors, bit for bit."""
    packed = head(70, 50, 50, 300, 13, "hm")
    x_v, h3 = inputs(packed, 2, 2)
    logits, fused = run(machine, packed, x_v, h3)
    for blocks, rows in [(1, 1), (3, 4), (64, 4)]:
        for b, k in [(0, 0), (1, 1)]:
            variant = HeadVariant(rows, "fp16")
            alone = np.ascontiguousarray(h3[b : b + 1, k : k + 1])
            how = {"variant": variant, "multiprocessors": blocks, "seed": blocks}
            got = run(machine, packed, x_v[b : b + 1], alone, **how)
            np.testing.assert_array_equal(got[0][0, 0], logits[b, k])
            np.testing.assert_array_equal(got[1][0, 0], fused[b, k])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_large_values_stay_finite(machine, fusion):
    """Far beyond fp16, and where exp would overflow or vanish."""
    packed = head(24, 40, 40, 30, 5, fusion)
    for scale in (1e3, 1e6):
        x_v, h3 = inputs(packed, 2, 2, scale=scale)
        check(run(machine, packed, x_v, h3), head_reference(packed, x_v, h3))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_value_that_is_not_finite_stays_in_its_row(machine, fusion):
    packed = head(24, 40, 40, 30, 5, fusion)
    x_v, h3 = inputs(packed, 3, 2)
    want = run(machine, packed, x_v, h3)
    damaged = x_v.copy(), h3.copy()
    damaged[0][2, 5] = np.nan  # both rows of image 2
    damaged[1][0, 1, 7] = np.nan  # row 1 of image 0
    got = run(machine, packed, *damaged)
    for b, k in [(0, 0), (1, 0), (1, 1)]:
        for values, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(values[b, k], expected[b, k])
    for b, k in [(0, 1), (2, 0), (2, 1)]:
        assert np.isnan(got[0][b, k]).all()


@pytest.mark.parametrize(("images", "samples"), [(1, 1), (3, 1), (1, 5), (3, 2)])
def test_nothing_is_read_beyond_an_array(images, samples):
    for vision, aligned, semantic, classes in [(4, 3, 90, 1), (10, 90, 3, 2), (1000, 1, 200, 9)]:
        packed = head(vision, aligned, semantic, 5, classes, "concat")
        x_v, h3 = inputs(packed, images, samples)
        check(run(Fenced(), packed, x_v, h3), head_reference(packed, x_v, h3))
        folded = pack_condition_layer(np.ones((5, vision)), np.zeros(vision), np.ones(vision))
        machine = Fenced()
        arguments = place_condition(machine, folded, x_v)
        launch_condition(machine, arguments, choose_head_variant("fp16", images, 1, H100))


def test_every_order_of_the_blocks_gives_the_same(emulator):
    packed = head(40, 60, 60, 70, 9, "sum")
    x_v, h3 = inputs(packed, 2, 1)
    want = run(emulator, packed, x_v, h3)
    for seed in range(1, 6):
        got = run(emulator, packed, x_v, h3, seed=seed)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def place_condition(machine, packed, x_v):
    sizes = packed.layout.buffers(len(x_v))
    return ConditionArguments(
        layout=packed.layout,
        images=len(x_v),
        weights=machine.put(packed.weights),
        biases=machine.put(packed.biases),
        vision=machine.put(x_v),
        condition=machine.empty(sizes["condition"]),
    )


def launch_condition(machine, arguments, variant):
    if isinstance(machine, Cpu):
        emulate("fuse_head", variant.options()).launch(
            "condition", arguments.parameters(), grid=arguments.blocks(), block=256
        )
    else:
        FuseHead(variant).launch_condition(int(machine.stream), arguments)
        machine.wait()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("vision", "hidden"), [(768, 1024), (10, 12), (12, 257), (1028, 5)])
@pytest.mark.parametrize("images", [1, 3, 16])
def test_condition_matches_its_twin(machine, vision, hidden, images, dtype):
    rng = np.random.default_rng(0)
    mean, std = rng.standard_normal(vision), 0.2 + rng.random(vision)
    packed = pack_condition_layer(linear(rng, hidden, vision)[0], mean, std, dtype)
    x_v = (mean + std * rng.standard_normal((images, vision))).astype(np.float32)
    arguments = place_condition(machine, packed, x_v)
    launch_condition(machine, arguments, choose_head_variant(dtype, images, 1, H100))
    got = machine.get(arguments.condition, (images, packed.layout.shape[0]))
    want = condition_reference(packed, x_v)
    assert not got[:, hidden:].any()
    largest = np.abs(want).max(axis=-1, keepdims=True)
    assert (np.abs(got - want) <= 2 * HEAD * largest).all()  # the mean cancels


@pytest.mark.parametrize("fusion", FUSIONS)
def test_kernels_equal_a_model_with_rounded_weights(machine, fusion):
    torch = pytest.importorskip("torch")
    graph = pytest.importorskip("marnet_export.graph")
    tiny = pytest.importorskip("tiny")
    from marnet_export.plan import make_plan

    # Only concat joins features of different widths; those of the vision side are 768 wide.
    model = tiny.make_model(fusion=fusion, dim=24 if fusion == "concat" else 768, hidden=300)
    plan = make_plan(model)
    layers = [
        [x.detach().numpy() for x in (layer.weight, layer.bias)]
        for layer in (model.project_vision, model.classifier)
    ]
    packed = pack_head(layers[0], plan.output, layers[1], fusion)
    x_v, h3 = inputs(packed, 3, 2)
    x_v = (model.vision_mean.numpy() + model.vision_std.numpy() * x_v).astype(np.float32)

    rounded = copy.deepcopy(model)
    for layer in (rounded.project_vision, rounded.classifier):
        layer.weight.data = layer.weight.data.half().float()
    weight, bias = (torch.from_numpy(x).float() for x in plan.output)
    x_cdr = torch.from_numpy(h3[..., : packed.layout.hidden]) @ weight.half().float().T + bias
    with torch.inference_mode():
        want = [x.numpy() for x in graph.Head(rounded)(torch.from_numpy(x_v), x_cdr)]
    for values, expected in zip(run(machine, packed, x_v, h3), want, strict=True):
        np.testing.assert_allclose(values, expected, atol=HEAD_MODEL * np.abs(expected).max())

    folded = pack_condition_layer(plan.condition_weight, *plan.standardise)
    arguments = place_condition(machine, folded, x_v)
    launch_condition(machine, arguments, HeadVariant(4, "fp16"))
    got = machine.get(arguments.condition, (3, folded.layout.shape[0]))
    with torch.inference_mode():
        want = graph.PlanStep(plan).condition(torch.from_numpy(x_v))[:, 0].numpy()
    got, atol = got[:, : want.shape[1]], BUILT["fp16"] * np.abs(want).max()  # weights not rounded
    np.testing.assert_allclose(got, want, atol=atol)


class Driver:
    """The part of cuda.bindings.driver that the wrapper calls, on the emulator."""

    def __init__(self, variant):
        self.kernel = emulate("fuse_head", variant.options())

    def cuMemsetD32Async(self, address, value, count, stream):  # noqa: N802
        assert stream == 42
        ctypes.memmove(address, (ctypes.c_uint32 * count)(*[value] * count), 4 * count)
        return (0,)

    def cuLaunchKernel(self, function, *launch, kind=fuse_head._ConditionParameters):  # noqa: N802
        grid, one, two, block, three, four, shared, stream, parameters, *extra = launch
        assert (one, two, three, four, shared, stream, *extra) == (1, 1, 1, 1, 0, 42, 0)
        address = ctypes.c_void_p.from_address(parameters).value
        self.kernel.launch(function, kind.from_address(address), grid=grid, block=block)
        return (0,)

    def cuLaunchCooperativeKernel(self, function, *launch):  # noqa: N802
        return self.cuLaunchKernel(function, *launch, 0, kind=fuse_head._Parameters)


def test_wrapper_launches_both_kernels(emulator, monkeypatch):
    """Twice, so that the counter has to be cleared."""
    variant = HeadVariant(4, "fp16")
    monkeypatch.setattr(fuse_head, "current_device", lambda: H100)
    monkeypatch.setattr(fuse_head, "compile_cubin", lambda *_: None)
    monkeypatch.setattr(fuse_head, "load_function", lambda _, name: name)
    monkeypatch.setattr(fuse_head._cuda, "load", lambda _: Driver(variant))
    packed, kernel = head(24, 20, 33, 30, 5, "concat"), FuseHead(variant)
    folded = pack_condition_layer(np.ones((5, 24)), np.zeros(24), np.ones(24))
    for seed in (1, 2):
        x_v, h3 = inputs(packed, 2, 3, seed=seed)
        arguments = place(emulator, packed, x_v, h3)
        condition = place_condition(emulator, folded, x_v)
        kernel.launch(42, arguments)
        kernel.launch(42, arguments)
        kernel.launch_condition(42, condition)
        check(results(emulator, arguments), head_reference(packed, x_v, h3))
        want = condition_reference(folded, x_v)
        got = emulator.get(condition.condition, want.shape)
        np.testing.assert_allclose(got, want, atol=HEAD * np.abs(want).max())
    other = place(emulator, head(8, 8, 8, 8, 3, "add", "bf16"), *inputs(packed, 2, 1))
    with pytest.raises(ValueError, match="got weights in bf16, expected fp16, which this kernel"):
        kernel.launch(42, other)


REGISTERS = {1: 144, 4: 176}
"""Of 255: one block of 256 threads is on a multiprocessor, and registers are loads in flight."""


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("options", shipped_options(), ids=" ".join)
def test_it_compiles_for_every_target_without_spills(arch, options, tmp_path, monkeypatch):
    monkeypatch.setattr("marnet_kernels.compile.SHIPPED", tmp_path)
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path))
    cubin = compile_cubin(source("fuse_head"), arch, options)
    assert (cubin.arch, cubin.spill_bytes) == (arch, 0)
    rows = int(options[0].removeprefix("-DROWS="))
    assert 0 < cubin.registers <= REGISTERS[rows]
    assert "warning" not in cubin.log


@pytest.mark.gpu
def test_head_and_condition_can_be_captured_together(gpu):
    """Replays from other inputs: the counter is cleared in the graph, too."""
    packed = head(768, 768, 768, 1024, 101, "concat")
    rng = np.random.default_rng(2)
    folded = pack_condition_layer(linear(rng, 1024, 768)[0], np.zeros(768), np.ones(768))
    x_v, h3 = inputs(packed, 4, 2)
    arguments = place(gpu, packed, x_v, h3)
    condition = replace(place_condition(gpu, folded, x_v), vision=arguments.vision)
    kernel = FuseHead(choose_head_variant("fp16", 4, 2, H100))

    def enqueue():
        kernel.launch_condition(int(gpu.stream), condition)
        kernel.launch(int(gpu.stream), arguments)

    replay = gpu.graph(enqueue)
    for seed in range(5):
        x_v, h3 = inputs(packed, 4, 2, seed=seed)
        gpu.fill(arguments.vision, x_v)
        gpu.fill(arguments.hidden, h3)
        replay()
        gpu.wait()
        check(results(gpu, arguments), head_reference(packed, x_v, h3))
        want = condition_reference(folded, x_v)
        got = gpu.get(condition.condition, want.shape)
        assert (np.abs(got - want) <= HEAD * np.abs(want).max()).all()
