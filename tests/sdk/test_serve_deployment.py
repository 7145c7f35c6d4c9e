"""A bundle that another one replaces while callers ask: nothing is dropped, nothing is mixed."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import until

from marnet_sdk import Classifier, Prediction
from marnet_sdk import classifier as classifier_module
from marnet_sdk.backends import open_backend
from marnet_sdk.bundle import read_bundle, reseal_bundle
from marnet_sdk.errors import BundleCorrupt, ClassifierClosed, NotFound
from marnet_sdk.serve.deployment import Deployment

SECONDS = 60  # after which a test that waits has failed
CALLERS, RELOADS = 6, 4


@pytest.fixture(scope="module")
def bundles(bundle_of, zero_bundle) -> dict[str, Path]:
    """Two bundles whose answers tell which of them gave them, by their operating points."""
    found = {
        "default": bundle_of("onnxruntime", "fp32"),
        "zero": zero_bundle("onnxruntime", "fp32"),
    }
    assert {name: read_bundle(path).manifest.sampling.default for name, path in found.items()} == {
        "default": "default", "zero": "zero"
    }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def paths(digits: Path) -> list[Path]:
    return sorted((digits / "test").glob("*.png"))[:6]


def ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("marnet-")}


def test_under_load_every_answer_is_there_and_from_one_bundle(bundles, paths, tmp_path):
    link, before = tmp_path / "current.marnet", ours()
    expected: dict[str, list[str]] = {}
    for point, path in bundles.items():
        with Classifier(path, threads=1) as classifier:
            expected[point] = [answer.label for answer in classifier.predict(paths)]
    link.symlink_to(bundles["default"])
    deployment = Deployment(lambda: Classifier(link, threads=1))
    enough, blocks = threading.Event(), []

    def call() -> None:
        while not enough.is_set():
            with deployment.using() as classifier:
                futures: list[Future[Prediction]] = [classifier.submit(path) for path in paths]
                digest = classifier.bundle.digest
            blocks.append((digest, [future.result(SECONDS) for future in futures]))

    digests = {point: read_bundle(path).digest for point, path in bundles.items()}
    with ThreadPoolExecutor(CALLERS) as pool:
        callers = [pool.submit(call) for _ in range(CALLERS)]
        try:
            for point in ("zero", "default") * (RELOADS // 2):
                link.unlink()
                link.symlink_to(bundles[point])
                assert deployment.reload() == digests[point]
                wanted = len(blocks) + 2 * CALLERS  # each caller has at most one of before
                until(lambda n=wanted: len(blocks) >= n or any(map(Future.done, callers)))
        finally:
            enough.set()
        for caller in callers:
            caller.result(SECONDS)
    points = {digest: point for point, digest in digests.items()}
    assert {points[digest] for digest, _ in blocks} == set(bundles)
    for digest, answers in blocks:
        assert {answer.operating_point for answer in answers} == {points[digest]}
        assert [answer.label for answer in answers] == expected[points[digest]]
    deployment.close()
    assert ours() <= before


def test_a_bundle_that_is_refused_leaves_the_one_before(bundles, paths, tmp_path):
    link = tmp_path / "current.marnet"
    link.symlink_to(bundles["zero"])
    deployment = Deployment(lambda: Classifier(link, threads=1))
    link.unlink()
    with pytest.raises(NotFound, match="is not a bundle"):
        deployment.reload()
    with deployment.using() as classifier:
        assert classifier.predict(paths[0]).operating_point == "zero"
    deployment.close()


# --- who uses what, with classifiers that are played


class Named:
    """A classifier that remembers what it was asked."""

    def __init__(self, name: str) -> None:
        self.closed, self.asked = False, []
        self.bundle = SimpleNamespace(digest=name, golden_images=lambda: [f"{name}/0.png"])

    def predict(self, image: str) -> None:
        self.asked.append(image)

    def close(self) -> None:
        self.closed = True


def deployed(*classifiers: Named) -> Deployment:
    given = iter(classifiers)
    opened: Any = lambda: next(given)  # noqa: E731
    return Deployment(opened)


def test_the_golden_images_are_answered_before_callers_ask():
    first, second = Named("first"), Named("second")
    deployment = deployed(first, second)
    assert first.asked == ["first/0.png"]
    assert deployment.reload() == "second"
    assert second.asked == ["second/0.png"]
    with deployment.using() as classifier:
        assert classifier is second


def test_the_old_one_is_closed_when_its_last_caller_is_done():
    first, second = Named("first"), Named("second")
    deployment = deployed(first, second)
    with ThreadPoolExecutor(1) as pool:
        with deployment.using() as old:
            reloading = pool.submit(deployment.reload)
            current: object = old
            while current is first:
                with deployment.using() as current:
                    pass
            assert current is second
            assert not first.closed
            assert not reloading.done()
        assert reloading.result(SECONDS) == "second"
    assert (first.closed, second.closed) == (True, False)


def test_closing_waits_for_callers_and_refuses_others():
    only = Named("only")
    deployment = deployed(only)
    with ThreadPoolExecutor(1) as pool, deployment.using():
        closing = pool.submit(deployment.close)
        until(lambda: deployment._closed)
        with pytest.raises(ClassifierClosed, match="this Deployment is closed"):
            deployment.using().__enter__()
        assert not only.closed
    closing.result(SECONDS)
    assert only.closed
    deployment.close()


def test_a_bundle_that_is_open_too_late_is_closed_again():
    first, second = Named("first"), Named("second")
    opening, go_on = threading.Event(), threading.Event()

    def open_late() -> Named:
        opening.set()
        assert go_on.wait(SECONDS)
        return second

    ways = iter([lambda: first, open_late])
    late: Any = lambda: next(ways)()  # noqa: E731
    deployment = Deployment(late)
    with ThreadPoolExecutor(1) as pool:
        reloading = pool.submit(deployment.reload)
        assert opening.wait(SECONDS)
        deployment.close()
        go_on.set()
        with pytest.raises(ClassifierClosed, match="this Deployment is closed"):
            reloading.result(SECONDS)
    assert first.closed
    assert second.closed


# --- bundles that change places while one is being opened


def test_a_link_that_moves_later_moves_nothing_of_an_open_bundle(bundles, tmp_path):
    link = tmp_path / "current.marnet"
    link.symlink_to(bundles["default"])
    with Classifier(link, threads=1) as classifier:
        link.unlink()
        link.symlink_to(bundles["zero"])
        assert classifier.bundle.path == bundles["default"].resolve()


def test_a_bundle_that_is_replaced_while_it_is_opened_is_refused(bundles, tmp_path, monkeypatch):
    """Its self-test would pass, and its answers have the labels of the one before."""
    place, other = tmp_path / "current.marnet", tmp_path / "other.marnet"
    for copy in (place, other):
        shutil.copytree(bundles["default"], copy)
    reseal_bundle(other, labels=read_bundle(other).manifest.labels[::-1])

    def opened(*arguments: Any) -> Any:
        place.rename(tmp_path / "old.marnet")
        other.rename(place)
        return open_backend(*arguments)

    monkeypatch.setattr(classifier_module, "open_backend", opened)
    with pytest.raises(BundleCorrupt, match="was replaced by another bundle while it was being op"):
        Classifier(place, threads=1)
    monkeypatch.undo()
    Classifier(place, threads=1).close()
