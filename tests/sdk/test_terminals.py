"""Names and labels of any letters on any terminal: every command as a process of its own."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from quick import kept

from marnet_sdk.bundle import reseal_bundle
from marnet_sdk.console import printable

COMMANDS = {
    "marnet-train": "marnet_train.cli",
    "marnet-export": "marnet_export.cli",
    "marnet-classify": "marnet_sdk.commands.classify",
    "marnet-bench": "marnet_bench.cli",
    "marnet-bundle": "marnet_export.bundle_cli",
    "marnet-doctor": "marnet_sdk.commands.doctor",
}
REFUSING = [command for command in COMMANDS if command != "marnet-doctor"]  # which tells of all
ENCODINGS = ("utf-8", "ascii", "latin-1", "cp1252", "C")
# What people name files and classes, and what they should not. In a file name each is possible.
NAMES = (
    "[bold]loud[red]",
    ":smile:",
    "tab\there",
    "line\nbreak\rback",
    "clear\x1b[2Jscreen",
    "grüße",
    "犬",
    "rtl\u200f\u202emark",
    "next\x85line\u2028sep",
    "raw\udcffbyte",
    'comma,quote"s',
    "backslash\\n",
)
LABELS = NAMES[:10]


def run(
    command: str, *arguments: str | Path, encoding: str = "utf-8", **how
) -> subprocess.CompletedProcess[bytes]:
    code = f"import sys; from {COMMANDS[command]} import main; sys.argv[0] = {command!r}; main()"
    places = {"LC_ALL": "C"} if encoding == "C" else {"PYTHONIOENCODING": encoding}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONUNBUFFERED", "LC_ALL")}
    pipes = {} if "stdout" in how else {"stdout": subprocess.PIPE}
    return subprocess.run(
        [sys.executable, "-c", code, *map(os.fspath, arguments)],
        stderr=subprocess.PIPE,
        env=environment | places,
        check=False,
        **pipes,
        **how,
    )


def decoded(output: bytes, encoding: str) -> str:
    return output.decode("utf-8" if encoding == "C" else encoding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("odd") / "[red] :dog: \x1b[2J\r\n\u200f ü"
    root.mkdir()
    return root


@pytest.fixture(scope="module")
def bundle(bundle_of, folder) -> Path:
    """A bundle whose name and ten labels are odd."""
    path = shutil.copytree(bundle_of("onnxruntime", "fp32"), folder / "b.marnet")
    reseal_bundle(path, labels=LABELS)
    return path


@pytest.fixture(scope="module")
def images(digits, folder) -> list[Path]:
    """Images under every name, and the last one is none."""
    paths = [folder / f"{name}.png" for name in NAMES]
    for source, path in zip(sorted((digits / "test").glob("*.png")), paths, strict=False):
        shutil.copy(source, path)
    paths[-1].write_bytes(b"\x1b[2J no image")
    return paths


@pytest.fixture(scope="module")
def data(folder) -> Path:
    """A data set whose names and labels are odd, of which some are refused."""
    for split in ("train", "val"):
        (folder / split).mkdir()
        lines = []
        for number, name in enumerate(NAMES):
            colour = (17 * number, 80 if split == "train" else 160, 5)
            Image.new("RGB", (9, 9), colour).save(folder / split / f"{name}.png")
            line = {"file_name": f"{name}.png", "text": name, "label": name}
            lines += [json.dumps(line), json.dumps(line | {"file_name": f"no{name}"})]
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def check_shown(output: bytes, encoding: str, names: Sequence[str]) -> None:
    """A person sees every name, and nothing of it but its letters."""
    text = decoded(output, encoding)
    lines = text.split("\n")
    assert {c for line in lines for c in line if not c.isprintable()} <= set("\u200f\u202e")
    codec = "utf-8" if encoding == "C" else encoding
    for name in names:
        shown = name.translate({c: repr(chr(c))[1:-1] for c in (9, 10, 13, 27, 0x85, 0x2028)})
        shown = shown.encode(codec, "backslashreplace").decode(codec)
        assert any(shown in line for line in lines), (name, text)


# --- what is shown to people --------------------------------------------------------------------


@pytest.mark.parametrize("encoding", kept(ENCODINGS, {"utf-8", "C"}))
def test_classify_shows_every_name_and_label(bundle, images, encoding):
    done = run("marnet-classify", *images, "-m", bundle, "--top-k", "10", encoding=encoding)
    assert done.returncode == 1
    check_shown(done.stdout, encoding, [*NAMES, *LABELS])
    check_shown(done.stderr, encoding, [])
    assert b"1 of 12 images could not be used" in done.stderr


@pytest.mark.parametrize("encoding", kept(["utf-8", "ascii", "C"], {"C"}))
def test_check_shows_every_name_and_label(data, encoding):
    done = run("marnet-train", "data", "check", data, encoding=encoding)
    assert done.returncode == 1
    check_shown(done.stdout, encoding, [n for n in NAMES if n.isprintable()])
    check_shown(done.stderr, encoding, [])
    assert done.stderr.startswith(b"Error: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", kept(["utf-8", "ascii"], {"ascii"}))
def test_inspect_shows_labels_and_the_place(bundle, encoding):
    done = run("marnet-bundle", "inspect", bundle, encoding=encoding)
    assert done.returncode == 0, done.stderr
    check_shown(done.stdout, encoding, [str(bundle), *LABELS[:5]])
    check_shown(done.stderr, encoding, [])


@pytest.mark.parametrize("command", kept(REFUSING, {"marnet-classify", "marnet-bundle"}))
def test_a_refusal_names_what_was_asked_for(folder, command):
    encoding = "ascii"
    odd = folder / "none\udcff :smile: [b]\x1b[2J"
    ways = {
        "marnet-train": ("data", "check", odd),
        "marnet-export": ("--checkpoint", odd),
        "marnet-classify": (odd, "--model", odd),
        "marnet-bench": ("--model", odd),
        "marnet-bundle": ("verify", odd),
    }
    done = run(command, *ways[command], encoding=encoding)
    assert done.returncode == 2
    assert done.stdout == b""
    check_shown(done.stderr, encoding, [odd.name])
    assert done.stderr.count(b"\n") == 1
    wrong = run(command, "--fromat\x1b[2J\n", encoding=encoding)
    assert wrong.returncode == 2
    check_shown(wrong.stderr, encoding, [])


# --- what programs read -------------------------------------------------------------------------


def test_json_holds_every_name_and_label_as_it_is(bundle, images, data):
    encoding = "ascii"
    done = run(
        "marnet-classify", *images, "-m", bundle, "--format", "json", "--top-k", "10",
        encoding=encoding,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert [entry["image"] for entry in found] == [str(path) for path in images]
    assert {top["label"] for top in found[0]["top"]} == set(LABELS)
    checked = run("marnet-train", "data", "check", data, "--format", "json", encoding=encoding)
    classes = set(json.loads(checked.stdout)["classes"])
    assert classes
    assert classes <= set(NAMES)
    shown = run("marnet-bundle", "inspect", bundle, "--format", "json", encoding=encoding)
    assert json.loads(shown.stdout)["labels"] == list(LABELS)


@pytest.mark.parametrize("encoding", kept(["utf-8", "ascii", "cp1252"], {"cp1252"}))
def test_csv_is_read_as_it_was_written(bundle, images, encoding):
    done = run("marnet-classify", *images, "-m", bundle, "--format", "csv", encoding=encoding)
    rows = list(csv.DictReader(io.StringIO(decoded(done.stdout, encoding), newline="")))
    codec = "utf-8" if encoding == "C" else encoding
    expected = [str(path).encode(codec, "backslashreplace").decode(codec) for path in images]
    assert list(dict.fromkeys(row["image"] for row in rows)) == expected
    assert "no image" not in rows[-1]["label"]
    assert rows[-1]["error"]


# --- outputs that end ---------------------------------------------------------------------------

PRINTING = {
    "marnet-train": ("data", "check", "DATA"),
    "marnet-classify": ("IMAGE", "-m", "BUNDLE"),
    "marnet-bench": ("-m", "BUNDLE", "--no-peer", "--warmup", "0", "--duration", "0"),
    "marnet-bundle": ("inspect", "BUNDLE"),
    "marnet-doctor": (),
    "marnet-export": ("--checkpoint", "CHECKPOINT", "--explain"),
}


KINDS = kept(["help", "every help", "table", "every table", "json", "csv"], {"help", "table"})


@pytest.fixture(scope="module", params=KINDS)
def prints(request, bundle, images, data, checkpoint) -> dict[str, list[str | Path]]:
    """command -> arguments with which it prints something."""
    if "help" in request.param:
        commands = (
            COMMANDS if request.param == "every help" else ["marnet-train", "marnet-classify"]
        )
        return {command: ["--help"] for command in commands}
    places = {"DATA": data, "IMAGE": images[0], "BUNDLE": bundle, "CHECKPOINT": checkpoint}
    kind = [] if "table" in request.param else ["--format", request.param]
    commands = COMMANDS if request.param == "every table" else ["marnet-classify"]
    return {c: [places.get(a, a) for a in PRINTING[c]] + kind for c in commands}


def test_a_full_device_is_one_line_and_no_success(prints):
    for command, arguments in prints.items():
        with Path("/dev/full").open("wb") as full:
            done = run(command, *arguments, stdout=full)
        lines = done.stderr.decode().splitlines()
        assert done.returncode == 1, (command, lines)
        errors = [line for line in lines if line.startswith("Error: the output cannot be written")]
        assert errors == [
            "Error: the output cannot be written: No space left on device; send it elsewhere"
        ]
        assert not any("Traceback" in line or "Exception" in line for line in lines)


def test_a_closed_pipe_ends_without_a_word_and_without_success(prints):
    for command, arguments in prints.items():
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = run(command, *arguments, stdout=writer)
        finally:
            os.close(writer)
        assert done.returncode == 1, (command, done.stderr)
        assert b"Traceback" not in done.stderr
        assert b"Exception" not in done.stderr
        assert b"cannot be written" not in done.stderr


# --- one text -----------------------------------------------------------------------------------


@given(st.text())
def test_any_text_is_one_line_of_letters_and_most_are_themselves(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert shown.encode().decode() == shown
    if text.isprintable():
        assert shown == text
