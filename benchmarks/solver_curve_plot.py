"""The plot of solver_curve.py, from its JSON file.

    python benchmarks/solver_curve_plot.py solver_curve.json solver_curve.png

Rows of panels are measures and columns are families of methods; Euler and AB2 without a cache are in every panel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator, ScalarFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN = {"Euler": "#222222", "AB2": "#1f6fb2"}
NUDGES = {"Euler": (5, 5), "AB2": (5, -5)}  # of labels, in points
SHADES = ("#f2a65a", "#d9622b", "#8c2f0d")
MEASURES = (
    ("right", "prompts drawn right"),
    ("mean_attribute", "attributes right, mean"),
    ("latent_error", "relative error of latents"),
)
TICKS = (4, 6, 8, 12, 18, 24, 34, 49)


def plot(source: Path, target: Path) -> None:
    """Draw the curves that the JSON file `source` holds, into `target`."""
    about = json.loads(source.read_text(encoding="utf-8"))["about"]
    rows = about["curves"]
    families = list(dict.fromkeys(row["family"] for row in rows if row["family"] not in PLAIN)) or [""]
    figure, panels = plt.subplots(
        len(MEASURES),
        len(families),
        figsize=(4.2 * len(families) + 0.6, 9.6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for across, family in enumerate(families):
        for down, (measure, words) in enumerate(MEASURES):
            panel = panels[down][across]
            draw_panel(panel, rows, family, measure)
            if across == 0:
                panel.set_ylabel(words)
        panels[0][across].set_title(family, fontsize=11)
        panels[-1][across].set_xlabel("network evaluations")
    error = (0.25 / about["prompts"]) ** 0.5
    figure.suptitle(
        f"{Path(about['model']).name}, {about['prompts']} held-out prompts "
        f"(standard error of a share: at most {error:.3f})",
        fontsize=11,
    )
    figure.savefig(target, dpi=150)
    plt.close(figure)


def draw_panel(panel: Axes, rows: list[dict[str, Any]], family: str, measure: str) -> None:
    """One measure of one family, with its cache intervals in shades, over the curves without a cache."""
    panel.set_xscale("log")
    if measure == "latent_error":
        panel.set_yscale("log")
    panel.set_xticks(TICKS)
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    caches = sorted({row["cache"] for row in rows if row["family"] == family})
    colours = dict(zip(caches, SHADES, strict=False))
    lines = [(name, name, 1, colour) for name, colour in PLAIN.items()]
    lines += [(f"T = {cache}", family, cache, colour) for cache, colour in colours.items()]
    for label, group, cache, colour in lines:
        points = sorted(
            (row["evaluations"], row[measure])
            for row in rows
            if row["family"] == group and row["cache"] == cache
        )
        if not points:
            continue
        across, up = zip(*points, strict=True)
        panel.plot(across, up, color=colour, linewidth=1.5, marker="o", markersize=3)
        panel.annotate(
            label,
            points[-1],
            # Curves without a cache end at the same number of evaluations, the others at different ones.
            xytext=NUDGES.get(label, (0, 8)),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            ha="left" if label in NUDGES else "center",
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            annotation_clip=False,
        )


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
