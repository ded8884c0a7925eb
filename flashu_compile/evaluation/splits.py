"""Which samples are held out for `evaluate`, and which its splits "calibration" and "search" leave for other uses.

A build's calibration knows nothing of them: it draws from the samples that it is given.

Samples are told apart by a key: prompts by the canonical one, questions by their picture. All samples of a key go to
the same split, so splits share no prompt and no picture. Keys are ordered by a hash of the data, the seed and the key.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from flashu_compile.errors import EvaluationError

CALIBRATION, SEARCH, HELD_OUT, ALL = "calibration", "search", "held-out", "all"
SPLITS = (CALIBRATION, SEARCH, HELD_OUT)
_CALIBRATION_KEYS = 20
_ARTICLES = frozenset(("a", "an", "the"))


def canonical(text: str) -> str:
    """Return the key of a prompt that brings none: its words without case, punctuation and articles."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(word for word in words if word not in _ARTICLES) or text


def split_of(keys: Iterable[str], data: str, seed: int) -> dict[str, str]:
    """Return the split of each key: a quarter, but at most 20, for calibration, a third of the rest for search.

    `data` is the hash of the data.
    """
    unique = dict.fromkeys(keys)
    order = sorted(unique, key=lambda key: hashlib.sha256(f"{data} {seed} {key}".encode()).digest())
    calibration = min(_CALIBRATION_KEYS, len(order) // 4)
    search = calibration + (len(order) - calibration) // 3
    return {
        key: CALIBRATION if place < calibration else SEARCH if place < search else HELD_OUT
        for place, key in enumerate(order)
    }


def check_split(name: str) -> str:
    """Return the name of a split, or "all". Raises `EvaluationError` on any other."""
    if name not in (*SPLITS, ALL):
        raise EvaluationError(f"There is no split {name!r}; there are {', '.join((*SPLITS, ALL))}.")
    return name
