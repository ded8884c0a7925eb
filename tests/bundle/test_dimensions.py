"""Dimensions as text mean what they mean in Python, in any thread, and nothing else is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashu_compile.bundle.dimensions import evaluate, parsed, symbols
from flashu_compile.errors import ConfigurationError

SIZES = {"prefix": 7, "s0": 3, "_n": 1000, "größe": 2}
_LEAVES = st.one_of(st.integers(0, 99).map(str), st.sampled_from(sorted(SIZES)))
EXPRESSIONS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", "-", "*", " // "]), inner).map("".join),
        inner.map("({})".format),
    ),
    max_leaves=12,
).filter(lambda text: len(text) <= 200)


@given(EXPRESSIONS)
def test_they_mean_what_they_mean_in_python(expression: str) -> None:
    try:
        expected = eval(expression, {"__builtins__": {}}, SIZES)
    except ZeroDivisionError:
        with pytest.raises(ConfigurationError, match="divides by zero"):
            evaluate(expression, SIZES)
    else:
        assert evaluate(expression, SIZES) == expected
    assert symbols(expression) <= SIZES.keys()


@pytest.mark.parametrize(
    "text",
    ["", " ", "(", ")", "()", "a b", "a +", "* a", "-a", "2 ** 3", "a % 2", "f(a)", "a.b", "'a'", "1.5", "a" * 201,
     "٤", "(a", "a)", "a + (b", "a;b", "((((x"],
)  # fmt: skip
def test_nothing_else_is_one(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not arithmetic"):
        parsed(text)


def test_unknown_names_are_told() -> None:
    assert symbols("(prefix + s0) // 2 * prefix") == {"prefix", "s0"}
    with pytest.raises(ConfigurationError, match="'prefix \\+ 1' cannot be computed from s0"):
        evaluate("prefix + 1", {"s0": 1})


def test_threads_do_not_disturb_each_other() -> None:
    """Python's own parser was seen to raise SystemError in one of two threads, rarely."""
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from flashu_compile.bundle.dimensions import evaluate
sys.setswitchinterval(1e-6)
def work(number):
    return [evaluate(f"prefix + {number * 2000 + n} * (s0 - 1) // 2", {"prefix": 7, "s0": 3}) for n in range(2000)]
with ThreadPoolExecutor(8) as pool:
    assert sum(map(sum, pool.map(work, range(8)))) == sum(7 + n for n in range(16000))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
