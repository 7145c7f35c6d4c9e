"""What several test files share: a small trained checkpoint and bundles made from it."""

from __future__ import annotations

import os

# Before anything imports torch, whose libgomp reads it once: its threads spin by default, and
# where another process holds a core, tests then take up to 50 times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

# With these, set where the tests are started, rich prints colours and breaks lines in a pipe too.
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
    os.environ.pop(name, None)

settings.register_profile("untimed", deadline=None)  # how long a test takes depends on the machine
settings.load_profile("untimed")

BundleOf = Callable[[str, str], Path]

# Files with a test of a minute or more. They come first, or one worker ends with them alone.
LONG = ("test_readme.py", "test_nothing_lost.py", "test_no_lock_in.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features are cached in a folder of this session, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits data set. Tests must not change it: copy what you damage."""
    from marnet_train.data.digits import write_digits

    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def quick_recipe():
    """The digits recipe with few epochs and nothing to choose: seconds of training, about 90 %."""
    from marnet_train.recipe import load_recipe

    recipe = load_recipe("digits")
    assert recipe.text_phase is not None
    return replace(
        recipe,
        dim=64,
        hidden=96,
        samples=1,
        text_phase=replace(recipe.text_phase, epochs=2),
        alignment=replace(recipe.alignment, epochs=3, ita_weight=0.5),
        refinement=replace(recipe.refinement, epochs=10, views=1, norm_weight=1.0),
        fusion_phase=replace(recipe.fusion_phase, epochs=10, draws=1),
    )


@pytest.fixture(scope="session")
def checkpoint(digits: Path, quick_recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained checkpoint. Tests must not change it: copy what you damage."""
    from marnet_train.trainer import fit

    out = tmp_path_factory.mktemp("runs") / "quick"
    fit(digits, quick_recipe, out, name="digits")
    return out


@pytest.fixture(scope="session")
def bundle_of(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """backend, precision -> a bundle of the checkpoint, built once per session."""
    from marnet_export.pipeline import export_bundle
    from marnet_export.settings import Settings

    folder = tmp_path_factory.mktemp("bundles")

    def make(backend: str, precision: str) -> Path:
        path = folder / f"quick-{backend}-{precision}.marnet"
        if not path.exists():
            # A model this little trained has many labels with a small margin.
            # The graph: which loop is faster depends on the machine.
            settings = Settings(backend, precision, min_agreement=0.98, loop="graph")
            export_bundle(checkpoint, path, settings)
        return path

    return make


@pytest.fixture(scope="session")
def swept_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four operating points, and a threshold for each."""
    from marnet_export.pipeline import export_bundle
    from marnet_export.settings import Settings

    path = tmp_path_factory.mktemp("bundles") / "swept.marnet"
    settings = Settings(
        "torchscript", steps="auto", max_drop=0.03, min_agreement=0.95, target_risk=0.04, text=False
    )
    export_bundle(checkpoint, path, settings)
    return path


@pytest.fixture(scope="session")
def zero_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """backend, precision -> a bundle that answers without the loop, built once per session."""
    from marnet_export.pipeline import export_bundle
    from marnet_export.settings import Settings

    folder = tmp_path_factory.mktemp("bundles")

    def make(backend: str, precision: str) -> Path:
        path = folder / f"zero-{backend}-{precision}.marnet"
        if not path.exists():
            settings = Settings(backend, precision, steps=0, min_agreement=0.98, text=False)
            export_bundle(checkpoint, path, settings)
        return path

    return make


@pytest.fixture(scope="session")
def noisy_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples of noise that is keyed by the image."""
    from marnet_export.pipeline import export_bundle
    from marnet_export.settings import Settings

    path = tmp_path_factory.mktemp("bundles") / "noisy.marnet"
    settings = Settings(
        "onnxruntime",
        steps=10,
        samples=2,
        noise="image",
        min_agreement=0.98,
        text=False,
        loop="graph",
    )
    export_bundle(checkpoint, path, settings)
    return path


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """Two real photographs, which scikit-learn ships."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]
