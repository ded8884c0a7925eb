"""What weights in few bits bring to answers: seconds a token, a prefill, bytes of weights; and equal answers.

    python -m benchmarks.few_bits --geometry bench-small-27 --threads 1 --bundles DIR
    python -m benchmarks.few_bits --answers build/int4 --exact build/exact --questions shapes

Random weights of a geometry in each precision, timed in turn: from embeddings to the first token, and each token after
it. `int4` has every weight in 4 bits that bears it, whatever the outputs lose by it: speed is that of a share of 1. Or
two bundles asked the same questions, as `examples.showo2_shapes.questions` writes them. Bundles in DIR are used again.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

import flashu_compile
from benchmarks.answering import NEVER, QUESTION, picture_embeds, random_pixels
from benchmarks.geometries import GEOMETRIES, VAE, random_model, tokenizer
from benchmarks.measuring import machine, parser, report
from flashu_compile.bundle.manifest import MANIFEST
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.runtime import decoding
from flashu_compile.runtime.pipeline import Pipeline

TOKENS = 32
#: The precision of each row, and a budget that lets all of its layers have few bits.
PRECISIONS = {"float32": None, "int8": 0.99, "int4": 0.99}
#: Bits of an element, by ONNX's number of its type.
_BITS = {onnx.TensorProto.FLOAT: 32, onnx.TensorProto.INT8: 8, onnx.TensorProto.INT4: 4}


def built(geometry: str, folder: Path) -> dict[str, Path]:
    """Return the bundle of each precision, built where it is not there."""
    paths = {name: folder / f"{geometry}-{name}" for name in PRECISIONS}
    absent = [name for name, path in paths.items() if not (path / MANIFEST).is_file()]
    if absent:
        model = random_model(GEOMETRIES[geometry])
        captured = flashu_compile.capture_model(model, "mmu", vae=VAE, tokenizer=tokenizer())
        for name in absent:
            flashu_compile.export(
                captured,
                "mmu",
                output=paths[name],
                precision=name,
                precision_budget=PRECISIONS[name],
                cost_samples=0,
                proof="copy",
                cache=False,
            )
    return paths


def speed(geometry: str, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Time the bundles in turn; medians, and of ratios to float32 the medians, too."""
    paths = built(geometry, folder)
    pipes = {name: flashu_compile.load(path, threads=threads) for name, path in paths.items()}
    pixels = random_pixels(GEOMETRIES[geometry])
    embeds = {name: picture_embeds(pipe, pixels) for name, pipe in pipes.items()}
    rounds = [{name: _answer(pipe, embeds[name]) for name, pipe in pipes.items()} for _ in range(repeats + 1)]
    rows = {}
    for name in pipes:
        taken = [(row[name], row["float32"]) for row in rounds[1:]]  # the first one warms up
        rows[name] = {
            "token_ms": 1e3 * statistics.median(own[1] for own, _ in taken),
            "tokens_faster": statistics.median(full[1] / own[1] for own, full in taken),
            "prefill_ms": 1e3 * statistics.median(own[0] for own, _ in taken),
            "prefill_faster": statistics.median(full[0] / own[0] for own, full in taken),
            "linear_bytes": linear_bytes(paths[name]),
        }
    full = rows["float32"]["linear_bytes"]
    for row in rows.values():
        row["of_float32"] = row["linear_bytes"] / full
    return {"geometry": geometry, "threads": threads, "repeats": repeats, "machine": machine(), "rows": rows}


def _answer(pipe: Pipeline, embeds: np.ndarray) -> tuple[float, float]:
    """Return the seconds to the first token, and those of each token after it."""
    codec = PromptCodec(pipe.codec.tokenizer)
    rows = {"prefix_ids": np.array([codec.question_prefix()]), "image_embeds": embeds}
    started = time.perf_counter()
    said: Iterator[Any] = decoding.tokens(
        decoding.Picture(pipe._engines, rows), [codec.question_suffix(QUESTION)], NEVER, TOKENS + 1
    )
    next(said)
    first = time.perf_counter()
    for _ in said:
        pass
    return first - started, (time.perf_counter() - first) / TOKENS


def linear_bytes(bundle: Path) -> int:
    """Return the bytes of the language engine's weights of layers, scales included, embeddings left out."""
    graph = onnx.load(bundle / "language.onnx", load_external_data=False).graph
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    return sum(
        int(np.prod(tensor.dims)) * _BITS[tensor.data_type] // 8
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type in _BITS and tensor.name not in looked_up
    )


def equal_answers(bundle: Path, exact: Path, questions: Path) -> dict[str, Any]:
    """Ask both bundles the questions of a folder; return how many there are, and the share of equal answers."""
    lines = (questions / "data.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [row for row in map(json.loads, lines) if "image" in row]
    said = []
    for path in (bundle, exact):
        with flashu_compile.load(path) as pipe:
            said.append([pipe.ask(Image.open(questions / row["image"]), row["question"]) for row in asked])
    own, other = said
    right = [
        sum(a == row["answer"] for a, row in zip(side, asked, strict=True)) / len(asked) for side in said
    ]
    equal = sum(a == b for a, b in zip(own, other, strict=True)) / len(asked)
    return {"questions": len(asked), "equal": equal, "right": right[0], "exact_right": right[1]}


def main() -> None:
    options = parser(__doc__, repeats=9)
    options.add_argument("--geometry", choices=sorted(GEOMETRIES), default="bench-small-27")
    options.add_argument("--bundles", type=Path, help="a folder that keeps bundles")
    options.add_argument("--answers", type=Path, help="a bundle whose answers are compared with --exact")
    options.add_argument("--exact", type=Path)
    options.add_argument("--questions", type=Path, help="the folder that the questions were written to")
    given = options.parse_args()
    if given.answers is not None:
        report(equal_answers(given.answers, given.exact, given.questions), given.output)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.bundles or Path(scratch)
        report(speed(given.geometry, folder, given.repeats, given.threads), given.output)


if __name__ == "__main__":
    main()
