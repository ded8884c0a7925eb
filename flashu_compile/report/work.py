"""How much work programs do before and after compilation, from a bundle's report. No torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flashu_compile.bundle.manifest import Manifest
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.tasks import COMPLETE, DENOISE, DRAW, MMU, TEXT, UNDERSTAND, VAE_DECODE, VISION


@dataclasses.dataclass(frozen=True)
class ProgramWork:
    """The work of one run on the recorded inputs.

    `nodes`: of the ONNX graph, None for a program as captured. `rows`: as text.
    """

    name: str
    task: str
    captured: bool
    runs: str
    operations: int | None
    nodes: int | None
    parameters: int
    flops: int
    bytes: int | None
    rows: str


@dataclasses.dataclass(frozen=True)
class ResultWork:
    """The work that one result takes: as captured and published, and by the bundle's engines."""

    what: str
    flops: tuple[float, float]
    bytes: tuple[float, float]


def program_work(
    manifest: Manifest, report: Mapping[str, Any], plan: StepPlan | TokenPlan | None
) -> list[ProgramWork]:
    """Return a row for each captured program, followed by those of the engines made from it."""
    counts = report.get("engines", {})
    rows: list[ProgramWork] = []
    sources = dict.fromkeys(counts.get(e.name, {}).get("captured") for e in manifest.engines)
    for source in sources:
        members = [e for e in manifest.engines if counts.get(e.name, {}).get("captured") == source]
        before = report.get("captured", {}).get(source)
        if before is not None:
            rows.append(_row(source, members[0].task, before, _published_runs(source, report), captured=True))
        rows.extend(
            _row(e.name, e.task, counts[e.name], runs_of(manifest, e.name, plan), captured=False)
            for e in members
            if e.name in counts
        )
    return rows


def runs_of(manifest: Manifest, name: str, plan: StepPlan | TokenPlan | None) -> str:
    """Describe in words how often an engine runs."""
    readers = [e.name for e in manifest.engines if e.prologue == name]
    if manifest.engine(name).task == TEXT.name:
        return "once a prompt, then once a token"
    if manifest.engine(name).task == MMU.name:
        once = name == VISION or readers
        return "once a picture" if once else "once a question, then once a token"
    steps = Counter(step.engine for step in plan.steps) if plan else Counter()
    if name in steps:
        what = "codes" if isinstance(plan, TokenPlan) else "evaluations"
        return f"{steps[name]} of {sum(steps.values())} {what}"
    if any(e.schedule == name for e in manifest.engines):
        return "once a time point"
    return "once a prompt" if readers else "once"


def _published_runs(name: str, report: Mapping[str, Any]) -> str:
    if name in (UNDERSTAND, COMPLETE):
        return "once a token"
    if name == DRAW:
        return "once a code"
    points = report.get("published_points")
    return f"{points - 1} evaluations" if name == DENOISE and points else "once"


def _row(name: str, task: str, counts: Mapping[str, Any], runs: str, *, captured: bool) -> ProgramWork:
    moved = counts.get("bytes")
    return ProgramWork(
        name=name,
        task=task,
        captured=captured,
        runs=runs,
        operations=counts.get("operations"),
        nodes=counts.get("nodes"),
        parameters=sum(counts.get("parameters", {}).values()),
        flops=sum(counts.get("flops", {}).values()),
        bytes=None if moved is None else sum(moved.values()),
        rows=rows_text(counts.get("rows", {}).get(counts.get("decoder", ""), ())),
    )


def rows_text(rows: Sequence[int]) -> str:
    """Format the numbers of rows by layer: `904`, or `504 (3 layers), 374 (11)` where they differ."""
    stretches: list[list[int]] = []
    for count in rows:
        if stretches and stretches[-1][0] == count:
            stretches[-1][1] += 1
        else:
            stretches.append([count, 1])
    if len(stretches) == 1:
        return str(stretches[0][0])
    if len(stretches) > 3:
        return f"{min(rows)}–{max(rows)}"
    return ", ".join(f"{count} × {layers}" for count, layers in stretches)


def result_work(
    manifest: Manifest, report: Mapping[str, Any], plan: StepPlan | TokenPlan | None
) -> list[ResultWork]:
    """Compute the work of a first picture, and of an answer's first token; empty where the report lacks the counts."""
    captured, engines = report.get("captured", {}), report.get("engines", {})
    found: list[ResultWork] = []
    if (
        isinstance(plan, StepPlan)
        and "published_points" in report
        and _counted(captured, DENOISE, VAE_DECODE)
    ):
        evaluations = report["published_points"] - 1
        before = {DENOISE: float(evaluations), VAE_DECODE: 1 / captured[VAE_DECODE]["batch"]}
        after: dict[str, float] = {}
        for step in plan.steps:
            after[step.engine] = after.get(step.engine, 0) + len(step.branches) / 2
            engine = manifest.engine(step.engine)
            if engine.prologue is not None:
                after[engine.prologue] = 1
            if engine.schedule is not None:
                after[engine.schedule] = after.get(engine.schedule, 0) + 1
        after[VAE_DECODE] = before[VAE_DECODE]
        if _counted(engines, *after):
            found.append(_result("one picture", captured, before, engines, after))
    names = [e.name for e in manifest.engines if e.task == MMU.name]
    if manifest.understanding is not None and _counted(captured, UNDERSTAND) and _counted(engines, *names):
        share = 1 / captured[UNDERSTAND]["batch"]
        what = "one answer, to its first token"
        found.append(_result(what, captured, {UNDERSTAND: share}, engines, dict.fromkeys(names, share)))
    return found


def _counted(counts: Mapping[str, Any], *names: str) -> bool:
    """Tell whether the report counts all these programs or engines."""
    return all({"batch", "bytes"} <= counts.get(name, {}).keys() for name in names)


def _result(
    what: str,
    captured: Mapping[str, Any],
    before: Mapping[str, float],
    engines: Mapping[str, Any],
    after: Mapping[str, float],
) -> ResultWork:
    def total(counts: Mapping[str, Any], runs: Mapping[str, float], entry: str) -> float:
        return sum(share * sum(counts[name][entry].values()) for name, share in runs.items())

    flops, moved = (
        (total(captured, before, entry), total(engines, after, entry)) for entry in ("flops", "bytes")
    )
    return ResultWork(what, flops, moved)


def engine_errors(report: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the measured errors of engine outputs by engine: those of the proof copy, if there was one."""
    if "proof" in report:
        return dict(report["proof"]["engines"])
    return {name: told["errors"] for name, told in report.get("engines", {}).items() if "errors" in told}


@dataclasses.dataclass(frozen=True)
class Declined:
    """Something a pass left unchanged, and why.

    `undone`: the technique, if it was requested and nothing of it was done.
    """

    program: str
    name: str
    why: str
    undone: str | None


def declined(report: Mapping[str, Any]) -> list[Declined]:
    """Return a row for each reason, beginning with those of techniques that were requested and not done."""
    rows = [
        Declined(row["program"], row["name"], why, None if row["changes"] else row.get("technique"))
        for row in report.get("passes", [])
        for why in row.get("declined", ())
    ]
    return sorted(rows, key=lambda row: row.undone is None)


def answers_text(answered: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the answers that a build's bundle gave, from the report's entry `answered`; "" if there is none."""
    return "; ".join(f"{task}: {_answer_text(told)}" for task, told in answered.items())


def _answer_text(told: Mapping[str, Any]) -> str:
    if "not_run_here" in told:
        return f"not run here ({told['not_run_here']})"
    asked = f"{told['evaluations']} evaluations" if "evaluations" in told else f"{told['tokens']} tokens"
    of_copy = " of a small copy" if told["bundle"] == "copy" else ""
    held = f"within {told['error']:.1e} of eager" if "error" in told else "finite, of the right shape"
    if "rounding" in told:
        held += f" in float64, from which rounding to float32 may differ by {told['rounding']:.1e}"
    return f"{asked}{of_copy}, {held}"


def largest_error(
    records: Sequence[Mapping[str, Any]], validated: Sequence[Mapping[str, Any]], field: str = "error"
) -> float | None:
    """Return the largest `field` in one pass's `records`, and in the records of the same pass in `validated`.

    `validated` records what passes did to a copy. `field` is "error" or "float64_error".
    """
    alike = (*records, *(record for record in validated if record["name"] == records[0]["name"]))
    return max((record[field] for record in alike if record.get(field) is not None), default=None)
