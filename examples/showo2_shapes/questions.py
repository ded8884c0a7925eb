"""Write held-out prompts, and questions about rendered pictures with their answers, for `flashu-compile evaluate`.

    python -m examples.showo2_shapes.questions shapes

All of it is of the held-out split, which was not trained on. The prompts that presets, and earlier ones, were chosen by
(`evaluate.chosen_prompts`, `evaluate.prompts`) are not among them, under no other wording, so all of it may be judged:
`--split all`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from examples.showo2_shapes import evaluate
from examples.showo2_shapes.world.language import caption, questions
from examples.showo2_shapes.world.render import render
from examples.showo2_shapes.world.scenes import (
    PromptSpec,
    canonical_key,
    sample_free_scene,
    sample_scene,
    sample_spec,
)
from flashu_compile.errors import EvaluationError

CANVAS = 32
SEED = 40_000
OF_A_KEY = 2  # prompts that ask for the same, sizes aside
SEARCHED, CHOSEN = 200, 60  # prompts of evaluate.py by which earlier presets, and those of today, were chosen
MISSES = 10_000  # draws that give nothing new, after which there is nothing new


def write(folder: Path, prompts: int, pictures: int, each: int) -> Path:
    rng = np.random.default_rng(SEED)
    records: list[dict[str, str]] = []
    for spec in itertools.islice(unsearched(rng), prompts):
        records.append({"prompt": caption(spec, rng), "key": canonical_key(spec), "kind": spec.kind})
    if len(records) < prompts:
        raise EvaluationError(
            f"There are {len(records)} held-out prompts, not {prompts}; ask for fewer (--prompts)."
        )
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for index in range(pictures):
        prompted = sample_scene(sample_spec(rng, "heldout"), rng, CANVAS)
        scene = prompted if index % 2 else sample_free_scene(rng, CANVAS, "heldout")
        name = f"pictures/{index:03d}.png"
        Image.fromarray(render(scene)).save(folder / name)
        records += [
            {"image": name, "question": asked.question, "answer": asked.answer, "kind": asked.kind}
            for asked in questions(scene, rng, each)
        ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def unsearched(rng: np.random.Generator) -> Iterator[PromptSpec]:
    """Draw held-out prompts of meanings that no preset was chosen by, until there are no more."""
    searched = {canonical_key(s) for s in (*evaluate.prompts(SEARCHED), *evaluate.chosen_prompts(CHOSEN, 0))}
    drawn: Counter[str] = Counter()
    misses = 0
    while misses < MISSES:
        spec = sample_spec(rng, "heldout")
        key = canonical_key(spec)
        misses += 1
        if key not in searched and drawn[key] < OF_A_KEY:
            drawn[key] += 1
            misses = 0
            yield spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=200, help="pictures to ask about")
    parser.add_argument("--each", type=int, default=5, help="questions on each of them")
    given = parser.parse_args()
    print(f"wrote {write(given.folder, given.prompts, given.pictures, given.each)}")


if __name__ == "__main__":
    main()
