"""The page's plots: SVG that is part of the page, so that its colours are the page's and its text is text.

Everything is drawn in colours that stand for the page's variables and are replaced by them. The same data give the
same bytes: no dates, no random identifiers, nobody's matplotlibrc.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flashu_compile.recipe.plan import Step, StepPlan
from flashu_compile.recipe.token_plan import CodeStep, TokenPlan
from flashu_compile.tasks import DENOISE, DRAW, REUSE

INK, MUTED, LINE, FIRST, SECOND, THIRD = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flashu_compile",
    "svg.id": None,
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_WIDTH = 8.6  # inches of 72 points: the width of the page's column


@contextmanager
def _figure(height: float, label: str) -> Iterator[tuple[Figure, Callable[[], Markup]]]:
    """Open a figure and yield it with a function that renders it as SVG, to be called when all is drawn.

    `label` is the text alternative for screen readers.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, lambda: _svg(figure, label)


def _svg(figure: Figure, label: str) -> Markup:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<g id=\"[^\"]*\">", "<g>", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", text)
    text = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    label = str(Markup.escape(label))
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def timeline(plan: StepPlan | TokenPlan) -> Markup:
    """Plot which engine each evaluation or code runs, a lane for every engine, over the guidance scale."""
    what = "code" if isinstance(plan, TokenPlan) else "evaluation"
    steps: tuple[Step | CodeStep, ...] = plan.steps
    engines = list(dict.fromkeys(step.engine for step in steps))
    label = f"Engines and guidance scale of {len(plan.steps)} {what}s"
    with _figure(1.5 + 0.3 * len(engines), label) as (figure, done):
        heights = [0.3 * len(engines) + 0.1, 0.8]
        lanes, scales = figure.subplots(2, 1, sharex=True, height_ratios=heights)
        number = 1
        # Codes are hundreds or thousands: one block for each stretch of those that are drawn alike.
        stretches = itertools.groupby(steps, None if isinstance(plan, TokenPlan) else id)
        for step, stretch in ((step, len(list(same))) for _, (step, *same) in stretches):
            lane, width = engines.index(step.engine), stretch + 1
            colour = SECOND if step.engine == REUSE else THIRD if step.engine in (DENOISE, DRAW) else FIRST
            lanes.add_patch(
                Rectangle((number - 0.46, lane - 0.36), width - 0.08, 0.72, facecolor=colour, linewidth=0)
            )
            if isinstance(step, Step) and step.store:
                lanes.plot(number, lane, ".", color="white", markersize=4)
            number += width
        lanes.set(ylim=(len(engines) - 0.4, -0.6), yticks=range(len(engines)), yticklabels=engines)
        lanes.tick_params(axis="y", labelcolor=INK, length=0)
        lanes.tick_params(axis="x", length=0)
        lanes.spines[["left", "bottom"]].set_visible(False)
        numbers = np.arange(1, len(plan.steps) + 1)
        values = [step.guidance_scale for step in plan.steps]
        edges = [numbers[0] - 0.5, *(numbers + 0.5)]
        scales.stairs(values, edges, color=INK, linewidth=1.4, baseline=None)
        scales.set(xlabel=what, ylabel="guidance", xlim=(0.4, len(plan.steps) + 0.6))
        low, high = min(0.0, *values), max(values)
        scales.set_ylim(low, high * 1.15 or 1)
        return done()


def importance_map(
    stack: str, phases: Sequence[Mapping[str, Any]], skipped: Sequence[Sequence[int]]
) -> Markup:
    """Plot layer importance, 1 − cosine, by phase of the trajectory: darker is more; a cross marks skipped layers."""
    table = np.array([phase["importance"] for phase in phases])
    layers = table.shape[1]
    shades = _shades(table)
    with _figure(0.9 + 0.32 * len(phases), f"Importance of every layer of {stack} by phase") as (
        figure,
        done,
    ):
        axes = figure.subplots()
        for row, column in np.ndindex(*table.shape):
            place = (column - 0.47, row - 0.45)
            axes.add_patch(
                Rectangle(place, 0.94, 0.9, facecolor=FIRST, alpha=float(shades[row, column]), linewidth=0)
            )
            if row < len(skipped) and column in skipped[row]:
                axes.plot(column, row, "x", color=INK, markersize=7, markeredgewidth=1.6)
        names = [f"from {phase['start']:.0%}" for phase in phases]
        axes.set(xlim=(-0.6, layers - 0.4), ylim=(len(phases) - 0.4, -0.6), xlabel=f"layer of {stack}")
        axes.set(xticks=range(layers), yticks=range(len(phases)), yticklabels=names)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        return done()


def _shades(table: np.ndarray) -> np.ndarray:
    """Map importances to opacities in [0.08, 1] on a logarithmic scale, as they span several orders of magnitude."""
    levels = np.log10(np.maximum(table, table.max() * 1e-4) if table.max() > 0 else np.ones_like(table))
    spread = levels.max() - levels.min()
    return (0.08 + 0.92 * (levels - levels.min()) / (spread or 1.0)).round(3)


def importance_bars(stack: str, importance: Sequence[float], skipped: Sequence[int]) -> Markup:
    """Plot layer importance, 1 − cosine, a bar for each layer; those skipped stand out."""
    with _figure(1.9, f"Importance of every layer of {stack}") as (figure, done):
        axes = figure.subplots()
        colours = [SECOND if layer in skipped else FIRST for layer in range(len(importance))]
        axes.bar(range(len(importance)), importance, color=colours, width=0.8)
        axes.set(xlabel=f"layer of {stack}", ylabel="1 − cosine", xticks=range(len(importance)))
        axes.tick_params(length=0)
        return done()


def score_curves(stacks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """Plot the neuron scores in descending order, a line for each block, and where they are cut."""
    with _figure(2.5, "Scores of FFN neurons from best to worst, with the cut") as (figure, done):
        panels = figure.subplots(1, max(len(stacks), 2), sharey=True, squeeze=False)[0]
        for axes, (stack, blocks) in zip(panels, stacks.items(), strict=False):
            _curves(axes, stack, blocks)
        panels[0].set_ylabel("share of the best score")
        for axes in panels[len(stacks) :]:
            axes.set_visible(False)
        return done()


def _curves(axes: Axes, stack: str, blocks: Sequence[Mapping[str, Any]]) -> None:
    for number, block in enumerate(blocks):
        shares = np.linspace(0, 100, len(block["curve"]))
        depth = (number + 1) / len(blocks)
        axes.plot(shares, block["curve"], color=FIRST, alpha=round(0.25 + 0.75 * depth, 3), linewidth=1.1)
    cuts = sorted({round(100 * block["kept"] / block["width"], 2) for block in blocks})
    axes.axvspan(cuts[0], 100, color=SECOND, alpha=0.14, linewidth=0)
    for cut in cuts:
        axes.axvline(cut, color=SECOND, linewidth=1.2)
    axes.set(title=f"{stack}: {len(blocks)} block{'s' * (len(blocks) > 1)}", xlim=(0, 100), ylim=(0, 1))
    axes.set_xlabel("neurons, best to worst (%)")
    axes.tick_params(length=2)


def value_norms(norms: Sequence[Mapping[str, float]], layer: int | None) -> Markup:
    """Plot mean norms of value vectors by layer, for picture and text rows, and mark where tokens are dropped."""
    with _figure(2.0, "Mean norms of value vectors by layer") as (figure, done):
        axes = figure.subplots()
        for kind, colour in (("image", FIRST), ("text", SECOND)):
            values = [row[kind] for row in norms]
            axes.plot(range(len(values)), values, "o-", color=colour, markersize=3.5, linewidth=1.4)
            axes.annotate(kind, (len(values) - 1, values[-1]), xytext=(6, 0), textcoords="offset points",
                          va="center", color=colour)  # fmt: skip
        if layer is not None:
            axes.axvline(layer, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(
            xlabel="layer of the decoder", ylabel="mean ‖value‖", xticks=range(len(norms)), ylim=(0, None)
        )
        axes.set_xlim(-0.4, len(norms) - 0.1)
        axes.tick_params(length=2)
        return done()
