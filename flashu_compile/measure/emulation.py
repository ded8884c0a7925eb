"""Emulate a recipe on a captured program by changing values while it runs, instead of compiling it.

Neurons that are pruned are set to zero, the output of a skipped layer is its input, dropped tokens are hidden
from every later attention, cached features replace those of a step. In real arithmetic that is what the
engines of the recipe compute, without their speed: it measures one technique at a time without building
engines for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import networkx as nx
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.measure.recorder import Recorder
from flashu_compile.passes.analysis.attention import attention_sites
from flashu_compile.passes.analysis.blocks import residual_blocks
from flashu_compile.passes.analysis.feed_forward import feed_forwards
from flashu_compile.passes.analysis.graph import node_flow
from flashu_compile.passes.analysis.regions import upstream
from flashu_compile.passes.analysis.span import no_fixed_length, visual_span
from flashu_compile.passes.token_scorers import SCORERS
from flashu_compile.program.program import Program, Role
from flashu_compile.recipe.config import MMUConfig
from flashu_compile.recipe.decisions import Decisions, Layers
from flashu_compile.recipe.plan import Variant, variants
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.tasks import REUSE, T2I


@dataclasses.dataclass(frozen=True, eq=False)
class Edits:
    """The changes to a captured program. `kept`: masks [width] of neurons, by the name of the hidden value."""

    kept: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)  # a layer's exit → its entry
    tokens: DroppedTokens | None = None


class Emulator(Recorder):
    """Runs the program under `edits`; nodes that no output in `wanted` depends on are left out."""

    def __init__(self, program: Program, wanted: tuple[str, ...], edits: Edits) -> None:
        super().__init__(program, {})
        self._edits, self._wanted = edits, wanted
        self._roles = dict(zip(program.outputs, program.exported.graph_signature.user_outputs, strict=True))
        self._flow = _flow(program, edits.skipped)
        self._entries = frozenset(edits.skipped.values())
        self._passed: dict[str, Any] = {}
        self._needed_by: dict[frozenset[str], set[str]] = {}

    @property
    def tokens(self) -> DroppedTokens | None:
        """Return the edit that drops tokens, or None."""
        return self._edits.tokens

    def emulate(
        self, inputs: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the wanted outputs by role.

        `given` replaces outputs, by role, for everything that depends on them.
        """
        self._overrides = {self._roles[role]: value for role, value in (given or {}).items()}
        replaced = frozenset(self._overrides)
        if replaced not in self._needed_by:
            self._needed_by[replaced] = self._ancestors()
        self._needed = self._needed_by[replaced]
        outputs = self.record(inputs)
        self._passed.clear()
        return {role: outputs[role] for role in self._wanted}

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node under the edits, or return None if nothing wanted depends on it."""
        if n.op == "call_function" and n.name not in self._needed:
            return None
        value = self._value(n)
        if n.name in self._entries:  # the interpreter forgets it before the layer ends
            self._passed[n.name] = value
        if self._edits.tokens is not None:
            self._edits.tokens.see(n.name, value)
        return value

    def _value(self, node: fx.Node) -> Any:
        tokens = self._edits.tokens
        if node.name in self._edits.skipped:
            return self._passed[self._edits.skipped[node.name]]
        if tokens is not None and node.name in tokens.attentions:
            return tokens.attend(*self.fetch_args_kwargs_from_env(node))
        value = super().run_node(node)
        kept = self._edits.kept.get(node.name)
        return value if kept is None else value * kept.to(value.dtype)

    def _ancestors(self) -> set[str]:
        """Return the names of the nodes that wanted outputs depend on, with layers skipped and values given."""
        tokens, skipped = self._edits.tokens, self._edits.skipped
        wanted = [self._roles[role] for role in self._wanted] + list(tokens.watched if tokens else ())
        given = self._overrides.keys() - skipped.keys()
        return upstream(nx.subgraph_view(self._flow, filter_edge=lambda _, name: name not in given), wanted)


def _flow(program: Program, skipped: Mapping[str, str]) -> nx.DiGraph:
    """Return the program's data flow by node name, with each skipped exit read from its entry alone."""
    flow = node_flow(program.exported.graph)
    flow = nx.relabel_nodes(flow, {node: node.name for node in flow})
    flow.remove_edges_from(list(flow.in_edges(skipped)))
    flow.add_edges_from((entry, leaving) for leaving, entry in skipped.items())
    return flow


class DroppedTokens:
    """Drops tokens of the visual span behind the deciding layer: later attentions do not see their keys."""

    def __init__(self, program: Program, config: MMUConfig, skipped: Layers) -> None:
        span, stack = visual_span(program), program.decoder
        sites = [site for site in attention_sites(program, stack) if site.block not in skipped.get(stack, ())]
        self._site, *later = [site for site in sites if site.block >= config.token_layer]
        self.attentions = frozenset(site.node.name for site in later)
        self._before = [node.name for node in span.before]
        self._axis, self._length = span.axis, span.length
        self._dropped = math.floor(config.token_pruning * span.length + 1e-9)
        self._score = SCORERS[config.token_scorer](span.length, span.length - self._dropped)
        self.watched = frozenset([self._site.key.name, self._site.value.name, *self._before])
        self._seen: dict[str, Tensor] = {}
        self.kept: NDArray[np.bool_] = np.ones(span.length, bool)

    def see(self, name: str, value: Any) -> None:
        """Store a watched value, and choose the tokens to drop once the deciding layer's attention is reached."""
        if name in self.watched:
            self._seen[name] = value
        if name == self._site.node.name:
            start = sum(self._seen[name].shape[self._axis] for name in self._before)
            key, value = (
                self._seen[node.name].narrow(2, start, self._length)
                for node in (self._site.key, self._site.value)
            )
            kept = torch.ones(key.shape[0], self._length, dtype=torch.bool)
            kept.scatter_(1, self._score(key, value).topk(self._dropped, dim=1).indices, False)
            self._start, self._kept, self.kept = start, kept, kept[0].numpy()

    def attend(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
        """Compute an attention whose mask also hides the dropped rows."""
        query, key, value, *rest = arguments
        options = dict(options)
        mask = rest.pop(0) if rest else options.pop("attn_mask", None)
        seen = torch.ones(key.shape[0], 1, 1, key.shape[2], dtype=torch.bool)
        seen[:, 0, 0, self._start : self._start + self._length] = self._kept
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, -math.inf)
        return F.scaled_dot_product_attention(query, key, value, mask, *rest, **options)


def edits(program: Program, decided: Decisions, skipped: Layers, tokens: MMUConfig | None = None) -> Edits:
    """Convert decisions to edits of the captured `program`; with `tokens`, its token pruning too."""
    masks = {}
    for stack, blocks in decided.kept_neurons.items():
        for group in feed_forwards(program, stack):
            if group.block in blocks:
                mask = torch.zeros(group.width)
                mask[torch.from_numpy(blocks[group.block].copy())] = 1
                masks[group.hidden.name] = mask
    passed = {
        block.exit.name: block.entry.name
        for stack, layers in skipped.items()
        for block in residual_blocks(program, stack)
        if block.index in layers
    }
    # A program whose pass declines drops none.
    dropping = tokens is not None and tokens.token_pruning > 0 and no_fixed_length(program) is None
    return Edits(masks, passed, DroppedTokens(program, tokens, skipped) if dropping and tokens else None)


class EmulatedEngines:
    """The engines of `recipe`'s step plan, emulated for the sampler on the captured generation step."""

    def __init__(self, program: Program, recipe: Recipe) -> None:
        self._program, self._decided = program, recipe.decided(T2I.name)
        self._variants = {v.name: v for v in variants(recipe.t2i, self._decided, recipe.decoder)}
        self._features = recipe.t2i.head_cache > 1
        self._made: dict[str, EmulatedEngine] = {}

    @property
    def precision(self) -> str:
        """Return the precision that programs are captured in."""
        return "float32"

    def engine(self, name: str) -> EmulatedEngine:
        """Return the engine called `name`, made on first use."""
        if name not in self._made:
            variant = Variant() if name == REUSE else self._variants[name]
            decided = self._decided if variant.pruned else Decisions()
            outputs = (Role.VELOCITY, Role.HEAD_FEATURES) if self._features else (Role.VELOCITY,)
            emulator = Emulator(self._program, outputs, edits(self._program, decided, dict(variant.skipped)))
            self._made[name] = EmulatedEngine(name, emulator, reuses=name == REUSE)
        return self._made[name]


class EmulatedEngine:
    """An emulated engine. `reuses`: it takes head features instead of computing them."""

    def __init__(self, name: str, emulator: Emulator, *, reuses: bool) -> None:
        self._emulator, self._reuses = emulator, reuses
        program = emulator.program
        taken = (*program.input_roles, *((Role.HEAD_FEATURES,) if reuses else ()))
        inputs = tuple(TensorSpec(str(role), "", ()) for role in taken)
        self.spec = EngineSpec(name, program.task, "", inputs, (), "")

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run on inputs by role, and return the outputs by role."""
        values = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        given = {Role.HEAD_FEATURES: values[Role.HEAD_FEATURES]} if self._reuses else {}
        outputs = self._emulator.emulate(values, {str(role): value for role, value in given.items()})
        return {str(role): value.numpy() for role, value in outputs.items()}
