"""An operator is called once for each kind of operands, and what it gives is as if it was called each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

from flashu_compile.program.program import Program
from flashu_compile.program.repeated_calls import RepeatedCalls

_aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Counts the calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def fake(mode: FakeTensorMode, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a fake tensor with a symbol for its first size."""
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    return mode.from_tensor(torch.zeros((rows, 4), dtype=dtype), symbolic_context=context)


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


class Plain(fx.Interpreter):
    """Keeps the value of every node, with each operator called as it is."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)


class Repeated(Plain):
    """The same through `RepeatedCalls`."""

    calls = RepeatedCalls()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.calls.call(target, args, kwargs)


def described(value: object) -> object:
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return value.dtype, value.device, [str(size) for size in sizes]
    return [described(v) for v in value] if isinstance(value, list | tuple) else str(value)


@pytest.mark.parametrize("name", ["denoise", "understand"])
def test_values_are_those_of_calls_that_are_all_made(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name)
    module = program.exported.graph_module
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    found, calls = [], []
    for interpreter in (Plain(module), Repeated(module), Repeated(module)):
        with inputs[0].fake_mode, torch.no_grad(), enable_python_dispatcher(), Counter() as counter:
            interpreter.run(*inputs, enable_io_processing=False)
        values = interpreter.env.values()
        found.append({node: described(value) for node, value in interpreter.env.items()})
        calls.append(counter.count)
        tensors = [v for v in values if isinstance(v, Tensor)]
        assert len({id(v) for v in tensors}) >= len(tensors) - len(inputs)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(module.graph.nodes)
    assert calls[1] < 0.75 * calls[0]  # two layers, and what is around them
    assert calls[2] < 0.5 * calls[1]


def test_each_call_gives_a_tensor_of_its_own(mode: FakeTensorMode) -> None:
    x, calls = fake(mode, 5), RepeatedCalls()
    with mode, Counter() as counter:
        first = calls.call(_aten.split.Tensor, (x, 2, 1), {})
        made = counter.count
        second = calls.call(_aten.split.Tensor, (x, 2, 1), {})
    assert counter.count == made > 0
    assert len({id(part) for part in (*first, *second)}) == 4
    assert described(first) == described(second)
    assert str(first[0].shape[0]) == str(x.shape[0])


def test_operands_of_another_kind_are_another_call(mode: FakeTensorMode) -> None:
    x, whole = fake(mode, 5), fake(mode, 5, torch.int64)
    calls = RepeatedCalls()
    with mode:
        columns = [(x.t(), 2), (x.t().contiguous(), 2)]
        given: list[Any] = [(x, x), (x, x[:, :1]), *columns, (whole, 2), (whole, 2.0), (whole, True)]
        for a, b in given * 2:
            expected = _aten.mul.Tensor(a, b)
            assert described(calls.call(_aten.mul.Tensor, (a, b), {})) == described(expected)
    assert calls.call(_aten.mul.Tensor, (whole, 2.0), {}).dtype == torch.float32
    assert calls.call(_aten.mul.Tensor, (whole, 2), {}).dtype == torch.int64


def test_tensors_of_another_mode_are_another_call(mode: FakeTensorMode) -> None:
    other, calls = FakeTensorMode(shape_env=ShapeEnv()), RepeatedCalls()
    for one in (mode, other, mode):
        with one:
            result: Any = calls.call(_aten.neg.default, (fake(one, 5),), {})
        assert result.fake_mode is one


def test_what_is_not_a_new_tensor_by_metadata_is_called_each_time(mode: FakeTensorMode) -> None:
    x, calls = fake(mode, 5), RepeatedCalls()
    with mode:
        masks = x > 0, x > 0  # one and the same mask has one number of rows
        for _ in range(2):
            assert calls.call(_aten.add_.Tensor, (x, 1), {}) is x
            same = torch.ops.aten.contiguous.default
            assert calls.call(same, (x,), {}) is x
            assert calls.call(_aten.sym_size.int, (x, 0), {}).node.expr == x.shape[0].node.expr
        counts = [calls.call(_aten.index.Tensor, (x, [mask]), {}).shape[0] for mask in masks]
    assert str(counts[0]) != str(counts[1])


def test_sizes_that_follow_from_values_are_those_of_one_call(mode: FakeTensorMode) -> None:
    with mode:
        repeats = [torch.ones(3, dtype=torch.int64) for _ in range(2)]
        calls = RepeatedCalls()
        counts = [
            calls.call(_aten.repeat_interleave.self_Tensor, (torch.zeros(3), each), {}).shape[0]
            for each in repeats
        ]
    assert str(counts[0]) != str(counts[1])


def test_another_default_dtype_is_another_call(mode: FakeTensorMode) -> None:
    whole, calls = fake(mode, 5, torch.int64), RepeatedCalls()
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            with mode:
                assert calls.call(_aten.div.Tensor, (whole, whole), {}).dtype == dtype
    finally:
        torch.set_default_dtype(before)


def test_calls_by_name_go_through_it_while_it_is_entered(mode: FakeTensorMode) -> None:
    x, calls = fake(mode, 5), RepeatedCalls()
    with mode, Counter() as counter, calls:
        results = [_aten.neg.default(x) for _ in range(3)]
    assert counter.count == 1
    assert len({id(result) for result in results}) == 3
