"""Records go on where they stopped, keys follow from what is measured, and tables show it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.records import (
    Records,
    digest,
    markdown_table,
    mean_relative_error,
    number,
    ratio,
    recipe_digest,
    save_array,
)
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe


def test_records_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    records = Records(path)
    records.add("one", {"right": np.float64(0.5)})
    records.about["model"] = "m"
    records.save()
    again = Records(path)
    assert again.rows == {"one": {"right": 0.5}}
    assert again.about == {"model": "m"}
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_a_row_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    records = Records(tmp_path / "rows.json")
    records.add("one", {"right": 0.5})
    with pytest.raises(TypeError):
        records.add("two", {"right": object()})
    assert Records(records.path).rows == {"one": {"right": 0.5}}


def test_arrays_are_read_back(tmp_path: Path) -> None:
    for values in (np.ones((2, 3), np.float32), np.array(["red", "two"])):
        save_array(tmp_path / "sub" / "values.npy", values)
        assert np.array_equal(np.load(tmp_path / "sub" / "values.npy"), values)
    assert [file.name for file in (tmp_path / "sub").iterdir()] == ["values.npy"]


def test_a_recipe_is_named_by_what_it_makes_of_the_task() -> None:
    kept = {"llm": {0: np.arange(4)}}
    recipe = Recipe("a", T2IConfig(pruning={"llm": 0.5}), MMUConfig(), {"t2i": Decisions(kept)})
    name = recipe_digest(recipe, "t2i")
    assert recipe_digest(dataclasses.replace(recipe, name="b", mmu=MMUConfig(0.1)), "t2i") == name
    other = Decisions({"llm": {0: np.arange(1, 5)}})
    assert recipe_digest(dataclasses.replace(recipe, decisions={"t2i": other}), "t2i") != name
    assert recipe_digest(dataclasses.replace(recipe, t2i=T2IConfig(pruning={"llm": 0.4})), "t2i") != name
    # A decision that is switched off makes no difference.
    off = dataclasses.replace(recipe, t2i=T2IConfig())
    assert recipe_digest(off, "t2i") == recipe_digest(dataclasses.replace(off, decisions={}), "t2i")


def test_digests_tell_arrays_apart_by_type_and_shape() -> None:
    values = np.zeros(4, np.float32)
    assert digest(values) == digest(values.copy())
    assert len({digest(values), digest(values.reshape(2, 2)), digest(values.astype(np.int32))}) == 3


def test_mean_relative_error_is_the_mean_over_the_rows_both_have() -> None:
    truth = np.array([[3.0, 4.0], [0.0, 2.0]])
    values = np.array([[3.0, 4.5], [0.0, 2.6], [9.0, 9.0]])
    assert mean_relative_error(values, truth) == pytest.approx((0.5 / 5 + 0.6 / 2) / 2)
    assert mean_relative_error(truth, truth) == 0


def test_ratios_of_nothing_are_nothing() -> None:
    assert ratio(1.0, 4.0) == 0.25
    assert ratio(1.0, 0.0) is None
    assert ratio(None, 1.0) is None
    assert number(None) == ""
    assert number(0.25) == "0.250"


def test_a_table_has_a_column_for_each_text() -> None:
    columns = (("row", lambda row: row["name"]), ("right", lambda row: number(row["right"], ".1f")))
    assert markdown_table(columns, [{"name": "exact", "right": 0.75}]) == (
        "| row | right |\n|---|---:|\n| exact | 0.8 |\n"
    )
