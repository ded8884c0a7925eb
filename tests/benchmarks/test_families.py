"""The benchmark of families: its table, and that the tokenizer of Emu3 spells codes by the ids that the model has."""

from __future__ import annotations

import torch

from benchmarks.families import table
from benchmarks.family_models import EMU3_ROLES, EMU3_SPECIAL, VISUAL, emu3, tokenizer


def test_a_row_for_each_task() -> None:
    spread = {"median": 2.5, "low": 2.0, "high": 3.0}
    row = {"family": "janus", "task": "t2i", "recipe": "exact", "declined": []}
    told = table([{**row, "library": {**spread, "median": 50.746}, "bundle": spread, "faster": spread}])
    assert told.splitlines()[2:] == ["| janus | t2i | `exact` | 50.7 | 2.5 | 2.50× (2.00 to 3.00) |"]


def test_the_tokens_of_emu3_are_those_of_the_model() -> None:
    words = tokenizer([*EMU3_SPECIAL, *VISUAL], EMU3_ROLES)
    with torch.device("meta"):
        model, _ = emu3()
    known = words.get_vocab()
    assert all(known[word] == number for word, number in model.config.vocabulary_map.items())
    assert words.eol_token == EMU3_SPECIAL[-1]
