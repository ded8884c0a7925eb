"""The structures that the analyses find in a model's programs, and why others are missing, as plain data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack

from torch import Tensor, fx, nn

from flashu_compile.compiler.captured import CapturedModel, ModelParts
from flashu_compile.compiler.progress import Progress, ProgressReporter
from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.attention import Attention, attention_sites
from flashu_compile.passes.analysis.blocks import Block, residual_blocks
from flashu_compile.passes.analysis.dependence import depends_on
from flashu_compile.passes.analysis.feed_forward import FeedForward, feed_forwards
from flashu_compile.passes.analysis.graph import value_flow
from flashu_compile.passes.analysis.regions import upstream
from flashu_compile.passes.analysis.span import visual_span
from flashu_compile.passes.cutting import outputs_after
from flashu_compile.passes.reuse_features import ReuseFeatures
from flashu_compile.program.program import Program, Role

Shape = tuple[int | str, ...]
_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True)
class TensorFacts:
    """An input or output. `shape` names dynamic dimensions; `reads` are inputs whose values an output depends on."""

    role: str
    shape: Shape
    reads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FeedForwardFacts:
    """An FFN. `kind`: plain (one up projection), or gated (two; or one for both if `fused`)."""

    kind: str
    width: int
    fused: bool


@dataclasses.dataclass(frozen=True)
class AttentionFacts:
    """An attention. `rotary`: whether queries and keys are rotated by tables from outside the block."""

    heads: int
    kv_heads: int
    head_size: int | None
    masked: bool
    rotary: bool


@dataclasses.dataclass(frozen=True)
class BlockFacts:
    """A residual block: the nodes where the residual stream enters and leaves, and the layers between."""

    index: int
    entry: str
    exit: str
    feed_forward: FeedForwardFacts | None
    attention: tuple[AttentionFacts, ...]


@dataclasses.dataclass(frozen=True)
class StackFacts:
    """A stack of residual blocks below module path `root`, `width` wide. `decoder`: it attends over all rows."""

    name: str
    root: str
    width: int | str
    blocks: tuple[BlockFacts, ...]
    decoder: bool


@dataclasses.dataclass(frozen=True)
class SpanFacts:
    """The rows of the picture: how many, in which node, and how many pieces of rows stand before and after them."""

    length: int
    rows: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class HeadFacts:
    """Features that a head cache can store. `gives`: outputs computed from them; `beside`: other inputs these need.

    `stack` is the last one they come from, None where no stack was found before them.
    """

    stack: str | None
    shape: Shape
    gives: tuple[str, ...]
    beside: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class NotFound:
    """A structure that was not found, and the reason."""

    what: str
    why: str


@dataclasses.dataclass(frozen=True)
class ProgramStructure:
    """All structures found in one captured program."""

    name: str
    task: str
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    stacks: tuple[StackFacts, ...]
    visual_span: SpanFacts | None
    head: HeadFacts | None
    not_found: tuple[NotFound, ...]


def model_structure(
    model: nn.Module | str | Path,
    tasks: Sequence[str],
    *,
    progress: Progress | None = None,
    **parts: Unpack[ModelParts],
) -> tuple[ProgramStructure, ...]:
    """Return the structure of every captured program of `tasks` that has stacks. Arguments are as for `export`.

    No `tasks` are all that the model has.

    Raises `FlashuError` if the model cannot be loaded or captured; a missing structure is not an error.
    """
    tell = ProgressReporter(progress)
    source = CapturedModel.load(model, tasks, tell, **parts)
    programs = [captured for captured in source.programs.values() if captured.spec.stacks]
    found = []
    for index, captured in enumerate(programs):
        tell.fraction = (index + 0.1) / (len(programs) + 0.1)
        found.append(program_structure(captured.program))
    tell("done", 1.0)
    return tuple(found)


def program_structure(program: Program) -> ProgramStructure:
    """Run every analysis on `program` and return what it finds."""
    not_found: list[NotFound] = []

    def look(what: str, analysis: Callable[..., _Found], *arguments: Any) -> _Found | None:
        try:
            return analysis(program, *arguments)
        except StructureError as error:
            not_found.append(NotFound(what, str(error)))
            return None

    stacks, exits = [], {}
    for name, root in program.stacks.items():
        blocks = look(f"stack {name}", residual_blocks, name)
        if blocks is None:
            continue
        groups = look(f"FFN groups of {name}", feed_forwards, name) or ()
        sites = look(f"attention of {name}", attention_sites, name) or ()
        width = _shape(program, blocks[-1].exit)[-1]
        facts = tuple(_block(b, groups, sites) for b in blocks)
        stacks.append(StackFacts(name, root, width, facts, decoder=name == program.decoder))
        exits[name] = blocks[-1].exit
    inputs, outputs = _signature(program)
    return ProgramStructure(
        name=program.name,
        task=program.task,
        inputs=inputs,
        outputs=outputs,
        stacks=tuple(stacks),
        visual_span=look("visual span", _span),
        head=look("head features", _head, exits),
        not_found=tuple(not_found),
    )


def _block(block: Block, groups: Sequence[FeedForward], sites: Sequence[Attention]) -> BlockFacts:
    group = next((g for g in groups if g.block == block.index), None)
    return BlockFacts(
        index=block.index,
        entry=block.entry.name,
        exit=block.exit.name,
        feed_forward=None if group is None else _feed_forward(group),
        attention=tuple(
            AttentionFacts(
                heads=site.heads,
                kv_heads=site.kv_heads,
                head_size=_static(site.value.meta["val"].shape[-1]),
                masked=site.mask is not None,
                rotary=bool(site.rotary),
            )
            for site in sites
            if site.block == block.index
        ),
    )


def _feed_forward(group: FeedForward) -> FeedForwardFacts:
    ups = len(group.parts) if group.fused else len(group.ups)
    return FeedForwardFacts("plain" if ups == 1 else "gated", group.width, group.fused)


def _signature(program: Program) -> tuple[tuple[TensorFacts, ...], tuple[TensorFacts, ...]]:
    signature = program.exported.graph_signature
    nodes = {node.name: node for node in program.exported.graph.nodes}
    reads = depends_on(program)
    inputs = tuple(
        TensorFacts(str(role), _shape(program, nodes[name]))
        for role, name in zip(program.input_roles, signature.user_inputs, strict=True)
    )
    outputs = tuple(
        TensorFacts(
            str(role),
            _shape(program, nodes[name]),
            tuple(str(r) for r in program.input_roles if r in reads[nodes[name]]),
        )
        for role, name in zip(program.outputs, signature.user_outputs, strict=True)
    )
    return inputs, outputs


def _span(program: Program) -> SpanFacts:
    span = visual_span(program)
    return SpanFacts(span.length, span.rows.name, len(span.before), len(span.after))


def _head(program: Program, exits: Mapping[str, fx.Node]) -> HeadFacts:
    """Describe the features that can be reused. Raises `StructureError` where nothing can be."""
    reason = ReuseFeatures().requires(program)
    if reason is not None:
        raise StructureError(f"{reason[0].upper()}{reason[1:]}.")
    flow = value_flow(program)
    nodes = dict(zip(program.outputs, program.exported.graph.output_node().args[0], strict=True))
    features = nodes[Role.HEAD_FEATURES]
    earlier = upstream(flow, [features])
    position = {node: index for index, node in enumerate(flow)}
    before = [name for name, node in exits.items() if node in earlier]
    gives = outputs_after(program, Role.HEAD_FEATURES)
    read = upstream(flow, [nodes[role] for role in gives], through=lambda node: node is not features)
    users = program.exported.graph_signature.user_inputs
    names = {node.name for node in read}
    return HeadFacts(
        stack=max(before, key=lambda name: position[exits[name]], default=None),
        shape=_shape(program, features),
        gives=tuple(map(str, gives)),
        beside=tuple(
            str(role) for role, user in zip(program.input_roles, users, strict=True) if user in names
        ),
    )


def _shape(program: Program, node: fx.Node) -> Shape:
    """Return the sizes of a value; a dynamic one in the names that the inputs give their dimensions."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    names = _dimension_names(program)

    def named(size: object) -> int | str:
        number = _static(size)
        return re.sub(r"\w+", lambda m: names.get(m[0], m[0]), str(size)) if number is None else number

    return tuple(named(size) for size in value.shape)


def _dimension_names(program: Program) -> dict[str, str]:
    """Return the names of dynamic dimensions by their symbols; one may be a number of times a symbol."""
    nodes = {node.name: node for node in program.exported.graph.find_nodes(op="placeholder")}
    users = program.exported.graph_signature.user_inputs
    return {
        str(size).rpartition("*")[2]: axis.rpartition(" * ")[2]
        for given, user in zip(program.inputs, users, strict=True)
        for axis, size in zip(given.axes, nodes[user].meta["val"].shape, strict=True)
        if axis is not None
    }


def _static(size: object) -> int | None:
    return size if isinstance(size, int) else None
