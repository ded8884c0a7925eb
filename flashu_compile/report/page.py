"""A bundle's report as one web page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flashu_compile.bundle.manifest import Manifest
from flashu_compile.quantities import change, quantity, seconds, size
from flashu_compile.recipe.plan import StepPlan, phases_run
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.recipe.view import COLUMNS, recipe_rows
from flashu_compile.report.pictures import AMPLIFIED, data_uri, keep_map
from flashu_compile.report.work import (
    answers_text,
    declined,
    engine_errors,
    largest_error,
    program_work,
    result_work,
)
from flashu_compile.system.libraries import place_matplotlib
from flashu_compile.tasks import MMU, RECORDS, T2I

if TYPE_CHECKING:
    from flashu_compile.report.pictures import Comparison, Seen


_PARTS = {
    "ssim": "SSIM of pictures",
    "clean": "pictures free of speckle",
    "next_tokens": "next tokens that are the same",
    "next_codes": "next codes that are the same",
}


def render(
    manifest: Manifest,
    report: Mapping[str, Any],
    recipe: Recipe,
    plan: StepPlan | TokenPlan | None,
    comparisons: Mapping[str, Sequence[Comparison]],
    seen: Sequence[Seen] = (),
) -> str:
    """Render the page as HTML, the same text for the same arguments. Sections with nothing to show are left out."""
    environment = Environment(
        loader=PackageLoader("flashu_compile.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "quantity": quantity,
        "size": size,
        "error": _error,
        "share": _share,
        "seconds": seconds,
        "times": "{:.2f}×".format,
    }
    template = environment.get_template("page.html.j2")
    proof = report.get("proof", {})
    return template.render(
        manifest=manifest,
        report=report,
        neutral=_neutral(report),
        tasks={task: RECORDS[task].title for task in manifest.tasks},
        recipe_rows=[dict(zip(COLUMNS, row, strict=True)) for row in recipe_rows(recipe, plan)],
        costs={task: _cost(report.get("cost", {}).get(task)) for task in manifest.tasks},
        beside=report.get("beside_exact", {}),
        part_titles=_PARTS,
        seen=[_side_by_side(pictures) for pictures in seen],
        comparisons={task: list(_shown(comparisons.get(task, ()))) for task in manifest.tasks},
        programs=program_work(manifest, report, plan),
        results=result_work(manifest, report, plan),
        change=change,
        passes=list(_passes(report.get("passes", []), proof.get("passes", []))),
        proof=proof,
        answers=answers_text(report.get("answered", {})),
        int8=report.get("int8"),
        declined=declined(report),
        lossy=[row for row in report.get("passes", []) if row["kind"] == "lossy" and row["changes"]],
        engine_errors={
            name: max(errors.values()) for name, errors in engine_errors(report).items() if errors
        },
        plan=plan,
        drawn_by_codes=isinstance(plan, TokenPlan),
        plots=_plots(report, recipe, plan),
        token_rule=_token_rule(recipe),
    )


def _neutral(report: Mapping[str, Any]) -> str:
    """Say what rests on neutral samples: decisions, costs, both, or nothing (an empty text)."""
    if report.get("samples", {}).get("origin") != "neutral":
        return ""
    measured = any("not_measured" not in figures for figures in report.get("cost", {}).values())
    resting = {"decisions": bool(report.get("calibration")), "costs": measured}
    return " and ".join(name for name, rests in resting.items() if rests)


def _cost(figures: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the measured figures, with the length of each technique's bar as a share of the longest."""
    if figures is None or "not_measured" in figures:
        return None if figures is None else dict(figures)
    rows = figures["techniques"]
    longest = max([figures["error"], *(row["error"] for row in rows)]) or 1.0
    everything = {"name": "everything together", "error": figures["error"], "whole": True}
    bars = [{**row, "bar": row["error"] / longest} for row in (*rows, everything)]
    return {**figures, "bars": bars}


def _shown(comparisons: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    for comparison in comparisons:
        pictures = list(comparison.pictures)
        if comparison.kept is not None:
            seen = keep_map(pictures[0], comparison.kept)
            pictures += [] if seen is None else [seen]
        yield {"text": comparison.text, "pictures": [data_uri(picture) for picture in pictures]}


def _side_by_side(seen: Seen) -> dict[str, Any]:
    pictures, told = {"exact": seen.exact, "this bundle": seen.own}, f"{seen.prompt} (seed {seen.seed})"
    if seen.ssim is not None:
        pictures[f"difference × {AMPLIFIED}"] = seen.difference
        told += f": SSIM {seen.ssim:.3f}"
    return {"pictures": {title: data_uri(picture) for title, picture in pictures.items()}, "text": told}


def _passes(
    records: Sequence[Mapping[str, Any]], validated: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the passes that changed something, over all programs, in the order of their first appearance.

    `validated`: what the same passes did to a copy of the model.
    """
    changing: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["changes"]:
            changing.setdefault(record["name"], []).append(record)
    for name, group in changing.items():
        yield {
            "name": name,
            "kind": group[0]["kind"],
            "programs": len(group),
            "changes": sum(len(record["changes"]) for record in group),
            "error": largest_error(group, validated),
            "float64_error": largest_error(group, validated, "float64_error"),
        }


def _plots(report: Mapping[str, Any], recipe: Recipe, plan: StepPlan | TokenPlan | None) -> dict[str, Any]:
    """Draw the plots there is data for, by name; without any, the plotting library is not even imported."""
    made: dict[str, Any] = {}
    figures = report.get("calibration", {})
    varied = plan is not None and len({(s.engine, s.guidance_scale) for s in plan.steps}) > 1
    if not figures and not varied:
        return made
    place_matplotlib()
    from flashu_compile.report import plots

    if plan is not None and varied:
        made["timeline"] = plots.timeline(plan)
    for task, measured in figures.items():
        scores = measured.get("neuron_scores")
        if scores:
            made[f"{task}_scores"] = plots.score_curves(scores)
        phases = recipe.decided(task).phases
        by_codes = task == T2I.name and isinstance(plan, TokenPlan)
        for stack, importance in measured["layer_importance"].items():
            skipped = [phase.layers.get(stack, ()) for phase in phases]
            name = f"{task}_importance_bars" if by_codes else f"{task}_importance"
            if task != T2I.name or isinstance(plan, TokenPlan):
                drawn = plots.importance_bars(stack, importance, skipped[0] if skipped else ())
            else:
                run = () if plan is None else phases_run(plan, phases)
                rows = [row for number, row in enumerate(importance) if number in run]
                if not rows:
                    continue
                drawn = plots.importance_map(stack, rows, [skipped[number] for number in run])
            made[name] = made.get(name, "") + drawn
    if (norms := figures.get(MMU.name, {}).get("value_norms")) is not None:
        layer = recipe.mmu.token_layer if recipe.mmu.token_pruning else None
        made["value_norms"] = plots.value_norms(norms, layer)
    return made


def _token_rule(recipe: Recipe) -> str:
    """Describe which rows token pruning drops; "" where it is off."""
    if not recipe.mmu.token_pruning:
        return ""
    where = "after the layer marked by a dashed line"
    dropped = {"v_norm": "the rows with the largest norms", "duplication": "the rows most like others",
               "random": "rows at random"}  # fmt: skip
    rows = dropped.get(recipe.mmu.token_scorer, f"rows chosen by {recipe.mmu.token_scorer}")
    return f" Token pruning drops {rows} from the picture {where}."


def _error(value: float) -> str:
    """Format a relative error: in per cent where that is readable."""
    if value == 0:
        return "0"
    return f"{100 * value:.3g}\u00a0%" if value >= 1e-3 else f"{value:.1e}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0"
