"""int8: its ranges, and that what is built in it is the same classifier whatever the batch."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from calibration import calibrate
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from quick import kept
from safetensors.numpy import load_file, save_file
from tiny import make_model, plain_refine, tables_of
from tolerances import FLOAT32_TWICE, INT8
from torch import nn

from marnet_export.build import onnxruntime
from marnet_export.build.builder import Order, builder
from marnet_export.build.openvino import graphs
from marnet_export.build.quantise import (
    IMAGES,
    LEVELS,
    Range,
    kept_nodes,
    loop_ranges,
    quantised_rows,
    ranked,
    require_calibration,
)
from marnet_export.build.types import Calibration, Types
from marnet_export.job import export_bundle
from marnet_export.lower.methods import Lowered, lower, lower_marnet
from marnet_export.lower.plan import make_plan
from marnet_export.settings import Settings
from marnet_sdk.backends import Backend, open_backend
from marnet_sdk.backends import openvino as runtime
from marnet_sdk.backends.openvino import ENCODER, REFINE, load_openvino
from marnet_sdk.bundle import read_bundle
from marnet_sdk.cpus import int8_sums_overflow
from marnet_sdk.errors import BackendUnavailable, ExportError, MissingExtra
from marnet_sdk.noise.tables import Floats
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import SamplerTable, sampler_table
from marnet_train.models.marnet import MARNet

BACKENDS = ("onnxruntime", "openvino")
EACH = kept(BACKENDS, {"openvino"})  # the graph of another takes seconds to make
INT8_TYPES, FLOAT_TYPES = Types("int8", "fp32"), Types("fp32", "fp32")


def build(
    backend: str, lowered: Lowered, calibration: Calibration, payload: Path, types: Types
) -> None:
    payload.mkdir(parents=True)
    module, pixels = builder(backend), torch.from_numpy(calibration.pixels[:2])
    module.build_encoder(lowered, pixels, types, payload, Order(calibration=calibration))
    module.build_refine(lowered, types, payload, Order(calibration=calibration))


def ddpm(model: MARNet) -> SamplerTable:
    return sampler_table(model.config.schedule, "ddpm")


# Ranges


@given(st.floats(-1e6, 0), st.floats(0, 1e6))
def test_a_range_has_zero_and_both_ends_among_its_steps(least, largest):
    values = Range(least, largest)
    low, high = values.ends
    assert 0 <= values.zero_point < LEVELS
    assert low <= least + values.scale / 2
    assert high >= largest - values.scale / 2
    assert high - low == pytest.approx((LEVELS - 1) * values.scale)


def test_an_activation_that_is_always_zero_has_a_range_too():
    assert Range(0.0, 0.0).scale == 1.0
    assert Range(0.0, 0.0).zero_point == 0


def test_rows_have_scales_of_their_own_and_zeros_stay_zeros():
    weight = np.random.default_rng(0).standard_normal((5, 7)) * [[1e-3], [1], [1e3], [0], [5]]
    stored, scale = quantised_rows(weight)
    assert (stored.dtype, scale.shape) == (np.int8, (5, 1))
    assert np.abs(stored).max(axis=1).tolist() == [127, 127, 127, 0, 127]
    assert (np.abs(stored * scale - weight) <= scale * 0.501).all()


@pytest.mark.parametrize("carry", ["hidden", "feature"])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_ranges_are_those_of_every_step_image_and_sample(carry, steps):
    model = make_model(hidden=16, dim=24)
    plan = make_plan(model, carry)
    calibration = calibrate(model, plan=plan, sampler="dpmpp", steps=steps, samples=3)
    found = loop_ranges(lower_marnet(model, plan), calibration)
    wanted = inputs_of_products(model, plan, calibration)
    assert found.keys() == wanted.keys()
    for name, (least, largest) in wanted.items():
        assert found[name].least == pytest.approx(min(least, 0), rel=FLOAT32_TWICE, abs=1e-6)
        assert found[name].largest == pytest.approx(largest, rel=FLOAT32_TWICE, abs=1e-6)


def inputs_of_products(model: MARNet, plan, calibration: Calibration):
    """The same in NumPy: least and largest input of each product of the loop."""
    mean, std = plan.standardise
    q = ((calibration.x_v - mean) / std @ plan.condition_weight.T)[:, None]
    rows = len(calibration.x_v), calibration.bias.shape[2], len(plan.carry_weight)
    state = previous = np.zeros(rows)
    seen: dict[str, list] = {}

    def product(name, x, weight, bias=0.0):
        seen.setdefault(name, []).append(x)
        return x @ weight.T + bias

    def leaky(y):
        return np.maximum(y, 0.01 * y)

    last = len(calibration.coefficients) - 1
    for i, (a, b, c) in enumerate(calibration.coefficients):
        into = state if plan.carry == "hidden" else product("input", state, plan.input_weight)
        h = leaky(into + q + calibration.bias[i])
        h = leaky(product("hidden2", h, *plan.hidden2))
        h = leaky(product("hidden3", h, *plan.hidden3))
        gained = product("carry", h, plan.carry_weight)
        if i == last and i > 0:
            seen["carry"].pop()  # the last step gives its estimate, and gains nothing
        state, previous = a * state + b * gained + c * previous, gained
    return {name: (np.min(xs), np.max(xs)) for name, xs in seen.items()}


def test_many_samples_are_ranged_on_fewer_images():
    model = make_model()
    one = calibrate(model, steps=3, samples=IMAGES)
    some = replace(one, x_v=one.x_v[:1])
    assert loop_ranges(lower(model), one) == loop_ranges(lower(model), some)


def test_a_chain_that_diverges_is_refused_by_the_product_where_it_does():
    model = make_model()
    lowered = lower(model)
    broken = calibrate(model, steps=5)
    broken.coefficients[1] = np.inf
    with pytest.raises(ExportError, match=r"the reverse chain's hidden2 .* its denoiser does not"):
        loop_ranges(lowered, broken)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_without_images_is_refused(backend, tmp_path):
    lowered = lower(make_model())
    module = builder(backend)
    with pytest.raises(ExportError, match=r"int8 needs images to calibrate on.*--data"):
        module.build_encoder(lowered, torch.rand(2, 3, 32, 32), INT8_TYPES, tmp_path)
    with pytest.raises(ExportError, match="int8 needs images"):
        module.build_refine(lowered, INT8_TYPES, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "name"), [("pixels", "images"), ("x_v", "image features"), ("bias", "tables")]
)
def test_calibration_that_is_not_finite_is_refused_by_name(field, name):
    calibration = calibrate(make_model(), steps=2)
    getattr(calibration, field).flat[-1] = np.nan
    with pytest.raises(ExportError, match=f"the {name} to calibrate int8 on hold NaN"):
        require_calibration(calibration, INT8_TYPES)


def test_only_int8_is_calibrated_and_on_so_many_images():
    calibration = calibrate(make_model(), steps=2)
    assert require_calibration(calibration, FLOAT_TYPES) is None
    more = replace(
        calibration,
        pixels=np.repeat(calibration.pixels, 10, axis=0),
        x_v=np.repeat(calibration.x_v, 10, axis=0),
        bias=np.repeat(calibration.bias, 400, axis=1),  # a row of noise for each image
    )
    cut = require_calibration(more, INT8_TYPES)
    assert cut is not None
    assert (len(cut.pixels), len(cut.x_v), cut.bias.shape[1]) == (IMAGES,) * 3


# What is built


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> tuple[MARNet, Floats]:
    """A trained model, and all of its validation images."""
    loaded = load_checkpoint(checkpoint)
    return loaded.model, loaded.preprocess.pixels(sorted(loaded.samples.glob("*.png")))


@pytest.fixture(scope="module")
def built(trained, tmp_path_factory) -> Callable[[str], Path]:
    """backend -> the payload of the trained model in int8. Read-only."""
    known: dict[str, Path] = {}

    def make(backend: str) -> Path:
        if backend not in known:
            model, pixels = trained
            payload = tmp_path_factory.mktemp("int8") / backend
            build(backend, lower(model), calibrate(model, pixels[:100]), payload, INT8_TYPES)
            known[backend] = payload
        return known[backend]

    return make


@pytest.fixture(scope="module")
def opened(built) -> Callable[[str], Backend]:
    known: dict[str, Backend] = {}

    def make(backend: str) -> Backend:
        if backend not in known:
            known[backend] = open_backend(backend, built(backend), "fp32", 1)
        return known[backend]

    return make


@pytest.mark.parametrize("backend", EACH)
def test_a_trained_model_gives_the_same_labels_in_int8(backend, opened, trained):
    model, pixels = trained
    run, table = opened(backend), ddpm(model)
    with torch.inference_mode():
        x_v = model.vision(torch.from_numpy(pixels)).numpy()
    want = plain_refine(model, table, x_v)[0]
    got = run.refine(run.encode(pixels), tables_of(model, make_plan(model), table))[0]
    assert (got.argmax(-1) == want.argmax(-1)).mean() >= 0.99
    assert 1e-4 < np.abs(got - want).max() / np.abs(want).max() < INT8


@pytest.mark.parametrize(
    ("steps", "samples"), kept([(1, 1), (1, 2), (2, 1), (20, 2)], {(1, 1), (20, 2)}, many=True)
)
@pytest.mark.parametrize("backend", EACH)
def test_one_int8_file_serves_every_batch_number_of_steps_and_samples(
    backend, steps, samples, opened, trained
):
    model, pixels = trained
    run, table = opened(backend), sampler_table(model.config.schedule, "dpmpp", steps)
    tables = tables_of(model, make_plan(model), table, seed=3, samples=samples)
    with torch.inference_mode():
        x_v = model.vision(torch.from_numpy(pixels[:64])).numpy()
    want = plain_refine(model, table, x_v, seed=3, samples=samples)[0]
    for batch in (1, 5, 64):
        got = run.refine(run.encode(pixels[:batch]), tables)[0]
        assert got.shape == (batch, samples, len(model.config.labels))
        assert np.abs(got - want[:batch]).max() / np.abs(want).max() < INT8


@pytest.mark.parametrize("backend", EACH)
def test_an_int8_answer_does_not_depend_on_the_other_images(backend, opened, trained):
    """Neither on how many there are, nor on how far beyond any range they reach."""
    model, pixels = trained
    run = opened(backend)
    tables = tables_of(model, make_plan(model), sampler_table(model.config.schedule, "ddpm", 10))
    loud = pixels[:9].copy()
    loud[1:] *= 50

    def answer(images: Floats) -> Floats:
        return run.refine(run.encode(images), tables)[0]

    alone = answer(pixels[:1])
    for images in (pixels[:9], loud):
        np.testing.assert_allclose(answer(images)[:1], alone, rtol=FLOAT32_TWICE, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", EACH)
def test_the_same_images_give_the_same_int8_weights_and_scales(backend, built, trained, tmp_path):
    model, pixels = trained
    build(backend, lower(model), calibrate(model, pixels[:100]), tmp_path / "again", INT8_TYPES)
    for path in built(backend).iterdir():
        if path.suffix in (".bin", ".onnx"):
            assert weights_of(tmp_path / "again" / path.name) == weights_of(path), path.name


def weights_of(path: Path) -> list[bytes]:
    """All constants, in the order of the file."""
    if path.suffix == ".bin":
        return [path.read_bytes()]
    return [tensor.SerializeToString() for tensor in onnx.load(path).graph.initializer]


@pytest.mark.slow
@pytest.mark.parametrize("backend", EACH)
def test_an_encoder_and_a_loop_may_have_types_of_their_own(backend, trained, tmp_path):
    model, pixels = trained
    lowered, calibration = lower(model), calibrate(model, pixels[:50])
    module, example = builder(backend), torch.from_numpy(pixels[:2])
    module.build_encoder(lowered, example, INT8_TYPES, tmp_path, Order(calibration=calibration))
    module.build_refine(lowered, FLOAT_TYPES, tmp_path, Order(calibration=calibration))
    run, table = (
        open_backend(backend, tmp_path, "fp32", 1),
        sampler_table(model.config.schedule, "ddpm"),
    )
    x_v = run.encode(pixels[:20])
    want = plain_refine(model, table, x_v)[0]
    got = run.refine(x_v, tables_of(model, make_plan(model), table))[0]
    assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()


@pytest.mark.parametrize("backend", kept(BACKENDS, {"openvino"}))
def test_quantising_leaves_the_model_and_the_loggers_as_they_were(backend, tmp_path):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    root = logging.getLogger()
    logs = logging.getLoggerClass(), list(root.handlers), root.level
    build(backend, lower(model), calibrate(model, steps=3), tmp_path / "payload", INT8_TYPES)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert (logging.getLoggerClass(), list(root.handlers), root.level) == logs


def test_without_nncf_the_pip_line_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nncf", None)
    model = make_model()
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[export\]"'):
        build("openvino", lower(model), calibrate(model, steps=3), tmp_path / "p", INT8_TYPES)


@pytest.mark.slow
def test_quantising_is_silent_and_writes_nothing_home(tmp_path):
    """NNCF has telemetry, a progress bar and a logger; ONNX Runtime's tools have loggers."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from calibration import calibrate\n"
        "from test_quantise import BACKENDS, INT8_TYPES, build\n"
        "from tiny import make_model\n"
        "from marnet_export.lower.methods import lower\n"
        "model = make_model()\n"
        "for backend in BACKENDS:\n"
        f"    folder = Path({str(tmp_path / 'payload')!r}) / backend\n"
        "    build(backend, lower(model), calibrate(model, steps=3), folder, INT8_TYPES)\n"
        "print('openvino_telemetry' in sys.modules)\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"HOME": str(home), "PATH": "", "PYTHONPATH": f"{here}:{here.parent}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert list(home.iterdir()) == []


# An encoder that rounding hurts


class Depthwise(nn.Module):
    """Pointwise, depthwise and pointwise convolutions with ReLU6, as in EfficientNet-Lite.

    Channels differ by a factor of a thousand before they are cut off at 6, and the weights of the
    depthwise convolution by as much; they nearly cancel, so that rounding them moves the mean.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        wide, norm = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)
        self.wide = nn.Sequential(wide, nn.BatchNorm2d(width), nn.ReLU6())
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.Sequential(norm, nn.ReLU6())
        self.narrow = nn.Conv2d(width, 16, 1)
        ranges = torch.logspace(-1.5, 1.5, width)
        with torch.no_grad():
            for weight in (wide.weight, self.depthwise.weight):
                weight.mul_(ranges[:, None, None, None])
            assert wide.bias is not None
            wide.bias.copy_(6 + ranges)
            self.depthwise.weight.sub_(self.depthwise.weight.mean((2, 3), keepdim=True))
            assert norm.running_var is not None
            norm.running_var.copy_(0.1 * ranges**2)
            norm.bias.fill_(3.0)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.norm(self.depthwise(self.wide(pixels)))).mean((2, 3))


def depthwise_errors(backend: str, payload: Path) -> Floats:
    """Relative errors of the features of 20 images that were not calibrated on."""
    encoder, model = Depthwise().eval(), make_model()
    calibration = calibrate(model, steps=3)
    calibration = replace(calibration, pixels=np.tanh(calibration.pixels))
    build(backend, replace(lower(model), encoder=encoder), calibration, payload, INT8_TYPES)
    images = np.tanh(np.random.default_rng(1).standard_normal((20, 3, 32, 32), np.float32))
    got = open_backend(backend, payload, "fp32", 1).encode(images)
    with torch.inference_mode():
        want = encoder(torch.from_numpy(images)).numpy()
    return np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)


@pytest.mark.parametrize("backend", EACH)
def test_a_depthwise_convolution_with_channels_of_all_sizes_survives(backend, tmp_path):
    bound = 0.03 if backend == "openvino" and int8_sums_overflow() else 0.01  # 7 bits, not 8
    assert depthwise_errors(backend, tmp_path / "payload").max() < bound


class Grouped(Depthwise):
    """`Depthwise` with a convolution in groups of several channels behind it, as RegNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(32, 16, 3, groups=4)


@pytest.fixture(scope="module")
def by_processor(tmp_path_factory) -> dict[bool, Path]:
    """int8 in OpenVINO, by whether sums of products overflow where it is exported; read-only."""
    found = {}
    for overflows in (True, False):
        found[overflows] = tmp_path_factory.mktemp("int8") / "payload"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "int8_sums_overflow", lambda there=overflows: there)
            lowered = replace(lower(make_model()), encoder=Grouped().eval())
            calibration = calibrate(make_model(), steps=3)
            build("openvino", lowered, calibration, found[overflows], INT8_TYPES)
    return found


def int8_weights(path: Path) -> list[NDArray]:
    """Every stored matrix of int8, those of the loop's iterator among them."""

    def of(graph: Any) -> Iterator[NDArray]:
        for node in graph.get_ops():
            if node.get_type_name() == "TensorIterator":
                yield from of(node.get_function())
            elif node.get_type_name() == "Constant" and node.get_element_type().to_string() == "i8":
                yield node.data.astype(int)

    return list(of(load_openvino().Core().read_model(path)))


@pytest.mark.parametrize("part", [ENCODER, REFINE])
@pytest.mark.parametrize(("overflows", "most"), [(True, 64), (False, 127)])
def test_openvino_has_weights_of_7_bits_where_sums_overflow(
    part: str, overflows: bool, most: int, by_processor: dict[bool, Path]
) -> None:
    weights = int8_weights(by_processor[overflows] / part)
    # Those of a depthwise convolution stay, [groups, 1, 1, height, width]: its sums are short.
    sums = [values for values in weights if values.ndim < 5 or values.shape[2] > 1]
    assert any(values.ndim == 5 for values in sums) == (part == ENCODER)
    assert all(most - 1 <= abs(values).max() <= most for values in sums)


@pytest.mark.parametrize("part", [ENCODER, REFINE])
def test_openvino_refuses_8_bit_weights_where_sums_overflow(
    part: str, by_processor: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "int8_sums_overflow", lambda: True)
    shutil.copytree(by_processor[True], tmp_path / "payload")
    open_backend("openvino", tmp_path / "payload", "fp32", 1)
    for file in (part, Path(part).with_suffix(".bin")):
        shutil.copy(by_processor[False] / file, tmp_path / "payload" / file)
    why = f"{part} was exported on another processor.*no VNNI.*export the bundle on this machine"
    with pytest.raises(BackendUnavailable, match=why):
        open_backend("openvino", tmp_path / "payload", "fp32", 1)
    monkeypatch.setattr(runtime, "int8_sums_overflow", lambda: False)
    open_backend("openvino", tmp_path / "payload", "fp32", 1)


def spread_channels(weights: dict[str, np.ndarray]) -> None:
    """The same function of the images, but channels inside of a ResNet's layers differ widely.

    What is behind a ReLU may be larger, where the next convolution reads it with smaller weights.
    """
    for name in [
        name
        for name in weights
        if "stages.0" in name and name.endswith("layer.0.normalization.weight")
    ]:
        factors = np.logspace(-3, 3, len(weights[name]), dtype=np.float32)
        factors = np.random.default_rng(0).permutation(factors)
        weights[name] *= factors
        weights[name.replace(".weight", ".bias")] *= factors
        weights[name.replace("0.normalization", "1.convolution")] /= factors[:, None, None]


@pytest.mark.parametrize("backend", kept(BACKENDS, {"onnxruntime"}))
def test_layers_that_int8_hurts_most_stay_float_and_the_receipt_says_why(
    backend, checkpoint, tmp_path
):
    shutil.copytree(checkpoint, tmp_path / "spread")
    file, said = tmp_path / "spread" / "model.safetensors", []
    weights = load_file(file)
    spread_channels(weights)
    save_file(weights, file)
    more = {"steps": 5, "min_agreement": 0.98, "text": False, "source": False, "loop": "graph"}
    settings = Settings(backend, "int8", **more)
    export_bundle(tmp_path / "spread", tmp_path / "bundle", settings, say=said.append)
    precision = read_bundle(tmp_path / "bundle").manifest.precision
    assert all("alone in int8 moves the features by" in why for why in precision.kept.values())
    assert any("1.convolution" in layer for layer in precision.kept)
    assert 0 < precision.receipt["encoder"].compute["fp32"] < 0.6
    assert any("of the image encoder in fp32" in line for line in said)


def test_the_block_that_int8_hurts_most_is_ranked_first():
    model = make_model()
    encoder, pixels = lower(model).encoder, calibrate(model).pixels
    name, layer = next((n, m) for n, m in encoder.named_modules() if n.endswith("1.convolution"))
    norm = encoder.get_submodule(name.replace("1.convolution", "0.normalization"))
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(layer, nn.Conv2d)
    factors = torch.logspace(-3, 3, norm.num_features)
    with torch.no_grad():
        norm.weight.mul_(factors)
        layer.weight.div_(factors[:, None, None])
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    blocks = ranked(encoder, pixels)
    assert name in blocks[0].layers
    assert [block.error for block in blocks] == sorted((b.error for b in blocks), reverse=True)
    assert sum(block.share for block in blocks) >= 1  # a convolution may stay float for the next
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in before.items())


def test_layers_are_found_in_a_graph_by_their_rows_whatever_scales_and_turns_them():
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(5, 5)
    encoder = nn.ModuleDict({"conv": layers[0], "linear": layers[1]})
    conv, linear = (layer.weight.detach().numpy() for layer in layers)
    factors = {
        "other": np.ones_like(conv),
        "folded": (conv * np.arange(-2, 4)[:, None, None, None]).reshape(2, 3, 2, 3, 3),
        "turned": linear.T,
    }
    assert kept_nodes(factors, encoder, ["conv"]) == ["folded"]
    assert kept_nodes(factors, encoder, ["linear", "conv"]) == ["folded", "turned"]
    assert kept_nodes(factors, nn.ModuleDict({"wrapped": encoder}), ["conv"]) == ["folded"]
    with pytest.raises(ExportError, match="conv shall stay float, but no product of the graph"):
        kept_nodes({"other": factors["other"]}, encoder, ["conv"])
    assert kept_nodes({}, nn.ModuleDict({"wrapped": encoder}), ["conv"]) == []


def test_int8_is_not_fitted_to_images_that_only_verify(checkpoint, digits, tmp_path, monkeypatch):
    seen = []

    def build_encoder(lowered, pixels, types, payload, order) -> None:
        seen.append(order.calibration.pixels)
        raise ExportError("stop here")

    stopped = replace(onnxruntime.BUILDER, build_encoder=build_encoder)
    monkeypatch.setattr(onnxruntime, "BUILDER", stopped)
    settings = Settings("onnxruntime", "int8", steps=2)
    for data in (None, digits / "test"):
        with pytest.raises(ExportError, match="stop here"):
            export_bundle(checkpoint, tmp_path / "bundle", settings, data=data)
    np.testing.assert_array_equal(*seen)
