"""Drop visual tokens after a layer of the decoder; every later layer runs on the rows that are left. Lossy.

Looks for the visual span (`analysis.span`), the residual blocks and the attention of the layer. Inserts after
the layer's exit: scores of the span's tokens from the layer's own keys and values (`token_scorers`), top-k,
and the index of the kept rows in their old order. Every value that is computed before that point and read
after it is gathered at the index along its rows (`row_gather`): hidden states, rotary tables, masks on both
dimensions. So kept rows keep their positions, and text is never dropped.

Order among passes: before `RemoveLayers`, since both count the blocks of the program they are given
(`skipped` names those that will be removed); before or after `PruneFFN`, which changes no rows; before
`SplitAtOutput` in a list of passes, since a list runs every pass on every program and the visual part has no
rows to drop. On the language part alone, after a split, it does the same.

Source: v-norm token pruning of Flash-Unified (arXiv 2603.15271), for understanding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, fx

from flashu_compile.errors import ConfigurationError, PassError, StructureError
from flashu_compile.passes.analysis.attention import Attention, attention_sites
from flashu_compile.passes.analysis.blocks import Block, residual_blocks
from flashu_compile.passes.analysis.graph import node_flow
from flashu_compile.passes.analysis.regions import downstream
from flashu_compile.passes.analysis.span import VisualSpan, no_fixed_length, visual_span
from flashu_compile.passes.base import Kind, Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.inlining import inline
from flashu_compile.passes.row_gather import RowGather
from flashu_compile.passes.token_scorers import SCORERS, Score
from flashu_compile.program.program import Program
from flashu_compile.recipe.decisions import Layers

_SCOPE = "gather_tokens"
#: 0.29 of 100 tokens are 29, though 0.29 * 100 is a little less.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class GatherTokens(Pass):
    """Drop the ⌊ratio · length⌋ tokens of the visual span that `scorer` scores highest, after the decoder's `layer`.

    The layer itself runs on all rows. If it is in `skipped`, by stack, tokens are scored at the next layer that is not.
    `ratio` is in [0, 1); 0 leaves the program as it is, and so does, declining, a ratio of less than one
    token. Raises `ConfigurationError` on a value out of range.
    """

    kind: ClassVar[Kind] = "lossy"
    technique: ClassVar[str | None] = "token pruning"

    layer: int
    ratio: float
    scorer: str = "v_norm"
    skipped: Layers = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ConfigurationError(
                f"The ratio of visual tokens to drop must be in [0, 1), not {self.ratio}."
            )
        if self.layer < 0:
            raise ConfigurationError(f"Layers are counted from 0; {self.layer} cannot drop tokens.")
        if self.scorer not in SCORERS:
            raise ConfigurationError(
                f"Unknown token scorer {self.scorer!r}; known ones are: {', '.join(SCORERS)}."
            )

    def call(self, program: Program) -> PassResult:
        """Insert scores, top-k and the index of kept rows after the layer, and gather what is read after it."""
        if self.ratio == 0:
            return PassResult.unchanged(program)
        if (reason := no_fixed_length(program)) is not None:
            return PassResult.declined(program, reason)
        block, site, span = self._find(program)
        dropped = math.floor(self.ratio * span.length + _ROUNDING)
        if not dropped:
            nothing = f"dropped no token: {self.ratio} of {span.length} visual tokens is less than one"
            return PassResult.declined(program, nothing)
        editor = GraphEditor(program)
        editor.remove_unused()
        copies = {node.name: node for node in editor.graph.nodes}
        exit_node = copies[block.exit.name]
        behind = _behind(exit_node)
        score = SCORERS[self.scorer](span.length, span.length - dropped)
        index = inline(
            editor,
            _kept_rows(score, span, dropped),
            [copies[node.name] for node in (site.key, site.value, *span.before)],
            after=exit_node,
            scope=_SCOPE,
        )
        rows = RowGather(editor, exit_node, index, last_stays=bool(span.after), scope=_SCOPE)
        gathered = rows.cross(behind)
        editor.remove_unused()
        changes = (
            f"after layer {block.index} of stack {block.stack}, {dropped} of {span.length} visual tokens are dropped "
            f"by {self.scorer}",
            f"gathered {', '.join(gathered)}",
        )
        return PassResult((editor.finish(),), changes)

    def _find(self, program: Program) -> tuple[Block, Attention, VisualSpan]:
        """Find the block whose attention scores the tokens, that attention, and the visual span.

        Raises `PassError` if no layer from `layer` on runs, and `StructureError` if the block does not have
        one attention over a dynamic number of rows, that of the span.
        """
        span = visual_span(program)
        stack = program.decoder
        blocks, skipped = residual_blocks(program, stack), self.skipped.get(stack, ())
        running = [block for block in blocks[self.layer :] if block.index not in skipped]
        if not running:
            raise PassError(
                f"tokens cannot be dropped at layer {self.layer} of stack {stack!r} in program "
                f"{program.name!r}: it has {len(blocks)} layers, and none from there on runs"
            )
        block = running[0]
        sites = [site for site in attention_sites(program, stack) if site.block == block.index]
        where = f"layer {block.index} of stack {stack!r} in program {program.name!r}"
        if len(sites) != 1:
            raise StructureError(f"Looked for one attention in {where} and found {len(sites)}.")
        total = span.rows.meta["val"].shape[span.axis]
        found = [sites[0].key.meta["val"].shape[2], block.exit.meta["val"].shape[1]]
        if not isinstance(total, torch.SymInt) or any(str(size) != str(total) for size in found):
            raise StructureError(
                f"Looked for a dynamic number of rows, that of the visual span ({total}, at {span.rows.name}), "
                f"in {where}, and found {found[1]}."
            )
        return block, sites[0], span


def _behind(boundary: fx.Node) -> list[fx.Node]:
    """List every operator that depends on `boundary`, in graph order."""
    following = downstream(node_flow(boundary.graph), [boundary]) - {boundary}
    return sorted(node for node in following if node.op == "call_function")


def _kept_rows(score: Score, span: VisualSpan, dropped: int) -> Callable[..., Tensor]:
    """Make a function from keys and values [b, kv_heads, rows, d] and the span's `before` to kept rows [b, kept]."""
    length = span.length

    def kept_rows(key: Tensor, value: Tensor, *before: Tensor) -> Tensor:
        sizes = [segment.shape[span.axis] for segment in before]
        start = sum(sizes[1:], *sizes[:1])
        scores = score(key.narrow(2, start, length), value.narrow(2, start, length))
        worst = scores.topk(dropped, dim=1).indices
        # Counted in floats, as wherever there is a running sum: whole numbers below 2^24 are exact.
        stays = torch.ones_like(scores).scatter(1, worst, 0.0)
        # The j-th token kept stands where more than j have been counted, and not before. (Sorting the places of a
        # top-k of those kept would be a second top-k in ONNX.)
        counted = stays.cumsum(1).to(torch.int64)
        kept = (counted[:, None] <= torch.arange(length - dropped)[:, None]).sum(-1)
        kept = kept.clamp(max=length - 1)  # as it is anyway; said for whoever must know which rows are picked
        parts = [kept + start]
        if span.before:
            parts.insert(0, torch.arange(start).expand(kept.shape[0], -1))
        if span.after:
            end = start + length
            parts.append((torch.arange(value.shape[2] - end) + end).expand(kept.shape[0], -1))
        return torch.cat(parts, dim=1)

    return kept_rows
