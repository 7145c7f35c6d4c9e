"""Bundles: what export writes and the SDK loads. A directory.

manifest.json      everything inference needs; size and SHA-256 of every other file; own digest
payload/           the backend's files, and plan.safetensors
golden/            a few images with the pixels and logits they gave when the bundle was built
fidelity.json      agreement with the float32 checkpoint
text/              the text encoder, for matching; read when a text comes
source/            the checkpoint, for verifying and rebuilding; never read to classify

A bundle is code: TorchScript archives contain pickle data, engines are native code. The checksums
tell damage from delivery; they do not make a bundle from a stranger safe.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from marnet_sdk.errors import (
    BundleCorrupt,
    BundleError,
    BundleFormatError,
    InvalidInput,
    NotFound,
    brief,
)
from marnet_sdk.files import newest, sha256_file
from marnet_sdk.inputs.preprocess import Preprocess

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
PAYLOAD, TEXT, SOURCE = "payload", "text", "source"
LAZY = (f"{TEXT}/", f"{SOURCE}/")  # what is not needed to classify
PLAN = "payload/plan.safetensors"
ALIGNMENT_HEAD = "payload/alignment.safetensors"
NATIVE_LAYERS = "payload/native_loop.safetensors"
ZERO, NO_LOOP = "zero", "none"  # the operating point without the loop, and its sampler
FIDELITY = "fidelity.json"
GOLDEN_IMAGES, GOLDEN_ANSWERS = "golden/images", "golden/answers.safetensors"


@dataclass(frozen=True)
class Share:
    """The shares of types in the multiply-adds of one answer, read from what was built."""

    multiply_adds: int
    storage: dict[str, float]  # type that the weights are stored in -> share; or "activation"
    compute: dict[str, float]  # type that is multiplied in -> share


@dataclass(frozen=True)
class Precision:
    """The precision that was asked for, and what the built files really hold and do."""

    asked: str  # fp32, bf16, fp16, int8
    loop: str  # the same for the reverse loop
    compute: str  # type of all products whose weights are not in int8
    receipt: dict[str, Share]  # of "encoder", "loop", "head" and "all"
    # Layers of an int8 image encoder that stayed in `compute`, and why each did.
    kept: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OperatingPoint:
    """One way to run the reverse process: a trade of accuracy for speed, verified at export."""

    sampler: str  # NO_LOOP where there is no step: the alignment branch alone answers
    eta: float  # of ddim
    timesteps: tuple[int, ...]  # S of them, decreasing, 1-based
    samples: int  # K: chains per image, whose probabilities are averaged
    abstain_below: float | None  # score under which an answer is not to be relied on


@dataclass(frozen=True)
class Sampling:
    """The ways to run the reverse process. The plan file holds `coefficients.NAME` of each."""

    points: dict[str, OperatingPoint]
    default: str  # which of them answers when none is asked for
    train_steps: int  # T
    noise: str  # "shared": every image meets the same; "image": keyed by its pixels
    seed: int  # of the noise that the golden answers were made with
    width: int  # D, of one noise vector

    @property
    def point(self) -> OperatingPoint:
        """The default operating point."""
        return self.points[self.default]

    @property
    def with_loop(self) -> str:
        """The operating point that stands for the loop: the default, or the first that has one."""
        names = (self.default, *self.points)
        return next((name for name in names if self.points[name].timesteps), self.default)


@dataclass(frozen=True)
class BuiltFor:
    """The machine that a bundle runs on, and what it was built with."""

    device: str  # cpu or cuda
    machine: str  # processor architecture
    packages: dict[str, str]  # name -> version
    targets: tuple[str, ...] = ()  # what native code was compiled for: instruction sets, GPUs


@dataclass(frozen=True)
class BatchTimes:
    """The seconds that batches took when the bundle was built, at its default operating point."""

    processor: str
    threads: int  # that a call computed with
    seconds: tuple[tuple[int, float], ...]  # images of a batch, and the least seconds


@dataclass(frozen=True)
class Manifest:
    """The manifest, typed. `files` maps each relative path to its size and SHA-256."""

    method: str
    labels: tuple[str, ...]
    preprocess: dict[str, Any]
    backend: str
    precision: Precision
    sampling: Sampling
    buckets: tuple[int, ...]  # batch sizes it was built for; empty: any
    golden_tolerance: float  # of the logits, relative to the largest golden one
    built_for: BuiltFor
    settings: dict[str, Any]  # what the export was asked for, so that it can be repeated
    checkpoint_sha256: str
    created: str
    files: dict[str, dict[str, Any]]
    loop: str = "graph"  # what runs the reverse loop: "graph", or "native"
    batch_times: BatchTimes | None = None  # None: it was not measured

    @property
    def preprocessing(self) -> Preprocess:
        return Preprocess.from_dict(self.preprocess)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose bytes have been checked, but for those of `LAZY` where they were left out."""

    path: Path
    manifest: Manifest
    digest: str  # of the manifest, and so of every byte of the bundle

    def has(self, folder: str) -> bool:
        """Tell whether it holds `TEXT` or `SOURCE`."""
        return any(name.startswith(f"{folder}/") for name in self.manifest.files)

    def check(self, folder: str) -> Path:
        """Check every file of `TEXT` or `SOURCE`, and return the folder.

        Raises:
            BundleCorrupt: a file is not byte for byte what was written.
            BundleError: the system does not let it be read.
        """
        with _readable(self.path):
            for name, expected in self.manifest.files.items():
                if name.startswith(f"{folder}/"):
                    _check_file(self.path, name, expected)
        return self.path / folder

    def check_point(self, name: str) -> None:
        """Refuse an operating point that the bundle does not have.

        Raises:
            InvalidInput: it has no such point; says how to make one.
        """
        points = self.manifest.sampling.points
        if name not in points:
            zero = f" or --steps 0, which add {ZERO!r}" if ZERO not in points else ""
            raise InvalidInput(
                f"operating_point: got {brief(name)}; {self.path} has {', '.join(points)}. More "
                f"are made by exporting it again with marnet-export --steps auto{zero}"
            )

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        Raises:
            BundleFormatError: it lists no such file.
        """
        if name not in self.manifest.files:
            raise BundleFormatError(f"{self.path}: the manifest lists no {name}; export it again")
        return self.path / name

    def golden_images(self) -> list[Path]:
        """The paths of the golden images, in the order of their answers."""
        names = (name for name in self.manifest.files if name.startswith(f"{GOLDEN_IMAGES}/"))
        return [self.path / name for name in sorted(names, key=lambda name: int(Path(name).stem))]

    def check_in_place(self) -> None:
        """Refuse a folder that holds another bundle by now, of whose files some may have been read.

        Raises:
            BundleCorrupt: it does.
        """
        if _digest_in(self.path) != self.digest:
            raise BundleCorrupt(
                f"{self.path} was replaced by another bundle while it was being opened; open it "
                "again"
            )

    def check_listed(self, folder: Path) -> None:
        """Refuse files inside a folder of the bundle that the manifest does not list.

        Raises:
            BundleFormatError: there is one.
        """
        for file in folder.rglob("*"):
            if not file.is_dir():
                self.file(file.relative_to(self.path).as_posix())


def is_bundle(path: Path) -> bool:
    """Tell whether a directory looks like a bundle."""
    return (path / MANIFEST).is_file()


def newest_bundle(folder: Path = Path("bundles")) -> Path:
    """The most recently written bundle under `folder`.

    Raises:
        NotFound: there is none; the message holds the command that makes one.
    """
    if (found := newest(folder, is_bundle)) is None:
        raise NotFound(
            f"no bundle under {os.path.join('.', folder)}; make one from the newest checkpoint "
            "with: marnet-export --precision fp16, or name one with --model"
        )
    return found


def bundle_with(digest: str, folder: Path = Path("bundles")) -> Path:
    """The bundle under `folder` whose manifest has this digest.

    Raises:
        NotFound: there is none; says how to name one.
    """
    if (found := newest(folder, lambda path: _digest_in(path) == digest)) is None:
        raise NotFound(
            f"no bundle under {os.path.join('.', folder)} has the digest {brief(digest)}; name its "
            "folder with --model"
        )
    return found


def _digest_in(path: Path) -> str | None:
    """The digest that a folder's manifest states; None where it is no bundle."""
    try:
        return json.loads((path / MANIFEST).read_bytes())["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def seal_bundle(path: Path, fields: Mapping[str, Any]) -> Manifest:
    """Write manifest.json over all files that are in `path`, and return it.

    Args:
        fields: all fields of `Manifest` but `files`.
    """
    names = sorted(
        entry.relative_to(path).as_posix()
        for entry in path.rglob("*")
        if entry.is_file() and entry != path / MANIFEST
    )
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": sha256_file(path / name)}
        for name in names
    }
    manifest = Manifest(**fields, files=files)
    content = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    content["digest"] = _digest(content)
    (path / MANIFEST).write_bytes(_canonical(content))
    return manifest


def reseal_bundle(path: Path, **changes: Any) -> Manifest:
    """Write the manifest of a bundle anew, over the files that it holds now.

    Args:
        changes: fields of `Manifest` that are no longer what they were.
    """
    manifest, _ = _parse(path / MANIFEST)
    kept = {f.name: getattr(manifest, f.name) for f in fields(Manifest) if f.name != "files"}
    return seal_bundle(path, kept | changes)


def read_bundle(path: str | Path, *, lazily: bool = False) -> Bundle:
    """Read a bundle's manifest and check every file against it.

    Args:
        lazily: of the files that classifying does not need, check only that they are there with
            their size; see `Bundle.check`.

    Raises:
        InvalidInput: `path` is no path.
        NotFound: no bundle there.
        BundleFormatError: a newer format, or a manifest that lacks something.
        BundleCorrupt: the manifest or a file is not byte for byte what was written.
        BundleError: the system does not let it be read.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInput(
            f"got {brief(path)} ({type(path).__name__}) as a bundle; expected the path "
            "of its folder"
        )
    path = Path(path)
    with _readable(path):
        if not is_bundle(path):
            what = "has no manifest.json" if path.is_dir() else "is not a directory"
            raise NotFound(f"{path} {what}, so it is not a bundle; make one with: marnet-export")
        manifest, digest = _parse(path / MANIFEST)
        for name, expected in manifest.files.items():
            _check_file(path, name, expected, content=not (lazily and name.startswith(LAZY)))
    return Bundle(path, manifest, digest)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file that the system refuses to read inside the block."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{error.filename or path} cannot be read: {error.strerror or error}; check its "
            "permissions and the disk, or copy the bundle again"
        ) from error


def _parse(path: Path) -> tuple[Manifest, str]:
    """Read a manifest and its digest."""
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        version, digest = content["format_version"], content["digest"]
        # Also the layout of the text is checked, so that no byte of it can change unnoticed.
        unchanged = raw == _canonical(content) and digest == _digest(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleCorrupt(
            f"{path} is damaged ({error}); copy or export the bundle again"
        ) from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleFormatError(
            f"{path}: format {version} is newer than this version of marnet reads "
            f"({FORMAT_VERSION}); upgrade with: pip install --upgrade marnet"
        )
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise BundleFormatError(
            f"{path}: format {version} is older than this version of marnet reads "
            f"({FORMAT_VERSION}); export the bundle again"
        )
    if not unchanged:
        raise BundleCorrupt(
            f"{path} was changed after it was written; copy or export the bundle again"
        )
    return _typed(path, content), digest


def _typed(path: Path, content: dict[str, Any]) -> Manifest:
    fields = {k: v for k, v in content.items() if k not in ("format_version", "digest")}
    try:
        fields["labels"] = tuple(fields["labels"])
        fields["buckets"] = tuple(fields["buckets"])
        receipt = {k: Share(**share) for k, share in fields["precision"]["receipt"].items()}
        fields["precision"] = Precision(**{**fields["precision"], "receipt": receipt})
        points = {
            name: OperatingPoint(**{**point, "timesteps": tuple(point["timesteps"])})
            for name, point in fields["sampling"]["points"].items()
        }
        fields["sampling"] = Sampling(**{**fields["sampling"], "points": points})
        _check_sampling(fields["sampling"], fields["files"])
        built_for = fields["built_for"]
        targets = tuple(built_for["targets"])
        fields["built_for"] = BuiltFor(**{**built_for, "targets": targets})
        fields["files"] = {
            name: {"bytes": entry["bytes"], "sha256": entry["sha256"]}
            for name, entry in fields["files"].items()
        }
        _check_loop(fields.get("loop", "graph"), fields["files"])
        if (times := fields.get("batch_times")) is not None:
            seconds = tuple(_size_and_seconds(*pair) for pair in times["seconds"])
            fields["batch_times"] = BatchTimes(**{**times, "seconds": seconds})
        return Manifest(**fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleFormatError(f"{path} lacks what inference needs: {error}") from error


def _check_sampling(sampling: Sampling, files: Mapping[str, Any]) -> None:
    sampling.point  # noqa: B018 - the default must be one of them
    if sampling.noise not in ("shared", "image"):
        raise ValueError(f"noise {sampling.noise!r} is neither shared nor image")
    for name, point in sampling.points.items():
        if not all(1 <= t <= sampling.train_steps for t in point.timesteps):
            raise ValueError(f"operating point {name!r} visits steps outside 1 .. T")
        if bool(point.timesteps) == (point.sampler == NO_LOOP):
            raise ValueError(f"operating point {name!r} has {len(point.timesteps)} steps")
        if point.sampler == NO_LOOP and ALIGNMENT_HEAD not in files:
            raise ValueError(f"operating point {name!r} needs {ALIGNMENT_HEAD}; export it again")


def _check_loop(loop: str, files: Mapping[str, Any]) -> None:
    if loop not in ("graph", "native"):
        raise ValueError(f"loop {loop!r} is neither graph nor native; upgrade marnet")
    if (loop == "native") != (NATIVE_LAYERS in files):
        raise ValueError(f"loop {loop!r} does not go with {NATIVE_LAYERS}; export it again")


def _size_and_seconds(size: int, seconds: float) -> tuple[int, float]:
    if type(size) is not int or size < 1 or not 0 < seconds < math.inf:
        raise ValueError(f"a batch of {size} images took {seconds} seconds")
    return size, seconds


def _check_file(
    root: Path, name: str, expected: Mapping[str, Any], *, content: bool = True
) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise BundleCorrupt(f"{root}: the manifest lists {name!r}, which leaves the bundle")
    path = root / name
    if not path.is_file():
        raise BundleCorrupt(f"{path} is missing; copy or export the bundle again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise BundleCorrupt(
            f"{path} has {size} bytes, the manifest says {expected['bytes']}; "
            "copy or export the bundle again"
        )
    if content and sha256_file(path) != expected["sha256"]:
        raise BundleCorrupt(
            f"{path} does not have the SHA-256 of the manifest; copy or export the bundle again"
        )


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("ascii")


def _digest(content: Mapping[str, Any]) -> str:
    body = {k: v for k, v in content.items() if k != "digest"}
    return hashlib.sha256(_canonical(body)).hexdigest()
