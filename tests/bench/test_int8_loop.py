"""The script that compares ways to round the activations of an int8 loop."""

from __future__ import annotations

import json
from functools import partial
from types import ModuleType

import numpy as np
import pytest
from benchmark_scripts import load_script
from calibration import calibrate
from click.testing import CliRunner
from plan_twin import run_plan
from tiny import make_model, make_seda, tables_of, write_checkpoint
from tolerances import FLOAT32_LOOP, INT8

from marnet_export.build.native import loop_layers
from marnet_export.build.quantise import loop_ranges
from marnet_export.build.types import Types
from marnet_export.lower.methods import lower_marnet
from marnet_export.lower.plan import make_plan
from marnet_kernels.native import loop_reference
from marnet_sdk.noise.tables import Tables
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.diffusion import sampler_table


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/int8_loop.py")


def test_levels_by_hand(script):
    x = np.float32([-9, -0.6, 0.4, 1.4, 9])
    assert script.on_levels(x, -1.0, 2.0, bits=2).tolist() == [-1, -1, 0, 1, 2]
    assert script.on_levels(np.zeros(2, np.float32), 0.0, 0.0).tolist() == [0, 0]


def test_a_row_has_its_own_range_and_so_has_a_group(script):
    x = np.float32([[0.01, 0.02, 1, 100], [0.01, 0.02, 0.03, 0.04]])
    by_row = script.by_row()("hidden2", 0, x)
    assert by_row[0, :2].tolist() == [0, 0]
    np.testing.assert_allclose(by_row[1], x[1], atol=0.04 / 255)
    np.testing.assert_array_equal(script.by_row()("hidden2", 0, x[1:]), by_row[1:])
    in_groups = script.in_groups(2)("hidden2", 0, x)
    np.testing.assert_allclose(in_groups[0, :2], x[0, :2], atol=0.02 / 255)


def test_the_last_steps_may_be_rounded_in_another_way(script):
    rounded = script.switched(lambda *_: "early", lambda *_: "late", 2)
    assert [rounded("carry", left, None) for left in (3, 2, 1, 0)] == ["early"] * 2 + ["late"] * 2


@pytest.mark.parametrize("carry", ["hidden", "feature"])
def test_without_rounding_it_is_the_plan(script, carry):
    model = make_model(dim=24, hidden=32)
    plan, table = make_plan(model, carry), sampler_table(model.config.schedule, "dpmpp", 20)
    x_v = np.random.default_rng(1).standard_normal((5, len(model.vision_mean)))
    drawn = [
        draw_trajectory(0, table.timesteps, table.train_steps, 24, trajectory=k) for k in (0, 1)
    ]
    want = run_plan(plan, table, x_v, drawn)
    tables = tables_of(model, plan, table, samples=2)
    got = script.estimates(plan, x_v.astype(np.float32), tables, script.FLOAT)
    assert np.abs(got - want).max() <= FLOAT32_LOOP * np.abs(want).max()


def test_with_a_range_for_each_row_it_is_the_native_loop(script):
    model = make_model(dim=24, hidden=32)
    plan = make_plan(model)
    calibration = calibrate(model, plan=plan, steps=10)
    ranges = loop_ranges(lower_marnet(model, plan), calibration)
    layers = loop_layers(plan, Types("int8", "fp32"))
    tables = Tables(calibration.coefficients, calibration.bias)
    want = loop_reference(layers, calibration.x_v, tables.coefficients, tables.bias)
    form = script.Form("a range for each row, 8 bits", script.by_row())
    assert form.name in {one.name for one in script.forms(ranges)}
    got = script.estimates(plan, calibration.x_v, tables, form)
    assert np.abs(got - want).max() <= INT8 * np.abs(want).max()


def test_every_form_is_held_to_the_checkpoint(script, small, tmp_path):
    out = tmp_path / "found.json"
    result = CliRunner().invoke(script.main, ["--checkpoint", str(small), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    (run,) = json.loads(out.read_text())["runs"]
    first, *others = run["forms"]
    assert (first["form"], first["agreement"]) == ("float32", 1.0)
    assert first["largest_error"] < 1e-3
    assert len(others) == 16
    errors = {one["form"]: one["refined_error"] for one in others}
    assert errors["16 bits"] < errors["fixed ranges, 8 bits"]
    assert "activations not rounded" in result.stdout


@pytest.mark.parametrize(
    "make",
    [partial(make_model, progressive=True), partial(make_seda, latent=10, handover="carry")],
)
def test_a_loop_that_the_native_one_does_not_run_is_refused_before_any_work(
    script, make, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("it works already"))
    other, out = write_checkpoint(make(), tmp_path / "other"), tmp_path / "found.json"
    arguments = [f"--checkpoint={small}", f"--checkpoint={other}", f"--out={out}"]
    result = CliRunner().invoke(script.main, arguments)
    assert result.exit_code == 2
    assert "its denoiser is progressive or its handover is carry, and the native loop" in " ".join(
        result.stderr.split()
    )
    assert not out.exists()
