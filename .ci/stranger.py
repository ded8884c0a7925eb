"""A file of somebody who uses the package, which type checkers in their strictest mode must accept; it is not run."""

from pathlib import Path

from PIL import Image

import flashu_compile
from flashu_compile import FlashuError, MMUConfig, Pipeline, Recipe, T2IConfig, calibrate, export, load


def build(output: Path) -> str:
    """Build a bundle by a recipe of one's own."""
    recipe: Recipe = calibrate("showo2-shapes", ["t2i", "mmu"], recipe="flashu", samples=4)
    mine = Recipe("mine", T2IConfig(points=25, head_cache=5), MMUConfig(token_pruning=0.25))
    bundle = export(
        "showo2-shapes",
        ["t2i", "mmu"],
        recipe=recipe if recipe.decisions else mine,
        output=output,
        precision={"llm": "int8", "head": "float16"},
        resolution=(32, 32),
        progress=lambda stage, done: print(f"{done:.0%} {stage}"),
    )
    digest: str = bundle.digest
    return digest


def use(path: Path) -> list[str]:
    """Draw a picture and ask about it."""
    pipe: Pipeline = load(path, memory="low", threads=2)
    picture: Image.Image = pipe.generate("a red circle", seed=1)
    pictures: list[Image.Image] = pipe.generate(["a", "b"], seed=[1, 2])
    answer: str = pipe.ask(picture, "what is it?")
    answers: list[str] = pipe.ask(pictures[0], ["what?", "where?"])
    pieces: list[str] = list(pipe.stream(picture, "how many?"))
    with load(path) as other:
        latents = other.latents("a red circle")
    return [answer, *answers, *pieces, str(latents.shape), flashu_compile.__version__]


def main() -> None:
    """Do both."""
    try:
        print(build(Path("bundle")), use(Path("bundle")))
    except FlashuError as error:
        print(error)
