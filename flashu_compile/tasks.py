"""The record of each task: what it is called, what it is captured as, and which engines its loop runs.

A record holds for every model; what a model's adapter says of a task is in `models/`. What the compiler does for a
task (jobs, calibration, cost) is in `compiler/tasks.py`. Nothing else names a task by a literal.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

#: The tasks of this package, which editors complete; where it is annotated, any other name is accepted, too.
TaskName = Literal["t2i", "mmu", "text"]

#: Captured programs, and the engines of the same names.
DENOISE, VAE_DECODE, UNDERSTAND, COMPLETE = "denoise", "vae_decode", "understand", "complete"
DRAW, CODES_DECODE = "draw", "codes_decode"
#: Those of them that techniques change: a task of a model has one.
MAIN = (DENOISE, DRAW, UNDERSTAND, COMPLETE)
#: Engines that passes make of these.
REUSE, VISION, LANGUAGE = "reuse", "vision", "language"
#: What recipes and precisions call the stack that attends over all rows, whatever a model calls it.
DECODER = "decoder"


def prologue_of(name: str) -> str:
    """Name the program that computes, once, what program `name` takes with every call."""
    return f"{name}_prologue"


def schedule_of(name: str) -> str:
    """Name the program that computes, once for each time point, what program `name` takes there."""
    return f"{name}_schedule"


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """What is known of a task, whichever model has it.

    Attributes:
        name: the name that users give; also the name of the recipe's field with its parameters.
        title: the heading of its part of a page.
        purpose: what it does, as the end of "this bundle cannot …".
        sample_field: the field of `CalibrationSamples` that it is calibrated on.
        sample_kind: what these samples are, in words.
        example: a command that does it with `{bundle}`, without the program's name.
        describe: returns a sentence on an engine of this task, for its graph; empty for an unknown name.
    """

    name: str
    title: str
    purpose: str
    sample_field: str
    sample_kind: str
    example: str
    describe: Callable[[str], str]


_SCHEDULE = (
    "What follows from the time point alone, such as its embedding and the modulation of each block; runs once for "
    "each point of a plan."
)
_SENTENCES = {
    REUSE: "The diffusion head's final layer on features that an earlier step stored; runs on steps that reuse them.",
    schedule_of(REUSE): _SCHEDULE,
    VAE_DECODE: "The VAE's decoder, from latents to pixels; runs once a picture.",
    CODES_DECODE: "The decoder of image codes, from a picture's codes to pixels; runs once a picture.",
    VISION: "The image encoder, from pixels to the embeddings the language model reads; runs once a picture.",
    prologue_of(
        LANGUAGE
    ): "The language model on the rows of the picture and what precedes it, to their keys and values; runs once a "
    "picture.",
    LANGUAGE: "The language model on new rows, by the keys and values of the rows before; runs once a question, then "
    "once a token.",
    COMPLETE: "The language model on new rows, by the keys and values of the rows before; runs once a prompt, then "
    "once a token.",
}
_VARIANT = re.compile(rf"({DENOISE}|{DRAW})(_pruned)?(?:_skip([\w-]+?))?(_prologue|_schedule)?")


def _describe_generation(name: str) -> str:
    """Describe an engine of t2i: one of fixed name, or a variant of `denoise` or `draw`, a prologue or a schedule."""
    found = _VARIANT.fullmatch(name)
    if found is None:
        return _SENTENCES.get(name, "")
    loop, pruned, layers, part = found.groups()
    how = ["with pruned FFNs"] * bool(pruned)
    if layers:
        how.append(f"without layers {_layers_in_words(layers)}")
    suffix = f", {' and '.join(how)}" if how else ""
    if loop == DRAW:
        return (
            f"The language model on new rows, text or image codes, to the logits of the next code{suffix}; runs once a "
            "prompt, then on the codes that the plan names it for."
        )
    if part == "_schedule":
        return _SCHEDULE
    if part == "_prologue":
        return f"What does not change from step to step, of the prompt's rows{suffix}; runs once a prompt."
    return f"One evaluation of the velocity of the latents{suffix}; runs on the steps that the plan names it for."


def _layers_in_words(name: str) -> str:
    """Return the layers that an engine's name lists, such as `3-5-eye-0`: those of the decoder first, then by stack."""
    stacks: dict[str, list[str]] = {}
    stack = "the language model"
    for part in filter(None, name.split("-")):
        if part.isdecimal():
            stacks.setdefault(stack, []).append(part)
        else:
            stack = part
    return " and ".join(f"{', '.join(layers)} of {stack}" for stack, layers in stacks.items())


def _describe_answering(name: str) -> str:
    return _SENTENCES.get(name, "")


T2I = TaskRecord(
    name="t2i",
    title="Pictures from text (t2i)",
    purpose="generate pictures",
    sample_field="prompts",
    sample_kind="prompts",
    example='generate {bundle} "a red circle left of a blue square" --output picture.png',
    describe=_describe_generation,
)
MMU = TaskRecord(
    name="mmu",
    title="Questions about pictures (mmu)",
    purpose="answer questions",
    sample_field="questions",
    sample_kind="image and question pairs",
    example='ask {bundle} picture.png "what is in the picture?"',
    describe=_describe_answering,
)
TEXT = TaskRecord(
    name="text",
    title="Questions without a picture (text)",
    purpose="answer questions without a picture",
    sample_field="prompts",
    sample_kind="prompts",
    example='ask {bundle} "what is a prime number?"',
    describe=_describe_answering,
)
RECORDS = {record.name: record for record in (T2I, MMU, TEXT)}
#: The names of all tasks, in the order in which bundles and pages have them.
TASKS = tuple(RECORDS)
