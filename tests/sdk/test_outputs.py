"""Folders appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from marnet_sdk import outputs
from marnet_sdk.errors import OutputError, OutputExists
from marnet_sdk.files import newest, sha256_file
from marnet_sdk.outputs import atomic_directory, atomic_file


def write(folder: Path, content: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/file").write_text(content)


def fail_half_way(target: Path, error: type[BaseException], **options: bool) -> None:
    with atomic_directory(target, **options) as fresh:
        write(fresh, "half")
        raise error


def refuse(target: Path, message: str, **options: Any) -> None:
    """Overwriting is refused before the block runs."""
    with (
        pytest.raises(OutputExists, match=message),
        atomic_directory(target, overwrite=True, **options),
    ):
        pytest.fail("the block ran")


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
    with pytest.raises(OutputExists, match="already exists"), atomic_directory(target):
        pass
    refuse(target, "target is not a directory: it does not look like what would be replaced")
    assert os.path.lexists(target)


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


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_exception_between_the_two_renames_brings_the_old_folder_back(
    tmp_path, monkeypatch, error
):
    target = tmp_path / "target"
    with atomic_directory(target) as fresh:
        write(fresh, "old")
    rename = Path.rename

    def fail_to_place_the_new(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise error
        return rename(self, to)

    monkeypatch.setattr(outputs, "_rename", lambda one, other, how: False)  # as on other systems
    monkeypatch.setattr(Path, "rename", fail_to_place_the_new)
    with pytest.raises(error), atomic_directory(target, overwrite=True) as fresh:
        write(fresh, "new")
    assert (target / "sub/file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_only_what_is_replaceable_is_replaced(tmp_path):
    target = tmp_path / "target"
    with atomic_directory(target) as fresh:
        write(fresh, "a user's photographs")
    message = "target holds something else: .* so it is left alone; choose another output"
    refuse(target, message, replaceable=lambda path: (path / "manifest.json").is_file())
    assert (target / "sub/file").read_text() == "a user's photographs"
    is_ours = {"overwrite": True, "replaceable": lambda path: (path / "sub/file").is_file()}
    with atomic_directory(target, **is_ours) as fresh:
        write(fresh, "new")
    assert (target / "sub/file").read_text() == "new"


@pytest.mark.parametrize("other_system", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_process_put_there_during_the_block_is_left_alone(
    tmp_path, monkeypatch, overwrite, other_system
):
    target = tmp_path / "target"
    if other_system:
        monkeypatch.setattr(outputs, "_rename", lambda one, other, how: False)

    def work() -> None:
        with atomic_directory(target, overwrite=overwrite, replaceable=lambda _: False) as fresh:
            write(fresh, "new")
            target.mkdir()
            (target / "thesis.tex").write_text("years of work")

    with pytest.raises(OutputExists, match=r"already exists|holds something else"):
        work()
    assert (target / "thesis.tex").read_text() == "years of work"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("other_system", [False, True])
def test_what_comes_between_the_last_look_and_the_exchange_is_brought_back(
    tmp_path, monkeypatch, other_system
):
    target = tmp_path / "target"
    target.mkdir()
    (target / "manifest.json").touch()
    looks = []

    def replaceable(path: Path) -> bool:
        looks.append(path)
        if len(looks) == 2:  # the last look; then another process is faster
            (target / "manifest.json").unlink()
            (target / "thesis.tex").write_text("years of work")
            return True
        return (path / "manifest.json").exists()

    if other_system:
        monkeypatch.setattr(outputs, "_rename", lambda one, other, how: False)
    with (
        pytest.raises(OutputExists, match="target holds something else"),
        atomic_directory(target, overwrite=True, replaceable=replaceable) as fresh,
    ):
        write(fresh, "new")
    assert len(looks) == 3
    assert (target / "thesis.tex").read_text() == "years of work"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_threads_that_write_one_file_do_not_share_what_they_write_to(tmp_path):
    target, barrier = tmp_path / "file", Barrier(2)

    def keep(content: str) -> Path:
        with atomic_file(target) as fresh:
            barrier.wait(60)
            fresh.write_text(content)
            barrier.wait(60)
            assert fresh.read_text() == content
            barrier.wait(60)
        return fresh

    with ThreadPoolExecutor(2) as pool:
        places = list(pool.map(keep, ["a" * 9, "b" * 9]))
    assert len(set(places)) == 2
    assert target.read_text() in ("a" * 9, "b" * 9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("inside", [".", "deep/er"])
def test_the_folder_that_the_user_stands_in_is_left_alone(tmp_path, monkeypatch, inside):
    (tmp_path / "target/deep/er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "target" / inside)
    refuse(tmp_path / "target", "target is or contains the current working directory: it does not")
    assert (tmp_path / "target/deep/er").is_dir()


def test_modes_follow_the_umask_whatever_the_writer_gave(tmp_path):
    """safetensors makes files that only their owner may read; a server may be another user."""
    script = """
import sys
from pathlib import Path
from marnet_sdk.outputs import atomic_directory, atomic_file
with atomic_directory(Path(sys.argv[1])) as fresh:
    (fresh / "sub").mkdir(mode=0o700)
    for name in ("private", "sub/private"):
        (fresh / name).write_bytes(b"x")
        (fresh / name).chmod(0o600)
    (fresh / "link").symlink_to("nowhere near")
    (fresh / "nowhere near").touch()
with atomic_file(Path(sys.argv[1]) / "alone") as fresh:
    fresh.write_bytes(b"x")
    fresh.chmod(0o600)
"""
    target = tmp_path / "target"
    subprocess.run([sys.executable, "-c", script, target], check=True, umask=0o027)
    modes = {path.name: path.stat().st_mode & 0o777 for path in target.rglob("*")}
    ordinary = dict.fromkeys(("private", "link", "nowhere near", "alone"), 0o640)
    assert modes == {"sub": 0o750, **ordinary}
    assert (target / "sub/private").stat().st_mode & 0o777 == 0o640
    assert target.stat().st_mode & 0o777 == 0o750


def leave(folder: Path, minutes: int, content: str = "new") -> None:
    """What a killed write leaves, so many minutes old."""
    (folder / content).mkdir(parents=True)
    when = time.time() - 60 * minutes
    os.utime(folder, (when, when))


def test_the_next_write_removes_what_a_killed_one_left_an_hour_ago(tmp_path):
    leave(tmp_path / ".target.abcd_123", 61)
    leave(tmp_path / ".target.recent12", 59)
    leave(tmp_path / ".target.part2.abcd_123", 61)  # of a target called target.part2
    leave(tmp_path / ".target.original", 61, "holiday")  # a user's
    (tmp_path / ".target.a_file_1").touch()
    kept = {entry.name for entry in tmp_path.iterdir()} - {".target.abcd_123"}
    with pytest.raises(ZeroDivisionError):
        fail_half_way(tmp_path / "target", ZeroDivisionError)
    assert (tmp_path / ".target.abcd_123").exists()  # it may hold the only good copy
    with atomic_directory(tmp_path / "target") as fresh:
        write(fresh, "new")
    assert {entry.name for entry in tmp_path.iterdir()} == kept | {"target"}


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


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "state"
    with outputs.atomic_file(target) as fresh:
        fresh.write_text("old")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), outputs.atomic_file(target) as fresh:
        fresh.write_text(str(1 // 0))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(tmp_path, code):
    with (
        pytest.raises(OutputError, match=r"state: no space left on its file system.*Free some"),
        outputs.atomic_file(tmp_path / "state"),
    ):
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_other_failures_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="unplugged"), outputs.enough_space(tmp_path):
        raise OSError(errno.EIO, "unplugged")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file/target"
    with (
        pytest.raises(OutputError, match=r"target: cannot be written \(.*/file\); choose"),
        atomic_directory(target),
    ):
        pytest.fail("must not begin")
