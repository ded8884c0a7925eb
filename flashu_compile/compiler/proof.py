"""Validate passes and engines on the model itself or, where that would take hours, on a small copy of it.

Passes find structure, not sizes. So their effect on a model of a hundred layers is validated on a copy with a
few of them: the same widths and weights, the same techniques, every kind of engine. On the whole model the
same passes then run without validation: its graphs are linted and shapes propagated, and each engine gets a
reference that `verify` runs it on.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flashu_compile.arguments import shown
from flashu_compile.compiler.answering import BundleProbe
from flashu_compile.compiler.building import BuildResult, Maker, build_engines
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.kept_engines import EngineShelf
from flashu_compile.compiler.metadata import bundle_metadata, checkpoint_bytes, picture_plan, size_ranges
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.compiler.work import COPYING, making_work
from flashu_compile.errors import ConfigurationError
from flashu_compile.exporters.bundle import Draft, write_bundle
from flashu_compile.models.adapter import LoadedModel
from flashu_compile.recipe.decisions import Decisions, KeptNeurons, Phase
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.backends import find_run_backend
from flashu_compile.system.drafts import draft_folder
from flashu_compile.tasks import MMU

WHOLE, COPY, AUTO = "whole", "copy", "auto"
#: Weights of more bytes than this are validated on a copy, unless asked otherwise.
LARGE = 2 << 30


@dataclasses.dataclass(frozen=True)
class ProofCopy:
    """A small copy of a model and its recipe; `layers` are those it has of each stack of the whole model."""

    loaded: LoadedModel
    recipe: Recipe
    layers: Mapping[str, tuple[int, ...]]

    def name(self, weight: str) -> str | None:
        """Return the name in the copy of a weight of the model, or None if the copy lacks it."""
        return self.loaded.adapter.place_in_copy(self.loaded, weight, self.layers)

    def report(self, built: BuildResult, model: LoadedModel) -> dict[str, Any]:
        """Return what was validated on the copy of `model`: the errors of engine outputs, and pass records."""
        total = model.adapter.depths(model)
        return {
            "layers": {stack: list(chosen) for stack, chosen in self.layers.items()},
            "of_layers": total,
            "engines": {name: told["errors"] for name, told in built.engines.statistics.items()},
            "passes": [dataclasses.asdict(record) for record in built.engines.records],
        }


def check_proof(proof: str) -> None:
    """Raise `ConfigurationError` if `proof` is not a known choice."""
    if proof not in (AUTO, WHOLE, COPY):
        raise ConfigurationError(f"proof is one of {AUTO}, {WHOLE}, {COPY}, not {shown(proof)}.")


def needs_copy(proof: str, loaded: LoadedModel) -> bool:
    """Tell whether `proof` asks for a copy of this model."""
    return proof == COPY or (proof == AUTO and checkpoint_bytes(loaded) > LARGE)


def proof_copy(loaded: LoadedModel, recipe: Recipe) -> ProofCopy:
    """Make a copy with few layers in which everything that the decided `recipe` does to the model happens."""
    total = loaded.adapter.depths(loaded)
    decoder = loaded.adapter.decoder(loaded)
    layers = {stack: _chosen(stack, depth, recipe, stack == decoder) for stack, depth in total.items()}
    small = loaded.adapter.reduced(loaded, layers, recipe.mmu.token_pruning)
    return ProofCopy(small, _reduced_recipe(recipe, layers), layers)


def _ends(depth: int) -> tuple[int, ...]:
    return tuple(sorted({0, depth - 1}))


def _chosen(stack: str, depth: int, recipe: Recipe, drops: bool) -> tuple[int, ...]:
    """Choose the layers of a stack in a copy: both ends, and some for each skipped set; where it `drops` tokens, more.

    Of the sets of skipped layers, none becomes empty or takes every layer, and sets that differ still differ. Those
    around token pruning are in the copy.
    """
    chosen = set(_ends(depth))
    sets = [
        set(phase.layers.get(stack, ())) for task in recipe.decisions for phase in recipe.decided(task).phases
    ]
    if drops and recipe.mmu.token_pruning > 0:
        skipped = {
            layer for phase in recipe.decided(MMU.name).phases for layer in phase.layers.get(stack, ())
        }
        running = [layer for layer in range(recipe.mmu.token_layer, depth) if layer not in skipped]
        # The first of them decides, and the next has fewer rows.
        chosen |= {*range(min(recipe.mmu.token_layer, depth)), *running[:2]}
    for skipped in sets:
        for group in (skipped, set(range(depth)) - skipped):
            if group and not group & chosen:
                chosen.add(min(group))
    for first, second in itertools.combinations(sets, 2):
        if first != second and first & chosen == second & chosen:
            chosen.add(min(first ^ second))
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
                Phase(
                    phase.start,
                    {
                        s: tuple(places(s, phase.layers.get(s, ())).values())
                        for s in phase.stacks
                        if s in layers
                    },
                )
                for phase in decided.phases
            ),
        )
        for task, decided in recipe.decisions.items()
    }
    return dataclasses.replace(recipe, decisions=decisions)


def validate_on_copy(
    loaded: LoadedModel,
    tasks: tuple[str, ...],
    recipe: Recipe,
    maker: Maker,
    backend: str,
    tell: ProgressReporter,
) -> dict[str, Any]:
    """Build everything for a small copy of the model, compare it with eager PyTorch, and return report entries.

    The copy's bundle is asked too, and then deleted.
    """
    copy = proof_copy(loaded, recipe)
    tell_of_copy = ProgressReporter(
        lambda stage, done: tell(f"a small copy: {stage}", tell.within(COPYING, done)), within=True
    )
    small = CapturedModel.from_loaded(copy.loaded, tasks, tell_of_copy)
    # What a copy is too small for may well be done to the model, whose own build decides.
    maker = dataclasses.replace(
        maker,
        precision=maker.precision.of_copy(copy.name),
        ranges=size_ranges(copy.loaded, tasks),
        allow_declined=True,
    )
    shelf = EngineShelf(small, maker.backend, None)
    tell_of_copy.plan(making_work(small, tasks, copy.recipe))
    built = build_engines(small, tasks, copy.recipe, maker, shelf, tell_of_copy)
    tell_of_copy("asking its bundle")
    answered = _answered_by_copy(copy, tasks, built, maker, backend)
    told = {"proof": copy.report(built, loaded), "answered": answered}
    del copy, small, shelf, built
    gc.collect()  # graphs refer to themselves, and hold weights that were made for the copy
    return told


def _answered_by_copy(
    copy: ProofCopy, tasks: tuple[str, ...], built: BuildResult, maker: Maker, backend: str
) -> dict[str, Any]:
    loaded = copy.loaded
    answers = BundleProbe(loaded, tasks, maker.precision.is_exact, built.lossy, COPY)
    found: dict[str, Any] = {}

    # Beside the model, sessions with weights of their own would take more memory than anything else in a build.
    sparing: Any = {"memory": "low"} if "memory" in find_run_backend(backend).options else {}

    def ask(draft: Draft) -> dict[str, Any]:
        found.update(answers.of(functools.partial(draft.open, **sparing)))
        return found

    with draft_folder(maker.scratch_parent) as scratch:
        write_bundle(
            scratch / "copy",
            engines=built.engines.engines,
            metadata=bundle_metadata(loaded, tasks, backend, str(maker.precision), copy.recipe.name),
            tokenizer=loaded.tokenizer,
            recipe=copy.recipe,
            plan=picture_plan(loaded, tasks, copy.recipe),
            measure=ask,
        )
    return found
