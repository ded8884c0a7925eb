from __future__ import annotations

from pathlib import Path

import pytest

from examples.showo2_shapes import evaluate
from examples.showo2_shapes.questions import CHOSEN, SEARCHED, write
from examples.showo2_shapes.world.language import parse_caption
from examples.showo2_shapes.world.scenes import canonical_key, is_heldout
from flashu_compile.errors import EvaluationError
from flashu_compile.evaluation.data import read_data


def test_nothing_of_it_was_trained_on_or_searched_with(tmp_path: Path) -> None:
    data = read_data(write(tmp_path, 400, 4, 3))
    searched = {
        canonical_key(spec) for spec in (*evaluate.prompts(SEARCHED), *evaluate.chosen_prompts(CHOSEN, 0))
    }
    assert len(data.prompts) == 400
    for sample in data.prompts:
        spec = parse_caption(sample.prompt)
        assert is_heldout(spec)
        assert sample.key == canonical_key(spec)
        assert sample.key not in searched
    assert len(data.questions) == 12
    assert len({sample.key for sample in data.questions}) == 4
    assert all(sample.answer for sample in data.questions)


def test_more_prompts_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.showo2_shapes.questions.MISSES", 500)  # quicker, though it may miss some
    with pytest.raises(EvaluationError, match=r"There are \d{3} held-out prompts, not 1000; ask for fewer"):
        write(tmp_path / "a", 1000, 0, 0)
    assert not (tmp_path / "a").exists()
