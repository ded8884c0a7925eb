r"""A scorer of one's own: whether pictures of showo2-shapes show what their prompts ask for.

    flashu-compile evaluate build/flashu --data shapes/data.jsonl --split all \
        --score examples/showo2_shapes/scoring.py:score

`python -m examples.showo2_shapes.questions shapes` writes the data.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.showo2_shapes.world.language import parse_caption
from examples.showo2_shapes.world.scorer import Score
from examples.showo2_shapes.world.scorer import score as judge
from flashu_compile.evaluation.agreement import noise

NOISY = 8.0
"""Levels of 255 at which flat areas count as noise alone."""


def score(pipeline: Any, samples: Sequence[Any]) -> Mapping[str, Sequence[float]] | None:
    """Of each picture: the share of conditions that it meets, whether it is right, and how free of noise it is."""
    if samples[0].task != "t2i":
        return None
    pictures = pipeline.over(lambda s: np.asarray(pipeline.generate(s.prompt, seed=s.seed)), samples)
    judged = [judge(picture, parse_caption(s.prompt)) for picture, s in zip(pictures, samples, strict=True)]
    return {
        "conditions": [_share(found) for found in judged],
        "right": [float(found.correct) for found in judged],
        "flat": [_flat(picture.astype(np.float64)) for picture in pictures],
    }


def _flat(picture: NDArray[np.float64]) -> float:
    """How free of noise it is; all of a scene is flat but for edges, which `noise` leaves out."""
    everywhere = np.ones(picture.shape[:2], dtype=np.bool_)
    return max(0.0, 1 - float(noise(picture, everywhere, blocks=1)[0, 0]) / NOISY)


def _share(found: Score) -> float:
    """The share of what the prompt asks for that the picture shows."""
    asked = [
        value
        for value in (found.shape, found.color, found.count, found.size, found.relation)
        if value is not None
    ]
    return sum(asked) / len(asked)
