"""What several test files share: a small trained checkpoint and bundles made from it."""

from __future__ import annotations

import os
import sys

# Before anything imports torch, whose libgomp reads it once: its threads spin by default, and
# where another process holds a core, tests then take up to 50 times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# With these, set where the tests are started, rich prints colours and breaks lines in a pipe too.
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
    os.environ.pop(name, None)

# No deadline: how long a test takes depends on the machine. `make test-all` asks for "all".
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("all", deadline=None, max_examples=150)
settings.load_profile("quick")

BundleOf = Callable[[str, str], Path]
Shared = Callable[[str, Callable[[Path], object]], Path]

# Files with a test of half a minute or more. They come first, or one worker ends with them alone;
# and one worker begins with both of those that need compiled code, or another waits for it.
LONG = (
    "test_builder_aotinductor.py",
    "test_backend_aotinductor.py",
    "test_readme.py",
    "test_nothing_lost.py",
    "test_no_lock_in.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run have in common."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(of_this_run: Path) -> Iterator[None]:
    """Features and compiled loops are cached in a folder of this run, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARNET_CACHE", str(of_this_run / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _onnx_operators_once() -> Iterator[None]:
    """The exporter to ONNX looks up what it knows once a session."""
    if "torch" not in sys.modules:  # nothing here is exported
        yield
        return
    from onnx_operators import looked_up_once

    with looked_up_once():
        yield


@pytest.fixture(scope="session")
def shared(of_this_run: Path) -> Shared:
    """name, what writes it -> a folder of this run, written by the first process that needs it.

    What writes it must leave the whole folder or none. Tests must not change it: copy what you
    damage.
    """

    def make(name: str, write: Callable[[Path], object]) -> Path:
        path = of_this_run / name
        with FileLock(of_this_run / f"{name}.lock"):
            if not path.exists():
                write(path)
        return path

    return make


@pytest.fixture(scope="session")
def digits(shared: Shared) -> Path:
    """The digits data set."""
    from marnet_train.data.digits import write_digits

    return shared("digits", write_digits)


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
def checkpoint(digits: Path, quick_recipe, shared: Shared) -> Path:
    """A trained checkpoint."""
    from marnet_train.trainer import fit

    return shared("quick", lambda out: fit(digits, quick_recipe, out, name="digits"))


@pytest.fixture(scope="session")
def seda_recipe(quick_recipe):
    """The quick recipe for SeDA."""
    semantic = replace(quick_recipe.semantic, epochs=60, batch=64)
    return replace(quick_recipe, method="seda", semantic=semantic)


@pytest.fixture(scope="session")
def seda_checkpoint(digits: Path, seda_recipe, shared: Shared) -> Path:
    """A trained checkpoint of SeDA."""
    from marnet_train.trainer import fit

    return shared("quick-seda", lambda out: fit(digits, seda_recipe, out, name="digits"))


@pytest.fixture(scope="session")
def progressive_checkpoint(digits: Path, seda_recipe, shared: Shared) -> Path:
    """A trained checkpoint of SeDA with progressive denoisers."""
    from marnet_train.trainer import fit

    recipe = replace(seda_recipe, progressive=True)
    return shared("quick-progressive", lambda out: fit(digits, recipe, out, name="digits"))


@pytest.fixture(scope="session")
def carry_checkpoint(digits: Path, seda_recipe, shared: Shared) -> Path:
    """A trained checkpoint of SeDA in which one chain passes through both stages."""
    from marnet_train.trainer import fit

    recipe = replace(seda_recipe, handover="carry")
    return shared("quick-carry", lambda out: fit(digits, recipe, out, name="digits"))


@pytest.fixture(scope="session")
def few_digits(digits: Path, shared: Shared) -> Path:
    """Some images of each split of the digits data set."""
    from marnet_train.data.imagefolder import read_split, write_split

    def write(out: Path) -> None:
        fresh = out.with_name("few-digits.new")
        for split, count in {"train": 60, "val": 30, "test": 20}.items():
            rows = read_split(digits / split, needs_text=True)[:count]
            write_split(
                fresh / split,
                ((e.image.name, e.image.read_bytes(), e.label, e.text) for e in rows),
            )
        fresh.rename(out)

    return shared("few-digits", write)


@pytest.fixture(scope="session")
def tiny_seda(few_digits: Path, shared: Shared) -> Path:
    """A checkpoint of SeDA that was trained for moments, on few images, and knows little."""
    from tiny_training import SEDA

    from marnet_train.trainer import fit

    return shared("tiny-seda", lambda out: fit(few_digits, SEDA, out, name="tiny"))


@pytest.fixture(scope="session")
def tiny_progressive(few_digits: Path, shared: Shared) -> Path:
    """A checkpoint of SeDA with progressive denoisers, trained for moments."""
    from tiny_training import SEDA

    from marnet_train.trainer import fit

    recipe = replace(SEDA, progressive=True)
    return shared("tiny-progressive", lambda out: fit(few_digits, recipe, out, name="tiny"))


@pytest.fixture(scope="session")
def tiny_carry(few_digits: Path, shared: Shared) -> Path:
    """A checkpoint of SeDA in which one chain passes through both stages, trained for moments."""
    from tiny_training import CARRY

    from marnet_train.trainer import fit

    return shared("tiny-carry", lambda out: fit(few_digits, CARRY, out, name="tiny"))


@pytest.fixture(scope="session")
def exported(checkpoint: Path, shared: Shared) -> Callable[..., Path]:
    """name, settings -> a bundle of the checkpoint, built once in a run of the tests.

    The backend's graph runs the loop if no other is named: which is faster depends on the machine.
    All share what the float32 checkpoint answers.
    """
    from exports import in_one_process

    from marnet_export.job import export_bundle
    from marnet_export.settings import Settings

    def make(name: str, *types: str, **more) -> Path:
        settings = Settings(*types, **{"loop": "graph"} | more)

        def write(path: Path) -> None:
            with in_one_process():
                export_bundle(checkpoint, path, settings, answers=path.with_name("answers"))

        return shared(f"{name}.marnet", write)

    return make


@pytest.fixture(scope="session")
def bundle_of(exported: Callable[..., Path]) -> BundleOf:
    """backend, precision -> a bundle of the checkpoint."""

    def make(backend: str, precision: str) -> Path:
        name = f"quick-{backend}-{precision}"
        # Text encoders take seconds to export to ONNX; that of the bundle in float32 is enough.
        text = (backend, precision) != ("onnxruntime", "fp16")
        # A model this little trained has many labels with a small margin.
        return exported(name, backend, precision, min_agreement=0.98, text=text)

    return make


@pytest.fixture(scope="session")
def native_bundle(exported: Callable[..., Path]) -> BundleOf:
    """backend, precision -> a bundle whose loop the native kernel runs."""

    def make(backend: str, precision: str) -> Path:
        chosen = {"loop": "native", "steps": 10, "min_agreement": 0.98}
        return exported(f"native-{backend}-{precision}", backend, precision, **chosen)

    return make


@pytest.fixture(scope="session")
def swept_bundle(exported: Callable[..., Path]) -> Path:
    """Four operating points, and a threshold for each."""
    chosen = {"steps": "auto", "max_drop": 0.03, "min_agreement": 0.95, "target_risk": 0.04}
    return exported("swept", "torchscript", **chosen, text=False)


@pytest.fixture(scope="session")
def zero_bundle(exported: Callable[..., Path]) -> BundleOf:
    """backend, precision -> a bundle that answers without the loop."""

    def make(backend: str, precision: str) -> Path:
        name = f"zero-{backend}-{precision}"
        return exported(name, backend, precision, steps=0, min_agreement=0.98, text=False)

    return make


@pytest.fixture(scope="session")
def noisy_bundle(exported: Callable[..., Path]) -> Path:
    """Two samples of noise that is keyed by the image."""
    chosen = {"steps": 10, "samples": 2, "noise": "image", "min_agreement": 0.98}
    return exported("noisy", "torchscript", **chosen, text=False)


@pytest.fixture(scope="session")
def small(shared: Shared) -> Path:
    """An untrained checkpoint of ten steps, with eight images of noise and no tokenizer."""
    from tiny import make_model, write_checkpoint

    return shared("small", lambda folder: write_checkpoint(make_model(steps=10), folder))


@pytest.fixture(scope="session")
def compiled_bundle(shared: Shared) -> Path:
    """A bundle of aotinductor, float32, of `make_model(hidden=48, dim=32)`, which is not trained.

    g++ takes half a minute to compile it, so that those who need compiled code share it.
    """
    from compilers import need_compiler
    from exports import in_one_process
    from tiny import make_model, write_checkpoint
    from torch._inductor import config

    from marnet_export.job import export_bundle
    from marnet_export.settings import Settings

    need_compiler()
    settings = Settings("aotinductor", text=False, source=False)

    def write(path: Path) -> None:
        checkpoint = write_checkpoint(make_model(hidden=48, dim=32), path.with_name("untrained"))
        # Else torch compiles a program for each instruction set, to see whether g++ knows it: 10 s.
        with in_one_process(), config.patch({"cpp.vec_isa_ok": True}):
            export_bundle(checkpoint, path, settings)

    return shared("compiled.marnet", write)


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """Two real photographs, which scikit-learn ships."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]
