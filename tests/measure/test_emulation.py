"""Recipes carried out by changing values, against the published accelerated model and the eager twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashu_compile.measure.emulation import EmulatedEngines, Emulator, edits
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.program.program import Program, Role
from flashu_compile.program.trace import capture_program
from flashu_compile.recipe.config import MMUConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.runtime.sampler import sample
from tests.support.oracle import Oracle, load_oracle, relative_error
from tests.support.published import published_recipe
from tests.support.tiny import PaddedSpaceToDepth
from tests.support.understanding_twin import UnderstandingTwin

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return load_oracle("tiny")


def text_of(oracle: Oracle) -> dict[str, np.ndarray]:
    text, offsets = oracle.text.numpy(), oracle.offsets.tolist()
    longest, span = max(offsets), oracle.model.config.span_length
    ids, mask = np.zeros((2, longest), dtype=np.int64), np.zeros((2, longest), dtype=bool)
    for row, offset in enumerate(offsets):
        ids[row, longest - offset :], mask[row, longest - offset :] = text[row, :offset], True
    return {"prompt_ids": ids, "prompt_mask": mask, "tail_ids": text[:, longest + span :]}


def test_the_published_decisions_give_the_published_latents(oracle: Oracle) -> None:
    """Pruning, skipping by phase, the head cache and the guidance schedule together."""
    program = capture_program(capture_specs("t2i", oracle.model, PaddedSpaceToDepth())[0])
    recipe = published_recipe("tiny")
    engines = EmulatedEngines(program, recipe)
    plan = recipe.plan()
    latents = sample(engines, plan, text_of(oracle), oracle.tensors["noise"].numpy())
    assert relative_error(torch.from_numpy(latents), oracle.tensors["flashu_final"]) < 1e-4


@pytest.fixture(scope="module")
def understand(oracle: Oracle) -> Program:
    return capture_program(capture_specs("mmu", oracle.model, PaddedSpaceToDepth())[0])


def test_understanding_equals_the_eager_twin(oracle: Oracle, understand: Program) -> None:
    """Pruned neurons, a skipped layer and dropped tokens; the layer that was to decide is the skipped one."""
    model, program = oracle.model, understand
    layers, width = model.config.llm.num_hidden_layers, model.config.llm.intermediate_size
    kept = {"llm": {block: np.arange(block, width - 5) for block in range(layers)}}
    config = MMUConfig(token_pruning=0.5, token_layer=0)
    emulator = Emulator(program, (Role.LOGITS,), edits(program, Decisions(kept), {"llm": (0,)}, config))
    pixels = torch.rand(1, 3, *program.sample[Role.PIXELS].shape[2:]) * 2 - 1
    inputs = {Role.PIXELS: pixels, Role.PREFIX_IDS: oracle.prefix, Role.SUFFIX_IDS: oracle.suffix}
    logits = emulator.emulate(inputs)[Role.LOGITS]

    lists = {stack: {b: n.tolist() for b, n in blocks.items()} for stack, blocks in kept.items()}
    twin = UnderstandingTwin(model=model, kept=lists, skipped=(0,), token_layer=0, token_ratio=0.5)
    with torch.inference_mode():
        image = twin.image(PaddedSpaceToDepth().encode(pixels))
    truth = twin.last(image, oracle.prefix, oracle.suffix)
    assert relative_error(logits, truth.logits) < TOLERANCE
    assert emulator.tokens is not None
    assert emulator.tokens.kept.tolist() == truth.keep.tolist()
    assert relative_error(program.run(inputs)[Role.LOGITS], truth.logits) > 1e-3  # without edits


def test_without_edits_the_program_gives_what_it_gave(understand: Program) -> None:
    emulator = Emulator(understand, (Role.LOGITS,), edits(understand, Decisions(), {}))
    logits = emulator.emulate(understand.sample)[Role.LOGITS]
    assert torch.equal(logits, understand.run(understand.sample)[Role.LOGITS])
