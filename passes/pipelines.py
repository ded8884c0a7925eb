"""The passes of each captured program, in order.

Two more kinds run elsewhere: neurons are ordered before (`compiler/specialise.py`), and precision is lowered when an
engine is emitted (`export/precision.py`).

Lossy passes come first, while block indices are still those of the captured program, which each of them
refers to: tokens are gathered before layers are removed, and neurons are pruned while all FFNs are still
there.
"""

from __future__ import annotations

from flashu_compile.passes.base import Pass
from flashu_compile.passes.cache_rows import CacheRows
from flashu_compile.passes.canonical_names import CanonicalNames
from flashu_compile.passes.fold_constants import FoldConstants
from flashu_compile.passes.gather_tokens import GatherTokens
from flashu_compile.passes.group_heads import GroupHeads
from flashu_compile.passes.halve_rotary import HalveRotary
from flashu_compile.passes.hoist_prologue import HoistPrologue
from flashu_compile.passes.hoist_schedule import HoistSchedule
from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.last_row import LastRow
from flashu_compile.passes.merge_duplicates import MergeDuplicates
from flashu_compile.passes.prune_ffn import PruneFFN
from flashu_compile.passes.remove_dead_code import RemoveDeadCode
from flashu_compile.passes.remove_layers import RemoveLayers
from flashu_compile.passes.reuse_features import ReuseFeatures
from flashu_compile.passes.separate_first import SeparateFirst
from flashu_compile.passes.share_batch import ShareBatch
from flashu_compile.passes.split_at_output import SplitAtOutput
from flashu_compile.passes.split_rows import SplitRows
from flashu_compile.passes.update_in_place import UpdateInPlace
from flashu_compile.program.program import Role
from flashu_compile.recipe.decisions import KeptNeurons, Layers
from flashu_compile.tasks import LANGUAGE, VISION

#: The dimension along which the ids lie of a picture and what precedes it.
CONTEXT = "context"
_STEP = frozenset({Role.LATENTS, Role.TIMESTEP})  # what differs from evaluation to evaluation
_PLAIN = (GroupHeads(), HalveRotary())
_SCHEDULE = HoistSchedule(Role.TIMESTEP)
CLEAN: tuple[Pass, ...] = (RemoveDeadCode(), FoldConstants(), CanonicalNames())


def denoise(
    *, kept: KeptNeurons | None = None, skipped: Layers | None = None, features: bool = False
) -> tuple[Pass, ...]:
    """List the passes of the generation step.

    They split it into a prologue with what does not change during a trajectory, a schedule with what depends
    on the time point alone, and the step itself. `features`: the step also outputs what a reuse program
    takes.
    """
    outputs = (Role.VELOCITY, Role.HEAD_FEATURES) if features else (Role.VELOCITY,)
    once = (*_PLAIN, SplitRows(_STEP), MergeDuplicates(), HoistPrologue(_STEP), _SCHEDULE)
    return (KeepOutputs(outputs), *_cut(kept, skipped), *once, *CLEAN)


def reuse() -> tuple[Pass, ...]:
    """List the passes that derive, from the generation step, the program that reuses the diffusion head's features."""
    return (KeepOutputs((Role.VELOCITY, Role.HEAD_FEATURES)), ReuseFeatures())


def reused() -> tuple[Pass, ...]:
    """List the passes of the program that reuses the head's features, which split its schedule off."""
    return (ShareBatch(), MergeDuplicates(), _SCHEDULE, *CLEAN)


def understand(
    *, kept: KeptNeurons | None = None, skipped: Layers | None = None, gather: GatherTokens | None = None
) -> tuple[Pass, ...]:
    """List the passes of the understanding forward, which split it into a part per picture and a part per token."""
    # Rotations first: where a table's halves are the same cannot be seen behind a gather.
    tokens = () if gather is None else (HalveRotary(), gather)
    split = SplitAtOutput((Role.IMAGE_EMBEDS, Role.CONTEXT_IDS), (VISION, LANGUAGE), CONTEXT)
    return (*tokens, *_cut(kept, skipped), split, *CLEAN)


def decode() -> tuple[Pass, ...]:
    """List the passes of the language part.

    They split off a prologue over the picture's rows, and make the part itself update buffers of keys and
    values.
    """
    # The token that ends an image belongs to it where the mask lets the image see it.
    return (SeparateFirst(Role.SUFFIX_IDS, Role.IMAGE_END_IDS), *_token_by_token())


def complete(*, kept: KeptNeurons | None = None, skipped: Layers | None = None) -> tuple[Pass, ...]:
    """List the passes of the completion forward, which make it as `decode` makes the language part.

    Its prologue, over the first of its two inputs of ids, is not needed: the buffers may be empty.
    """
    return (*_cut(kept, skipped), *_token_by_token())


def _token_by_token() -> tuple[Pass, ...]:
    """List the passes that leave the rows of `SUFFIX_IDS` alone to a program, on keys and values of those before."""
    changing = frozenset({Role.SUFFIX_IDS})
    once = (*_PLAIN, SplitRows(changing), MergeDuplicates(), HoistPrologue(changing))
    cached = (CacheRows(), UpdateInPlace(Role.ROWS_BEFORE), MergeDuplicates())
    return (*once, *cached, LastRow(), *CLEAN)


def _cut(kept: KeptNeurons | None, skipped: Layers | None) -> tuple[Pass, ...]:
    """List the passes that prune neurons and remove the `skipped` layers, stack by stack."""
    return (
        *(PruneFFN(stack, blocks) for stack, blocks in (kept or {}).items()),
        *(RemoveLayers(stack, layers) for stack, layers in (skipped or {}).items()),
    )
