"""Folders appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from marnet_sdk.errors import OutputExists
from marnet_sdk.files import atomic_directory, newest, sha256_file


def write(folder: Path, content: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/file").write_text(content)


def fail_half_way(target: Path, error: type[BaseException], **options: bool) -> None:
    with atomic_directory(target, **options) as fresh:
        write(fresh, "half")
        raise error


def test_the_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep/er/target"
    with atomic_directory(target) as fresh:
        write(fresh, "new")
        assert not target.exists()
        assert fresh.parent.parent == target.parent  # a rename must stay on one file system
    assert (target / "sub/file").read_text() == "new"
    assert [entry.name for entry in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        fail_half_way(tmp_path / "target", error)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused_before_the_block_runs(tmp_path):
    (tmp_path / "target").mkdir()
    ran = False
    with (
        pytest.raises(OutputExists, match=r"target already exists; .*--force"),
        atomic_directory(tmp_path / "target"),
    ):
        ran = True
    assert not ran
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_a_file_or_a_broken_link_is_a_taken_place_too(tmp_path, kind):
    target = tmp_path / "target"
    target.write_text("x") if kind == "file" else target.symlink_to("nowhere")
    with pytest.raises(OutputExists), atomic_directory(target):
        pass
    with atomic_directory(target, overwrite=True) as fresh:
        write(fresh, "new")
    assert (target / "sub/file").read_text() == "new"
    assert not target.is_symlink()


def test_overwriting_replaces_the_whole_folder(tmp_path):
    target = tmp_path / "target"
    with atomic_directory(target) as fresh:
        write(fresh, "old")
        (fresh / "only in old").write_text("x")
    with atomic_directory(target, overwrite=True) as fresh:
        write(fresh, "new")
        assert (target / "sub/file").read_text() == "old"
    assert sorted(entry.name for entry in target.iterdir()) == ["sub"]
    assert (target / "sub/file").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_a_failed_overwrite_keeps_what_was_there(tmp_path):
    target = tmp_path / "target"
    with atomic_directory(target) as fresh:
        write(fresh, "old")
    with pytest.raises(ZeroDivisionError):
        fail_half_way(target, ZeroDivisionError, overwrite=True)
    assert (target / "sub/file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_two_writers_do_not_meet(tmp_path):
    with atomic_directory(tmp_path / "a") as first, atomic_directory(tmp_path / "b") as second:
        write(first, "first")
        write(second, "second")
    assert (tmp_path / "a/sub/file").read_text() == "first"
    assert (tmp_path / "b/sub/file").read_text() == "second"


def test_a_relative_target_means_the_folder_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_directory(Path("target")) as fresh:
        write(fresh, "new")
        monkeypatch.chdir("/")
    assert (tmp_path / "target/sub/file").read_text() == "new"


def test_newest_is_by_time_of_writing_and_skips_hidden_and_unfit_folders(tmp_path):
    for age, name in enumerate(("b", "a", "unfit", ".hidden")):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 + age, 1e9 + age))
    (tmp_path / "file").write_text("x")
    assert newest(tmp_path, lambda path: path.name != "unfit") == tmp_path / "a"
    assert newest(tmp_path, lambda path: False) is None
    assert newest(tmp_path / "absent", lambda path: True) is None


def test_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"\x00\r\n" * 100_000)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"\x00\r\n" * 100_000).hexdigest()
