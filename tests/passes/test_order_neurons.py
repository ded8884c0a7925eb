"""Neurons in the order of what two tasks keep: the same function, and each task's neurons as one range of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashu_compile.compiler.specialise import Job
from flashu_compile.errors import PassError
from flashu_compile.passes.manager import PassManager, relative_error
from flashu_compile.passes.order_neurons import OrderNeurons, kept_ranges
from flashu_compile.passes.prune_ffn import PruneFFN
from flashu_compile.program.program import Program
from tests.support.programs import only
from tests.support.toys import HIDDEN, Feed, Plain, Sliced, Stack, toy

FIRST, SECOND = [1, 4, 5, 9], [0, 4, 9]
ORDER = [1, 5, 4, 9, 0, 2, 3, 6, 7, 8]


@pytest.fixture(scope="module")
def plain() -> Program:
    return toy(Stack([Feed(Plain()), Feed(Plain())]))


@pytest.fixture(scope="module")
def sliced() -> Program:
    return toy(Stack([Feed(Sliced())]))


def weights(program: Program, block: int = 0) -> dict[str, Tensor]:
    prefix = f"blocks.{block}.inner."
    return {
        name.removeprefix(prefix): tensor.detach()
        for name, tensor in program.exported.state_dict.items()
        if name.startswith(prefix)
    }


def inside(part: Tensor, whole: Tensor) -> bool:
    start = part.data_ptr() - whole.data_ptr()
    return 0 <= start <= start + part.nbytes <= whole.nbytes


def test_the_order_is_first_both_second_neither(plain: Program) -> None:
    (after,), records = PassManager((OrderNeurons("stack", {0: FIRST}, {0: np.array(SECOND)}),)).run(plain)
    old, new = weights(plain), weights(after)
    assert torch.equal(new["up.weight"], old["up.weight"][ORDER])
    assert torch.equal(new["up.bias"], old["up.bias"][ORDER])
    assert torch.equal(new["down.weight"], old["down.weight"][:, ORDER])
    assert new["down.weight"].t().is_contiguous()
    assert weights(after, 1)["up.weight"].data_ptr() == weights(plain, 1)["up.weight"].data_ptr()
    assert records[0].changes == ("block 0 of stack stack: ordered 10 neurons",)


_KEPT = st.one_of(st.none(), st.sets(st.integers(0, HIDDEN - 1), min_size=1).map(sorted))


@settings(max_examples=12, deadline=None)
@given(first=_KEPT, second=_KEPT)
def test_what_a_task_keeps_is_a_range_of_the_same_neurons(
    first: list[int] | None, second: list[int] | None, plain: Program
) -> None:
    """Pruned after ordering gives what is pruned without, from memory of the whole weights."""
    kept = [{} if neurons is None else {1: neurons} for neurons in (first, second)]
    whole = only(OrderNeurons("stack", *kept).call(plain))
    x = plain.sample
    assert relative_error(whole.run(x)["y"], plain.run(x)["y"]) <= 1e-5
    for neurons, places in zip((first, second), kept_ranges(first, second), strict=True):
        assert (neurons is None) == (places is None)
        if neurons is None or places is None:
            continue
        expected = only(PruneFFN("stack", {1: neurons}).call(plain))
        pruned = only(PruneFFN("stack", {1: places}).call(whole))
        assert relative_error(pruned.run(x)["y"], expected.run(x)["y"]) <= 1e-5
        for name, tensor in weights(whole, 1).items():
            if name != "down.bias":
                assert sorted(weights(pruned, 1)[name].flatten()) == sorted(
                    weights(expected, 1)[name].flatten()
                )
                assert inside(weights(pruned, 1)[name], tensor)


def test_a_fused_layer_is_ordered_in_each_half(sliced: Program) -> None:
    """Its pruned weights are copies, since they are two ranges, and the change says so."""
    (after,), _ = PassManager((OrderNeurons("stack", {0: FIRST}, {}),)).run(sliced)
    (pruned,), records = PassManager((PruneFFN("stack", {0: range(4)}),)).run(after)
    expected = only(PruneFFN("stack", {0: FIRST}).call(sliced))
    x = sliced.sample
    assert relative_error(pruned.run(x)["y"], expected.run(x)["y"]) <= 1e-5
    assert inside(weights(pruned)["down.weight"], weights(after)["down.weight"])
    assert not inside(weights(pruned)["both.weight"], weights(after)["both.weight"])
    assert "partly as copies: one layer makes several of each neuron" in records[0].changes[0]


def test_nothing_to_order_is_no_change(plain: Program) -> None:
    for first, second in (({}, {}), ({0: range(HIDDEN)}, {0: range(HIDDEN)}), ({}, {1: range(HIDDEN)})):
        assert only(OrderNeurons("stack", first, second).call(plain)) is plain


def test_programs_share_ordered_weights(plain: Program) -> None:
    order = OrderNeurons("stack", {0: FIRST}, {})
    twice = [weights(only(order.call(plain))) for _ in range(2)]
    assert {t.data_ptr() for t in twice[0].values()} == {t.data_ptr() for t in twice[1].values()}
    unused = OrderNeurons("stack", {0: FIRST}, {})
    assert Job("a job", (order,)).fingerprint() == Job("a job", (unused,)).fingerprint()


def test_weights_that_another_block_reads_are_left_to_it() -> None:
    shared = Plain()
    program = toy(Stack([Feed(shared), Feed(shared)]))
    (after,), records = PassManager((OrderNeurons("stack", {1: FIRST}, {}),)).run(program)
    assert relative_error(after.run(after.sample)["y"], program.run(program.sample)["y"]) <= 1e-5
    assert records[0].changes[0].endswith("keep the weights in their old order, so they are there twice")


@pytest.mark.parametrize(
    ("first", "message"),
    [({5: [0]}, "no block 5"), ({0: [3, 2]}, "ascending order"), ({0: [10]}, "from 0 to 9")],
)
def test_impossible_decisions_are_named(plain: Program, first: dict, message: str) -> None:
    with pytest.raises(PassError, match=message):
        OrderNeurons("stack", first, {}).call(plain)
