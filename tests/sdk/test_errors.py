"""Whoever catches MarnetError has caught every error that marnet raises on purpose."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
from concurrent.futures import ProcessPoolExecutor

import pytest

import marnet_bench
import marnet_export
import marnet_kernels
import marnet_sdk
import marnet_train
from marnet_sdk import errors
from marnet_sdk.errors import (
    ImageError,
    ImageTooLarge,
    InvalidImages,
    MarnetError,
    MarnetWarning,
    MissingExtra,
    NotFound,
    requires_extra,
)
from marnet_sdk.prediction import Prediction, Score


def public_errors() -> list[type[Exception]]:
    found = inspect.getmembers(errors, inspect.isclass)
    ours = [c for _, c in found if c.__module__ == errors.__name__]
    return [c for c in ours if issubclass(c, BaseException) and not issubclass(c, Warning)]


def test_every_error_derives_from_marnet_error():
    assert len(public_errors()) > 15
    assert [error for error in public_errors() if not issubclass(error, MarnetError)] == []


@pytest.mark.parametrize("package", [marnet_sdk, marnet_train, marnet_export, marnet_bench])
def test_errors_defined_elsewhere_derive_from_it_too(package):
    """Private ones are caught where they are raised; a command's error only carries one out, and a
    server's becomes the answer to a request."""
    outside = []
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            is_error = inspect.isclass(value) and issubclass(value, Exception)
            ours = is_error and value.__module__.startswith("marnet_")
            known = (MarnetError, MarnetWarning)
            if ours and not name.startswith("_") and not issubclass(value, known):
                outside.append(f"{value.__module__}.{name}")
    carriers = {"marnet_sdk.console.CommandError", "marnet_sdk.server.service.Refused"}
    assert set(outside) <= carriers


def test_the_kernels_know_nothing_of_our_errors():
    assert not hasattr(marnet_kernels, "MarnetError")


@pytest.mark.parametrize("error", public_errors(), ids=lambda error: error.__name__)
def test_exit_codes_are_the_documented_ones_and_each_class_is_explained(error):
    assert 1 <= error.exit_code <= 6
    assert error.__doc__.endswith(".") or "\n" in error.__doc__


def example(kind: type[MarnetError]) -> MarnetError:
    """One of a kind, with all that it carries."""
    if issubclass(kind, ImageError):
        error: MarnetError = kind("image 3", "truncated; send the whole file")
    elif issubclass(kind, InvalidImages):
        answer = Prediction("cat", 1, 0.75, (Score("cat", 1, 0.75),))
        error = kind({0: ImageTooLarge("image 0", "too large")}, [None, answer])
    else:
        error = kind("got 1, expected 2")
    error.add_note("while answering request 7")
    return error


@pytest.mark.parametrize("error", public_errors(), ids=lambda error: error.__name__)
@pytest.mark.parametrize("carry", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_an_error_arrives_whole_from_another_process(carry, error):
    sent = example(error)
    got = carry(sent)
    assert type(got) is type(sent)
    assert (str(got), got.args) == (str(sent), sent.args)
    fields = vars(sent).keys()
    assert vars(got).keys() == fields
    for name in fields - {"errors"}:
        assert vars(got)[name] == vars(sent)[name]
    if isinstance(got, InvalidImages):
        assert {i: (type(e), str(e)) for i, e in got.errors.items()} == {
            0: (ImageTooLarge, "image 0: too large")
        }


def raise_one(kind: type[MarnetError]) -> None:
    raise example(kind)


@pytest.mark.parametrize("kind", [ImageError, InvalidImages, NotFound])
def test_a_pool_gives_the_error_and_goes_on(kind):
    """A process pool that cannot unpickle an error breaks, or waits for ever."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(kind, match=str(example(kind))[:12]):
            pool.submit(raise_one, kind).result(timeout=120)
        assert pool.submit(abs, -1).result(timeout=120) == 1


def test_an_image_error_names_its_source():
    error = ImageError("image 3 (a.png)", "truncated; send the whole file")
    assert str(error) == "image 3 (a.png): truncated; send the whole file"
    assert (error.source, error.problem) == ("image 3 (a.png)", "truncated; send the whole file")


def test_many_bad_images_are_counted_and_the_first_three_shown():
    many = {i: ImageError(f"image {i}", "bad") for i in range(5)}
    error = InvalidImages(many, [None] * 5)
    assert "5 of 5 inputs are not usable images: image 0: bad; image 1: bad; " in str(error)
    assert "image 2: bad; and 2 more." in str(error)
    assert "image 3" not in str(error)
    assert error.errors == many


def test_a_missing_package_becomes_the_pip_line_of_its_extra():
    message = r'the package "marnet_no_such" is not installed; run: pip install "marnet\[train\]"'
    with pytest.raises(MissingExtra, match=message), requires_extra("train", "marnet_no_such"):
        import marnet_no_such.part  # noqa: F401


def test_another_missing_module_is_somebody_s_bug_and_stays_itself():
    with (
        pytest.raises(ModuleNotFoundError, match="marnet_no_such"),
        requires_extra("train", "torch"),
    ):
        import marnet_no_such  # noqa: F401


def test_an_error_inside_a_present_package_stays_itself():
    with pytest.raises(ImportError, match="cannot import name"), requires_extra("train", "json"):
        from json import no_such_name  # noqa: F401
