"""The command line's output: JSON, bundles and programs on stdout, a progress bar on stderr."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashu_compile.cli.tables import open_console, print_pairs, print_table
from flashu_compile.cli.terminal import say, visible
from flashu_compile.quantities import change, quantity, size

if TYPE_CHECKING:
    from flashu_compile.bundle.manifest import Manifest, Origin
    from flashu_compile.looking.structure import BlockFacts, ProgramStructure, StackFacts
    from flashu_compile.recipe.plan import StepPlan
    from flashu_compile.recipe.recipe import Recipe
    from flashu_compile.recipe.token_plan import TokenPlan

#: What takes longer says where it is, on a stderr that shows no bar.
LINE_SECONDS = 10.0


def print_json(value: Any) -> None:
    """Print one JSON document in ASCII: no string steers a terminal, and any stream can encode it."""
    typer.echo(json.dumps(value, indent=2, default=str), file=sys.stdout)


def print_recipe(recipe: Recipe) -> None:
    """Print the name and techniques of a recipe, a row each."""
    from flashu_compile.recipe.view import COLUMNS, recipe_rows

    print_table(COLUMNS, recipe_rows(recipe), title=f"recipe: {recipe.name}")


def print_build(summary: Mapping[str, Any]) -> None:
    """Print the summary of a bundle just built: where, what, how big, cost of passes, distance from eager."""
    from flashu_compile.measure.samples import NEUTRAL
    from flashu_compile.report.work import answers_text

    sizes = {name: size(value) for name, value in summary["sizes"].items()}
    drawn = summary["samples"] or {}
    of = " of the neutral set" if drawn.get("origin") == NEUTRAL else ""
    samples = (f"{task} on {row['samples']} samples{of}" for task, row in summary["calibration"].items())
    pairs = {
        "bundle": summary["path"],
        "digest": summary["digest"],
        "tasks": _listed(summary["tasks"]),
        "recipe": summary["recipe"],
        "calibrated": _listed(samples) or "nothing to decide",
        "engines": _listed(summary["engines"]),
        "answered": answers_text(summary["answered"]),
    }
    print_pairs([*pairs.items(), *sizes.items()])
    proof = summary["proof"]
    _print_pass_totals(summary["passes"], proof["passes"] if proof else ())
    _print_declined(summary, undone_alone=True)
    _print_costs(summary["cost"])
    print_table(
        (
            "engine of a small copy" if proof else "engine",
            "output",
            "relative error against eager",
        ),
        [
            (engine, alike[0], f"{max(outputs[name] for name in alike[1]):.1e}")
            for engine, outputs in summary["errors"].items()
            for alike in _alike({name: name for name in outputs})
        ],
    )


def _print_costs(costs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the cost of a lossy recipe at the task's level, each technique alone and all together."""
    rows = []
    for task, cost in costs.items():
        if "not_measured" in cost:
            rows.append((task, "not measured", cost["not_measured"]))
            continue
        rows.extend((task, row["name"], f"{row['error']:.1e}") for row in cost["techniques"])
        same = (
            f", {cost['same_tokens']} of {cost['tokens']} next tokens the same"
            if "same_tokens" in cost
            else ""
        )
        rows.append((task, "everything together", f"{cost['error']:.1e}{same}"))
    if rows:
        print_table(("task", "technique", "relative error of final latents or next-token logits"), rows)


def _print_pass_totals(
    passes: Iterable[Mapping[str, Any]], validated: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Print a row for each pass that changed something; `validated` is what it did to a copy of the model."""
    from flashu_compile.report.work import largest_error

    changing: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in passes:
        if row["changes"]:
            changing.setdefault((row["kind"], row["name"]), []).append(row)
    rows = []
    for (kind, name), records in sorted(changing.items(), reverse=True):
        error = largest_error(records, validated)
        rows.append((name, kind, str(len(records)), "" if error is None else f"{error:.1e}"))
    print_table(("pass", "kind", "programs", "largest relative error of its own"), rows)


def print_bundle(
    directory: Path, manifest: Manifest, report: Mapping[str, Any], plan: StepPlan | TokenPlan | None
) -> None:
    """Print engines beside their programs, signatures, contents and cost by component, and passes."""
    total = sum(entry.bytes for entry in manifest.files.values())
    pairs = {
        "bundle": directory,
        "model": manifest.model,
        "tasks": _listed(manifest.tasks),
        "backend": f"{manifest.backend}, {manifest.precision}",
        "recipe": manifest.recipe,
        "built with": _listed(f"{name} {version}" for name, version in sorted(manifest.versions.items())),
        "files": f"{len(manifest.files)}, {size(total)}",
    }
    sizes = [(name, size(value)) for name, value in report.get("sizes", {}).items()]
    print_pairs([*pairs.items(), *sizes])
    _print_origins(manifest.origins)
    _print_work(manifest, report, plan)
    for engine in manifest.engines:
        sides = (("in", engine.inputs), ("out", engine.outputs))
        print_table(
            ("", "name", "dtype", "shape"),
            [
                (side, name, *row)
                for side, tensors in sides
                for row, name in _tensor_rows({t.name: (t.dtype, _shape(t.shape)) for t in tensors})
            ],
            title=f"{engine.name} ({engine.task}, {engine.file})",
        )
        counts = report.get("engines", {}).get(engine.name)
        if counts is not None:
            _print_components(counts)
    passes = report.get("passes", [])
    if passes:
        print_table(
            ("program", "pass", "kind", "changes", "relative error"),
            [
                (
                    row["program"],
                    row["name"],
                    row["kind"],
                    str(len(row["changes"])),
                    "" if row["error"] is None else f"{row['error']:.1e}",
                )
                for row in passes
            ],
            title="passes",
        )
    _print_declined(report)


def _print_declined(report: Mapping[str, Any], *, undone_alone: bool = False) -> None:
    """Print why passes made no change, or only which techniques were asked for and not done."""
    from flashu_compile.report.work import declined

    rows = [
        (row.program, row.name, f"asked, not done: {row.undone}" if row.undone else "declined", row.why)
        for row in declined(report)
        if row.undone or not undone_alone
    ]
    if rows:
        print_table(("program", "pass", "", "why"), rows, title="declined, with the reason")


def _print_origins(origins: Mapping[str, Origin]) -> None:
    """Print a row for each file that weights were read from, below what is known of them all."""
    for part, origin in sorted(origins.items()):
        hub = "" if origin.repository is None else f" from {origin.repository} at {origin.revision}"
        title = f"weights of the {part}{hub}, licence {origin.license or 'not declared'}"
        if origin.files is None:
            say(f"{title}: an object in memory")
        else:
            rows = [(name, size(entry.bytes), entry.sha256) for name, entry in sorted(origin.files.items())]
            print_table(("file", "size", "SHA-256"), rows, title=title)


def _print_work(manifest: Manifest, report: Mapping[str, Any], plan: StepPlan | TokenPlan | None) -> None:
    """Print the work before and after: each captured program, and below it the engines made from it."""
    from flashu_compile.report.work import program_work, result_work

    def known(value: int | None) -> str:
        return "" if value is None else str(value)

    print_table(
        (
            "program",
            "runs",
            "operations",
            "ONNX nodes",
            "parameters",
            "FLOPs",
            "bytes moved",
            "rows × layers",
        ),
        [
            (
                row.name if row.captured else f"  {row.name}",
                row.runs,
                known(row.operations),
                known(row.nodes),
                quantity(row.parameters),
                quantity(row.flops),
                "" if row.bytes is None else size(row.bytes),
                row.rows,
            )
            for row in program_work(manifest, report, plan)
        ],
        title="programs as captured, each with its engines; one run on the recorded inputs",
    )
    for result in result_work(manifest, report, plan):
        before, after = result.flops
        say(
            f"FLOPs of {result.what}: {quantity(before)} → {quantity(after)} {change(before, after)}".rstrip()
        )


def _tensor_rows(tensors: Mapping[str, tuple[str, str]]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield (dtype, shape) and name of every tensor, with those alike in different layers in one row."""
    for name, members in _alike({name: f"{name} {row}" for name, row in tensors.items()}):
        yield tensors[members[0]], name


def _alike(names: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Group names, in order, whose values differ in a layer's number alone, under one: `layers.0…11.key`."""
    groups: dict[str, list[str]] = {}
    for name, compared in names.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".#.", compared), []).append(name)
    for members in groups.values():
        numbers = [int(found[0][1:-1]) for name in members if (found := re.search(r"\.\d+\.", name))]
        label = members[0]
        if len(members) > 1:
            label = re.sub(r"\.\d+\.", f".{min(numbers)}…{max(numbers)}.", label, count=1)
        yield label, members


def _print_components(counts: Mapping[str, Any]) -> None:
    parameters, flops = counts.get("parameters", {}), counts.get("flops", {})
    rows = [
        (name, quantity(parameters.get(name, 0)), quantity(flops.get(name, 0)))
        for name in dict.fromkeys([*parameters, *flops])
    ]
    total = ("total", quantity(sum(parameters.values())), quantity(sum(flops.values())))
    title = f"{counts.get('nodes', '?')} nodes; FLOPs of one run on the recorded inputs"
    print_table(("component", "parameters", "FLOPs"), [*rows, total], title=title)


def print_structure(program: ProgramStructure) -> None:
    """Print the structures found in a captured program, like blocks in one row, and why others are missing."""
    roles, everything = tuple(tensor.role for tensor in program.inputs), "every input"
    print_table(
        ("", "tensor", "shape", "depends on"),
        [
            *(("in", tensor.role, _shape(tensor.shape), "") for tensor in program.inputs),
            *(
                ("out", t.role, _shape(t.shape), everything if t.reads == roles else _listed(t.reads))
                for t in program.outputs
            ),
        ],
        title=f"{program.name} ({program.task})",
    )
    if program.stacks:
        print_table(
            ("stack", "blocks", "feed-forward", "attention"),
            [row for stack in program.stacks for row in _stack_rows(stack)],
        )
    span, head, stacks = program.visual_span, program.head, program.stacks
    pairs = {f"stack {s.name}": f"{s.width} wide, under {s.root}{', decoder' * s.decoder}" for s in stacks}
    if span is not None:
        pairs["visual span"] = (
            f"{span.length} rows, with {span.before} segments before and {span.after} after"
        )
    if head is not None:
        source = f" from stack {head.stack}" if head.stack is not None else ""
        beside = f" with {_listed(head.beside)}" if head.beside else ""
        pairs["head features"] = (
            f"{_shape(head.shape)}{source}; {_listed(head.gives)} follows from them{beside}"
        )
    print_pairs(pairs.items())
    if program.not_found:
        print_table(("not found", "why"), [(row.what, row.why) for row in program.not_found])
    say()


def _stack_rows(stack: StackFacts) -> Iterator[tuple[str, str, str, str]]:
    def like(block: BlockFacts) -> tuple[Any, ...]:
        return block.feed_forward, block.attention

    for (feed_forward, attention), group in itertools.groupby(stack.blocks, like):
        ends = [block.index for block in group]
        ffn = "not found"
        if feed_forward is not None:
            ffn = f"{feed_forward.kind}{', fused' * feed_forward.fused}, {feed_forward.width} neurons"
        sites = []
        for site in attention:
            shared = "" if site.kv_heads == site.heads else f" ({site.kv_heads} kv)"
            traits = (", masked" * site.masked) + (", rotary" * site.rotary)
            sites.append(f"{site.heads} heads of {site.head_size}{shared}{traits}")
        yield (
            stack.name,
            "–".join(dict.fromkeys((str(ends[0]), str(ends[-1])))),
            ffn,
            "; ".join(sites) or "not found",
        )


def _shape(sizes: Iterable[int | str]) -> str:
    """Join sizes with ×, with sums in brackets."""
    return " × ".join(f"({size})" if " " in str(size) else str(size) for size in sizes)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


@contextmanager
def progress_bar(
    stage: str, *, shown: bool = True, lines: bool = True
) -> Iterator[Callable[[str, float | None], None]]:
    """Show a bar on stderr, if that is a terminal; yield a function of a stage and a fraction in [0, 1].

    Where it is none, stages are `lines` on stderr, one in `LINE_SECONDS` at most.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    screen = open_console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=screen, transient=True, disable=not (shown and screen.is_terminal)
    ) as progress:
        row = progress.add_task(stage, total=None)
        told = time.monotonic()

        def advance(stage: str, fraction: float | None) -> None:
            nonlocal told
            now = time.monotonic()
            if lines and not screen.is_terminal and now - told >= LINE_SECONDS:
                told = now
                say(stage if fraction is None else f"{fraction:4.0%} {stage}", err=True)
            total = None if fraction is None else 1.0
            progress.update(row, description=visible(stage), completed=fraction or 0.0, total=total)

        yield advance
