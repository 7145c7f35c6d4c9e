"""This module tells what a data set holds and what is wrong with it: `marnet-train data check`.

Every image is read and decoded once. Of each only a digest, a thumbnail of 192 bytes, its size and
its format are kept, so memory grows with the number of images and not with their pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from marnet_sdk.console import track
from marnet_sdk.cpus import cpus
from marnet_sdk.errors import DataError, ImageError
from marnet_sdk.inputs.images import decode
from marnet_train.data.dataset import scan_data_set
from marnet_train.data.examples import (
    MAX_PROBLEMS,
    Example,
    Problems,
    image_suffix,
    natural_key,
    read_image,
)
from marnet_train.data.near import near_pairs, thumbnail
from marnet_train.data.pixels import image_name

MAX_CLASSES = 40  # shown one by one; of more, the largest and the smallest


@dataclass(frozen=True)
class Spread:
    """This holds the smallest, middle and largest of some numbers."""

    least: float
    median: float
    most: float


@dataclass
class Report:
    """This says in numbers what is in a data set."""

    layout: str
    classes: dict[str, dict[str, int]] = field(default_factory=dict)  # class -> split -> images
    images: dict[str, int] = field(default_factory=dict)  # split -> images
    words: dict[str, Spread] = field(default_factory=dict)  # split -> of a text
    texts: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> see `_count_texts`
    width: Spread | None = None  # pixels, of all images that can be decoded
    height: Spread | None = None
    formats: dict[str, int] = field(default_factory=dict)  # "PNG" -> images
    leaks: list[str] = field(default_factory=list)  # one image in several splits
    repeats: list[str] = field(default_factory=list)  # one image several times in a split
    leak_count: int = 0
    repeat_count: int = 0
    near: list[str] = field(default_factory=list)  # nearly the same image in two splits
    near_count: int = 0
    problems: Problems = field(default_factory=Problems)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return asdict(self)

    def raise_if_wrong(self, root: Path) -> None:
        """Raise a DataError if something could not be read or an image is in several splits."""
        faults = []
        if self.problems.count:
            faults.append(f"{self.problems.count} problem{'s' * (self.problems.count > 1)}")
        if self.leak_count:
            faults.append(f"{self.leak_count} image(s) in more than one split")
        if faults:
            raise DataError(
                f"{root}: {' and '.join(faults)}, listed above; correct them, or results on val "
                "and test will not be what they seem"
            )


@dataclass(frozen=True)
class _Seen:
    """This is one decoded image."""

    digest: bytes  # of its pixels and size, so that a copy in another file format is found, too
    thumbnail: bytes
    width: int
    height: int
    kind: str  # "PNG"


def check_data_set(root: Path) -> Report:
    """Read a data set and look at every image.

    Raises:
        NotFound: there is no folder `root`.
        DataError: it has no known layout, or several. What is wrong inside is in the report.
        MissingExtra: the layout needs a package that is not installed.
    """
    scan = scan_data_set(root)
    report = Report(scan.layout, problems=scan.problems)
    _count_classes(scan.splits, report)
    for split, examples in scan.splits.items():
        _count_texts(split, examples, report)
    _look_at_images(scan.splits, report)
    return report


def _count_classes(splits: Mapping[str, Sequence[Example]], report: Report) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split, examples in splits.items():
        if not examples:  # all of it was refused, so there is nothing to count
            continue
        report.images[split] = len(examples)
        for example in examples:
            counts[example.label][split] += 1
    for label in sorted(counts, key=natural_key):
        report.classes[label] = {split: counts[label][split] for split in report.images}


def _count_texts(split: str, examples: Sequence[Example], report: Report) -> None:
    """Count the `distinct` texts, and those of them that stand under `several_classes`."""
    texts = [(example.text, example.label) for example in examples if example.text is not None]
    if not texts:
        return
    report.words[split] = _spread([len(text.split()) for text, _ in texts])
    labels: dict[str, set[str]] = defaultdict(set)
    for text, label in texts:
        labels[text].add(label)
    report.texts[split] = {
        "distinct": len(labels),
        "several_classes": sum(len(found) > 1 for found in labels.values()),
    }


def _spread(values: Sequence[float]) -> Spread:
    return Spread(min(values), median(values), max(values))


def _look_at_images(splits: Mapping[str, Sequence[Example]], report: Report) -> None:
    everything = [(split, example) for split, examples in splits.items() for example in examples]
    seen: list[_Seen] = []
    thumbnails: dict[bytes, bytes] = {}  # by pixels
    places: dict[bytes, list[tuple[str, Example]]] = defaultdict(list)  # by pixels
    with ThreadPoolExecutor(cpus().threads) as pool:
        looks = pool.map(_look, [example for _, example in everything])
        for place, look in zip(
            everything, track(looks, "check images", len(everything)), strict=True
        ):
            if isinstance(look, str):
                report.problems.add(look)
            else:
                seen.append(look)
                places[look.digest].append(place)
                thumbnails[look.digest] = look.thumbnail
    if seen:
        report.width = _spread([look.width for look in seen])
        report.height = _spread([look.height for look in seen])
        report.formats = dict(Counter(look.kind for look in seen).most_common())
    _find_copies(places, report)
    _find_near_copies(places, thumbnails, report)


def _look(example: Example) -> _Seen | str:
    """Return what one image is, or say what is wrong with it."""
    try:
        content = read_image(example)
        image = decode(content, name=image_name(example))
    except (ImageError, DataError) as error:
        return str(error)
    digest = hashlib.sha256(b"%d %d " % image.size + image.tobytes()).digest()
    return _Seen(digest, thumbnail(image), *image.size, image_suffix(content)[1:].upper())


def _find_copies(places: Mapping[bytes, list[tuple[str, Example]]], report: Report) -> None:
    for found in places.values():
        if len(found) == 1:
            continue
        across = len({split for split, _ in found}) > 1
        labels = sorted({example.label for _, example in found}, key=natural_key)
        firsts = list({split: place for split, *place in reversed(found)}.values())[::-1]
        named = [example for (example,) in firsts]  # of every split one, then the others
        named += [example for _, example in found if example not in named]
        listed = ", ".join(example.origin for example in named[:4])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        classes = f" (classes {', '.join(labels[:4])})" if len(labels) > 1 else ""
        into = report.leaks if across else report.repeats
        if len(into) < MAX_PROBLEMS:
            into.append(f"{listed}{more}{classes}")
        if across:
            report.leak_count += 1
        else:
            report.repeat_count += 1


def _find_near_copies(
    places: Mapping[bytes, list[tuple[str, Example]]],
    thumbnails: Mapping[bytes, bytes],
    report: Report,
) -> None:
    """Find images of different splits that are nearly, but not exactly, the same."""
    splits: dict[str, dict[bytes, Example]] = defaultdict(dict)  # split -> pixels -> one place
    for digest, found in places.items():
        for split, example in found:
            splits[split].setdefault(digest, example)
    for first, second in combinations(splits.values(), 2):
        digests = list(first), list(second)
        for i, j in near_pairs(*([thumbnails[d] for d in side] for side in digests)):
            if digests[0][i] == digests[1][j]:
                continue
            pair = first[digests[0][i]], second[digests[1][j]]
            report.near_count += 1
            if len(report.near) < MAX_PROBLEMS:
                report.near.append(", ".join(f"{e.origin} ({e.label})" for e in pair))


def class_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield rows (class, images of each split); of many classes the largest and the smallest."""
    items = list(report.classes.items())
    if len(items) > MAX_CLASSES:
        items.sort(key=lambda item: -sum(item[1].values()))
        shown = MAX_CLASSES // 2
        hidden = len(items) - 2 * shown
        yield from (_class_row(*item) for item in items[:shown])
        yield (f"... {hidden} classes between", *("" for _ in report.images))
        items = items[-shown:]
    yield from (_class_row(*item) for item in items)
    yield ("all", *(f"{count:,}" for count in report.images.values()))


def _class_row(label: str, counts: Mapping[str, int]) -> tuple[str, ...]:
    return (label, *(f"{count:,}" for count in counts.values()))


def summary_rows(report: Report) -> Iterator[tuple[str, str]]:
    """Yield rows (what, figures) about texts and images."""
    for split, words in report.words.items():
        texts = report.texts[split]
        yield (
            f"{split}: words of a text",
            f"{words.least:g} to {words.most:g}, median {words.median:g}; {texts['distinct']:,} "
            f"different texts, {texts['several_classes']:,} of them in several classes",
        )
    for name, spread in (("width", report.width), ("height", report.height)):
        if spread is not None:
            yield (
                f"{name} of an image",
                f"{spread.least:g} to {spread.most:g} pixels, median {spread.median:g}",
            )
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in report.formats.items())
    if kinds:
        yield "formats", kinds
