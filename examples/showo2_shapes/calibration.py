"""Write the samples that showo2-shapes ships for calibration: prompts, and questions about rendered pictures.

    python -m examples.showo2_shapes.calibration flashu_compile/models/showo2_shapes

They come from the training distribution, by a seed of their own; nothing held out for evaluation is among them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from examples.showo2_shapes.world.language import caption, questions
from examples.showo2_shapes.world.render import render
from examples.showo2_shapes.world.scenes import sample_free_scene, sample_scene, sample_spec

CANVAS = 32
SEED = 30_000
COUNT = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    pictures = arguments.directory / "calibration"
    pictures.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    prompts = [caption(sample_spec(rng, "train"), rng) for _ in range(COUNT)]
    asked = []
    for index in range(COUNT):
        prompted = sample_scene(sample_spec(rng, "train"), rng, CANVAS)
        scene = prompted if index % 2 else sample_free_scene(rng, CANVAS)
        name = f"calibration/{index:02d}.png"
        Image.fromarray(render(scene)).save(arguments.directory / name, optimize=True)
        asked.append({"image": name, "question": questions(scene, rng, 1)[0].question})
    text = json.dumps({"prompts": prompts, "questions": asked}, indent=1)
    (arguments.directory / "calibration.json").write_text(text + "\n", encoding="utf-8")
    print(f"wrote {COUNT} prompts and {COUNT} questions to {arguments.directory}")


if __name__ == "__main__":
    main()
