"""Files, folders, patterns and lists, as people name images."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marnet_sdk.errors import NotFound
from marnet_sdk.inputs.listing import LIST, image_paths


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder as cameras and people leave it."""
    root = tmp_path / "photos"
    for name in (
        *("b.JPG", "a.png", "notes.txt", ".hidden.jpg", "2025/z.jpeg", "2025/may/y.webp"),
        *(".trash/x.jpg", "empty/readme.md", "c.tiff"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def named(*sources: Path | str, listed: bytes = b"", null: bool = False) -> list[str]:
    return [str(p) for p in image_paths(map(Path, sources), io.BytesIO(listed), null=null)]


def below(root: Path, *names: str) -> list[str]:
    return [str(root / name) for name in names]


def test_a_folder_stands_for_the_images_in_it_and_below_in_order(photos):
    expected = ("2025/may/y.webp", "2025/z.jpeg", "a.png", "b.JPG", "c.tiff")
    assert named(photos) == below(photos, *expected)


def test_a_file_is_itself_whatever_its_name(photos):
    assert named(photos / "notes.txt", "nowhere.jpg") == [f"{photos}/notes.txt", "nowhere.jpg"]


def test_a_pattern_stands_for_what_it_matches(photos):
    assert named(photos / "[ab].*") == below(photos, "a.png", "b.JPG")
    assert named(photos / "20*") == below(photos, "2025/may/y.webp", "2025/z.jpeg")
    assert named(photos / "**/*.jpeg") == below(photos, "2025/z.jpeg")
    both = sorted(below(photos, "2025/may/y.webp", "2025/z.jpeg"))
    assert named(photos / "2025/**") == both
    assert named(photos / "*.bmp") == below(photos, "*.bmp")  # whoever opens it says why


def test_a_file_whose_name_looks_like_a_pattern_is_meant_itself(photos):
    (photos / "a[1].png").write_bytes(b"")
    (photos / "a1.png").write_bytes(b"")
    assert named(photos / "a[1].png") == below(photos, "a[1].png")


def test_a_list_on_standard_input_names_files_and_folders(photos):
    lines = f"{photos}/a.png\r\n\n{photos}/2025\nmissing.jpg".encode()
    found = below(photos, "a.png", "2025/may/y.webp", "2025/z.jpeg")
    assert named(LIST, listed=lines) == [*found, "missing.jpg"]
    assert named(photos / "c.tiff", LIST, listed=lines)[0] == f"{photos}/c.tiff"


@given(st.lists(st.binary(min_size=1).filter(lambda name: b"\0" not in name)))
def test_names_with_any_byte_pass_where_null_bytes_end_them(names):
    names = [b"/no/" + name for name in names]
    listed = b"".join(name + b"\0" for name in names)
    try:
        found = list(image_paths([LIST], io.BytesIO(listed), null=True))
    except NotFound:
        assert not names
    else:
        assert found == [Path(os.fsdecode(name)) for name in names]


def test_a_list_is_read_as_it_comes():
    class Endless(io.BytesIO):
        lines = 0

        def __next__(self) -> bytes:
            self.lines += 1
            return b"%d.jpg\n" % self.lines

    endless = Endless()
    paths = image_paths([LIST], endless)
    assert [str(next(paths)) for _ in range(3)] == ["1.jpg", "2.jpg", "3.jpg"]
    assert endless.lines == 3


def test_folders_behind_links_are_left_out_and_cannot_loop(photos):
    (photos / "loop").symlink_to(photos)
    (photos / "again.jpg").symlink_to(photos / "b.JPG")
    found = named(photos)
    assert len(found) == 6
    assert f"{photos}/again.jpg" in found


def test_a_folder_that_cannot_be_read_is_named(photos, monkeypatch):
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("2025"):
            raise PermissionError
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert named(photos) == below(photos, "2025", "a.png", "b.JPG", "c.tiff")


def test_no_image_at_all_is_an_error_that_names_the_places(photos):
    with pytest.raises(NotFound, match=r"no image files in .*empty, standard input; name files"):
        named(photos / "empty", LIST)
