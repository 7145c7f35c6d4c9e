"""Bounds by hand, and measured rates that a machine can have."""

from __future__ import annotations

import pytest

from marnet_bench.limits import (
    PRECISIONS,
    Limits,
    Rate,
    bound,
    higher,
    measure_limits,
    product_rate,
    read_rate,
)
from marnet_bench.loop_candidates import NATIVE, Candidate


def limits(read: dict[int, float], **multiply_adds: float) -> Limits:
    return Limits(
        threads=2,
        read={size: Rate(rate, "reader") for size, rate in read.items()},
        multiply_adds={name: Rate(rate, "product") for name, rate in multiply_adds.items()},
    )


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (1, 20.0),  # reading: 100 steps of 2 MB at 10 GB/s; arithmetic alone would take 1 ms
        (20, 20.0),  # as long as both
        (64, 64.0),  # 100 steps of 64 million at 100 G/s
    ],
)
def test_the_slower_of_reading_and_multiplying_counts(batch, expected):
    found = bound(1_000_000, 2_000_000, batch, 100, arithmetic=100e9, reading=10e9)
    assert found == pytest.approx(expected)


def test_a_loop_reads_at_the_rate_of_the_nearest_size_and_multiplies_in_its_precision():
    machine = limits({3_000_000: 300e9, 12_000_000: 100e9}, fp32=100e9, int8=1000e9)
    fp32 = machine.bound_ms(3_000_000, 3_000_000, "fp32", batch=1, steps=100)
    assert fp32 == pytest.approx(100 * 12e6 / 100e9 * 1e3)
    int8 = machine.bound_ms(3_000_000, 3_000_000, "int8", batch=1, steps=100)
    assert int8 == pytest.approx(100 * 3e6 / 300e9 * 1e3)
    large = machine.bound_ms(3_000_000, 3_000_000, "int8", batch=64, steps=10)
    assert large == pytest.approx(10 * 64 * 3e6 / 1000e9 * 1e3)


def test_of_two_measurements_each_rate_is_the_higher():
    found = higher(limits({1: 5.0, 2: 8.0}, fp32=3.0), limits({1: 6.0, 2: 7.0}, fp32=2.0))
    assert {size: rate.per_second for size, rate in found.read.items()} == {1: 6.0, 2: 8.0}
    assert found.multiply_adds["fp32"].per_second == 3.0


@pytest.mark.parametrize("size", [100, 5_000_001])
def test_reading_takes_time_whatever_the_size(size):
    rate = read_rate(size, threads=2, seconds=0.01)
    assert 0 < rate.per_second < 1e14  # less than all caches together
    assert rate.through


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_has_a_kernel_here(precision):
    rate = product_rate(precision, threads=1, seconds=0.01, side=256)
    assert 0 < rate.per_second < 1e15
    assert rate.through


def test_a_kernel_that_is_missing_leaves_the_others(monkeypatch):
    def absent(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("marnet_bench.limits._openvino_product", absent)
    assert product_rate("fp32", 1, 0.01, side=64).through != "OpenVINO MatMul"


def test_all_is_measured_at_once():
    found = measure_limits([1_000, 1_000, 2_000], threads=1, seconds=0.01, side=64)
    assert list(found.read) == [1_000, 2_000]
    assert list(found.multiply_adds) == list(PRECISIONS)
    assert found.threads == 1


def test_weights_may_be_read_in_one_type_and_multiplied_in_another():
    machine = limits({2_000_000: 200e9}, fp32=100e9, bf16=400e9)
    wide = machine.bound_ms(1_000_000, 1_000_000, "bf16", batch=64, steps=10, compute="fp32")
    assert wide == pytest.approx(10 * 64e6 / 100e9 * 1e3)
    alone = machine.bound_ms(1_000_000, 1_000_000, "bf16", batch=1, steps=10, compute="fp32")
    assert alone == pytest.approx(10 * 2e6 / 200e9 * 1e3)


@pytest.mark.parametrize(
    ("model", "precision", "compute"),
    [(NATIVE, "bf16", "fp32"), (NATIVE, "int8", "int8"), ("marnet openvino", "bf16", "bf16")],
)
def test_the_native_loop_multiplies_in_float32_what_is_not_int8(model, precision, compute):
    assert Candidate(model, precision, lambda x_v: x_v).compute == compute
