"""A bundle is read only if every byte of it is the one that was written."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quick import kept

from marnet_sdk.bundle import (
    BatchTimes,
    BuiltFor,
    Bundle,
    Manifest,
    OperatingPoint,
    Precision,
    Sampling,
    Share,
    newest_bundle,
    read_bundle,
    reseal_bundle,
    seal_bundle,
)
from marnet_sdk.errors import (
    BundleCorrupt,
    BundleError,
    BundleFormatError,
    InvalidInput,
    NotFound,
)

FILES = {
    "payload/model.onnx": b"graph " * 50,
    "golden/images/0.png": b"image",
    "empty": b"",
    "text/text.onnx": b"words",
    "source/config.json": b"{}",
}
FIELDS: dict[str, Any] = {
    "method": "marnet",
    "labels": ("cat", "dog \u5b57"),
    "preprocess": {"size": {"height": 8, "width": 8}},
    "backend": "onnxruntime",
    "precision": Precision(
        "fp16", "fp16", "fp32", {"all": Share(1000, {"fp16": 0.99, "fp32": 0.01}, {"fp32": 1.0})}
    ),
    "sampling": Sampling(
        points={
            "exact": OperatingPoint("ddpm", 0.0, (3, 2, 1), 1, None),
            "fast": OperatingPoint("ddim", 0.5, (3,), 4, 0.75),
        },
        default="fast",
        train_steps=3,
        noise="shared",
        seed=0,
        width=16,
    ),
    "buckets": (),
    "golden_tolerance": 0.02,
    "built_for": BuiltFor("cpu", "x86_64", {"python": "3.11.0"}, ("AVX2",)),
    "settings": {"backend": "auto", "steps": None},
    "checkpoint_sha256": "0" * 64,
    "created": "2026-11-20T12:00:00+00:00",
}


def make_bundle(folder: Path, **changes: Any) -> Path:
    """A small bundle: sound as far as bytes go, though nothing can run it."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    seal_bundle(folder, FIELDS | changes)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "b")


@pytest.fixture(scope="module")
def lasting() -> Iterator[Path]:
    """One bundle for many examples; each restores the byte that it changes."""
    with tempfile.TemporaryDirectory() as folder:
        yield make_bundle(Path(folder) / "b")


def reseal(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it the digest that the format prescribes."""
    content = json.loads((bundle / "manifest.json").read_text())
    del content["digest"]
    change(content)

    def canonical() -> bytes:
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("ascii")

    content["digest"] = hashlib.sha256(canonical()).hexdigest()
    (bundle / "manifest.json").write_bytes(canonical())


def refused_with_a_byte_changed(bundle: Path, name: str, offset: int, mask: int) -> bool:
    file = bundle / name
    sound = file.read_bytes()
    damaged = bytearray(sound)
    damaged[offset] ^= mask
    file.write_bytes(damaged)
    try:
        read_bundle(bundle)
    except BundleError:
        return True
    finally:
        file.write_bytes(sound)
    return False


def test_what_was_sealed_is_what_is_read(bundle):
    manifest = read_bundle(bundle).manifest
    got = {field.name: getattr(manifest, field.name) for field in fields(Manifest)}
    files = got.pop("files")
    assert got.pop("loop") == "graph"  # of a manifest that does not say
    assert got.pop("batch_times") is None
    assert got == FIELDS
    assert files["golden/images/0.png"] == {
        "bytes": 5,
        "sha256": hashlib.sha256(b"image").hexdigest(),
    }
    assert files.keys() == FILES.keys()


@given(st.lists(st.text(), max_size=4), st.dictionaries(st.text(), st.floats(), max_size=3))
def test_any_label_and_any_number_survive_sealing(labels, storage):
    with tempfile.TemporaryDirectory() as folder:
        path = make_bundle(
            Path(folder),
            labels=tuple(labels),
            precision=Precision("fp16", "fp16", "fp32", {"all": Share(1, storage, {})}),
        )
        manifest = read_bundle(path).manifest
    assert manifest.labels == tuple(labels)
    assert repr(manifest.precision.receipt["all"].storage) == repr(
        {k: storage[k] for k in sorted(storage)}
    )


@pytest.mark.parametrize(
    ("name", "folder"), [("text/text.onnx", "text"), ("source/config.json", "source")]
)
def test_what_classifying_does_not_need_is_checked_when_it_is_used(bundle, name, folder):
    whole = read_bundle(bundle, lazily=True)
    assert whole.has(folder)
    assert whole.check(folder) == bundle / folder
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[::-1])
    damaged = read_bundle(bundle, lazily=True)
    with pytest.raises(BundleCorrupt, match=f"{name} does not have the SHA-256"):
        damaged.check(folder)
    with pytest.raises(BundleCorrupt, match=f"{name} does not have the SHA-256"):
        read_bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleCorrupt, match=f"{name} is missing"):
        read_bundle(bundle, lazily=True)


def test_a_payload_is_never_left_for_later(bundle):
    (bundle / "payload/model.onnx").write_bytes(b"graph! " * 50)
    with pytest.raises(BundleCorrupt, match=r"model\.onnx has 350 bytes"):
        read_bundle(bundle, lazily=True)
    (bundle / "payload/model.onnx").write_bytes(b"grAph " * 50)
    with pytest.raises(BundleCorrupt, match=r"model\.onnx does not have the SHA-256"):
        read_bundle(bundle, lazily=True)


def test_a_bundle_is_sealed_again_over_what_it_holds_now(bundle):
    (bundle / "text/text.onnx").unlink()
    (bundle / "more").write_bytes(b"more")
    manifest = reseal_bundle(bundle, backend="openvino")
    assert read_bundle(bundle).manifest == manifest
    assert (manifest.backend, manifest.method) == ("openvino", "marnet")
    assert manifest.files.keys() == {*FILES, "more"} - {"text/text.onnx"}
    assert not read_bundle(bundle).has("text")


def test_the_manifest_is_canonical_json_that_a_person_can_read(bundle):
    raw = (bundle / "manifest.json").read_bytes()
    content = json.loads(raw)
    assert raw == (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("ascii")
    assert content["format_version"] == 3
    assert b'"dog \\u5b57"' in raw


def test_the_digest_is_of_the_canonical_manifest_without_it(bundle):
    before = (bundle / "manifest.json").read_bytes()
    reseal(bundle, lambda content: None)
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("step", kept([1, 19], {19}))
def test_a_change_of_any_single_byte_of_the_manifest_is_noticed(lasting, step):
    size = (lasting / "manifest.json").stat().st_size
    missed = [
        offset
        for offset in range(0, size, step)
        if not refused_with_a_byte_changed(lasting, "manifest.json", offset, 1 << offset % 8)
    ]
    assert missed == []
    read_bundle(lasting)


@given(st.data())
def test_any_change_of_any_byte_of_any_file_is_noticed(lasting, data):
    files = [path for path in lasting.rglob("*") if path.is_file() and path.stat().st_size]
    file = data.draw(st.sampled_from(sorted(files)))
    offset = data.draw(st.integers(0, file.stat().st_size - 1))
    mask = data.draw(st.integers(1, 255))
    assert refused_with_a_byte_changed(lasting, str(file.relative_to(lasting)), offset, mask)


@pytest.mark.parametrize("files", kept(["one of each kind", "all"], {"one of each kind"}))
def test_a_changed_byte_in_any_file_of_a_real_bundle_is_noticed(bundle_of, tmp_path, files):
    copy = tmp_path / "b"
    shutil.copytree(bundle_of("torchscript", "fp16"), copy)
    paths = sorted(path for path in copy.rglob("*") if path.is_file())
    assert len(paths) >= 13
    if files != "all":
        paths = list({(path.parent, path.suffix): path for path in paths}.values())
    for path in paths:
        name, size = str(path.relative_to(copy)), path.stat().st_size
        for offset in {0, size // 3, size // 2, size - 1} if files == "all" else {size // 2}:
            assert refused_with_a_byte_changed(copy, name, offset, 0x10), (name, offset)
    read_bundle(copy)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(BundleCorrupt, match=f"{name} is missing; copy or export the bundle again"):
        read_bundle(bundle)


@pytest.mark.parametrize("size", [0, 1, 299, 301])
def test_a_truncated_or_longer_file_is_named_with_both_sizes(bundle, size):
    content = FILES["payload/model.onnx"] + b"x"
    (bundle / "payload/model.onnx").write_bytes(content[:size])
    with pytest.raises(BundleCorrupt, match=f"model.onnx has {size} bytes, the manifest says 300"):
        read_bundle(bundle)


def test_two_files_that_change_places_are_noticed(tmp_path):
    folder = make_bundle(tmp_path / "b")
    (folder / "golden/images/1.png").write_bytes(b"other")
    seal_bundle(folder, FIELDS)
    read_bundle(folder)
    (folder / "golden/images/0.png").write_bytes(b"other")
    (folder / "golden/images/1.png").write_bytes(b"image")
    with pytest.raises(BundleCorrupt, match=r"0.png does not have the SHA-256 of the manifest"):
        read_bundle(folder)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_manifest_is_damage(bundle, length):
    raw = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").write_bytes(raw[:length])
    with pytest.raises(BundleCorrupt, match=r"manifest.json (is damaged|was changed)"):
        read_bundle(bundle)


@pytest.mark.parametrize("raw", [b"[]", b'"x"', b"1", b"null", b"\xff\xfe", b"{}", b"[" * 50])
def test_something_else_called_manifest_is_damage(bundle, raw):
    (bundle / "manifest.json").write_bytes(raw)
    with pytest.raises(BundleCorrupt, match="copy or export the bundle again"):
        read_bundle(bundle)


NESTED = b'{"digest": "", "format_version": 3, "x": %s%s}' % (b"[" * 400, b"]" * 400)


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 100_000, NESTED])
def test_a_manifest_nested_too_deeply_is_damage(bundle, raw):
    (bundle / "manifest.json").write_bytes(raw)
    message = r"manifest.json (is damaged \(maximum recursion depth|was changed)"
    with pytest.raises(BundleCorrupt, match=message):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "payload/model.onnx"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "I/O")])
def test_a_file_that_the_system_does_not_let_us_read_is_named(bundle, monkeypatch, name, error):
    error.filename = str(bundle / name)  # root, as whom tests may run, is denied nothing
    original = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any):
        if self == bundle / name:
            raise error
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    message = f"{name} cannot be read: {error.strerror}; check its permissions and the disk"
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle)


def test_a_path_that_the_system_refuses_is_an_error_of_ours():
    with pytest.raises(BundleError, match="cannot be read: File name too long"):
        read_bundle("x" * 300)


@pytest.mark.parametrize("path", [None, 7, b"bundles/b", ["b"]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(InvalidInput, match=r"got .* as a bundle; expected the path of its folder"):
        read_bundle(path)


def test_the_same_content_in_another_layout_is_a_change(bundle):
    content = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleCorrupt, match="was changed after it was written"):
        read_bundle(bundle)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_an_older_format_says_what_to_do(bundle, version):
    reseal(bundle, lambda content: content.update(format_version=version))
    with pytest.raises(BundleFormatError, match=f"format {version} is older .* export the bundle"):
        read_bundle(bundle)


def test_a_default_that_is_no_operating_point_is_refused(bundle):
    reseal(bundle, lambda content: content["sampling"].update(default="slow"))
    with pytest.raises(BundleFormatError, match="lacks what inference needs: 'slow'"):
        read_bundle(bundle)


def point(**changes: Any) -> dict[str, Any]:
    """A sampling whose only operating point is "exact", with changes."""
    exact = {"sampler": "ddpm", "eta": 0.0, "timesteps": [3, 2, 1], "samples": 1}
    return {"points": {"exact": exact | {"abstain_below": None} | changes}, "default": "exact"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": "none"}, "noise 'none' is neither shared nor image"),
        ({"train_steps": 2}, "operating point 'exact' visits steps outside 1 .. T"),
        (point(timesteps=[]), "operating point 'exact' has 0 steps"),
        (point(sampler="none"), "operating point 'exact' has 3 steps"),
        (
            point(sampler="none", timesteps=[]),
            r"point 'exact' needs payload/alignment\.safetensors; export it again",
        ),
    ],
)
def test_a_sampling_that_cannot_be_is_refused(bundle, change, message):
    reseal(bundle, lambda content: content["sampling"].update(change))
    with pytest.raises(BundleFormatError, match=message):
        read_bundle(bundle)


def test_times_of_batches_are_read_and_impossible_ones_refused(bundle):
    times = BatchTimes("a processor", 2, ((1, 0.5), (16, 2)))
    path = make_bundle(bundle, batch_times=times)
    assert read_bundle(path).manifest.batch_times == times
    for wrong in ([0, 1.0], [1, 0], [1, float("inf")], [1.5, 1.0], [True, 1.0], [1], 1):
        reseal(path, lambda content, wrong=wrong: content["batch_times"].update(seconds=[wrong]))
        with pytest.raises(BundleFormatError, match="lacks what inference needs: "):
            read_bundle(path)


@pytest.mark.parametrize("version", [4, 5, 1000])
def test_a_newer_format_is_told_from_damage(bundle, version):
    reseal(bundle, lambda content: content.update(format_version=version, future={"x": 1}))
    with pytest.raises(BundleFormatError, match=f"format {version} is newer .*--upgrade marnet"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["../outside", "payload/../../outside", "/etc/hostname"])
def test_a_manifest_cannot_name_files_outside_the_bundle(bundle, name):
    (bundle.parent / "outside").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    reseal(bundle, lambda content: content["files"].update({name: entry}))
    with pytest.raises(BundleCorrupt, match=f"lists '{name}', which leaves the bundle"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", sorted({*FIELDS, "files"}))
def test_a_manifest_without_a_field_says_which(bundle, name):
    reseal(bundle, lambda content: content.pop(name))
    with pytest.raises(BundleFormatError, match=f"lacks what inference needs: .*'{name}'"):
        read_bundle(bundle)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
ENTRIES = st.dictionaries(st.sampled_from(sorted(FILES)), JSON)


@given(name=st.sampled_from(sorted({*FIELDS, "files", "format_version"})), value=JSON | ENTRIES)
def test_a_sealed_manifest_with_any_value_in_any_place_gives_a_bundle_or_a_typed_error(name, value):
    with tempfile.TemporaryDirectory() as folder:
        path = make_bundle(Path(folder))
        reseal(path, lambda content: content.update({name: value}))
        try:
            found = read_bundle(path)
        except BundleError:
            return
        assert isinstance(found, Bundle)


def test_a_file_that_the_manifest_does_not_list_is_not_handed_out(bundle):
    (bundle / "payload/extra.bin").write_bytes(b"x")
    read = read_bundle(bundle)
    assert read.file("payload/model.onnx") == bundle / "payload/model.onnx"
    with pytest.raises(BundleFormatError, match=r"the manifest lists no payload/extra.bin"):
        read.file("payload/extra.bin")


def test_a_folder_that_is_no_bundle_shows_the_command_that_makes_one(tmp_path):
    with pytest.raises(NotFound, match=r"has no manifest.json, so it is not a bundle.*export"):
        read_bundle(tmp_path)
    with pytest.raises(NotFound, match=r"nowhere is not a directory.*make one with: marnet"):
        read_bundle(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NotFound, match="file is not a directory"):
        read_bundle(tmp_path / "file")


def test_without_any_bundle_the_exact_command_is_shown(tmp_path):
    with pytest.raises(NotFound, match="marnet-export --precision fp16, or name one with --model"):
        newest_bundle(tmp_path)
