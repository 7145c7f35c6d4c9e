"""Stages are timed inside of calls whose answers stay the same, and bounds are true."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from compilers import need_compiler

from marnet_bench.cli import main
from marnet_bench.explain import needs
from marnet_bench.limits import Limits, Rate
from marnet_bench.photographs import golden_images, images_of
from marnet_bench.stages import STAGES, WHOLE, Watch, run_stages
from marnet_sdk import Classifier
from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import InvalidInput

SHORT = {"warmup": 1, "duration": 0.0, "min_rounds": 4}


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch):
    """Measuring what the machine can do takes seconds, and is tested elsewhere."""
    known = limits(fp32=1e10, bf16=2e10, int8=4e10)
    monkeypatch.setattr("marnet_bench.limits.measure_limits", lambda sizes, threads: known)


def limits(**multiply_adds: float) -> Limits:
    rates = {name: Rate(rate, "product") for name, rate in multiply_adds.items()}
    return Limits(threads=1, read={1000: Rate(1e9, "reader")}, multiply_adds=rates)


def staged(bundle: Any, batch: int = 1, **more: Any) -> dict[str, Any]:
    fast = more.pop("fast_decode", False)
    with Classifier(bundle, threads=1, fast_decode=fast) as classifier:
        images = images_of(classifier.bundle, more.pop("sides", ()))
        return run_stages(classifier, images, batch=batch, **SHORT, **more)


def test_a_watch_adds_up_what_passes_it_and_calls_the_rest_so():
    now = iter([0.0, 1.0, 3.0, 4.0, 5.0, 9.0])
    watch = Watch(lambda: next(now))
    taken = watch.all_stages(lambda: [watch.call("decode", len, "ab") for _ in range(2)])
    assert taken == {"decode": 3.0, "rest": 6.0}
    assert watch.call("decode", len, "ab") == 2  # off again, so no time is asked for


@pytest.mark.parametrize("batch", [1, 3])
def test_every_stage_is_timed_and_the_sum_is_beside_the_whole_call(bundle_of, batch):
    report = staged(bundle_of("onnxruntime", "fp32"), batch)
    assert [line["stage"] for line in report["lines"]] == [*STAGES, WHOLE]
    *stages, whole = report["lines"]
    assert sum(line["share"] for line in stages) == pytest.approx(1)
    assert all(line["calls"] == whole["calls"] == 4 for line in stages)
    assert report["sum_ms"] == pytest.approx(sum(line["p50_ms"] for line in stages))
    found = report["loop_by_difference"]
    assert found["steps"] == report["steps"] == 100
    assert found["low_us"] <= found["step_us"] <= found["high_us"]
    assert found["loop_ms"] == pytest.approx(100 * found["step_us"] / 1e3)
    assert report["fast_decoding"] is None


def test_watched_calls_answer_as_ever(bundle_of):
    path = bundle_of("onnxruntime", "fp32")
    files = golden_images(read_bundle(path), 8)
    with Classifier(path, threads=1) as classifier:
        before = classifier.predict(files)
        run_stages(classifier, files, batch=2, **SHORT)
        assert classifier.predict(files) == before


def test_a_bundle_without_the_loop_has_no_steps(zero_bundle):
    report = staged(zero_bundle("onnxruntime", "fp32"), explains=True)
    assert report["steps"] == 0
    assert report["loop_by_difference"] is None
    refine = next(line for line in report["lines"] if line["stage"] == "loop and head")
    assert refine["bound_ms"] > 0


def test_noise_of_each_image_and_several_samples_pass_the_same_stages(noisy_bundle):
    report = staged(noisy_bundle)
    assert [line["stage"] for line in report["lines"]] == [*STAGES, WHOLE]


def test_the_native_loop_is_told_from_the_graph(native_bundle):
    need_compiler()
    report = staged(native_bundle("onnxruntime", "fp16"), explains=True)
    assert report["loop"].startswith("native")
    refine = next(line for line in report["lines"] if line["stage"] == "loop and head")
    assert refine["weight_bytes"] > 0


def test_fast_decoding_stands_beside_its_agreement(bundle_of):
    report = staged(bundle_of("onnxruntime", "fp32"), sides=[640], fast_decode=True)
    found = report["fast_decoding"]
    assert found["images"] == 6
    assert 0 <= found["same_label"] <= 6
    assert 0 < found["mean_grey_levels"] < 3
    assert found["mean_grey_levels"] < found["largest_grey_levels"]
    assert found["low"] <= found["ratio"] <= found["high"]


def test_needs_are_those_of_the_receipt_by_hand(bundle_of):
    manifest = read_bundle(bundle_of("onnxruntime", "fp16"), lazily=True).manifest
    receipt, machine = manifest.precision.receipt, limits(fp32=1e9, bf16=2e9, int8=4e9)
    found = needs(manifest, 8, machine)
    encoder, refine = found["encoder"], found["loop and head"]
    assert encoder.multiply_adds == 8 * receipt["encoder"].multiply_adds
    assert encoder.bound_ms == pytest.approx(8e3 * receipt["encoder"].multiply_adds / 1e9)
    assert (encoder.weight_bytes, encoder.bound_by) == (None, "multiplying")
    both = receipt["loop"].multiply_adds + receipt["head"].multiply_adds
    assert refine.multiply_adds == 8 * both
    # Stored in 16 bits and multiplied in 32, so 16 are certainly read, once for all images.
    assert refine.weight_bytes == pytest.approx(2 * both, rel=0.01)
    assert refine.reading_ms == pytest.approx(1e3 * refine.weight_bytes / 1e9)
    slow = needs(manifest, 1, limits(fp32=1e15, bf16=1e15, int8=1e15))["loop and head"]
    assert slow.bound_by == "reading weights"
    assert slow.bound_ms == slow.reading_ms


def test_samples_multiply_more_and_read_no_more(noisy_bundle):
    manifest = read_bundle(noisy_bundle, lazily=True).manifest
    receipt = manifest.precision.receipt
    assert manifest.sampling.point.samples == 2
    refine = needs(manifest, 1, limits(fp32=1e9, bf16=2e9, int8=4e9))["loop and head"]
    weights = receipt["loop"].multiply_adds / 2 + receipt["head"].multiply_adds / 2
    assert refine.weight_bytes == pytest.approx(4 * weights)
    assert refine.multiply_adds < receipt["loop"].multiply_adds + receipt["head"].multiply_adds


def bench(*words: str) -> Result:
    return CliRunner().invoke(main, ["--scenario", "stages", *words])


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_command_prints_where_the_time_goes(bundle_of, tmp_path):
    chosen = ["-m", str(bundle_of("onnxruntime", "fp32")), "--threads", "1", "--duration", "0"]
    out = tmp_path / "stages.json"
    more = ["--photographs", "200", "--fast-decode", "--explain", "-o", str(out)]
    result = bench(*chosen, *more)
    assert result.exit_code == 0, result.output
    said = one_line(result.stderr)
    for word in ("decode", "resize", "normalise", "encoder", "loop and head", "whole call"):
        assert word in result.stdout
    assert "their medians add up to" in said
    assert "100 steps and the head as one call" in said
    assert "same label for" in said
    assert "bound: what this machine needs at least" in said
    report = json.loads(out.read_text())
    assert report["photographs"] == [200]
    whole = report["lines"][-1]
    assert np.median(whole["seconds"]) * 1e3 == pytest.approx(whole["p50_ms"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-peer"], "--no-peer is for --scenario batches"),
        (["-b", "1", "-b", "2"], "measures one --batch, got 2"),
        (["--steps", "4"], "--steps is for --scenario loop"),
    ],
)
def test_options_of_other_scenarios_are_refused(words, message):
    result = bench(*words)
    assert result.exit_code == 2
    assert message in one_line(result.stderr)


def test_a_bundle_on_a_gpu_is_refused_with_the_reason():
    on_gpu: Any = SimpleNamespace(runtime=SimpleNamespace(device="cuda"))
    with pytest.raises(InvalidInput, match="one captured program; measure the stages of a bundle"):
        run_stages(on_gpu, [b""], batch=1, **SHORT)
