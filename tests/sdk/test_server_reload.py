"""marnet-serve goes on with another bundle: when it is told to, or sees that there is one."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving import Load, Played, point_to, process, running, said
from waiting import PATIENCE, until

from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import NotFound
from marnet_sdk.server import service as service_module
from marnet_sdk.server.reloads import Reloads, content

CALLERS = 4


# --- when it should be opened again


def test_whoever_asks_gets_one_reload():
    reloads = Reloads()
    assert not reloads.due()
    reloads.ask()
    reloads.ask()
    assert [reloads.due(), reloads.due()] == [True, False]


def test_a_folder_that_changes_is_opened_again_once_it_is_whole(tmp_path):
    folder = tmp_path / "current.marnet"
    folder.mkdir()
    (folder / "manifest.json").write_text("1")
    reloads = Reloads(folder)
    assert [reloads.due(), reloads.due()] == [False, False]
    (folder / "manifest.json").write_text("22")
    assert not reloads.due()
    (folder / "payload").mkdir()
    (folder / "payload/plan").write_text("3")
    assert [reloads.due(), reloads.due(), reloads.due()] == [False, True, False]


def test_a_link_that_points_elsewhere_is_opened_again(tmp_path):
    link = tmp_path / "current.marnet"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("same")
    link.symlink_to("a")
    reloads = Reloads(link)
    link.unlink()
    link.symlink_to("b")
    assert [reloads.due(), reloads.due(), reloads.due()] == [False, True, False]


def test_where_there_is_no_folder_there_is_nothing_in_it(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    assert content(tmp_path / "none") == content(tmp_path / "circle") == frozenset()


# --- what is told


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(service_module, "_POLL_SECONDS", 0.01)


def named(name: str) -> Played:
    """A classifier of a bundle with this digest."""
    played = Played()
    played.bundle = SimpleNamespace(**{**vars(Played.bundle), "digest": name})
    return played


def test_answers_metadata_and_metrics_say_which_bundle_answers(quick):
    first, second = named("a" * 64), named("b" * 64)
    given = iter([first, second])
    with running(lambda: next(given)) as server, server.client() as client:

        def check(digest: str) -> None:
            assert client.post("/predict", content=b"x").json()["bundle"] == digest
            assert client.get("/v2/models/digits").json()["bundle"] == digest
            assert f'bundle="{digest}"' in client.get("/metrics").text

        check("a" * 64)
        server.service.reloads.ask()
        until(lambda: len(server.told) > 1)
        check("b" * 64)
        assert server.told[1] == f"reloaded: bundle {'b' * 64}"
        assert (first.closed, second.closed) == (True, False)
        assert 'marnet_reloads_total{result="done"} 1.0' in client.get("/metrics").text


def test_a_bundle_that_is_refused_leaves_the_one_before_and_says_why(quick):
    def refuse() -> Played:
        raise NotFound("current.marnet is not a directory, so it is not a bundle")

    ways = itertools.chain([Played], itertools.repeat(refuse))
    with running(lambda: next(ways)()) as server, server.client() as client:
        for count in (1, 2):
            server.service.reloads.ask()
            until(lambda count=count: len(server.told) > count)
        assert server.told[1] == (
            "not reloaded, the bundle before goes on: current.marnet is not a directory, so it is "
            "not a bundle"
        )
        assert client.post("/predict", content=b"x").status_code == 200
        assert client.get("/readyz").status_code == 200
        assert 'marnet_reloads_total{result="refused"} 2.0' in client.get("/metrics").text


def test_a_request_is_answered_by_the_bundle_that_began_it(quick):
    first, second = named("a" * 64), named("b" * 64)
    given = iter([first, second])
    with (
        running(lambda: next(given)) as server,
        server.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(client.post, "/predict", content=b"wait")
        until(first.waiting.is_set)
        server.service.reloads.ask()
        until(lambda: client.post("/predict", content=b"x").json()["bundle"] == "b" * 64)
        assert not first.closed
        first.go_on.set()
        assert asked.result(PATIENCE).json()["bundle"] == "a" * 64
        until(lambda: first.closed)


def test_a_server_that_ends_while_a_bundle_is_being_opened_closes_both(quick):
    first, second = named("a" * 64), named("b" * 64)
    opening, go_on = threading.Event(), threading.Event()

    def open_late() -> Played:
        opening.set()
        assert go_on.wait(PATIENCE)
        return second

    ways = iter([lambda: first, open_late])
    with running(lambda: next(ways)()) as server:
        server.service.reloads.ask()
        until(opening.is_set)
        server.server.should_exit = True
        until(lambda: first.closed)
        go_on.set()
    assert second.closed
    assert server.service.reloaded == {"done": 0, "refused": 0}


# --- a process, under load


@pytest.fixture(scope="module")
def bundles(bundle_of, zero_bundle) -> dict[str, Path]:
    """Two bundles whose answers tell which of them gave them, by their operating points."""
    return {"default": bundle_of("onnxruntime", "fp32"), "zero": zero_bundle("onnxruntime", "fp32")}


def test_a_server_under_load_changes_its_bundle_and_drops_and_mixes_nothing(
    bundles, digits, tmp_path
):
    link, damaged = tmp_path / "current.marnet", tmp_path / "damaged.marnet"
    point_to(link, bundles["default"])
    shutil.copytree(bundles["zero"], damaged)
    (damaged / "payload/plan.safetensors").write_bytes(b"damaged")
    digests = {read_bundle(path).digest: point for point, path in bundles.items()}
    default, zero = digests
    image = min((digits / "test").glob("*.png")).read_bytes()
    with process(link, "--watch", stdout=subprocess.DEVNULL) as (served, url):
        load = Load(int(url.rstrip("/").rpartition(":")[2]), image)
        with ThreadPoolExecutor(CALLERS) as pool:
            callers = [pool.submit(load.call) for _ in range(CALLERS)]
            try:
                load.wait_for(default)
                point_to(link, bundles["zero"])
                load.wait_for(zero)
                assert said(served, "reloaded: ") == f"reloaded: bundle {zero}\n"
                point_to(link, damaged)
                refused = said(served, "not reloaded, the bundle before goes on: ")
                assert "payload/plan.safetensors has 7 bytes" in refused
                load.wait_for(zero)
                link.unlink()
                shutil.copytree(bundles["default"], link)
                load.wait_for(default)
                assert said(served, "reloaded: ") == f"reloaded: bundle {default}\n"
                served.send_signal(signal.SIGHUP)  # nothing has changed
                assert said(served, "reloaded: ") == f"reloaded: bundle {default}\n"
            finally:
                load.enough.set()
            for caller in callers:
                caller.result(PATIENCE)
        served.send_signal(signal.SIGTERM)
        assert served.wait(PATIENCE) == 0
    load.check(digests)
