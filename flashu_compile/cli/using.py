"""generate and ask: run a bundle."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashu_compile.arguments import LARGEST_POINTS
from flashu_compile.cli import display
from flashu_compile.cli.base import (
    USING,
    Bundle,
    Json,
    Memory,
    Provider,
    ProviderOption,
    RunBackend,
    Threads,
    Trust,
    app,
    examples,
    provider_options,
    quiet_onnxruntime,
)
from flashu_compile.cli.terminal import say
from flashu_compile.system.paths import absolute

if TYPE_CHECKING:
    from flashu_compile.bundle.sampling import Sampling
    from flashu_compile.runtime import Pipeline

AllowControlTokens = Annotated[
    bool,
    typer.Option(
        "--allow-control-tokens",
        help="Take what spells a control token of the model, such as <image>, as that token and not as text.",
    ),
]

Temperature = Annotated[
    float | None,
    typer.Option(
        min=0, help="Choose tokens at random, the bolder the larger this is; 0 takes the most likely."
    ),
]
TopK = Annotated[
    int | None, typer.Option(min=0, help="Choose among so many of the most likely tokens; 0 is all.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Choose among the most likely tokens whose probabilities sum up to this."
    ),
]


@app.command(
    rich_help_panel=USING,
    epilog=examples(
        'generate build/shapes "a red circle left of a blue square" --output picture.png',
        'generate build/shapes "two green triangles" --seed 7 --steps 20 --guidance-scale 4 -o triangles.webp',
    ),
)
def generate(
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shows.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The picture: .png, .jpg, .webp, .bmp or .tiff. Replaced if it exists."
        ),
    ] = Path("picture.png"),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same picture.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=LARGEST_POINTS,
            help="Time points: N points are N - 1 evaluations.",
            show_default="the bundle's plan",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0, help="How strongly the prompt is followed; 1 is plain.", show_default="the bundle's plan"
        ),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    threads: Threads = None,
    memory: Memory = "fast",
    backend: RunBackend = None,
    trust: Trust = False,
    allow_control_tokens: AllowControlTokens = False,
    as_json: Json = False,
) -> None:
    """Make a picture of PROMPT. Temperature, top-k and top-p are for models that draw code by code."""
    from flashu_compile.bundle.images import check_picture_path, save_picture

    target = absolute(output)
    check_picture_path(target)
    pipeline = _load(
        bundle,
        provider=provider,
        provider_options=provider_options(provider_option),
        threads=threads,
        memory=memory,
        backend=backend,
        trust=trust,
        allow_control_tokens=allow_control_tokens,
    )
    drawing = pipeline.manifest.drawing
    sampling = _sampling(temperature, top_k, top_p, None if drawing is None else drawing.sampling)
    started = time.perf_counter()
    with display.progress_bar("Generating") as advance:
        picture = pipeline.generate(
            prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            sampling=sampling,
            progress=lambda done, total: advance("Generating", done / total),
        )
    seconds = time.perf_counter() - started
    save_picture(picture, target)
    if not as_json:
        say(str(output))
        return
    plan = pipeline.plan_for(steps, guidance_scale)
    display.print_json(
        {
            "output": str(output),
            "prompt": prompt,
            "seed": seed,
            "steps": plan.points,
            "evaluations": len(plan.steps),
            "backend": pipeline.backend,
            "guidance_scales": sorted({step.guidance_scale for step in plan.steps}),
            "width": picture.width,
            "height": picture.height,
            "seconds": round(seconds, 3),
        }
    )


@app.command(
    rich_help_panel=USING,
    epilog=examples(
        'ask build/shapes photo.png "what is left of the blue square?"',
        'ask build/shapes photo.png "how many circles?" "what colour is the star?" --json',
        'ask build/chat "what is a prime number?"',
    ),
)
def ask(
    bundle: Bundle,
    picture: Annotated[
        Path,
        typer.Argument(metavar="[PICTURE]", help="A picture file; none for questions without a picture."),
    ],
    question: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION", help="One or more questions about it.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="the bundle's")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Annotated[
        int, typer.Option(min=0, help="With a temperature, the same seed gives the same answer.")
    ] = 0,
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    threads: Threads = None,
    memory: Memory = "fast",
    backend: RunBackend = None,
    trust: Trust = False,
    allow_control_tokens: AllowControlTokens = False,
    as_json: Json = False,
) -> None:
    """Answer QUESTION about PICTURE, or without one. Of several, each stands above its answer, in the order asked.

    The most likely tokens are taken unless temperature, top-k or top-p is given.

    Without a picture give questions alone: one, or any number where the bundle has the task text only.
    """
    pipeline = _load(
        bundle,
        provider=provider,
        provider_options=provider_options(provider_option),
        threads=threads,
        memory=memory,
        backend=backend,
        trust=trust,
        allow_control_tokens=allow_control_tokens,
    )
    if not question and pipeline.manifest.text is None:
        raise typer.BadParameter("Missing QUESTION: this bundle answers questions about a picture alone.")
    alone = not question or pipeline.manifest.understanding is None
    questions = [str(picture), *(question or ())] if alone else list(question or ())
    answers = pipeline.ask(
        None if alone else picture,
        questions,
        max_new_tokens=max_new_tokens,
        sampling=_sampling(temperature, top_k, top_p),
        seed=seed,
    )
    if as_json:
        display.print_json([{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)])
        return
    for number, (asked, answer) in enumerate(zip(questions, answers, strict=True)):
        if len(questions) > 1:
            say("\n" * bool(number) + f"> {asked}", lines=True)
        say(answer, lines=True)


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, default: Sampling | None = None
) -> Sampling | None:
    """Return how tokens are chosen, by what was given, and by the default for the rest; None if nothing was."""
    from flashu_compile.bundle.sampling import Sampling

    given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    asked = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(default or Sampling(), **asked) if asked else None


def _load(bundle: Path, **options: Any) -> Pipeline:
    quiet_onnxruntime()
    import flashu_compile

    return flashu_compile.load(bundle, **options)
