"""Files of a collection are counted by what becomes of them, and a fault is never lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import load_script
from click.testing import CliRunner
from pictures import encode, make_picture
from PIL import Image

from marnet_sdk.errors import ImageError


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/image_collections.py")


def test_a_folder_is_counted_and_what_differs_is_named(script, tmp_path: Path) -> None:
    picture = make_picture()
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "whole").write_bytes(encode(picture, "PNG"))
    (folder / "cut.png").write_bytes(encode(picture, "PNG")[:200])
    picture.putalpha(Image.new("L", picture.size))  # ours ignores it, and Pillow does not
    picture.save(folder / "clear.png")
    (folder / "notes\n.txt").write_bytes(b"no image")
    out = tmp_path / "found.json"
    result = CliRunner().invoke(script.main, [str(folder), "--output", str(out)])
    assert result.exit_code == 0, result.output
    found = {Path(f["path"]).name: f for f in json.loads(out.read_text("utf-8"))[str(folder)]}
    outcomes = {name: f["outcome"] for name, f in found.items()}
    assert outcomes == {
        "whole": "answered", "clear.png": "answered", "cut.png": "refused", "notes\n.txt": "refused"
    }  # fmt: skip
    assert found["whole"]["other"] == "same"
    assert "clear.png: 100% of the pixels" in result.stderr
    assert "got a file that starts with ..." in result.stdout


@pytest.mark.parametrize(
    ("number", "outcome"), [(signal.SIGALRM, "hang"), (signal.SIGSEGV, "crash")]
)
def test_the_file_on_which_a_child_dies_is_named(
    script, monkeypatch, tmp_path: Path, number: int, outcome: str
) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys\n"
        "for path in json.load(sys.stdin):\n"
        f"    if path == 'bad': os.kill(os.getpid(), {int(number)})\n"
        "    print(json.dumps({'path': path, 'outcome': 'answered'}), flush=True)\n"
    )
    monkeypatch.setattr(script, "__file__", str(child))
    found = list(script.outcomes(["first", "bad", "last"], "pillow", 60))
    assert [(f.path, f.outcome) for f in found] == [
        ("first", "answered"), ("bad", outcome), ("last", "answered")
    ]  # fmt: skip


def test_an_error_of_another_type_is_a_fault(script, monkeypatch) -> None:
    def fails(path: str) -> None:
        raise ImageError(path, "no") if path == "refused" else KeyError("tag")

    monkeypatch.setattr(script, "decode", fails)
    assert script.tried("refused", script.by_pillow).outcome == "refused"
    assert script.tried("other", script.by_pillow).reason == "KeyError('tag')"
