"""How rows are held against the exact one, and the tables that show it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.ablation_table import ablation_tables, compare


def picture_row(name: str, points: int, right: float, flops: float) -> dict[str, Any]:
    return {
        "task": "t2i", "name": name, "parameters": {"points": points}, "prompts": 4, "right": right,
        "attributes": {"shape": right, "color": 1.0}, "mean_attribute": (right + 1) / 2, "flops": flops,
        "evaluations": {"full": points - 1, "cut": 0, "reused": 0}, "seconds": {"eager": 2.0, "bundle": 0.5},
    }  # fmt: skip


def answer_row(name: str, right: float) -> dict[str, Any]:
    return {
        "task": "mmu", "name": name, "parameters": {}, "pictures": 2, "each": 2, "right": right, "flops": 1e9,
        "evaluations": {"language": 2.0}, "seconds": {"eager": 0.2, "bundle": 0.1},
    }  # fmt: skip


@pytest.fixture
def compared() -> list[dict[str, Any]]:
    rows = [
        picture_row("exact", 50, 0.8, 4e9),
        picture_row("only fewer points", 35, 0.6, 3e9),
        picture_row("all (flashu)", 35, 0.4, 1e9),
        picture_row("aggressive", 25, 0.2, 1e9),
        answer_row("exact", 0.75),
        answer_row("all (flashu)", 0.5),
    ]
    ones = np.ones((4, 1, 2, 2))
    answers = np.array(["red", "two", "yes", "no"])
    compare(rows, [ones, 2 * ones, 3 * ones, 3 * ones, answers, np.array(["red", "one", "yes", "yes"])])
    return rows


def test_pictures_are_held_against_the_exact_row(compared: list[dict[str, Any]]) -> None:
    exact, _, everything, _ = compared[:4]
    assert exact["kept"] == exact["work"] == exact["mean_attribute_kept"] == 1
    assert exact["latent_error"] == exact["latent_error_same_points"] == 0
    assert exact["speedup"] == 4
    assert everything["kept"] == pytest.approx(0.5)
    assert everything["work"] == pytest.approx(0.25)
    assert everything["mean_attribute_kept"] == pytest.approx(0.7 / 0.9)
    assert everything["latent_error"] == pytest.approx(2)


def test_latents_are_also_held_against_an_exact_row_of_as_many_points(compared: list[dict[str, Any]]) -> None:
    _, fewer, everything, aggressive = compared[:4]
    assert fewer["latent_error_same_points"] == 0
    assert everything["latent_error_same_points"] == pytest.approx(0.5)
    assert aggressive["latent_error_same_points"] is None


def test_answers_are_held_against_the_exact_row(compared: list[dict[str, Any]]) -> None:
    assert compared[4]["agreement"] == 1
    assert compared[5]["agreement"] == 0.5
    assert compared[5]["kept"] == pytest.approx(2 / 3)


def test_nothing_is_kept_of_nothing() -> None:
    rows = [picture_row("exact", 50, 0.0, 1e9), picture_row("all (flashu)", 50, 0.1, 1e9)]
    compare(rows, [np.ones((4, 1, 2, 2))] * 2)
    assert rows[1]["kept"] is None
    assert "| all (flashu) | 0.100 |  |" in ablation_tables(rows)


def test_there_is_a_table_for_each_task(compared: list[dict[str, Any]]) -> None:
    text = ablation_tables(compared)
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert "| all (flashu) | 0.400 | 0.500 | 0.700 | 0.778 | 34 + 0 + 0 | 1.0 | 0.250 |" in text
    assert "| exact | 0.750 | 1.000 | 1.000 | 1.00 | 1.000 | 200 | 100 | 2.00× |" in text
    assert "4 held-out prompts" in text


def test_a_table_of_one_task_alone(compared: list[dict[str, Any]]) -> None:
    assert "pictures |" not in ablation_tables(compared[4:])
