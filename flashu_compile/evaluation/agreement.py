"""agreement: how far a bundle does what another one does, without known answers.

Pictures are compared at equal seed: `ssim` is the mean structural similarity (Wang et al., 2004), and `clean` tells
speckle, which SSIM hardly sees on busy pictures or in a corner: the noise where the other side's picture is flat,
beyond that of that picture, in the worst of 4 × 4 blocks; `TOLERATED` levels of 255 cost nothing, `LEVELS` more cost
all. PSNR is told beside them. Answers are compared token by token: the other side's answer is given to the bundle, and
`next_tokens` is the share of its tokens that the bundle would have chosen, since free answers part for good at the
first difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile.errors import EvaluationError
from flashu_compile.evaluation.evaluators import Parts
from flashu_compile.extras import naming_the_extra
from flashu_compile.tasks import T2I

with naming_the_extra("Comparing pictures"):
    from scipy import ndimage
    from skimage.metrics import structural_similarity

TOLERATED, LEVELS = 1.0, 8.0
_BLOCKS = 4
_FLAT_RANGE = 32  # levels within 5 × 5 pixels, after the median
_LEAST_FLAT = 0.1  # of a block
_RMS_OF_MEDIAN = 1.4826  # the rms of normal values over the median of their sizes
_WINDOW = 7

Pixels = NDArray[np.float64]


class Agreement:
    """The evaluator, against the pipeline `other`. `limit` is the largest number of tokens of an answer.

    It notes the median PSNR among `figures`, infinite if most pictures are equal.
    """

    def __init__(self, other: Any, limit: int | None, figures: dict[str, float]) -> None:
        self._other, self._limit, self._figures = other, limit, figures
        self._answers: dict[tuple[str, str], list[int]] = {}
        self._codes: dict[str, list[int]] = {}

    def __call__(self, pipeline: Any, samples: Sequence[Any]) -> Parts:
        """Return `ssim` and `clean` of prompts, or `next_tokens` of questions; of the other side itself all are 1.

        Where pictures are drawn code by code it is `next_codes`: after one other code all that follow are others.
        """
        by_codes = samples[0].task == T2I.name and pipeline.draws_codes
        if pipeline is self._other:  # nothing to compute, so that too few samples are told at once
            names = ("next_codes",) if by_codes else ("ssim", "clean")
            names = names if samples[0].task == T2I.name else ("next_tokens",)
            return dict.fromkeys(names, [1.0] * len(samples))
        if samples[0].task != T2I.name:
            return {"next_tokens": pipeline.over(lambda sample: self._next_tokens(pipeline, sample), samples)}
        if by_codes:
            return {"next_codes": pipeline.over(lambda sample: self._next_codes(pipeline, sample), samples)}
        pairs = pipeline.over(lambda sample: self.pictures(pipeline, sample), samples)
        self._figures["median PSNR in dB"] = statistics.median(psnr(*pair) for pair in pairs)
        return {"ssim": [similarity(*pair) for pair in pairs], "clean": [clean(*pair) for pair in pairs]}

    def pictures(self, pipeline: Any, sample: Any) -> tuple[Pixels, Pixels]:
        """Return the pictures of both sides, [height, width, 3] in levels of 255."""
        one, two = (
            np.asarray(side.generate(sample.prompt, seed=sample.seed), dtype=np.float64)
            for side in (pipeline, self._other)
        )
        if one.shape != two.shape:
            raise EvaluationError(
                f"The two sides make pictures of {one.shape[1]} × {one.shape[0]} and {two.shape[1]} × {two.shape[0]}, "
                "which cannot be compared pixel by pixel."
            )
        return one, two

    def _next_codes(self, pipeline: Any, sample: Any) -> float:
        if sample.prompt not in self._codes:
            self._codes[sample.prompt] = self._other.codes(sample.prompt)
        codes = self._codes[sample.prompt]
        return float(np.mean(np.array(pipeline.next_codes(sample.prompt, codes)) == np.array(codes)))

    def _next_tokens(self, pipeline: Any, sample: Any) -> float:
        key = (sample.key, sample.question)
        if key not in self._answers:
            self._answers[key] = self._other.answer_ids(sample.image, sample.question, self._limit)
        answer = self._answers[key]
        chosen, _ = pipeline.logits(sample.image, sample.question, tokens=len(answer), answer=answer)
        return float(np.mean(np.array(chosen) == np.array(answer)))


def psnr(picture: Pixels, other: Pixels) -> float:
    """Return the peak signal-to-noise ratio in dB, of levels up to 255."""
    error = float(np.mean((picture - other) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def similarity(picture: Pixels, other: Pixels) -> float:
    """Return the mean SSIM over windows and channels, in [0, 1]."""
    side = min(_WINDOW, *picture.shape[:2])
    window = side - 1 + side % 2
    value = structural_similarity(picture, other, win_size=window, channel_axis=2, data_range=255)
    return float(np.clip(value, 0, 1))


def clean(picture: Pixels, other: Pixels) -> float:
    """Return 1 where no block is noisier than in the other picture, 0 where one is by `TOLERATED + LEVELS` levels."""
    where = flat(other)  # the same pixels of both: a noisy picture is flat nowhere itself
    excess = float(np.max(noise(picture, where) - noise(other, where)))
    return float(np.clip(1 - (excess - TOLERATED) / LEVELS, 0, 1))


def flat(picture: Pixels) -> NDArray[np.bool_]:
    """Mark the pixels around which a 3 × 3 median hardly changes."""
    median, window = _median(picture), (5, 5, 1)
    spread = ndimage.maximum_filter(median, size=window) - ndimage.minimum_filter(median, size=window)
    return np.asarray(spread.max(axis=2) < _FLAT_RANGE)


def noise(picture: Pixels, where: NDArray[np.bool_], blocks: int = _BLOCKS) -> Pixels:
    """Return the noise of the pixels `where`, in levels, by part of the picture: the rms deviation from a 3 × 3 median.

    Around pixels that are not flat, the median deviation stands for the rms: most pixels near an edge deviate by
    nothing, and most of a speckled area do not. The noise is 0 in a block that has hardly any of the pixels `where`.
    """
    deviation, own = np.abs(picture - _median(picture)), flat(picture)
    levels = np.zeros((blocks, blocks))
    for row, rows in enumerate(np.array_split(np.arange(len(picture)), blocks)):
        for column, columns in enumerate(np.array_split(np.arange(picture.shape[1]), blocks)):
            part = np.ix_(rows, columns)
            marks, deviations, smooth = where[part], deviation[part], own[part]
            if not marks.size or marks.mean() < _LEAST_FLAT:
                continue
            rough = deviations[marks & ~smooth]
            total = (deviations[marks & smooth] ** 2).sum()
            total += rough.size * (_RMS_OF_MEDIAN * np.median(rough)) ** 2 if rough.size else 0
            levels[row, column] = math.sqrt(total / deviations[marks].size)
    return levels


def _median(picture: Pixels) -> Pixels:
    return np.asarray(ndimage.median_filter(picture, size=(3, 3, 1)))
