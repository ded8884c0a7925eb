"""The whole way on the bundled model: compile it, draw pictures, ask about them.

    python -m flashu_compile.cli.demo [FOLDER]

Leaves the bundle, the pictures, a contact sheet and the answers in FOLDER (default: showo2-shapes-demo).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

import flashu_compile
from flashu_compile.cli.logs import logged_on_stderr, quiet_libraries, speak
from flashu_compile.cli.streams import accept_any_text
from flashu_compile.cli.terminal import visible
from flashu_compile.errors import FlashuError
from flashu_compile.runtime import Pipeline, load
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import MMU, T2I

MODEL = "showo2-shapes"
FOLDER = Path("showo2-shapes-demo")
PROMPTS = (
    "a red circle",
    "a large blue square",
    "three green triangles",
    "two yellow crosses",
    "a red circle left of a blue square",
    "a cyan cross above a purple circle",
)
QUESTIONS = (
    ("a red circle", "what color is the circle?"),
    ("a large blue square", "what shape is the blue object?"),
    ("three green triangles", "how many triangles are there?"),
    ("a red circle left of a blue square", "is the red circle left of the blue square?"),
    ("a cyan cross above a purple circle", "is there a red square?"),
)
_SCALE, _MARGIN, _CAPTION, _COLUMNS = 6, 12, 22, 3


def main(folder: Path = FOLDER) -> None:
    """Compile the bundled model, draw pictures and ask about them; leave all results in `folder`."""
    quiet_libraries()
    folder = absolute(folder)
    console = Console(markup=False, emoji=False)
    started = time.perf_counter()
    bundle, pictures = folder / "bundle", folder / "pictures"
    columns = (SpinnerColumn("line"), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        digest = _build(bundle, progress)
        pipe = load(bundle)
        drawn = _draw(pipe, pictures, progress)
        answers = _ask(pipe, drawn, progress)
    sheet = folder / "contact-sheet.png"
    contact_sheet(drawn).save(sheet)
    (folder / "answers.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    for row in answers:
        words = {key: visible(text) for key, text in row.items()}
        console.print(
            Text.assemble(
                (f"{words['picture']}:", "dim"), f" {words['question']} ", (words["answer"], "bold")
            ),
            soft_wrap=True,
        )
    console.print(
        Text.assemble(
            f"Done in {time.perf_counter() - started:.0f} s. Results are in ",
            (f"{visible(folder)}/", "bold"),
            ":",
        )
    )
    console.print(f"  {sheet.name}, answers.json, pictures/ and the compiled bundle/")
    console.print(f"  (digest of the bundle: {digest})", soft_wrap=True)


def _build(bundle: Path, progress: Progress) -> str:
    row = progress.add_task(f"compiling {MODEL}", total=1.0)
    built = flashu_compile.export(
        MODEL,
        [T2I.name, MMU.name],
        output=bundle,
        overwrite=True,
        progress=lambda stage, done: progress.update(
            row, description=visible(f"compiling {MODEL}: {stage}"), completed=done
        ),
    )
    progress.update(row, description=f"compiled {MODEL} for t2i and mmu")
    return built.digest


def _draw(pipe: Pipeline, pictures: Path, progress: Progress) -> dict[str, Image.Image]:
    pictures.mkdir(parents=True, exist_ok=True)
    row = progress.add_task("drawing", total=len(PROMPTS))
    drawn = {}
    for prompt in PROMPTS:
        progress.update(row, description=f"drawing: {prompt}")
        drawn[prompt] = pipe.generate(prompt, seed=0)
        drawn[prompt].save(pictures / f"{prompt.replace(' ', '-')}.png")
        progress.advance(row)
    progress.update(row, description=f"drew {len(PROMPTS)} pictures")
    return drawn


def _ask(pipe: Pipeline, drawn: dict[str, Image.Image], progress: Progress) -> list[dict[str, str]]:
    row = progress.add_task("asking", total=len(QUESTIONS))
    answers = []
    for prompt, question in QUESTIONS:
        answer = pipe.ask(drawn[prompt], question, max_new_tokens=16)
        answers.append({"picture": prompt, "question": question, "answer": answer})
        progress.advance(row)
    progress.update(row, description=f"asked {len(QUESTIONS)} questions")
    return answers


def contact_sheet(drawn: dict[str, Image.Image]) -> Image.Image:
    """Arrange all pictures, enlarged and captioned, in rows of three."""
    side = max(picture.width for picture in drawn.values()) * _SCALE
    cell = (side + _MARGIN, side + _MARGIN + _CAPTION)
    rows = -(-len(drawn) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (prompt, picture) in enumerate(drawn.items()):
        x = _MARGIN + index % _COLUMNS * cell[0]
        y = _MARGIN + index // _COLUMNS * cell[1]
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x, y, x + side - 1, y + side - 1), outline="#cccccc")
        pen.text((x, y + side + 4), prompt, fill="black", font=font)
    return sheet


if __name__ == "__main__":
    accept_any_text()
    try:
        with logged_on_stderr():
            speak(quiet=False, verbose=False)
            main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
    except FlashuError as error:
        Console(stderr=True).print(
            Text.assemble(("error:", "red"), f" {visible(' '.join(str(error).split()))}")
        )
        sys.exit(1)
