"""Write held-out prompts, and questions about rendered pictures with their answers, for `flashu-compile evaluate`.

    python -m examples.showo2_shapes.questions shapes

Nothing of it was trained on. The prompts that presets were chosen by (`evaluate.prompts`) are not among them, under no
other wording, so all of it may be judged: `--split all`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from examples.showo2_shapes import evaluate
from examples.showo2_shapes.world.language import caption, questions
from examples.showo2_shapes.world.render import render
from examples.showo2_shapes.world.scenes import canonical_key, sample_free_scene, sample_scene, sample_spec

CANVAS = 32
SEED = 40_000
OF_A_KEY = 2  # prompts that ask for the same, sizes aside
SEARCHED = 200  # prompts of evaluate.py, by which presets were chosen


def write(folder: Path, prompts: int, pictures: int, each: int) -> Path:
    rng = np.random.default_rng(SEED)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    searched = {canonical_key(spec) for spec in evaluate.prompts(SEARCHED)}
    records: list[dict[str, str]] = []
    drawn: Counter[str] = Counter()
    while len(records) < prompts:
        spec = sample_spec(rng, "heldout")
        key = canonical_key(spec)
        if key not in searched and drawn[key] < OF_A_KEY:
            drawn[key] += 1
            records.append({"prompt": caption(spec, rng), "key": key, "kind": spec.kind})
    for index in range(pictures):
        prompted = sample_scene(sample_spec(rng, "heldout"), rng, CANVAS)
        scene = prompted if index % 2 else sample_free_scene(rng, CANVAS)
        name = f"pictures/{index:03d}.png"
        Image.fromarray(render(scene)).save(folder / name)
        records += [
            {"image": name, "question": asked.question, "answer": asked.answer, "kind": asked.kind}
            for asked in questions(scene, rng, each)
        ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


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
