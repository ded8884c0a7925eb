"""Giving a dimension of an input a size of its own, where it was computed from those of other inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx import traceback
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from flashu_compile.errors import PassError
from flashu_compile.passes.analysis.graph import live_nodes
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.retracing import retraced
from flashu_compile.program.program import Program


def with_own_size(program: Program, role: str, dim: int) -> GraphEditor:
    """Return an editor of the program in which dimension `dim` of input `role` has a size that no other input has.

    Raises `PassError` where a value depends on a part of that size, which the input does not tell.
    """
    editor = GraphEditor(program)
    node = editor.user_inputs()[role]
    value, sample = node.meta["val"], program.sample[role]
    old = value.shape[dim].node.expr
    node.meta = node.meta | {"val": _fresh(value, sample, dim)}
    new, shapes = node.meta["val"].shape[dim].node.expr, value.shape[dim].node.shape_env
    editor.ranges[new] = shapes.var_to_range[new] = shapes.bound_sympy(old)
    changed = editor.finish()
    part = next((s for s in sorted(old.free_symbols, key=str) if s not in (old - s).free_symbols), None)
    if part is None:
        raise PassError(f"the size {old} of '{role}' is no sum with one of the program's dimensions")
    given = {part: new - (old - part)}
    gone = old.free_symbols - {s for n in _others(editor, role) for s in _symbols(n.meta["val"])}

    def size(found: torch.SymInt) -> int | torch.SymInt:
        expression = sympy.expand(found.node.expr.subs(given))
        if expression.is_Integer:
            return int(expression)
        if left := expression.free_symbols & gone:
            raise PassError(f"the size {expression} depends on {left.pop()}, which '{role}' does not tell")
        return shapes.create_symintnode(expression, hint=found.node.hint)

    def run(placeholders: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        values: dict[fx.Node, Any] = dict(placeholders)
        live = live_nodes(changed.exported.graph)

        def value_of(source: fx.Node) -> Any:
            found = source.meta["val"]
            return size(found) if isinstance(found, torch.SymInt) else values[source]

        for one in changed.exported.graph.nodes:
            # Sizes are made where they are read: those that others are computed from may not be there any longer.
            if one.op != "call_function" or one not in live or isinstance(one.meta["val"], torch.SymInt):
                continue
            with traceback.set_current_meta(one):
                arguments, keywords = fx.map_arg((one.args, one.kwargs), value_of)
                values[one] = one.target(*arguments, **keywords)
        return [values[result] for result in changed.exported.graph.output_node().args[0]]

    return retraced(changed, run)


def _fresh(value: Tensor, sample: Tensor, dim: int) -> Tensor:
    """Make a fake tensor like `value` with a size of its own in one dimension; `sample` is one of its values."""
    mode = torch._guards.detect_fake_mode([value])
    assert mode is not None, "the values of a graph are fake"
    sizes: list[Any] = list(value.shape)
    dynamic = [DimDynamic.STATIC] * sample.ndim
    dynamic[dim] = DimDynamic.DYNAMIC
    context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic, constraint_sizes=[None] * sample.ndim)
    sizes[dim] = mode.from_tensor(sample.clone(), symbolic_context=context).shape[dim]
    with mode:
        return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _others(editor: GraphEditor, role: str) -> list[fx.Node]:
    """List the placeholders of the other inputs whose values are read."""
    return [
        node
        for name, node in editor.user_inputs().items()
        if name != role and any(user.target is not torch.ops.aten.sym_size.int for user in node.users)
    ]


def _symbols(value: Tensor) -> set[sympy.Symbol]:
    """Return the symbols in the sizes of a value."""
    sizes: list[Any] = list(value.shape)
    return {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
