"""What the rows of an ablation say against the exact row, and the tables of it. Pure; `ablation.py` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.records import markdown_table, mean_relative_error, number, ratio

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]

# Rows that change nothing but the number of points: what latents are held against, where points agree.
_PLAIN = ("exact", "only fewer points")


def compare(rows: Sequence[dict[str, Any]], saved: Sequence[np.ndarray]) -> None:
    """Add to each row how it stands against the exact row of its task, which must be among them.

    `saved` holds the latents [pictures, c, h, w] of each row at equal seeds, or its answers [questions]. Adds `kept`
    and `work` (shares of the exact row's scores and FLOPs) and `speedup` over eager; to t2i rows `latent_error`, the
    mean relative error against the exact row's latents, and `latent_error_same_points` against those of an exact
    trajectory with as many points (None if there is none); to mmu rows `agreement`, the share of equal answers.
    """
    pairs = list(zip(rows, saved, strict=True))
    for task in ("t2i", "mmu"):
        own = [(row, values) for row, values in pairs if row["task"] == task]
        if not own:
            continue
        exact, truth = next((row, values) for row, values in own if row["name"] == "exact")
        plain = {
            row["parameters"]["points"]: values
            for row, values in own
            if task == "t2i" and row["name"] in _PLAIN
        }
        for row, values in own:
            row["kept"] = ratio(row["right"], exact["right"])
            row["work"] = ratio(row["flops"], exact["flops"])
            row["speedup"] = ratio(row["seconds"]["eager"], row["seconds"]["bundle"])
            if task == "mmu":
                row["agreement"] = float(np.mean(values == truth))
                continue
            row["mean_attribute_kept"] = ratio(row["mean_attribute"], exact["mean_attribute"])
            row["latent_error"] = mean_relative_error(values, truth)
            same = plain.get(row["parameters"]["points"])
            row["latent_error_same_points"] = None if same is None else mean_relative_error(values, same)


def _evaluations(row: Row) -> str:
    counts = row["evaluations"]
    return " + ".join(str(counts[kind]) for kind in ("full", "cut", "reused"))


_COMMON: tuple[Column, ...] = (
    ("kept", lambda row: number(row["kept"])),
    ("work", lambda row: number(row["work"])),
    ("speed-up", lambda row: number(row["speedup"], ".2f") + "×"),
)

_T2I: tuple[Column, ...] = (
    ("pictures", lambda row: row["name"]),
    ("right", lambda row: number(row["right"])),
    _COMMON[0],
    ("attributes", lambda row: number(row["mean_attribute"])),
    ("kept", lambda row: number(row["mean_attribute_kept"])),
    ("evaluations", _evaluations),
    ("GFLOPs", lambda row: number(row["flops"] / 1e9, ".1f")),
    _COMMON[1],
    ("eager s", lambda row: number(row["seconds"]["eager"], ".2f")),
    ("bundle s", lambda row: number(row["seconds"]["bundle"], ".2f")),
    _COMMON[2],
    ("latents off", lambda row: number(row["latent_error"], ".1e")),
    ("at equal points", lambda row: number(row["latent_error_same_points"], ".1e")),
)

_MMU: tuple[Column, ...] = (
    ("answers", lambda row: row["name"]),
    ("right", lambda row: number(row["right"])),
    _COMMON[0],
    ("as exact", lambda row: number(row["agreement"])),
    ("GFLOPs", lambda row: number(row["flops"] / 1e9, ".2f")),
    _COMMON[1],
    ("eager ms", lambda row: number(1000 * row["seconds"]["eager"], ".0f")),
    ("bundle ms", lambda row: number(1000 * row["seconds"]["bundle"], ".0f")),
    _COMMON[2],
)


def ablation_tables(rows: Sequence[Row]) -> str:
    """The compared rows as Markdown: a table for each task, with what its columns mean."""
    parts = []
    for task, columns, words in (("t2i", _T2I, _t2i_words), ("mmu", _MMU, _mmu_words)):
        own = [row for row in rows if row["task"] == task]
        if own:
            parts += [markdown_table(columns, own), words(own[0])]
    return "\n".join(parts)


def _t2i_words(exact: Row) -> str:
    count = exact["prompts"]
    error = (exact["right"] * (1 - exact["right"]) / count) ** 0.5
    return (
        f"{count} held-out prompts, the same noise in every row. right: every attribute is; the standard error of the "
        f"exact row's is {error:.3f}. attributes: mean of {', '.join(exact['attributes'])}. kept and work: share of "
        "the exact row's. evaluations: full + pruned or without layers + reused. GFLOPs: of one picture. Seconds of "
        f"one picture, the eager loop at {exact['parameters']['points']} points. latents off: relative error of the "
        "final latents against the exact row, and against an exact trajectory of as many points.\n"
    )


def _mmu_words(exact: Row) -> str:
    count = exact["pictures"] * exact["each"]
    error = (exact["right"] * (1 - exact["right"]) / count) ** 0.5
    return (
        f"{count} questions about {exact['pictures']} pictures. right: exact match; the standard error of the exact "
        f"row's is {error:.3f}. as exact: share of answers equal to the exact row's. GFLOPs and milliseconds: of one "
        "answer, its picture included.\n"
    )
