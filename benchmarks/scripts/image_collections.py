"""This script tells what becomes of every file in folders of test images: answered, refused, or a
fault of ours.

    python benchmarks/scripts/image_collections.py DIR... [--reader opencv] [--output FILE.json]

Every file, whatever its name, is decoded and resized as `Classifier.predict` does it, in a child
process with limits of time and memory. A refusal is an `ImageError`; any other error, a hang and a
crash are faults, and end the program with code 1. What is answered is compared with another reader
(OpenCV is not one of marnet's dependencies), which also turns an image and puts white behind alpha.
The pictures differ if more than 1 % of the pixels are off by more than 8 grey levels.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageOps

from marnet_sdk.console import print_table, say
from marnet_sdk.errors import ImageError
from marnet_sdk.inputs.images import decode
from marnet_sdk.inputs.preprocess import Preprocess

OUTCOMES = ("answered", "refused", "untyped", "hang", "crash")
MEMORY = 6 * 2**30  # bytes of address space
resized = Preprocess(size=(224, 224))


@dataclass(frozen=True)
class Found:
    """This is what became of one file."""

    path: str
    outcome: str
    reason: str = ""  # of a refusal or an error
    other: str = ""  # what the other reader says of an answer: "same", or how it differs


def by_pillow(path: str) -> np.ndarray:
    """Pillow by itself, in 8 bits."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            page = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(page, image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))


def by_opencv(path: str) -> np.ndarray:
    """OpenCV, whose decoders of BMP and GIF are its own."""
    import cv2  # pyright: ignore[reportMissingImports]

    data = np.fromfile(path, np.uint8)
    pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if pixels.ndim < 3 or pixels.shape[2] != 4:
        return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
    pixels = pixels / (257 if pixels.dtype == np.uint16 else 1)
    alpha = pixels[..., 3:] / 255
    return pixels[..., 2::-1] * alpha + 255 * (1 - alpha)


READERS = {"pillow": by_pillow, "opencv": by_opencv}


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--reader", type=click.Choice([*READERS]), default="pillow", show_default=True)
@click.option("--seconds", default=60, show_default=True, help="Time for a file.")
@click.option("--output", type=click.Path(path_type=Path), help="Write what became of each file.")
@click.option("--child", is_flag=True, hidden=True)
def main(
    folders: Sequence[Path], reader: str, seconds: int, output: Path | None, child: bool
) -> None:
    """Count what becomes of the files in each folder, and list what is worth a look."""
    if child:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for path in json.load(sys.stdin):
            signal.alarm(seconds)
            print(json.dumps(asdict(tried(path, READERS[reader]))), flush=True)
        return
    found = {}
    for folder in folders:
        files = sorted(str(path) for path in folder.rglob("*") if path.is_file())
        found[str(folder)] = list(outcomes(files, reader, seconds))
    if output is not None:
        record = {name: [asdict(f) for f in files] for name, files in found.items()}
        output.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print_found(found)
    if any(f.outcome not in ("answered", "refused") for files in found.values() for f in files):
        raise SystemExit(1)


def outcomes(files: Sequence[str], reader: str, seconds: int) -> Iterator[Found]:
    """Try the files in a child, and in another from the next one on where it dies."""
    command = [sys.executable, __file__, "--child", "--reader", reader, "--seconds", str(seconds)]
    while files:
        done = subprocess.run(
            command, input=json.dumps(files), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, check=False,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        yield from (Found(**json.loads(line)) for line in lines)
        files = files[len(lines) :]
        if files:
            hang = done.returncode == -signal.SIGALRM
            yield Found(files[0], "hang" if hang else "crash", f"exit code {done.returncode}")
            files = files[1:]


def tried(path: str, reader: Callable[[str], np.ndarray]) -> Found:
    """Say what becomes of a file, and what the other reader makes of it."""
    try:
        image = decode(path)
        resized(image)
    except ImageError as error:
        return Found(path, "refused", error.problem)
    except Exception as error:
        return Found(path, "untyped", repr(error))
    try:
        with warnings.catch_warnings(action="ignore"):
            return Found(path, "answered", other=difference(np.asarray(image), reader(path)))
    except Exception as error:  # whatever the other reader raises, it does not read the file
        return Found(path, "answered", other=f"not read: {type(error).__name__}")


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Say how another picture of the same file differs."""
    if ours.shape != theirs.shape:
        return f"{ours.shape[1]} x {ours.shape[0]}, not {theirs.shape[1]} x {theirs.shape[0]}"
    off = np.abs(ours - theirs.astype(float)).max(axis=2) > 8
    return "same" if off.mean() <= 0.01 else f"{off.mean():.0%} of the pixels"


def print_found(found: dict[str, list[Found]]) -> None:
    """A table of the folders, the kinds of refusals, and each file that is worth a look."""
    rows = []
    for name, files in found.items():
        counts = Counter(f.outcome for f in files)
        same = sum(f.other == "same" for f in files)
        unread = sum(f.other.startswith("not read") for f in files)
        numbers = [len(files), *(counts[o] for o in OUTCOMES), same, unread]
        rows.append([name, *map(str, numbers), str(counts["answered"] - same - unread)])
    columns = ["folder", "files", *OUTCOMES, "same", "not read by the other", "differ"]
    print_table("", columns, rows)
    every = [f for files in found.values() for f in files]
    kinds = Counter(kind(f.reason) for f in every if f.outcome == "refused")
    print_table("refused", ["reason", "files"], [(k, str(n)) for k, n in kinds.most_common()])
    for f in every:
        if f.outcome not in ("answered", "refused"):
            say(f"{f.outcome}: {f.path}: {f.reason}")
        elif f.other not in ("", "same") and not f.other.startswith("not read"):
            say(f"differs: {f.path}: {f.other}")


def kind(reason: str) -> str:
    """The kind of a message: what is before the advice, without numbers and names."""
    return re.sub(r"b'.*'|b\".*\"|\d+", "...", reason).partition(";")[0][:100]


if __name__ == "__main__":
    main()
