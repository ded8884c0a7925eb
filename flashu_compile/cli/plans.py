"""A plan of pictures as a table: which engine runs, and at which guidance scale."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from flashu_compile.cli.tables import print_table

if TYPE_CHECKING:
    from flashu_compile.recipe.plan import Step, StepPlan
    from flashu_compile.recipe.token_plan import CodeStep, TokenPlan


def print_plan(plan: StepPlan | TokenPlan) -> None:
    """Print a row for each stretch of evaluations, or of codes, that do the same."""
    from flashu_compile.recipe.plan import StepPlan

    _print_step_plan(plan) if isinstance(plan, StepPlan) else _print_token_plan(plan)


def _print_step_plan(plan: StepPlan) -> None:
    rows, number = [], 1
    for same, stretch in itertools.groupby(plan.steps, lambda step: dataclasses.replace(step, t=0.0, dt=1.0)):
        steps = list(stretch)
        ends = dict.fromkeys((number, number + len(steps) - 1))
        number += len(steps)
        rows.append(
            (
                "–".join(map(str, ends)),
                f"{steps[0].t:.3f}–{steps[-1].t + steps[-1].dt:.3f}",
                _guided(same),
                "stored" if same.store else "extrapolated" if same.extrapolate else "",
                same.engine,
            )
        )
    title = (
        f"{plan.points} time points, {len(plan.steps)} evaluations, {plan.solver}, shift {plan.time_shift:g}"
    )
    print_table(("evaluation", "t", "guidance", "head cache", "engine"), rows, title=title)


def _print_token_plan(plan: TokenPlan) -> None:
    rows, number = [], 1
    for span in plan.spans:
        ends = dict.fromkeys((number, number + span.count - 1))
        number += span.count
        rows.append(("–".join(map(str, ends)), _guided(span.step), span.engine))
    print_table(("code", "guidance", "engine"), rows, title=f"{number - 1} codes")


def _guided(step: Step | CodeStep) -> str:
    alone = "" if len(step.branches) == 2 else f" ({('prompt', 'empty prompt')[step.branches[0]]} alone)"
    return f"{step.guidance_scale:g}{alone}"
