"""Imports point one way, frameworks stay in their leaves, and nothing is unpickled."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "marnet_kernels": ROOT / "kernels",
    "marnet_sdk": ROOT / "sdk",
    "marnet_train": ROOT / "train",
    "marnet_export": ROOT / "export",
    "marnet_bench": ROOT / "benchmarks",
}
MAY_IMPORT = {
    "marnet_kernels": set(),
    "marnet_sdk": {"marnet_kernels"},
    "marnet_train": {"marnet_sdk"},
    "marnet_export": {"marnet_sdk", "marnet_train"},
    "marnet_bench": {"marnet_sdk", "marnet_train", "marnet_export"},
}
# What export and bench may know of training: the model and how answers are judged, not how it was
# trained.
OF_TRAINING = {"models", "diffusion", "checkpoint", "data", "text", "measures"}
FRAMEWORKS = {
    "torch", "transformers", "tokenizers", "onnx", "onnxruntime", "openvino", "tensorrt",
    "tensorrt_rtx", "cuda", "sklearn", "datasets", "ray",
}  # fmt: skip
OF_THE_SERVER = {"fastapi", "h11", "prometheus_client", "pydantic", "starlette", "uvicorn"}
# The files of the SDK that may import frameworks, and which.
LEAVES = {
    "marnet_sdk/backends/aotinductor.py": {"torch"},
    "marnet_sdk/backends/onnxruntime.py": {"onnxruntime"},
    "marnet_sdk/backends/openvino.py": {"openvino"},
    "marnet_sdk/backends/torch_cpu.py": {"torch"},
    "marnet_sdk/backends/torch_cuda.py": {"torch"},
    "marnet_sdk/backends/torch_device.py": {"torch"},
    "marnet_sdk/gpu/torch_programs.py": {"torch"},
    "marnet_sdk/gpu/torch_stream.py": {"torch"},
    "marnet_sdk/backends/torchscript.py": {"torch"},
    "marnet_sdk/gpu/driver.py": {"cuda"},
    "marnet_sdk/serve/ray_app.py": {"ray"},
    "marnet_sdk/serve/ray_data.py": {"ray"},
    "marnet_sdk/serve/ray_worker.py": {"ray"},
    "marnet_sdk/text.py": {"tokenizers"},
}
# The one file that reads a pickle, and the call: bytes that it has compared with a pinned SHA-256,
# and nothing but tensors.
READS_A_PICKLE = {
    "marnet_train/encoders.py": [
        "torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)"
    ]
}
PICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def sources(package: str) -> list[tuple[str, ast.Module]]:
    folder = FOLDERS[package]
    return [
        (path.relative_to(folder).as_posix(), ast.parse(path.read_text("utf-8"), str(path)))
        for path in sorted((folder / package).rglob("*.py"))
    ]


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module named by an import anywhere in a tree, with what is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would hide from this test"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_on_import(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of its functions and without `if TYPE_CHECKING`."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

        def visit_If(self, node: ast.If) -> ast.AST | None:
            is_typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if is_typing else self.generic_visit(node)

    return Strip().visit(tree)


def root(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_import_only_what_lies_below_them(package):
    files = sources(package)
    assert files
    for name, tree in files:
        ours = {root(m) for m in imports(tree) if root(m).startswith("marnet_")}
        assert ours <= MAY_IMPORT[package] | {package}, name


@pytest.mark.parametrize("package", ["marnet_export", "marnet_bench"])
def test_export_and_bench_know_the_model_and_not_how_it_was_trained(package):
    for name, tree in sources(package):
        parts = {m.split(".")[1] for m in imports(tree) if root(m) == "marnet_train"}
        assert parts <= OF_TRAINING, name


def test_the_sdk_imports_frameworks_in_their_leaves_and_only_when_they_are_used():
    for name, tree in sources("marnet_sdk"):
        used = {root(m) for m in imports(tree)} & FRAMEWORKS
        assert used <= LEAVES.get(name, set()), name
        assert not {root(m) for m in imports(run_on_import(tree))} & FRAMEWORKS, name


def test_only_the_server_imports_what_serves():
    for name, tree in sources("marnet_sdk"):
        used = {root(m) for m in imports(tree)} & OF_THE_SERVER
        assert not used or name.startswith("marnet_sdk/server/"), name


def test_every_leaf_is_where_this_test_thinks_it_is():
    trees = dict(sources("marnet_sdk"))
    for leaf, frameworks in LEAVES.items():
        assert frameworks <= {root(m) for m in imports(trees[leaf])}


def test_the_kernels_need_no_framework():
    for name, tree in sources("marnet_kernels"):
        assert not {root(m) for m in imports(tree)} & (FRAMEWORKS - {"cuda"}), name
        assert "cuda" not in {root(m) for m in imports(run_on_import(tree))}, name


@pytest.mark.parametrize("package", FOLDERS)
def test_nothing_is_unpickled(package):
    """Weights are safetensors, everything else is JSON or TOML."""
    for name, tree in sources(package):
        assert not {root(m) for m in imports(tree)} & PICKLERS, name
        found = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                keywords = {keyword.arg for keyword in node.keywords}
                if ast.unparse(node.func) in {"torch.load", "eval", "exec"} or keywords & {
                    "weights_only",
                    "allow_pickle",
                }:
                    found.append(ast.unparse(node))
        assert found == READS_A_PICKLE.get(name, []), name
