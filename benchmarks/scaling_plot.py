"""The plot of scaling.py: time over size, a panel for each size that grows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"eager": "#222222", "denoise": "#1f6fb2", "pipeline": "#1f6fb2", "prologue": "#d9622b"}


def plot(result: Mapping[str, Any], target: Path) -> None:
    """Draw the series of a result into a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = result["series"]
    figure, panels = plt.subplots(
        1, len(series), figsize=(4 * len(series), 3.8), squeeze=False, layout="constrained"
    )
    for panel, (growing, values) in zip(panels[0], series.items(), strict=True):
        for name, seconds in values["seconds"].items():
            exponent = values["fits"][name]["exponent"]
            panel.plot(
                values["sizes"],
                [1e3 * s for s in seconds],
                color=COLOURS[name],
                marker="o",
                markersize=3,
                label=f"{name}, exponent {exponent:.2f}",
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(values["sizes"], [str(size) for size in values["sizes"]])
        panel.minorticks_off()
        panel.set_xlabel(growing)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        panel.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("milliseconds")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    plt.close(figure)
