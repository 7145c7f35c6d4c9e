"""marnet-bench --scenario loop as it is typed, and the report that others read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tiny import make_model, make_seda

from loop_peers import PEERS
from marnet_bench import loop, loop_candidates
from marnet_bench.cli import main
from marnet_bench.limits import PRECISIONS, Limits, Rate
from marnet_bench.loop import Check, compare, paper_model, run_loop
from marnet_bench.loop_candidates import CHECKED, Candidate, Missing
from marnet_bench.plain_loop import TORCH_PEERS, Peer, make_problem, reference
from marnet_bench.report import print_loop_report
from marnet_export.build.builder import BUILDERS
from marnet_sdk.errors import BackendUnavailable, InvalidInput

SHORT = ("--warmup", "1", "--duration", "0", "--threads", "1")
UNCOMPILED = {name: peer for name, peer in PEERS.items() if name != "torch.compile"}


def quick_limits(sizes: list[int], threads: int) -> Limits:
    """Instead of seconds of measurement, which test_limits.py tests."""
    return Limits(
        threads,
        {size: Rate(1e11, "a reader") for size in sizes},
        {precision: Rate(1e11, "a product") for precision in PRECISIONS},
    )


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def one_line(text: str) -> str:
    return " ".join(text.split())


def broken(*_: object) -> Any:
    raise RuntimeError("\n  no compiler found\nand much more")


def small_run(patch: pytest.MonkeyPatch) -> None:
    """One backend and one peer: building the others takes half a minute."""
    patch.setattr(loop, "measure_limits", quick_limits)
    patch.setattr(loop_candidates, "all_peers", lambda: {"torch eager": PEERS["torch eager"]})
    patch.setattr(loop_candidates, "BUILDERS", {"torchscript": BUILDERS["torchscript"]})
    patch.setattr(loop_candidates, "why_not", lambda *_: "the native loop is left out")


@pytest.fixture(scope="module")
def outcome(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The loop of a trained checkpoint through the command line: its JSON and what it printed."""
    file = tmp_path_factory.mktemp("loop") / "new/loop.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "measure_limits", quick_limits)
        patch.setattr(loop, "_PAUSE", 0.001)
        peers = UNCOMPILED | {"torch.compile": Peer(broken)}
        patch.setattr(loop_candidates, "all_peers", lambda: peers)
        chosen = ("--checkpoint", str(checkpoint), "--steps", "5", "--output", str(file))
        result = bench("--scenario", "loop", "-b", "1", "-b", "3", *chosen, *SHORT)
    assert result.exit_code == 0, result.stderr
    return {"report": json.loads(file.read_text()), "out": result.stdout, "err": result.stderr}


@pytest.fixture(scope="module")
def report(outcome) -> dict[str, Any]:
    return outcome["report"]


@pytest.mark.slow
def test_the_report_says_what_was_measured_on_what(report, checkpoint):
    assert report["scenario"] == "loop"
    assert (report["sampler"], report["steps"], report["batches"]) == ("ddpm", 5, [1, 3])
    assert report["threads"] == 1
    assert report["model"]["name"] == checkpoint.name
    assert (report["model"]["dim"], report["model"]["hidden"]) == (128, 96)
    assert report["plan"]["multiply_adds"] < report["plan"]["plain_multiply_adds"]
    assert report["limits"]["multiply_adds"].keys() == set(PRECISIONS)
    assert {"torch", "onnxruntime", "openvino"} <= report["machine"]["packages"].keys()


@pytest.mark.slow
def test_every_way_is_measured_at_every_batch_size_or_missing_with_a_reason(report):
    ours = (*BUILDERS, "native")
    asked = {(f"marnet {backend}", p) for backend in ours for p in PRECISIONS}
    asked |= {(name, p) for name, peer in PEERS.items() for p in peer.precisions}
    measured = {(line["model"], line["precision"], line["batch"]) for line in report["lines"]}
    missing = {(m["model"], m["precision"]): m["reason"] for m in report["missing"]}
    assert {(model, p) for model, p, _ in measured} | missing.keys() == asked
    assert len(measured) == 2 * (len(asked) - len(missing)) == len(report["lines"])
    assert missing["torch.compile", "fp32"] == "RuntimeError: no compiler found"
    assert "bfloat16" in missing["ONNX Runtime Scan", "bf16"]
    assert missing["marnet torchscript", "int8"].endswith("does not multiply in int8")
    assert ("marnet native", "fp16", 1) in measured
    for name in ("marnet onnxruntime", "marnet openvino", "marnet torchscript", "torch eager"):
        assert (name, "fp32", 3) in measured, missing.get((name, "fp32"))


@pytest.mark.slow
def test_every_line_has_its_times_its_bound_and_its_fidelity(report):
    plan = report["plan"]
    for line in report["lines"]:
        assert len(line["seconds"]) == line["calls"] >= 10
        assert 0 < line["p50_ms"] <= line["p90_ms"] <= line["p99_ms"]
        assert line["ours"] == line["model"].startswith("marnet ")
        assert line["share_of_bound"] == pytest.approx(line["bound_ms"] / line["p50_ms"])
        weights = plan["multiply_adds" if line["ours"] else "plain_multiply_adds"]
        size = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}[line["precision"]]
        work = 5 * weights + (plan["beside_the_steps"] if line["ours"] else 0)
        expected = 1e3 * work * max(line["batch"], size) / 1e11
        assert line["bound_ms"] == pytest.approx(expected)
        assert line["drift"] >= 0
        assert line["opening_s"] >= 0
        assert line["checking_s"] > 0
        assert 0.8 <= line["agreement"] <= 1
        if line["precision"] == "fp32":
            assert line["relative_error"] < 1e-3


@pytest.mark.slow
def test_ratios_compare_ours_with_every_peer_of_the_same_precision(report):
    medians = {(x["batch"], x["model"], x["precision"]): x["p50_ms"] for x in report["lines"]}
    for batch in (1, 3):
        for precision in PRECISIONS:
            lines = [
                x for x in report["lines"] if (x["batch"], x["precision"]) == (batch, precision)
            ]
            ours = {x["model"] for x in lines if x["ours"]}
            peers = {x["model"] for x in lines if not x["ours"]}
            found = [
                r
                for r in report["ratios"]
                if (r["batch"], r["ours_precision"], r["peer_precision"])
                == (batch, precision, precision)
            ]
            pairs = {(r["ours"], r["peer"]) for r in found}
            assert pairs == {(own, peer) for own in ours for peer in peers}
            for ratio in found:
                own, peer = (medians[batch, ratio[k], precision] for k in ("ours", "peer"))
                assert ratio["ratio"] == pytest.approx(peer / own, rel=1e-6)
                assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
                fastest = min(medians[batch, name, precision] for name in peers)
                assert ratio["best_peer"] == (peer == fastest)


@pytest.mark.slow
def test_our_best_is_compared_with_the_best_peers(report):
    for batch in (1, 3):
        lines = [x for x in report["lines"] if x["batch"] == batch]
        found = {r["against"]: r for r in report["best"] if r["batch"] == batch}
        same = [x for x in lines if x["agreement"] >= 0.995]
        own = min((x for x in same if x["ours"]), key=lambda x: x["p50_ms"])
        for kind, peers in {
            "best float32 peer": [x for x in same if x["precision"] == "fp32"],
            "best peer": same,
            "fastest peer, whatever it answers": lines,
        }.items():
            peer = min((x for x in peers if not x["ours"]), key=lambda x: x["p50_ms"])
            ratio = found[kind]
            assert (ratio["ours"], ratio["ours_precision"]) == (own["model"], own["precision"])
            assert (ratio["peer"], ratio["peer_precision"]) == (peer["model"], peer["precision"])


@pytest.mark.slow
def test_the_table_and_the_sentences_hold_what_the_json_holds(outcome):
    out, err = outcome["out"], one_line(outcome["err"])
    assert out.count("5 ddpm steps") == 2
    for line in outcome["report"]["lines"]:
        assert f"{line['p50_ms']:.2f}" in out
    assert "not measured: torch.compile fp32: RuntimeError: no compiler found" in err
    assert "limits of this machine, threads 1: fp32 100 G multiply-adds/s (a product)" in err
    assert "95 % interval of the ratio" in err
    assert re.search(r"opened and checked \d+ candidates in \d+ s: .* \d+ s, .* \d+ s", err)
    assert "Next: marnet-bench --scenario loop" in err


def test_a_run_restores_the_threads_of_torch_and_can_be_called_with_a_model(monkeypatch, capsys):
    small_run(monkeypatch)
    before = torch.get_num_threads()
    arguments: dict[str, Any] = {"batches": [2], "warmup": 0, "duration": 0, "threads": 1}
    model = make_model(steps=6)
    report = run_loop(model, **arguments, sampler="dpmpp", min_rounds=3)
    assert torch.get_num_threads() == before
    assert (report["sampler"], report["steps"]) == ("dpmpp", 6)
    assert report["model"]["name"] == "random weights"
    print_loop_report(report)
    assert "6 dpmpp steps" in capsys.readouterr().out


def test_drift_beyond_the_limit_exits_with_4_after_the_report(checkpoint, monkeypatch):
    small_run(monkeypatch)
    monkeypatch.setattr(loop, "drift", lambda seconds: 0.25)
    chosen = ("--checkpoint", str(checkpoint), "--steps", "2", "-b", "1", "--format", "json")
    result = bench("--scenario", "loop", *chosen, "--max-drift", "0.2", *SHORT)
    assert result.exit_code == 4
    assert json.loads(result.stdout)["steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenario", "lop"), "Did you mean 'loop'?"),
        (("--steps", "5"), "--steps is for --scenario loop"),
        (("--batch", "1", "--batch", "2"), "measures one --batch, got 2"),
        (("--scenario", "loop", "--model", "x"), "--model is for --scenario batches"),
        (("--scenario", "loop", "--no-peer"), "--no-peer is for --scenario batches"),
        (("--scenario", "loop", "--steps", "101"), "choose 1 to 100"),
        (("--scenario", "loop", "--checkpoint", "nowhere"), "nowhere"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_is_right(arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in one_line(result.stderr)


def test_help_tells_the_scenarios_apart():
    text = one_line(bench("--help").stdout)
    assert "marnet-bench --batch 64" in text
    assert "marnet-bench --scenario loop" in text
    assert "needs no bundle" in text


def test_the_default_model_has_the_paper_s_widths_and_always_the_same_weights():
    torch.manual_seed(5)
    one, other = paper_model(3), paper_model(3)
    denoiser = one.denoiser
    assert (one.vision.dim, denoiser.dim, denoiser.layer2.out_features) == (768, 768, 1024)
    assert torch.equal(denoiser.layer1.weight, other.denoiser.layer1.weight)


def test_a_progressive_denoiser_is_refused_before_anything_is_measured():
    with pytest.raises(InvalidInput, match=r"has a progressive denoiser, .* measure its bundle"):
        run_loop(make_model(progressive=True), batches=[1], warmup=0, duration=0)


def test_a_chain_that_carries_another_on_is_refused_before_anything_is_measured():
    with pytest.raises(InvalidInput, match=r"starts from what stage 1 left, .* measure its bundle"):
        run_loop(make_seda(latent=10, handover="carry"), batches=[1], warmup=0, duration=0)


def test_without_a_checkout_plain_torch_is_the_peer_and_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(loop_candidates, "find_spec", lambda _: None)
    assert loop_candidates.all_peers() == TORCH_PEERS
    assert "measured from a checkout of marnet" in one_line(capsys.readouterr().err)


def test_fp16_is_held_to_the_peers_in_float32_and_bf16():
    names = [("marnet native", "fp16"), ("a", "fp32"), ("b", "bf16"), ("c", "int8")]
    taken = {
        Candidate(model, precision, lambda x: x): np.full(9, float(seconds))
        for (model, precision), seconds in zip(names, (1, 6, 5, 2), strict=True)
    }
    found = loop._equal_precision(1, taken)
    pairs = [(r["ours_precision"], r["peer"], r["ratio"], r["best_peer"]) for r in found]
    assert pairs == [("fp16", "a", 6.0, False), ("fp16", "b", 5.0, True)]


def test_labels_and_logits_are_compared_and_nonsense_is_refused():
    wanted = np.array([[4, 1], [0, 2], [3, 0], [1, 0]], np.float32)
    got = wanted.copy()
    got[3] = [0.5, 1]
    assert compare(got, wanted) == Check(agreement=0.75, relative_error=0.25)
    for bad in (wanted[:3], np.full_like(wanted, np.nan)):
        with pytest.raises(BackendUnavailable, match="not finite, or not one row"):
            compare(bad, wanted)


def test_a_candidate_that_runs_another_loop_is_missing_and_not_timed():
    problem = make_problem(make_model(), "ddpm", 2)
    expected = reference(problem)
    x_v = np.random.default_rng(0).standard_normal((CHECKED, 10)).astype(np.float32)

    def failing(_: np.ndarray) -> np.ndarray:
        raise RuntimeError("at the first call")

    opened = [
        Candidate("right", "fp32", expected),
        Candidate("wrong", "fp32", lambda x: expected(x) * 2),
        Candidate("coarse", "int8", lambda x: expected(x) * 2),
        Candidate("failing", "fp32", failing),
        Missing("absent", "fp32", "why"),
    ]
    candidates, checks, missing = loop._check(opened, expected, x_v, [1, 3])
    assert [c.model for c in candidates] == ["right", "coarse"]
    found = checks[candidates[0]]
    assert (found.agreement, found.relative_error) == (1.0, 0.0)
    assert found.batch_effect < 1e-5
    coarse = checks[candidates[1]]
    assert (coarse.agreement, coarse.relative_error) == (1.0, 1.0)
    assert [(m.model, m.reason) for m in missing] == [
        ("absent", "why"),
        ("wrong", "its float32 logits are off by 1.0e+00: not timed"),
        ("failing", "RuntimeError: at the first call"),
    ]
