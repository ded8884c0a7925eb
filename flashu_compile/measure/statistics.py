"""What calibration counts while a program runs, and what is chosen by it: neurons by scores, layers by importance."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from flashu_compile.errors import CalibrationError, RecipeError
from flashu_compile.measure.recorder import Tap, joined_taps
from flashu_compile.passes.analysis.blocks import Block, residual_blocks
from flashu_compile.passes.analysis.feed_forward import FeedForward, feed_forwards
from flashu_compile.program.program import Program

Rows = Callable[[Tensor], Tensor]
_CURVE_POINTS = 41


def wanda_scores(squares: Tensor, down: Tensor) -> NDArray[np.float64]:
    """Return ||X_j||_2 * sum_i |W[i, j]|, float64 [ffn], from sums of squares [ffn] and W [out, ffn] (down)."""
    return (squares.double().sqrt() * down.detach().double().abs().sum(0)).numpy()


def keep_neurons(scores: NDArray[np.float64], ratio: float, multiple: int, where: str) -> NDArray[np.int64]:
    """Return the neurons that stay, in rising order. Raises `RecipeError` if none would.

    They are the best (1 - ratio), rounded down to a multiple of `multiple`; of equals, the lower index stays.
    """
    width = len(scores)
    count = math.floor((1 - ratio) * width + 1e-9) // multiple * multiple
    if count == 0:
        raise RecipeError(
            f"Pruning {ratio:g} of the {width} neurons of {where} leaves less than one multiple of {multiple}; "
            "lower the ratio or width_multiple."
        )
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)


def skip_layers(importance: Sequence[float], ratio: float) -> tuple[int, ...]:
    """Return the floor(n * ratio) least important layers in rising order; of equals, the lower goes first."""
    count = math.floor(len(importance) * ratio + 1e-9)
    return tuple(sorted(int(i) for i in np.argsort(np.asarray(importance), kind="stable")[:count]))


def score_curves(
    scores: Mapping[str, Mapping[int, NDArray[np.float64]]],
    kept: Mapping[str, Mapping[int, NDArray[np.int64]]],
) -> dict[str, list[dict[str, Any]]]:
    """Summarise how the scores of an FFN's neurons fall, for the report: by stack, an entry for each pruned block.

    `curve` holds the scores at equal distances from the best neuron to the worst, as shares of the best
    (three digits); `width` is the number of neurons before pruning, `kept` after.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for stack, blocks in kept.items():
        for block, neurons in blocks.items():
            falling = np.sort(scores[stack][block])[::-1]
            places = np.linspace(0, len(falling) - 1, _CURVE_POINTS).round().astype(int)
            curve = [float(f"{value:.2e}") for value in falling[places] / (falling[0] or 1.0)]
            entry = {"block": block, "width": len(falling), "kept": len(neurons), "curve": curve}
            curves.setdefault(stack, []).append(entry)
    return curves


class Statistics:
    """Running sums over a Recorder's values: of FFNs of stacks `pruned`, and of layers of the decoder and of `skipped`.

    `rows` selects the rows of a value, and `last_rows` those of the decoder's layers; set them before each run.
    """

    def __init__(self, program: Program, pruned: Collection[str], skipped: Collection[str]) -> None:
        self.feed_forwards: list[FeedForward] = [f for s in pruned for f in feed_forwards(program, s)]
        self.squares = {
            (f.stack, f.block): torch.zeros(f.width, dtype=torch.float64) for f in self.feed_forwards
        }
        self.decoder = program.decoder
        self.blocks = {
            stack: residual_blocks(program, stack) for stack in dict.fromkeys((program.decoder, *skipped))
        }
        self.rows: Rows = lambda value: value.flatten(0, -2)
        self.last_rows: Rows = self.rows
        self.where = ""
        self.reset_cosines()
        self._entering: dict[str, Tensor] = {}
        self._weights = program.stored()

    def empty(self) -> Statistics:
        """Return sums over the same values of the same program that begin at zero."""
        made = copy.copy(self)
        made.squares = {key: torch.zeros_like(total) for key, total in self.squares.items()}
        made._entering = {}
        made.reset_cosines()
        return made

    def add(self, other: Statistics) -> None:
        """Add the sums of `other`, which is of the same program."""
        for key, total in other.squares.items():
            self.squares[key] += total
        for stack, cosines in other.cosines.items():
            self.cosines[stack] += cosines
            self.counted[stack] += other.counted[stack]

    def reset_cosines(self) -> None:
        """Reset the sums of cosines, by stack, and the numbers of rows they cover."""
        self.cosines = {s: torch.zeros(len(blocks), dtype=torch.float64) for s, blocks in self.blocks.items()}
        self.counted = dict.fromkeys(self.blocks, 0)

    def taps(self) -> dict[fx.Node, Tap]:
        """Return the taps that update these sums, by node."""
        taps: list[tuple[fx.Node, Tap]] = [(f.hidden, self._square(f)) for f in self.feed_forwards]
        for blocks in self.blocks.values():
            taps.append((blocks[0].entry, self._enter(blocks[0])))
            taps += [(block.exit, self._leave(block)) for block in blocks]
        return joined_taps(taps)

    def _square(self, group: FeedForward) -> Tap:
        def tap(value: Tensor) -> None:
            total = self.rows(value).double().square().sum(0)
            if not total.isfinite().all():
                raise CalibrationError(
                    f"The activations of FFN {group.block} of stack {group.stack!r} are not finite on {self.where}."
                )
            self.squares[group.stack, group.block] += total

        return tap

    def _enter(self, block: Block) -> Tap:
        def tap(value: Tensor) -> None:
            self._entering[block.stack] = self._rows_of(block.stack)(value).double()

        return tap

    def _rows_of(self, stack: str) -> Rows:
        return self.last_rows if stack == self.decoder else self.rows

    def _leave(self, block: Block) -> Tap:
        stack, number = block.stack, block.index

        def tap(value: Tensor) -> None:
            before, after = self._entering[stack], self._rows_of(stack)(value).double()
            cosine = torch.cosine_similarity(before, after, dim=-1)
            if not cosine.isfinite().all():
                raise CalibrationError(
                    f"The rows that leave layer {number} of stack {stack!r} are not finite on {self.where}."
                )
            self.cosines[stack][number] += cosine.sum()
            self.counted[stack] += len(cosine) if number == 0 else 0
            self._entering[stack] = after

        return tap

    def importance(self) -> dict[str, list[float]]:
        """Return the importance of each layer, by stack: 1 - its mean cosine."""
        return {stack: (1 - sums / self.counted[stack]).tolist() for stack, sums in self.cosines.items()}

    def scores(self) -> dict[str, dict[int, NDArray[np.float64]]]:
        """Return the Wanda scores, float64 [ffn], by stack and block."""
        result: dict[str, dict[int, NDArray[np.float64]]] = {}
        for group in self.feed_forwards:
            down = self._weights[group.down.all_input_nodes[1]]
            scores = wanda_scores(self.squares[group.stack, group.block], down)
            result.setdefault(group.stack, {})[group.block] = scores
        return result
