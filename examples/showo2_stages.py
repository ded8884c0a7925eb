"""Compare a published Show-o2 checkpoint with the authors' own code, stage by stage.

    python -m examples.showo2_stages prepare --checkpoint showlab/show-o2-1.5B --vae Wan2.1_VAE.pth \\
        --llm Qwen/Qwen2.5-1.5B-Instruct --folder stages --picture photo.jpg
    python examples/showo2_authors.py … --folder stages       # in an environment of the authors'
    python -m examples.showo2_stages compare --checkpoint showlab/show-o2-1.5B --vae Wan2.1_VAE.pth \\
        --llm Qwen/Qwen2.5-1.5B-Instruct --folder stages --bundle build/show-o2

The first writes what both sides are given: noise, and the latents of the picture (the authors draw them at random from
the VAE's posterior; here they are its mean). The second runs the authors' code on it. The third prints one table: what
is compared, and how far this project's eager model is off, and a bundle built with recipe exact. float32 on the CPU.
The exit status is 1 if a stage is off by more than `--tolerance`, or ids or tokens differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import flashu_compile
from examples.showo2_authors import INPUTS, RECORDED, SETTINGS
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.reference import GenerationReference, UnderstandingReference, generate

TIME = 0.3  # of the one velocity that is compared


@dataclasses.dataclass(frozen=True)
class Row:
    """A stage: what is off, by how much (relative L2, or the share of ids that differ)."""

    stage: str
    side: str
    error: float
    exact: bool = False

    def within(self, tolerance: float) -> bool:
        """Tell whether the stage agrees: ids have to be equal."""
        return self.error == 0 if self.exact else self.error <= tolerance


def settings_of(eager: EagerPipeline, **given: Any) -> dict[str, Any]:
    """Return what the authors' side has to know: `given`, and sizes of the model."""
    names = ("span_length", "max_prompt_tokens", "add_time_embeds", "position_grid", "time_shift")
    return {**given, "time": TIME, **{name: getattr(eager.network.config, name) for name in names}}


@torch.inference_mode()
def compare_drawing(
    theirs: dict[str, Tensor], eager: EagerPipeline, inputs: dict[str, Tensor], settings: dict[str, Any]
) -> list[Row]:
    """Compare the stages of a picture on the model itself, in the order in which they follow from one another."""
    network = eager.network
    ids, _ = eager.published_rows(settings["prompt"])
    text, offsets, noise = theirs["prompt_ids"], theirs["offsets"], inputs["noise"]
    step = GenerationReference(network, text, offsets).step(
        noise.expand(2, -1, -1, -1), torch.full((2,), settings["time"])
    )
    points, scale = settings["points"], settings["guidance_scale"]
    made = generate(network, text, offsets, noise, points=points, guidance_scale=scale)
    pixels = eager.vae.decode(theirs["latents"])
    return [
        Row("prompt ids", "eager", differing(ids.flatten().tolist(), text.flatten().tolist()), exact=True),
        Row(f"velocities at t = {settings['time']}", "eager", off(step.velocity, theirs["velocity"])),
        Row(f"latents after {points} points", "eager", off(made.latents, theirs["latents"])),
        Row("decoded pixels", "eager", off(pixels.clamp(-1, 1), theirs["pixels"].clamp(-1, 1))),
    ]


@torch.inference_mode()
def compare_answer(
    theirs: dict[str, Tensor], eager: EagerPipeline, picture: Tensor, settings: dict[str, Any]
) -> list[Row]:
    """Compare the stages of an answer on the model itself."""
    prefix, suffix = eager.codec.question_prefix(), eager.codec.question_suffix(settings["question"])
    asked = theirs["before"].tolist() + theirs["behind"].tolist()
    understanding = UnderstandingReference(eager.network, picture)
    said = understanding.greedy(torch.tensor([prefix]), torch.tensor([suffix]), settings["tokens"], None)
    told = theirs["answer"].tolist()
    return [
        Row("question ids", "eager", differing(prefix + suffix, asked), exact=True),
        Row("picture embeddings", "eager", off(understanding.image, theirs["image_embeddings"])),
        Row("tokens of the answer", "eager", differing(said[: len(told)], told), exact=True),
    ]


def compare_bundle(bundle: str, theirs: dict[str, Tensor], settings: dict[str, Any]) -> list[Row]:
    """Compare the latents and the tokens of a bundle with theirs."""
    rows = []
    with closing(flashu_compile.load(bundle)) as pipe:
        if pipe.manifest.generation is not None:
            points = settings["points"]
            latents = pipe.latents(
                settings["prompt"],
                seed=settings["seed"],
                steps=points,
                guidance_scale=settings["guidance_scale"],
            )
            rows.append(Row(f"latents after {points} points", "bundle", off(latents, theirs["latents"])))
        if pipe.manifest.understanding is not None and "answer" in theirs:
            told = theirs["answer"].tolist()  # the end token too, where it came
            said, _ = pipe.logits(settings["picture"], settings["question"], tokens=len(told))
            rows.append(Row("tokens of the answer", "bundle", differing(said, told), exact=True))
    return rows


def off(value: Any, truth: Any) -> float:
    """Return the relative L2 distance of a value from the truth."""
    return relative_error(np.asarray(value), np.asarray(truth))


def differing(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Return the share of places at which two sequences of ids differ."""
    places = max(len(ours), len(theirs))
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    return (places - same) / places if places else 0.0


def show(rows: list[Row], tolerance: float) -> bool:
    """Print the table, and return whether every stage agrees."""
    table = Table("stage", "side", "off by", "", title="Against the authors' code")
    for row in rows:
        error = "equal" if row.error == 0 else f"{row.error:.1%} differ" if row.exact else f"{row.error:.1e}"
        table.add_row(row.stage, row.side, error, "ok" if row.within(tolerance) else "differs")
    Console().print(table)
    return all(row.within(tolerance) for row in rows)


def prepare(given: argparse.Namespace) -> None:
    """Write what both sides are given."""
    eager = opened(given)
    noise = torch.from_numpy(initial_noise(given.seed, 0, eager.network.config.latent_shape))[None]
    inputs = {"noise": noise}
    if given.picture is not None:
        inputs["picture"] = eager.latents(given.picture).contiguous()
    settings = settings_of(
        eager, prompt=given.prompt, seed=given.seed, points=given.points, guidance_scale=given.guidance_scale,
        picture=given.picture, question=given.question, tokens=given.tokens,
    )  # fmt: skip
    given.folder.mkdir(parents=True, exist_ok=True)
    save_file(inputs, given.folder / INPUTS)
    (given.folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def compare(given: argparse.Namespace) -> bool:
    """Compare what the authors' code recorded, and return whether every stage agrees."""
    for name, script in ((INPUTS, "this script's `prepare`"), (RECORDED, "showo2_authors.py")):
        if not (given.folder / name).is_file():
            raise SystemExit(f"{given.folder} has no {name}: run {script} first")
    inputs, theirs = load_file(given.folder / INPUTS), load_file(given.folder / RECORDED)
    settings = json.loads((given.folder / SETTINGS).read_text(encoding="utf-8"))
    eager = opened(given)
    rows = compare_drawing(theirs, eager, inputs, settings)
    if "picture" in inputs:
        rows += compare_answer(theirs, eager, inputs["picture"], settings)
    if given.bundle:
        rows += compare_bundle(given.bundle, theirs, settings)
    return show(rows, given.tolerance)


@torch.inference_mode()
def opened(given: argparse.Namespace) -> EagerPipeline:
    """Load the checkpoint."""
    parts = {"vae": given.vae, "tokenizer": given.llm, "resolution": given.resolution}
    return EagerPipeline(load_model(given.checkpoint, dtype=torch.float32, **parts))


def parser() -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = options.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="write what both sides are given")
    last = commands.add_parser("compare", help="compare what the authors' code recorded")
    for each in (first, last):
        each.add_argument("--checkpoint", required=True, help="folder or hub id of the checkpoint")
        each.add_argument("--llm", help="folder or hub id of its language model, for the tokenizer")
        each.add_argument("--vae", help="Wan2.1_VAE.pth")
        each.add_argument("--resolution", help="pixels of the picture that is drawn, as for build")
        each.add_argument("--folder", type=Path, required=True, help="where inputs and results lie")
    first.add_argument("--prompt", default="a red circle to the left of a blue square")
    first.add_argument("--points", type=int, default=5, help="time points (the usual 50 take long)")
    first.add_argument("--guidance-scale", type=_positive, default=7.5)
    first.add_argument("--seed", type=int, default=0)
    first.add_argument("--picture", help="a picture to ask about; without one only drawing is compared")
    first.add_argument("--question", default="Describe the picture.")
    first.add_argument("--tokens", type=int, default=16)
    last.add_argument("--bundle", help="a bundle of the checkpoint, built with recipe exact")
    last.add_argument("--tolerance", type=float, default=1e-4, help="relative L2")
    return options


def _positive(text: str) -> float:
    """Read a guidance scale: at 0 the authors' code follows the prompt alone, and the formula ignores it."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return float(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands, and return the exit status."""
    given = parser().parse_args(arguments)
    try:
        if given.command == "prepare":
            prepare(given)
            return 0
        return 0 if compare(given) else 1
    except flashu_compile.FlashuError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
