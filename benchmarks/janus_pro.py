"""Janus-Pro-1B as published, in random weights: seconds and memory of a build for both tasks, a picture, an answer.

    python benchmarks/janus_pro.py --folder /tmp/janus-pro --output janus_pro.json

The sizes in `data/janus_pro_1b.json` are those of the published `config.json` of deepseek-ai/Janus-Pro-1B that
transformers' converter keeps (`models/janus/convert_janus_weights_to_hf.py`); for all others the library's classes have
the published defaults. Weights are stored in bfloat16, as published. Stages run in processes of their own, so that each
has its own peak of resident memory, mapped pages included; one whose result is in the folder already is not run again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashu_compile
from benchmarks import family_models
from benchmarks.measuring import machine, parser, report, seconds

SIZES = Path(__file__).parent / "data" / "janus_pro_1b.json"
PROMPT = "a red circle left of a blue square"
CODES, TOKENS = 16, 16


def write_checkpoint(folder: Path) -> dict[str, Any]:
    """Write random weights of the published sizes, with a tokenizer of bytes."""
    from transformers import JanusConfig, JanusForConditionalGeneration
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    config = JanusConfig(**json.loads(SIZES.read_text(encoding="utf-8")), image_token_id=family_models.IMAGE)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = JanusForConditionalGeneration(config)
    family_models.draws(model)
    model.save_pretrained(folder / "model", max_shard_size="2GB")
    family_models.tokenizer().save_pretrained(folder / "model")
    JanusImageProcessorPil().save_pretrained(folder / "model")
    return {"parameters": sum(p.numel() for p in model.parameters())}


def build(folder: Path) -> dict[str, Any]:
    """Build a bundle for both tasks, exact, in float32."""
    took, bundle = seconds(
        lambda: flashu_compile.export(folder / "model", ["t2i", "mmu"], output=folder / "bundle", cache=False)
    )
    return {"build_seconds": took, **bundle.summary()["sizes"]}


def use(folder: Path) -> dict[str, Any]:
    """Draw the first codes of a picture, and answer a question about one, twice, on one map of the weights."""
    took, pipe = seconds(lambda: flashu_compile.load(folder / "bundle", memory="low"))
    found: dict[str, Any] = {"load_seconds": took}
    picture = np.zeros((384, 384, 3), np.uint8)
    calls: dict[str, Callable[[], Any]] = {
        f"{CODES} codes": lambda: pipe.code_logits(PROMPT, list(range(CODES))),
        f"{TOKENS} tokens": lambda: pipe.logits(picture, PROMPT, tokens=TOKENS),
    }
    for name, call in calls.items():
        found[f"first {name}, seconds"], _ = seconds(call)
        found[f"{name}, seconds"], _ = seconds(call)
    return found


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "checkpoint": write_checkpoint,
    "bundle": build,
    "use": use,
}


def main() -> None:
    """Run every stage that has no result yet."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--folder", type=Path, required=True, help="for checkpoint, bundle and results")
    options.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.stage is not None:
        found = STAGES[given.stage](given.folder)
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (given.folder / f"{given.stage}.json").write_text(json.dumps(found))
        return
    results = {}
    for stage in STAGES:
        path = given.folder / f"{stage}.json"
        if not path.exists():
            subprocess.run(
                [sys.executable, __file__, "--folder", str(given.folder), "--stage", stage], check=True
            )
        results[stage] = json.loads(path.read_text())
    report({"machine": machine(), **results}, given.output)


if __name__ == "__main__":
    main()
