"""What each engine is and when it runs, in a sentence, for whoever opens its graph."""

from __future__ import annotations

import re

from flashu_compile.program.program import prologue_of, schedule_of
from flashu_compile.recipe.plan import DENOISE, REUSE

_LANGUAGE = "language"
_SCHEDULE = (
    "What follows from the time point alone, such as its embedding and the modulation of each block; runs once for "
    "each point of a plan."
)
_SENTENCES = {
    REUSE: "The diffusion head's final layer on features that an earlier step stored; runs on steps that reuse them.",
    schedule_of(REUSE): _SCHEDULE,
    "vae_decode": "The VAE's decoder, from latents to pixels; runs once a picture.",
    "vision": "The image encoder, from pixels to the embeddings the language model reads; runs once a picture.",
    prologue_of(
        _LANGUAGE
    ): "The language model on the rows of the picture and what precedes it, to their keys and "
    "values; runs once a picture.",
    _LANGUAGE: "The language model on new rows, by the keys and values of the rows before; runs once a question, then "
    "once a token.",
}


def described(name: str) -> str:
    """What engine `name` is and when it runs; nothing if the name says nothing."""
    if name in _SENTENCES:
        return _SENTENCES[name]
    found = re.fullmatch(rf"{DENOISE}(_pruned)?(?:_skip([\d-]+))?(_prologue|_schedule)?", name)
    if found is None:
        return ""
    pruned, layers, part = found.groups()
    how = ["with pruned FFNs"] * bool(pruned)
    if layers:
        how.append(f"without layers {layers.replace('-', ', ')} of the language model")
    suffix = f", {' and '.join(how)}" if how else ""
    if part == "_schedule":
        return _SCHEDULE
    if part == "_prologue":
        return f"What does not change from step to step, of the prompt's rows{suffix}; runs once a prompt."
    return f"One evaluation of the velocity of the latents{suffix}; runs on the steps that the plan names it for."
