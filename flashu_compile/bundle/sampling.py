"""Sampling: how a token is chosen by its logits, greedily or at random."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from flashu_compile import arguments
from flashu_compile.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Manifests hold what is here, and help texts need not wait for numpy.
_HOTTEST, _MOST = 1e3, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen among all that there are.

    Attributes:
        temperature: logits are divided by it; 0 always takes the most likely token.
        top_k: only so many of the most likely tokens are left, and those that are as likely as the last; 0 leaves all.
        top_p: of these, only the most likely are left whose probabilities sum up to this share; 1 leaves all.

    They apply in this order, as in transformers' `generate`. Raises `InputError` on a value of the wrong type or out of
    range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        values = {
            "temperature": arguments.number("temperature", self.temperature, 0, _HOTTEST, InputError),
            "top_k": arguments.integer("top_k", self.top_k, 0, _MOST, InputError),
            "top_p": arguments.number("top_p", self.top_p, 0, 1, InputError, above=True),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, so that nothing is random."""
        return self.temperature == 0

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the probability of each token, float64 [vocab], by its logits [vocab]; they sum up to 1.

        The largest logit must be finite.
        """
        import numpy as np

        if self.is_greedy:
            return np.eye(1, len(logits), int(logits.argmax()))[0]
        # The largest is 0, so that no temperature, however low, makes one infinite.
        with np.errstate(over="ignore"):
            scores = (logits.astype(np.float64) - logits.max()) / self.temperature
        if 0 < self.top_k < len(scores):
            scores = np.where(scores < np.partition(scores, -self.top_k)[-self.top_k], -np.inf, scores)
        chances = np.exp(scores)
        chances /= chances.sum()
        if self.top_p < 1:
            order = np.argsort(-scores, kind="stable")
            before = np.cumsum(chances[order]) - chances[order]
            chances[order[before >= self.top_p]] = 0
            chances /= chances.sum()
        return chances

    def choose(self, logits: NDArray[np.float32], draws: Draws) -> int:
        """Return the token that the next of `draws` falls on: the first whose cumulated probability exceeds it."""
        import numpy as np

        if self.is_greedy:
            return int(logits.argmax())
        cumulated = np.cumsum(self.probabilities(logits))
        return int(np.searchsorted(cumulated, draws.next() * cumulated[-1], side="right"))


#: The most likely token, always.
GREEDY = Sampling(temperature=0)


class Draws:
    """Numbers from [0, 1), the same on every machine: those of numpy's Philox-4x64 generator with the key (seed, 0)."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._generator = np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)))

    def next(self) -> float:
        """Return the next number."""
        return float(self._generator.random())
