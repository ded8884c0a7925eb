"""The visual span: which rows of a sequence are a picture's, and which values precede and follow them.

Found forwards from the value with the role of image embeddings, be it an input or an output: through
pointwise operators on that value alone to the concatenation along its rows, and on through every
concatenation that this is an operand of.
"""

from __future__ import annotations

import dataclasses

import networkx as nx
import torch
from torch import fx

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.graph import dimension, is_pointwise, size, value_flow
from flashu_compile.passes.analysis.regions import downstream
from flashu_compile.program.program import Program, Role

_CAT = torch.ops.aten.cat.default
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.alias.default)


@dataclasses.dataclass(frozen=True)
class VisualSpan:
    """The rows of a picture in a sequence.

    `rows` [b, rows, width] concatenates the values `before`, `image` and the values `after` along `axis`.
    `image` holds the `length` rows of the picture, the same number for every element of the batch.
    """

    rows: fx.Node
    axis: int
    before: tuple[fx.Node, ...]
    image: fx.Node
    length: int
    after: tuple[fx.Node, ...]


def visual_span(program: Program) -> VisualSpan:
    """Find the one visual span.

    Raises `StructureError` where there is none, several, or one of unknown length.
    """
    if (reason := no_fixed_length(program)) is not None:
        raise StructureError(f"There is no visual span: {reason}.")
    embeds = _image_embeds(program)
    axis = embeds.meta["val"].ndim - 2
    length = size(embeds, axis)
    if length is None:
        raise StructureError(
            f"The visual span of program {program.name!r} has no fixed length: {embeds.name} "
            f"('{Role.IMAGE_EMBEDS}') must have a static size in dimension {axis}."
        )
    flow = value_flow(program)
    span: VisualSpan | None = None
    while True:
        whole = embeds if span is None else span.rows
        copies = _copies(flow, whole)
        cats = [user for user in flow if user.target is _CAT and dimension(user) == axis]
        uses = [(cat, place) for cat in cats for place, part in enumerate(cat.args[0]) if part in copies]
        if not uses:
            break
        if len(uses) > 1:
            raise StructureError(
                f"Looked for the one place of {whole.name} among the rows of program {program.name!r} and found "
                f"several: in {', '.join(cat.name for cat, _ in uses)}."
            )
        cat, place = uses[0]
        parts = tuple(cat.args[0])
        head, part, tail = parts[:place], parts[place], parts[place + 1 :]
        if span is None:
            span = VisualSpan(cat, axis, head, part, length, tail)
        else:
            span = dataclasses.replace(
                span, rows=cat, before=(*head, *span.before), after=(*span.after, *tail)
            )
    if span is None:
        raise StructureError(
            f"Looked for the visual span of program {program.name!r}, a concatenation of {embeds.name} "
            f"('{Role.IMAGE_EMBEDS}') with other rows along dimension {axis}, and found none."
        )
    return span


def no_fixed_length(program: Program) -> str | None:
    """Return that pictures differ in their number of rows, where the program reads them as ids among others."""
    if Role.CONTEXT_IDS not in program.outputs:
        return None
    return f"pictures differ in their number of rows in program {program.name!r}, and tokens are chosen of a fixed one"


def _image_embeds(program: Program) -> fx.Node:
    """Find the value with the role of image embeddings. Raises `StructureError` if there is none."""
    graph = program.exported.graph
    named = dict(zip(program.input_roles, program.exported.graph_signature.user_inputs, strict=True))
    named |= dict(zip(program.outputs, program.exported.graph_signature.user_outputs, strict=True))
    if Role.IMAGE_EMBEDS not in named:
        raise StructureError(
            f"Program {program.name!r} has no visual span: none of its inputs ({', '.join(program.input_roles)}) "
            f"and outputs ({', '.join(program.outputs)}) is '{Role.IMAGE_EMBEDS}'."
        )
    return next(node for node in graph.nodes if node.name == named[Role.IMAGE_EMBEDS])


def _copies(flow: nx.DiGraph, start: fx.Node) -> set[fx.Node]:
    """Return `start` and every value computed from it alone by copies, casts and other pointwise operators."""

    def is_copy(node: fx.Node) -> bool:
        return flow.in_degree(node) == 1 and (is_pointwise(node) or node.target in _COPIES)

    met = downstream(flow, [start], through=is_copy)
    return {start, *filter(is_copy, met)}
