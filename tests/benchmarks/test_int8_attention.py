"""Attention on bytes computes attention, and its `rest` is all of it but the products."""

from __future__ import annotations

from benchmarks.geometries import GEOMETRIES
from benchmarks.int8_attention import FORMS, attentions, measure


def test_it_is_attention_up_to_rounding() -> None:
    config = GEOMETRIES["bench-tiny"]
    assert attentions(config)["llm"] == (4, 2, 16, config.span_length, config.span_length + 24)
    for stack, row in measure(config, threads=1, repeats=1).items():
        assert 1e-4 < row["error"] < 4e-2, stack
        assert all(row[form] > 0 for form in FORMS), stack


def test_the_rest_is_all_but_the_products() -> None:
    left = [node for node in FORMS["int8"] if node not in FORMS["rest"]]
    assert [kind for kind, *_ in left if kind not in {"Mul", "Cast", "Div"}] == ["MatMulInteger"] * 2
