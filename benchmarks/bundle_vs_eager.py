"""Build time, bundle size, and the bundle's speed and error against the eager reference loops, in one run.

    python benchmarks/bundle_vs_eager.py --output bundle_vs_eager.json

Eager and bundle take turns; medians over `--repeats`. Both use the same number of threads.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashu_compile
from benchmarks.measuring import in_turn, machine, parser, relative, report, seconds
from flashu_compile.bundle.manifest import REPORT
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.eager import EagerPipeline

PROMPT = "a red circle left of a blue square"
QUESTION = "what is left of the blue square?"


def measure(model: str, repeats: int, threads: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(threads)
    output = folder / "bundle"
    build, bundle = seconds(lambda: flashu_compile.export(model, ["t2i", "mmu"], output=output, cache=False))
    eager = EagerPipeline(load_model(model))
    pipe = flashu_compile.load(bundle.path, threads=threads)
    first, _ = seconds(lambda: pipe.generate(PROMPT, steps=2))
    truth = eager.trajectory(PROMPT, seed=0).latents.numpy()
    latents = np.asarray(pipe.latents(PROMPT, seed=0))
    picture = eager.generate(PROMPT, seed=0)

    def ask(who: Any) -> str:
        return who.ask(picture, QUESTION, max_new_tokens=8)

    answers = [ask(eager), ask(pipe)]
    drawing = in_turn(
        {"eager": lambda: eager.generate(PROMPT), "bundle": lambda: pipe.generate(PROMPT)}, repeats
    )
    asking = in_turn({"eager": lambda: ask(eager), "bundle": lambda: ask(pipe)}, repeats)
    built = json.loads((bundle.path / REPORT).read_text())
    return {
        "model": model,
        "threads": threads,
        "repeats": repeats,
        "machine": machine(),
        "points": eager.network.config.steps,
        "seconds": {
            "build": build,
            "load_and_first_step": first,
            "eager_generate": drawing["eager"],
            "bundle_generate": drawing["bundle"],
            "eager_ask": asking["eager"],
            "bundle_ask": asking["bundle"],
        },
        "bytes": built["sizes"],
        "answers": answers,
        "errors": {
            "final_latents": relative(latents, truth),
            **{
                f"{name}.{o}": e
                for name, engine in built["engines"].items()
                for o, e in engine["errors"].items()
            },
        },
        "ratios": {
            "generate": drawing["eager"] / drawing["bundle"],
            "ask": asking["eager"] / asking["bundle"],
        },
    }


def main() -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--model", default="showo2-shapes")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments.model, arguments.repeats, arguments.threads, Path(scratch))
    report(result, arguments.output)


if __name__ == "__main__":
    main()
