"""Score showo2-shapes on held-out prompts and questions: with the eager model, or through a compiled bundle.

    python -m examples.showo2_shapes.evaluate eager showo2-shapes --output scores.json
    python -m examples.showo2_shapes.evaluate bundle build/showo2-shapes --output scores.json

Pictures are judged by `examples.showo2_shapes.world.scorer`; answers by exact match. Prompt and noise number i are the
same in every run, so two runs can be compared picture by picture.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from examples.showo2_shapes.world.language import QA, caption, questions
from examples.showo2_shapes.world.render import render
from examples.showo2_shapes.world.scenes import (
    PromptSpec,
    Split,
    canonical_key,
    sample_free_scene,
    sample_scene,
    sample_spec,
)
from examples.showo2_shapes.world.scorer import score_many

CANVAS = 32
SEED = 20_000
_SPLITS: tuple[Split, ...] = ("heldout", "train")  # in turn: some kinds of prompts have few that are held out

Generate = Callable[[str, int], np.ndarray]
Ask = Callable[[np.ndarray, list[str]], list[str]]


def prompts(count: int) -> list[PromptSpec]:
    rng = np.random.default_rng([SEED, 0])
    return [sample_spec(rng, "heldout") for _ in range(count)]


def chosen_prompts(count: int, seed: int) -> list[PromptSpec]:
    """Prompts of different meaning, none of which has that of one of the first 200 `prompts`.

    Presets were chosen on those of seed 0. At equal `count`, no two seeds share a meaning.
    """
    taken = {canonical_key(spec) for spec in prompts(200)}
    found: list[PromptSpec] = []
    for earlier in range(seed + 1):
        rng = np.random.default_rng([71_000, earlier])
        found = []
        while len(found) < count:
            spec = sample_spec(rng, _SPLITS[len(found) % 2])
            if canonical_key(spec) not in taken:
                taken.add(canonical_key(spec))
                found.append(spec)
    return found


def quizzes(pictures: int, each: int) -> list[tuple[np.ndarray, list[QA]]]:
    """Pictures with questions; half show held-out prompts, half free scenes."""
    rng = np.random.default_rng([SEED, 1])
    result = []
    for index in range(pictures):
        heldout = sample_scene(sample_spec(rng, "heldout"), rng, CANVAS)
        scene = heldout if index % 2 else sample_free_scene(rng, CANVAS)
        result.append((render(scene), questions(scene, rng, each)))
    return result


def eager(model: str, points: int, guidance_scale: float | None) -> tuple[Generate, Ask]:
    """The plain reference loops."""
    from flashu_compile.models.loading import load_model
    from flashu_compile.models.showo2.eager import EagerPipeline

    pipeline = EagerPipeline(load_model(model))

    def generate(prompt: str, seed: int) -> np.ndarray:
        picture = pipeline.generate(prompt, seed=seed, steps=points, guidance_scale=guidance_scale)
        return np.asarray(picture)

    return generate, lambda picture, asked: [pipeline.ask(picture, q, max_new_tokens=8) for q in asked]


def bundle(path: str, points: int, guidance_scale: float | None, threads: int | None) -> tuple[Generate, Ask]:
    """The compiled engines."""
    import flashu_compile

    pipe = flashu_compile.load(path, threads=threads)

    def generate(prompt: str, seed: int) -> np.ndarray:
        return np.asarray(pipe.generate(prompt, seed=seed, steps=points, guidance_scale=guidance_scale))

    return generate, lambda picture, asked: pipe.ask(Image.fromarray(picture), asked, max_new_tokens=8)


def score_generation(generate: Generate, count: int, pictures: Path | None) -> dict:
    specs = prompts(count)
    images = [generate(caption(spec), i) for i, spec in track(list(enumerate(specs)), "pictures")]
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for index, (spec, image) in enumerate(zip(specs, images, strict=True)):
            Image.fromarray(image).save(pictures / f"{index:03d} {caption(spec)}.png")
    summary = score_many(images, specs)
    rows = {"overall": summary.overall, **summary.kinds}
    return {name: vars(rates) if hasattr(rates, "__dict__") else rates for name, rates in rows.items()}


def score_understanding(ask: Ask, pictures: int, each: int) -> dict:
    right: dict[str, list[bool]] = defaultdict(list)
    for image, asked in track(quizzes(pictures, each), "questions"):
        for qa, answer in zip(asked, ask(image, [qa.question for qa in asked]), strict=True):
            right[qa.kind].append(answer == qa.answer)
    rows = {
        kind: {"exact_match": float(np.mean(r)), "questions": len(r)} for kind, r in sorted(right.items())
    }
    every = [hit for hits in right.values() for hit in hits]
    return {"overall": {"exact_match": float(np.mean(every)), "questions": len(every)}, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("through", choices=("eager", "bundle"))
    parser.add_argument("path", help="a model name or directory (eager), a bundle directory (bundle)")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=100, help="pictures to ask about")
    parser.add_argument("--each", type=int, default=5, help="questions on each of them")
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--threads", type=int, help="of a bundle's engines")
    parser.add_argument("--save", type=Path, help="folder for the generated pictures")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    settings = (arguments.path, arguments.points, arguments.guidance_scale)
    generate, ask = eager(*settings) if arguments.through == "eager" else bundle(*settings, arguments.threads)
    result = {
        "through": arguments.through,
        "points": arguments.points,
        "guidance_scale": arguments.guidance_scale,
    }
    if arguments.prompts:
        result["t2i"] = score_generation(generate, arguments.prompts, arguments.save)
    if arguments.pictures:
        result["mmu"] = score_understanding(ask, arguments.pictures, arguments.each)
    text = json.dumps(result, indent=1, default=float)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
