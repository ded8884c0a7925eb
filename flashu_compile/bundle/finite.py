"""Checks that what engines hand on is numbers, where looking costs little: logits, latents, pixels, image embeddings.

A value that is not finite would go on as something that looks like a result: `argmax` takes NaN for the largest logit,
and a picture of NaN is black.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashu_compile.bundle.precision import by_part
from flashu_compile.errors import NotFiniteError
from flashu_compile.tasks import DECODER

_FULL = "float32"


class Computing(Protocol):
    """The engines of a bundle, whose precision error messages name."""

    @property
    def precision(self) -> str:
        """The precision the engines compute in, as recorded in the manifest."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of values, as error messages name it, and the precision it computes in."""

    name: str
    precision: str

    @classmethod
    def engine(cls, engines: Computing, name: str) -> Source:
        """Return the source that names an engine of a bundle."""
        return cls(f"Engine {name!r}", engines.precision)

    def error(self, gave: str) -> NotFiniteError:
        """Build the error that describes the output `gave` and advises on the precision."""
        lower = next((name for name in by_part(self.precision).values() if name != _FULL), None)
        if lower is None:
            advice = (
                "Its weights or its inputs are at fault: check that the checkpoint's weights are finite, and a bundle "
                "with `flashu-compile verify`."
            )
        else:
            advice = (
                'Build the bundle again with precision="float32", or with a part of the model in float32, such as '
                f'precision="{DECODER}={lower}" (parts that are not named are float32).'
            )
        return NotFiniteError(f"{self.name}, computing in {self.precision}, {gave}. {advice}")

    def check(self, what: str, values: NDArray[Any]) -> None:
        """Raise `NotFiniteError` unless all values are finite."""
        if not np.isfinite(values).all():
            raise self.error(f"gave {what} that are not finite numbers")

    def greedy(self, logits: NDArray[Any]) -> list[int]:
        """Return the token with the largest logit of every row [rows, vocab], the first among equals.

        Entries of −inf are legal: they rule tokens out. Raises `NotFiniteError` if the largest of a row is not
        finite.
        """
        tokens = logits.argmax(axis=1)  # of a row with a NaN, its place
        if not np.isfinite(np.take_along_axis(logits, tokens[:, None], axis=1)).all():
            raise self.error(
                "gave logits without a largest finite number (NaN, infinite, or −infinite throughout)"
            )
        return tokens.tolist()


def is_broken(value: Any) -> bool:
    """Return whether an array or a kept value has a NaN or +inf. Additive attention masks may hold −inf."""
    return bool(((value != value) | (value == math.inf)).any())
