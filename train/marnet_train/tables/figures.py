"""The command `figures`: maps of the vectors by class, and confidences, from what `ablate` kept.

    DIR/figure-3.png    x_v and x_CDR of the first seed's test images by t-SNE, after MARNet's
                        figure 3
    DIR/figure-4.png    the probability of the true class by model, after its figure 4
    DIR/figures.json .md .csv    the same as numbers over the seeds, with paired tests

A map shows one seed and no distances, so nothing is concluded from it. What it is drawn for, how
well the classes are apart, is the silhouette of every space.
Axes: R seeds, N images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples

from marnet_sdk.errors import NotFound
from marnet_train.measures import paired_difference, student_interval
from marnet_train.tables.charts import draw_confidences, draw_maps
from marnet_train.tables.spaces import MODELS, SPACES
from marnet_train.tables.written import Table, as_csv, as_json, chance, shown, write_texts

Vectors = Mapping[str, NDArray[Any]]
PERPLEXITY = 30.0  # of t-SNE, its usual value; fewer for fewer than 91 images


def figures(folder: Path) -> dict[str, Any]:
    """Draw both figures of a folder that `ablate` wrote, and write their numbers.

    Returns:
        The content of figures.json.

    Raises:
        NotFound: no seed of it is finished.
    """
    done = sorted(folder.glob("seed-*/text.json"))
    if not done:
        raise NotFound(
            f"{folder} has no seed-*/text.json, which marnet-train ablate writes; run it first"
        )
    method = json.loads(done[0].read_text("utf-8"))["settings"]["method"]
    seeds = [load_file(path.with_suffix(".safetensors")) for path in done]
    first = seeds[0]
    maps = {space: tsne(first[space]) for space in ("x_v", "x_CDR")}
    draw_maps(maps, first["labels"], folder / "figure-3.png")
    sure = {shown(m, method): np.stack([s[f"p of {m}"] for s in seeds]) for m in MODELS}
    draw_confidences({m: p.ravel() for m, p in sure.items()}, MODELS[0], folder / "figure-4.png")
    apart = {space: np.stack([silhouettes(s, space) for s in seeds]) for space in SPACES}
    found = {
        "seeds": len(seeds),
        "silhouette": _over_seeds({space: (1 + s) / 2 for space, s in apart.items()}, 2, -1),
        "confidence": _over_seeds(sure, 1, 0),
    }
    _write(folder, found)
    return found


def tsne(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """Map vectors [N, D] to the plane [N, 2]: van der Maaten and Hinton, JMLR 9, 2008.

    The same vectors give the same map on the same machine.
    """
    perplexity = min(PERPLEXITY, (len(x) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(x)


def silhouettes(vectors: Vectors, space: str) -> NDArray[np.float64]:
    """Return how much nearer each image is to its own class than to the next one, -1 to 1, [N].

    Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of cluster
    analysis", 1987.
    """
    return np.asarray(silhouette_samples(vectors[space], vectors["labels"]))


def _over_seeds(
    values: Mapping[str, NDArray[np.floating]], scale: float, shift: float
) -> dict[str, dict[str, Any]]:
    """Join values of 0 to 1, [R, N] by name: means, and differences to the first name.

    Args:
        scale, shift: what makes of such a value the one that is reported.
    """
    out, reference = {}, next(iter(values.values()))
    for name, of_name in values.items():
        means = (scale * of_name.mean(axis=1) + shift).tolist()
        seen = paired_difference(np.clip(of_name, 0, 1), np.clip(reference, 0, 1))
        out[name] = {
            "mean": float(np.mean(means)),
            "over_seeds": student_interval(means),
            "minus_first": scale * seen.mean,
            "interval": [scale * bound for bound in seen.interval],
            "interval_over_seeds": [scale * bound for bound in seen.over_runs],
            "p": seen.p,
        }
    return out


_TITLES = {
    "silhouette": "Figure 3 as numbers: the mean silhouette of the classes",
    "confidence": "Figure 4 as numbers: the mean probability of the true class",
}
_COLUMNS = (
    *("figure", "row", "mean", "mean_low", "mean_high", "minus_first", "low", "high"),
    *("low_over_seeds", "high_over_seeds", "p"),
)


def figure_tables(found: Mapping[str, Any]) -> list[Table]:
    """Make the tables of what `figures` returned."""
    columns = ("", "mean", "95 % over seeds", "minus the first", "95 %", "over seeds", "p")
    return [
        Table(title, columns, [_row(name, r) for name, r in found[key].items()])
        for key, title in _TITLES.items()
    ]


def _write(folder: Path, found: Mapping[str, Any]) -> None:
    """Write the numbers as JSON, Markdown and CSV."""
    lines = [
        (key, name, r["mean"], *r["over_seeds"], r["minus_first"], *r["interval"],
         *r["interval_over_seeds"], r["p"])
        for key in _TITLES
        for name, r in found[key].items()
    ]  # fmt: skip
    texts = {
        "figures.json": as_json(found),
        "figures.md": "\n\n".join(table.markdown() for table in figure_tables(found)) + "\n",
        "figures.csv": as_csv(_COLUMNS, lines),
    }
    write_texts(folder, texts)


def _row(name: str, r: Mapping[str, Any]) -> list[str]:
    def bounds(key: str) -> str:
        low, high = r[key]
        return "" if np.isnan(low) else f"{low:.3f} to {high:.3f}"

    difference = f"{r['minus_first']:+.3f}", bounds("interval"), bounds("interval_over_seeds")
    return [name, f"{r['mean']:.3f}", bounds("over_seeds"), *difference, chance(r["p"])]
