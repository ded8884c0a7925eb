"""Tables and numbers as people read them."""

from __future__ import annotations

import pytest

from flashu_compile.cli import display, plans
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.plan import compile_plan


def test_plan_has_a_row_for_equal_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    config = T2IConfig(
        12,
        4.0,
        1.0,
        guidance=((0, None), (0.25, 1.0)),
        head_cache=3,
        head_extrapolation=True,
        full_ffn=0.2,
    )
    plans.print_plan(compile_plan(config))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[4:] if line.strip()]
    assert rows == [
        ["1–2", "0.000–0.182", "1", "(prompt", "alone)", "denoise"],
        ["3", "0.182–0.273", "1", "(prompt", "alone)", "stored", "denoise"],
        ["4–5", "0.273–0.455", "4", "denoise"],
        ["6", "0.455–0.545", "4", "stored", "denoise"],
        ["7–8", "0.545–0.727", "4", "reuse"],
        ["9", "0.727–0.818", "4", "stored", "denoise"],
        ["10–11", "0.818–1.000", "4", "denoise"],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (1536, "1.54 k"),
        (99_960, "100 k"),
        (999_950, "1.00 M"),
        (2e12, "2.00 T"),
        (3e15, "3 P"),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert display.quantity(value) == text
