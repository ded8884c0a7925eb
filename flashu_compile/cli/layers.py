"""verify --against: compare engines with a reference, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashu_compile.cli import display, tables
from flashu_compile.cli.logs import quiet_libraries
from flashu_compile.cli.terminal import say
from flashu_compile.system.paths import absolute

if TYPE_CHECKING:
    from flashu_compile.bundle.agreement import Difference
    from flashu_compile.looking.comparison.compare import EngineComparison, LayerComparison
    from flashu_compile.looking.comparison.search import Departure, Operand

EAGER, ONNX, BUNDLE = "eager", "onnx", "bundle"


def reference_named(against: str, other: Path | None, model_given: bool) -> str | Path:
    """Return the reference for `compare_layers`. Raises a usage error where arguments do not go together."""
    if against not in (EAGER, ONNX, BUNDLE):
        raise typer.BadParameter(f"--against is {EAGER}, {ONNX} or {BUNDLE}, not {against!r}.")
    if (other is not None) != (against == BUNDLE):
        raise typer.BadParameter(
            f"--against {BUNDLE} takes a second bundle, OTHER; --against {against} takes none."
            if other is not None
            else f"--against {BUNDLE} takes a second bundle: flashu-compile verify DIR --against {BUNDLE} OTHER."
        )
    if model_given and against != EAGER:
        raise typer.BadParameter(f"--model, --vae, --tokenizer and --llm-config go with --against {EAGER}.")
    # A name is no path here: a folder may be called like it.
    return against if other is None else absolute(other)


def verify_layers(bundle: Path, reference: str | Path, *, as_json: bool, **options: Any) -> None:
    """Compare the layers, print the result, and exit with 1 if an engine departs."""
    import flashu_compile

    quiet_libraries()
    with display.progress_bar("Comparing") as advance:
        found = flashu_compile.compare_layers(
            bundle, reference, progress=lambda stage: advance(stage, None), **options
        )
    if as_json:
        display.print_json(_as_json(found))
    else:
        for engine in found.engines:
            _print_engine(engine)
    if not found.ok:
        wrong = ", ".join(engine.engine for engine in found.engines if not engine.ok)
        say(f"error: {bundle} departs from {found.against} in {wrong}.", err=True)
        raise typer.Exit(1)


def _print_engine(engine: EngineComparison) -> None:
    rows = [
        ("output", name, "", *_errors(found), _verdict(found, engine.tolerance))
        for name, found in engine.outputs.items()
    ]
    rows += [
        (
            row.layer,
            row.farthest,
            str(row.values),
            *_errors(row.difference),
            _verdict(row.difference, engine.tolerance),
        )
        for row in engine.layers
    ]
    tables.print_table(
        ("layer", "farthest value", "of", "relative error", "largest error", ""),
        rows,
        title=f"{engine.engine}: {'agrees' if engine.ok else 'departs'} (tolerance {engine.tolerance:.0e})",
    )
    if engine.departure is not None:
        _print_departure(engine.engine, engine.departure)
    elif not engine.ok:
        say(
            f"{engine.engine}: outputs depart, but no value does once it is laid open: what is wrong is what the "
            "backend makes of the whole graph, and no node of it."
        )
        say()


def _print_departure(engine: str, found: Departure) -> None:
    node, off = found.node, found.difference
    tables.print_pairs(
        {
            "first to depart": f"{node.name} of engine {engine}",
            "operator": node.operator,
            "module": node.module or "none",
            "made by passes": ", ".join(node.passes) or "none",
            "value": found.value,
            "relative error": _errors(off)[0],
            "largest error": _errors(off)[1],
            "shape": _shapes(off),
        }.items()
    )
    tables.print_table(
        ("it reads", "", "relative error", "largest error", "shape"),
        [
            (
                operand.name,
                operand.kind,
                *_operand(operand),
            )
            for operand in found.operands
        ],
    )
    if found.unseen:
        say(f"or a node before it, of which the reference has no value: {', '.join(found.unseen)}")
        say()


def _operand(operand: Operand) -> tuple[str, str, str]:
    if operand.difference is None:
        return "the same" if operand.kind == "input" else "not in the reference", "", ""
    return (*_errors(operand.difference), _shapes(operand.difference))


def _errors(found: Difference) -> tuple[str, str]:
    if found.nan:
        return "NaN", "NaN"
    if found.shape != found.expected_shape:
        return "other shape", ""
    if found.reordered:
        return "other order", f"{found.absolute:.1e}"
    return f"{found.relative:.1e}", f"{found.absolute:.1e}"


def _shapes(found: Difference) -> str:
    shapes = dict.fromkeys((found.shape, found.expected_shape))
    return ", in the reference ".join(" × ".join(map(str, shape)) or "scalar" for shape in shapes)


def _verdict(found: Difference, tolerance: float) -> str:
    return "ok" if found.within(tolerance) else "DEPARTS"


def _as_json(found: LayerComparison) -> dict[str, Any]:
    engines = [{**dataclasses.asdict(engine), "ok": engine.ok} for engine in found.engines]
    return _finite({"against": found.against, "ok": found.ok, "engines": engines})


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
