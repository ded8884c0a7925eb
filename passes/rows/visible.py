"""Whether rows see rows that come later: what the masks of a program's attention forbid, for all lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx

from flashu_compile.passes.analysis.attention import attention_mask
from flashu_compile.passes.analysis.sizes import Sizes
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.retracing import retraced
from flashu_compile.passes.rows.interpreter import RowInterpreter
from flashu_compile.passes.rows.operators import pointwise
from flashu_compile.passes.rows.rules import RULES
from flashu_compile.passes.rows.segmented import Space
from flashu_compile.program.program import Program

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def sees_later(program: Program, space: Space, sizes: Sizes) -> bool:
    """Tell whether a row of a segment of `space` may see one of a later segment in any attention over all its rows.

    What no mask is proved to forbid may be seen.
    """
    masks = []
    for node in program.exported.graph.find_nodes(op="call_function", target=_ATTENTION):
        key, mask = cast("fx.Node", node.args[1]), attention_mask(node)
        if sizes.shape(key.meta["val"])[-2] != space.total:
            continue
        if mask is None or mask.meta["val"].dtype != torch.bool:
            return True
        masks.append(mask.name)
    if not masks:
        return False
    editor = GraphEditor(program)
    named = {node.name: node for node in editor.graph.nodes}
    wanted = [named[name] for name in dict.fromkeys(masks)]
    editor.set_outputs(wanted)
    interpreter = RowInterpreter(editor.graph, sizes, space, RULES, pointwise)
    nodes = editor.graph.find_nodes(op="placeholder")

    def run(values: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        return interpreter.run(dict(zip(nodes, values.values(), strict=True)))

    retraced(program, run)
    for mask in wanted:
        value = interpreter.values[mask]
        rows, columns = value.sample.ndim - 2, value.sample.ndim - 1
        if not {rows, columns} <= set(value.spaces):
            return True
        places = list(value.spaces)
        for segments, part in value.parts.items():
            later = segments[places.index(columns)] > segments[places.index(rows)]
            if later and not part.fact.is_false:
                return True
    return False
