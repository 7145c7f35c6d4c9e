"""Resize, crop and normalise: the twin against Pillow, and the kernel against its twin.

Comparisons are for equality: grey levels are made with integers, and normalised by a table.
"""

import ctypes
from dataclasses import asdict, replace

import numpy as np
import PIL
import pytest
from emulate import Cpu, emulate
from fenced import Fenced
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from marnet_kernels import preprocess
from marnet_kernels.compile import TARGETS, compile_cubin
from marnet_kernels.loader import DeviceInfo
from marnet_kernels.preprocess import (
    PreprocessArguments,
    PreprocessKernel,
    PreprocessPlan,
    PreprocessSpec,
    filter_weights,
    preprocess_reference,
    resize_reference,
    shipped_options,
)
from marnet_kernels.reverse_sampler import to_bits
from marnet_kernels.source import source
from marnet_sdk.preprocess import Preprocess

FILTERS = [Image.Resampling(code) for code in range(6)]
PILLOW = int(PIL.__version__.split(".")[0])
SMOOTH = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]
SQUARE = PreprocessSpec(size=(32, 32), pillow=PILLOW)
CLIP = PreprocessSpec(
    shortest_edge=40,
    crop_size=(36, 33),
    resample=3,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    pillow=PILLOW,
)


@pytest.fixture(scope="module", params=[0, 1], ids=["china", "flower"])
def photograph(request, photographs):
    with Image.open(photographs[request.param]) as image:
        return image.convert("RGB")


def noise(height, width, seed=0):
    """Saturated random pixels: sums beyond black and white on every edge."""
    shape = (height, width, 3)
    return np.random.default_rng(seed).choice(np.array([0, 1, 254, 255], np.uint8), shape)


def pillow(array, size, resample):
    return np.asarray(Image.fromarray(array).resize(size[::-1], resample))


def twin(array, size, resample):
    return resize_reference(array, size, resample, SQUARE.down_first(array.shape[:2], size))


def spec_of(configuration):
    return PreprocessSpec(**asdict(configuration), pillow=PILLOW)


# --- the twin against Pillow and the SDK ----------------------------------------------------------

BOXES = [  # left, top, right, bottom; and (height, width) to resize to
    ((0, 0, 640, 427), (56, 56)),
    ((0, 0, 640, 427), (30, 200)),
    ((3, 5, 104, 106), (150, 131)),
    ((0, 0, 300, 200), (200, 96)),
    ((0, 0, 96, 200), (60, 96)),
    ((0, 0, 639, 3), (41, 40)),
    ((0, 0, 1, 427), (20, 21)),
    ((50, 60, 51, 61), (7, 9)),
    ((0, 0, 640, 427), (1, 1)),
]


@pytest.mark.parametrize("resample", FILTERS, ids=lambda f: f.name)
@pytest.mark.parametrize(("box", "size"), BOXES)
def test_twin_resizes_photographs_as_pillow_does(photograph, box, size, resample):
    array = np.asarray(photograph.crop(box))
    np.testing.assert_array_equal(twin(array, size, resample), pillow(array, size, resample))


edges = st.integers(1, 48)


@settings(max_examples=60)
@given(st.tuples(edges, edges), st.tuples(edges, edges), st.sampled_from(FILTERS), st.integers(0))
def test_twin_resizes_any_sizes_as_pillow_does(here, there, resample, seed):
    array = noise(*here, seed=seed)
    np.testing.assert_array_equal(twin(array, there, resample), pillow(array, there, resample))


@pytest.mark.parametrize("resample", FILTERS, ids=lambda f: f.name)
def test_twin_has_the_order_of_either_version_of_pillow(photograph, resample):
    """Whatever is installed: resizing one axis at a time, Pillow has no choice."""
    image = photograph.crop((0, 0, 60, 300))
    array = np.asarray(image)
    across = image.resize((50, 300), resample).resize((50, 40), resample)
    down = image.resize((60, 40), resample).resize((50, 40), resample)
    for version, expected in [(12, across), (13, down)]:
        spec = PreprocessSpec(size=(40, 50), resample=resample, pillow=version, mean=(0, 0, 0))
        spec = replace(spec, std=(1, 1, 1), rescale_factor=1)
        got = preprocess_reference(array, spec)
        np.testing.assert_array_equal(got.transpose(1, 2, 0), np.asarray(expected))


CONFIGURATIONS = [
    Preprocess(size=(48, 40)),
    Preprocess(size=(64, 64), crop_size=(56, 47), resample=3),
    Preprocess(size=(33, 20), crop_size=(40, 31), resample=1),
    Preprocess(shortest_edge=50, crop_size=(44, 44), resample=3, mean=(0.1, 0.5, 0.9)),
    Preprocess(shortest_edge=21, crop_size=(24, 90), rescale_factor=1.0, std=(2.0, 3.0, 0.7)),
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("box", [(0, 0, 640, 427), (0, 0, 100, 400), (3, 3, 44, 20), (0, 0, 1, 1)])
def test_twin_equals_the_sdk(photograph, configuration, box):
    image = photograph.crop(box)
    got = preprocess_reference(np.asarray(image), spec_of(configuration))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, configuration(image))


def test_weights_of_a_crop_are_those_of_the_whole():
    """Also far out: an image of 60,000 x 1 whose short edge becomes 224 is 13 million wide."""
    for resample in FILTERS:
        starts, weights = filter_weights(300, 77, resample, 0, 77)
        some_starts, some = filter_weights(300, 77, resample, 20, 13)
        np.testing.assert_array_equal(some_starts, starts[20:33])
        np.testing.assert_array_equal(some, weights[20:33, : some.shape[1]])
        assert not weights[20:33, some.shape[1] :].any()
    starts, weights = filter_weights(60_000, 13_440_000, 3, 6_719_888, 224)
    assert starts.min() > 29_990
    assert weights.shape == (224, 4)


@settings(max_examples=200)
@given(edges, st.integers(1, 100), st.integers(1, 60), st.sampled_from(FILTERS))
def test_packed_filters_are_the_weights_and_end_with_the_pixels(length, resized, wanted, resample):
    cut, pad, covered = preprocess._centre(resized, wanted)
    starts, weights = filter_weights(length, resized, resample, cut, covered)
    expected = np.zeros((wanted, length), np.int64)
    for position, (start, row) in enumerate(zip(starts, weights, strict=True)):
        for tap in np.flatnonzero(row):
            expected[pad + position, start + tap] = row[tap]
    axis = preprocess._axis(length, resized, wanted, resample)
    table = axis.table.reshape(1 + 4 * axis.quads, -1)
    packed = table[1:].reshape(axis.quads, -1, 4).swapaxes(0, 1).reshape(table.shape[1], -1)
    got = np.zeros((table.shape[1], length + 4 * axis.quads), np.int64)
    for position, (start, row) in enumerate(zip(table[0], packed, strict=True)):
        assert 0 <= start <= max(0, axis.length - 4 * axis.quads)
        got[position, axis.first + start : axis.first + start + len(row)] = row
    assert axis.first + axis.length <= length
    assert 4 * axis.quads <= axis.length + 3
    np.testing.assert_array_equal(got[:wanted, :length], expected)
    assert not got[wanted:].any()
    assert not got[:, axis.first + axis.length :].any()


# --- the plan -------------------------------------------------------------------------------------


def test_buffers_have_room_for_what_the_crop_needs():
    plan = PreprocessPlan([(427, 640), (3, 5), (427, 640)], CLIP)
    assert plan.shape == (3, 3, 36, 33)
    assert plan.offsets.tolist() == [0, 819_856, 819_920]
    assert plan.buffers["source"] == 819_920 + 819_856
    assert plan.buffers["out"] == 4 * 3 * 3 * 36 * 33
    rows = plan._images["rows"].tolist()
    assert rows == [rows[0], 3, rows[0]]
    assert rows[0] < 427  # 36 of 40 rows are kept
    assert plan.buffers["scratch"] == sum(-(-3 * 36 * r // 16) * 16 for r in rows)
    assert PreprocessPlan([(3, 5)], CLIP, "fp16").buffers["out"] == 2 * 3 * 36 * 33


def test_images_of_one_size_share_their_filters():
    one, eight = (PreprocessPlan([(99, 77)] * n, CLIP).buffers["tables"] for n in (1, 8))
    assert eight - one == 7 * 48


def test_wrong_specifications_are_refused():
    for change, message in [
        ({"shortest_edge": 4}, "size, shortest_edge: got .* and 4, expected one of them"),
        ({"size": None}, "size, shortest_edge: got None and None, expected one of them"),
        ({"size": None, "shortest_edge": 4}, "crop_size: got none .* expected one; images of"),
        ({"size": (0, 4)}, r"edges: got \[0, 4, 1\], expected at least 1 pixel"),
        ({"resample": 6}, "resample: got 6, expected one of 0 nearest, 1 lanczos"),
        ({"std": (1.0, 0.0, 1.0)}, "expected finite numbers, three for mean and three non-zero"),
        ({"mean": (1.0, 1.0)}, "expected finite numbers, three for mean"),
        ({"rescale_factor": float("nan")}, "rescale_factor, mean, std: got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(SQUARE, **change)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "got 0 images, expected 1 to 65535; split the batch"),
        ([(4, 4), (0, 3)], "got image 1 of 0 x 3 pixels, expected at least one and less than"),
        ([(30_000, 30_000)], r"got image 0 of 30000 x 30000 pixels, .* 2\*\*31 bytes; decode it"),
        (
            [(700_000_000, 1)],
            "got 700000000 pixels in a row resized to 32, expected filters of",
        ),
    ],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        PreprocessPlan(sizes, SQUARE)


def test_more_scratch_than_the_kernel_can_address_is_refused():
    message = r"scratch for an image of 700000000 x 1 pixels, expected less than 2\*\*31; decode"
    with pytest.raises(ValueError, match=message):
        PreprocessPlan([(700_000_000, 1)], replace(SQUARE, resample=0, pillow=12))


def test_wrong_outputs_and_images_are_refused():
    with pytest.raises(ValueError, match="output: got 'fp8', expected 'fp32', 'fp16' or 'bf16'"):
        PreprocessPlan([(4, 4)], SQUARE, "fp8")
    with pytest.raises(ValueError, match=r"output: got normalised values of size 255000, .* fp16"):
        PreprocessPlan([(4, 4)], replace(SQUARE, rescale_factor=1000, std=(1, 1, 1)), "fp16")
    with pytest.raises(ValueError, match=r"spec: got an output of \(30000, 30000\), expected less"):
        PreprocessPlan([(4, 4)], PreprocessSpec(size=(30_000, 30_000)))
    plan = PreprocessPlan([(4, 5)], SQUARE)
    for wrong in (noise(5, 4), noise(4, 5).astype(np.int16), noise(4, 5)[..., :1]):
        with pytest.raises(ValueError, match=r"images: got .* expected \[\('uint8', 4, 5, 3\)\]"):
            plan.pack([wrong])
    with pytest.raises(ValueError, match=r"out: got uint8 \(3,\), expected uint8 \(80,\)"):
        plan.pack([noise(4, 5)], np.zeros(3, np.uint8))


def test_wrong_addresses_are_refused():
    good = {"source": 16, "tables": 16, "scratch": 16, "out": 16}
    plan = PreprocessPlan([(4, 5)], SQUARE)
    for name, address in [("source", 0), ("tables", 24), ("out", -16)]:
        message = rf"{name}: got address {address:#x}, expected a multiple of 16 that is not 0"
        with pytest.raises(ValueError, match=message):
            PreprocessArguments(plan=plan, **good | {name: address})
    arguments = PreprocessArguments(plan=plan, **good)
    assert ctypes.sizeof(arguments.parameters()) == 48
    assert "sizeof(Image) == 48 && sizeof(Arguments) == 48" in source("preprocess")


# --- the kernel -----------------------------------------------------------------------------------


def place(machine, plan, images):
    """Arguments for these images, all on the device."""
    return PreprocessArguments(
        plan=plan,
        source=machine.put(plan.pack(images)),
        tables=machine.put(plan.tables),
        scratch=machine.empty(plan.buffers["scratch"]),
        out=machine.empty(plan.buffers["out"]),
    )


def run(machine, images, spec, output="fp32", seed=0):
    """[B, 3, H, W] of the kernel: float32, or the bits of 16-bit values."""
    plan = PreprocessPlan([image.shape[:2] for image in images], spec, output)
    arguments = place(machine, plan, images)
    if isinstance(machine, Cpu):
        kernel, parameters = emulate("preprocess"), arguments.parameters()
        for function, grid, block, shared in arguments.launches():
            kernel.launch(function, parameters, grid=grid, block=block, shared=shared, seed=seed)
    else:
        PreprocessKernel().launch(int(machine.stream), arguments)
        machine.wait()
    return machine.get(arguments.out, plan.shape, np.float32 if output == "fp32" else np.uint16)


def references(images, spec):
    return np.stack([preprocess_reference(image, spec) for image in images])


@pytest.mark.parametrize("resample", FILTERS, ids=lambda f: f.name)
@pytest.mark.parametrize("spec", [CLIP, SQUARE, PreprocessSpec(size=(9, 11), crop_size=(17, 14))])
def test_kernel_equals_its_twin_on_a_ragged_batch(machine, photograph, spec, resample):
    spec = replace(spec, resample=resample)
    boxes = [(0, 0, 200, 133), (7, 9, 48, 300), (0, 0, 32, 32), (5, 5, 6, 6), (0, 3, 301, 5)]
    images = [np.asarray(photograph.crop(box)) for box in boxes]
    np.testing.assert_array_equal(run(machine, images, spec), references(images, spec))


@pytest.mark.parametrize("resample", SMOOTH, ids=lambda f: f.name)
def test_kernel_equals_pillow_at_the_size_of_a_vit(machine, photograph, resample):
    clip = Preprocess(shortest_edge=224, crop_size=(224, 224), resample=resample)
    got = run(machine, [np.asarray(photograph)], spec_of(clip))
    np.testing.assert_array_equal(got[0], clip(photograph))


def test_rows_come_first_where_they_shrink_much_more():
    for pillow, here, there, expected in [
        (13, (100, 50), (50, 26), True),
        (13, (100, 50), (50, 25), False),  # exactly twice as many
        (13, (100, 50), (100, 60), False),
        (13, (100, 50), (99, 60), True),
        (12, (100, 50), (10, 50), False),
    ]:
        assert replace(SQUARE, pillow=pillow).down_first(here, there) is expected


@pytest.mark.parametrize("pillow", [12, 13])
def test_both_orders_of_the_passes_equal_the_twin(machine, photograph, pillow):
    """Tall ones lose rows, so that from version 13 on they are resized down first."""
    spec = replace(CLIP, size=(40, 40), shortest_edge=None, pillow=pillow)
    images = [np.asarray(photograph.crop(box)) for box in [(0, 0, 41, 400), (0, 0, 401, 50)]]
    expected = references(images, spec)
    np.testing.assert_array_equal(run(machine, images, spec), expected)
    other = references(images, replace(spec, pillow=25 - pillow))
    levels = np.abs(
        np.searchsorted(spec.lookup()[0], expected[:, 0]).astype(int)
        - np.searchsorted(spec.lookup()[0], other[:, 0])
    )
    assert levels[0].max() == 1
    assert not levels[1].any()


@settings(max_examples=100)
@given(
    st.lists(st.tuples(edges, edges), min_size=1, max_size=3),
    st.tuples(edges, edges),
    st.tuples(edges, edges),
    st.sampled_from(FILTERS),
)
def test_kernel_equals_its_twin_at_any_sizes(sizes, size, crop, resample):
    images = [noise(*size, seed=index) for index, size in enumerate(sizes)]
    for spec in (
        PreprocessSpec(size=size, crop_size=crop, resample=resample, pillow=12),
        PreprocessSpec(size=size, crop_size=crop, resample=resample, pillow=13),
        PreprocessSpec(shortest_edge=size[0], crop_size=crop, resample=resample),
    ):
        np.testing.assert_array_equal(run(Cpu(), images, spec), references(images, spec))


@pytest.mark.parametrize("output", ["fp16", "bf16"])
@pytest.mark.parametrize("spec", [CLIP, SQUARE])
def test_kernel_writes_16_bits(machine, output, spec):
    images = [noise(50, 70), noise(20, 10)]
    expected = to_bits(references(images, spec), output)
    np.testing.assert_array_equal(run(machine, images, spec, output), expected)


def test_nothing_is_read_beyond_an_array():
    """Widths and heights below, at and above a multiple of the four taps that are read at once."""
    for last in [(h, w) for h in range(1, 10) for w in range(1, 10)]:
        for resample, size in [(2, (4, 5)), (3, (9, 2)), (1, (2, 9)), (0, (7, 7))]:
            spec = PreprocessSpec(size=size, crop_size=(3, 6), resample=resample)
            images = [noise(5, 3), noise(*last)]
            np.testing.assert_array_equal(run(Fenced(), images, spec), references(images, spec))


def test_no_image_depends_on_its_batch(machine):
    images = [noise(50, 70), noise(21, 11), noise(3, 200)]
    together = run(machine, images, CLIP, seed=5)
    for image, row in zip(images, together, strict=True):
        np.testing.assert_array_equal(run(machine, [image], CLIP)[0], row)


class Driver:
    """The part of cuda.bindings.driver that the wrapper calls, on the emulator."""

    def cuLaunchKernel(self, function, *launch):  # noqa: N802
        *(grid_x, grid_y, grid_z, block, one, other, shared, stream, parameters), extra = launch
        assert (grid_z, one, other, stream, extra) == (1, 1, 1, 42, 0)
        address = ctypes.c_void_p.from_address(parameters).value
        arguments = preprocess._Parameters.from_address(address)
        kernel = emulate("preprocess")
        kernel.launch(function, arguments, grid=(grid_x, grid_y), block=block, shared=shared)
        return (0,)


def test_wrapper_launches_both_kernels(emulator, monkeypatch):
    h100 = DeviceInfo((9, 0), multiprocessors=132, shared_bytes=232_448, cooperative=True)
    monkeypatch.setattr(preprocess, "current_device", lambda: h100)
    monkeypatch.setattr(preprocess, "compile_cubin", lambda *_: None)
    monkeypatch.setattr(preprocess, "load_function", lambda _, name: name)
    monkeypatch.setattr(preprocess._cuda, "load", lambda _: Driver())
    images = [noise(50, 70), noise(90, 11)]
    arguments = place(emulator, PreprocessPlan([i.shape[:2] for i in images], CLIP), images)
    PreprocessKernel().launch(42, arguments)
    got = emulator.get(arguments.out, arguments.plan.shape)
    np.testing.assert_array_equal(got, references(images, CLIP))


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", TARGETS)
def test_it_compiles_for_every_target_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setattr("marnet_kernels.compile.SHIPPED", tmp_path)
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path))
    (options,) = shipped_options()
    cubin = compile_cubin(source("preprocess"), arch, options)
    assert (cubin.arch, cubin.spill_bytes) == (arch, 0)
    assert 0 < cubin.registers <= 80  # three blocks of 256 threads on a multiprocessor
    assert "warning" not in cubin.log
