"""What passes and engines are proved on: the model itself, or where that would take hours, a small copy of it.

Passes find structure, not sizes. So what they do to a model of a hundred layers is proved on a copy with a few of
them: the same widths and weights, the same techniques, every kind of engine. On the whole model the same passes then
run unproved: its graphs are linted and shapes propagated, and each engine gets a reference that `verify` runs it on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flashu_compile.building import Built
from flashu_compile.errors import ConfigurationError
from flashu_compile.facts import checkpoint_bytes
from flashu_compile.models.loading import LoadedModel
from flashu_compile.models.showo2.reduced import depths, reduced
from flashu_compile.recipe import Decisions, KeptNeurons, Phase, Recipe

WHOLE, COPY, AUTO = "whole", "copy", "auto"
#: Weights of more bytes than this are proved on a copy, unless asked otherwise.
LARGE = 2 << 30


@dataclasses.dataclass(frozen=True)
class ProofCopy:
    """`loaded` and `recipe`, with the `layers` of each stack that they have of the whole model."""

    loaded: LoadedModel
    recipe: Recipe
    layers: Mapping[str, tuple[int, ...]]

    def report(self, built: Built, model: LoadedModel) -> dict[str, Any]:
        """What was proved on the copy of `model`: the errors of its engines' outputs, and what passes did."""
        total = depths(model.network.config)
        return {
            "layers": {stack: list(chosen) for stack, chosen in self.layers.items()},
            "of_layers": total,
            "engines": {name: told["errors"] for name, told in built.engines.statistics.items()},
            "passes": [dataclasses.asdict(record) for record in built.engines.records],
        }


def needs_copy(proof: str, loaded: LoadedModel) -> bool:
    """Whether `proof` asks for a copy of this model. Raises `ConfigurationError` on an unknown word."""
    if proof not in (AUTO, WHOLE, COPY):
        raise ConfigurationError(f"proof is one of {AUTO}, {WHOLE}, {COPY}, not {proof!r}.")
    return proof == COPY or (proof == AUTO and checkpoint_bytes(loaded) > LARGE)


def proof_copy(loaded: LoadedModel, recipe: Recipe) -> ProofCopy:
    """A copy with the fewest layers in which everything that `recipe`, all decided, does to the model happens too."""
    total = depths(loaded.network.config)
    layers = {stack: _ends(depth) for stack, depth in total.items()}
    layers["llm"] = _llm_layers(total["llm"], recipe)
    small = dataclasses.replace(loaded, network=reduced(loaded.network, layers), calibration=None)
    return ProofCopy(small, _reduced_recipe(recipe, layers), layers)


def _ends(depth: int) -> tuple[int, ...]:
    return tuple(sorted({0, depth - 1}))


def _llm_layers(depth: int, recipe: Recipe) -> tuple[int, ...]:
    """The ends, those up to where tokens are dropped, and of each set of skipped layers one that others do not skip."""
    chosen = set(_ends(depth))
    if recipe.mmu.token_pruning > 0:
        chosen |= set(range(min(recipe.mmu.token_layer + 2, depth)))
    sets = [set(phase.skipped) for task in recipe.decisions for phase in recipe.decided(task).phases]
    for skipped in sets:
        if skipped and not skipped & chosen:
            others = set().union(*(other for other in sets if other != skipped))
            chosen.add(min(skipped - others or skipped))
    return tuple(sorted(chosen))


def _reduced_recipe(recipe: Recipe, layers: Mapping[str, Sequence[int]]) -> Recipe:
    def places(stack: str, blocks: Iterable[int]) -> dict[int, int]:
        chosen = list(layers[stack])
        return {block: chosen.index(block) for block in blocks if block in chosen}

    def neurons(kept: KeptNeurons) -> KeptNeurons:
        return {
            stack: {new: blocks[old] for old, new in places(stack, blocks).items()}
            for stack, blocks in kept.items()
        }

    decisions = {
        task: Decisions(
            neurons(decided.kept_neurons),
            tuple(
                Phase(phase.start, tuple(places("llm", phase.skipped).values())) for phase in decided.phases
            ),
        )
        for task, decided in recipe.decisions.items()
    }
    return dataclasses.replace(recipe, decisions=decisions)
