"""Runs passes over a program in order and verifies the result of each.

After every pass the graph is linted and run on the sample inputs, and the shape and dtype of every value must be what
the metadata says. An exact pass must give what it got. A difference far below a unit in the last place is let pass;
where there is more, it may be rounding or a fault, and float64 tells: there the program is run before and after on the
same inputs, which must agree to 1e-9 relative L2, and the pass may not round ten times as much as the program it got
did, or may (as drawn, where one run of it rounds less).
Programs that are in float64 already must agree to 1e-12. What a lossy pass changes is measured and reported. Behind the
last pass shapes are propagated through each graph once more with its dynamic dimensions as symbols. Nodes that a pass
made or touched are marked with its name.

For a program that is too large to be run after every pass, this can be turned off (`validate=False`) where
the same passes were validated on a smaller copy of the model. Its graphs are still linted after every pass,
and shapes propagated after the last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from flashu_compile.bundle import agreement
from flashu_compile.bundle.agreement import (
    REORDERED,
    Difference,
    output_difference,
    possible_rounding,
    rounded,
)
from flashu_compile.errors import FlashuError, PassError
from flashu_compile.passes.base import Kind, Pass, PassResult
from flashu_compile.passes.provenance import note
from flashu_compile.passes.widening import run_wide
from flashu_compile.program.program import Program, run_chain
from flashu_compile.program.repeated_calls import RepeatedCalls

#: The share of a unit in the last place that nobody asks about: a tenth of what one rounding hides. Most passes make no
#: difference at all; that of those which sum in another order is larger, by how much depends on the weights.
_UNQUESTIONED = 0.05
_TOLERANCE_64 = 1e-12
#: In float64 sums in another order agree to 1e-14; programs that round a hundred thousand times as much pass too.
_WIDE_TOLERANCE = 1e-9
#: How many times the rounding of the program that it got (in one run, or as drawn), or a unit in the last place, an
#: exact pass may round.
_ROUNDING = 10


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass changed in one program, and in `declined` its reasons for changes it could not make.

    `error` is the largest relative L2 error (`agreement`) over the outputs it kept; None if the pass changed nothing,
    or was not validated on this program. `float64_error` is the same in float64, where `error` was too large to be
    taken for rounding. `technique` is what a recipe calls what the pass carries out, if it does.
    """

    program: str
    name: str
    kind: Kind
    changes: tuple[str, ...]
    error: float | None
    declined: tuple[str, ...] = ()
    technique: str | None = None
    float64_error: float | None = None

    @property
    def undone(self) -> bool:
        """Whether a recipe asks for what the pass does, and it declined to do any of it."""
        return self.technique is not None and bool(self.declined) and not self.changes


@dataclasses.dataclass(frozen=True)
class PassManager:
    """A pipeline of passes. Where a pass makes several programs, each later pass runs on each of them."""

    passes: tuple[Pass, ...]
    validate: bool = True

    def run(self, program: Program) -> tuple[tuple[Program, ...], tuple[PassRecord, ...]]:
        """Run every pass. Raises `PassError` naming the pass, the program and the passes before it."""
        current = [_Checked(program)]
        records: list[PassRecord] = []
        for index, step in enumerate(self.passes):
            made: list[_Checked] = []
            for before in current:
                last = index == len(self.passes) - 1
                try:
                    after, record = _run_one(step, before, validate=self.validate)
                    for checked in after if last else ():
                        if checked.program is not program:
                            check_graph(checked.program)
                except Exception as problem:  # whatever a pass trips over, say which pass it was
                    raise PassError(_where(self.passes[:index], step, before.program, problem)) from problem
                made.extend(after)
                records.append(record)
            current = made
        return tuple(checked.program for checked in current), tuple(records)


class _Checked:
    """A program whose metadata was checked against a run, and its outputs on its sample, computed on first use."""

    def __init__(self, program: Program, outputs: dict[str, Tensor] | None = None) -> None:
        self.program, self._outputs = program, outputs
        self._wide: dict[str, Tensor] | None = None

    def outputs(self) -> dict[str, Tensor]:
        """Return the program's outputs on its sample inputs."""
        if self._outputs is None:
            with torch.no_grad():
                self._outputs = self.program.run(self.program.sample)
        return self._outputs

    def wide_outputs(self) -> dict[str, Tensor]:
        """Return the program's outputs on its sample inputs, computed in float64."""
        if self._wide is None:
            self._wide = run_wide(self.program, self.program.sample)
        return self._wide


def _run_one(step: Pass, before: _Checked, *, validate: bool) -> tuple[list[_Checked], PassRecord]:
    """Run one pass on one program and verify what it made. Raises `PassError` if that is not valid."""
    program = before.program
    reason = step.requires(program)
    if reason is not None:
        raise PassError(f"its requirement does not hold: {reason}")
    result = step.call(program)
    if (result.programs == (program,)) != (not result.changes):
        raise PassError(
            f"it returns {'the program it got' if result.changes else 'another program'} "
            f"and tells of {'changes' if result.changes else 'none'}: {'; '.join(result.changes)}"
        )
    if result.programs == (program,):
        return [before], _record(step, program, result)
    note(step.name, program, result.programs)
    if not validate:
        for made in result.programs:
            made.exported.graph.lint()
        return [_Checked(made) for made in result.programs], _record(step, program, result)
    values = _sample(program, result)
    after = []
    for made in result.programs:
        outputs = _run_checked(made, values)
        values |= outputs
        after.append(_Checked(made, outputs if len(result.programs) == 1 else None))
    error, wide_error = _judged(step, before, result, values)
    return after, _record(step, program, result, error, wide_error)


def _sample(program: Program, result: PassResult) -> dict[str, Tensor]:
    """Return inputs for what a pass made: it may take an input apart, and then what it made of the sample counts."""
    return {**program.sample, **result.programs[0].sample}


def _record(
    step: Pass,
    program: Program,
    result: PassResult,
    error: float | None = None,
    wide_error: float | None = None,
) -> PassRecord:
    """Make the record of a pass that ran on `program`."""
    return PassRecord(
        program.name, step.name, step.kind, result.changes, error, result.reasons, step.technique, wide_error
    )


def _judged(
    step: Pass, before: _Checked, result: PassResult, values: Mapping[str, Tensor]
) -> tuple[float, float | None]:
    """Return the largest relative error of `values`, and that in float64 where it was asked for.

    Raises `PassError` if `step` may not cause it: a lossy pass only has to give numbers.
    """
    limit = _unquestioned(before.program)
    found = _differences(before.outputs(), values, result.dropped, limit)
    finite = all(math.isfinite(difference.relative) for difference in found.values())
    if step.kind == "lossy" and not finite:
        raise PassError(f"it gives no finite outputs ({_described(found)})")
    wide_error = None
    if step.kind == "exact" and not _all_within(found, limit):
        if not finite or _dtype(before.program) == torch.float64:
            raise PassError(f"it is declared exact but changed the outputs ({_described(found)})")
        wide_error = _judged_wide(before, result, values, found)
    return _largest(found), wide_error


def _judged_wide(
    before: _Checked, result: PassResult, values: Mapping[str, Tensor], found: Mapping[str, Difference]
) -> float:
    """Return the largest relative error in float64, of an exact pass that gave `values`, which are off by `found`.

    Raises `PassError` if it changed the outputs, or rounds much more than the program it got.
    """
    wide_values = _sample(before.program, result)
    try:
        truth = before.wide_outputs()
        for made in result.programs:
            wide_values |= run_wide(made, wide_values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise PassError(
            f"it is declared exact but changed the outputs ({_described(found)}), and float64 cannot tell "
            f"whether by rounding: {error}"
        ) from error
    wide = _differences(truth, wide_values, result.dropped, _WIDE_TOLERANCE)
    if not _all_within(wide, _WIDE_TOLERANCE):
        raise PassError(
            f"it is declared exact but changed the outputs ({_described(found)}; in float64: {_described(wide)})"
        )
    unit = torch.finfo(_dtype(before.program)).eps
    own = _largest(_differences(truth, before.outputs(), result.dropped, unit))
    rounding = _largest(_differences(truth, values, result.dropped, unit))
    if not rounding <= _ROUNDING * max(own, unit):
        own = possible_rounding(own, [_rounding_drawn(before.program, truth, result)])
    if not rounding <= _ROUNDING * max(own, unit):
        raise PassError(
            f"it is declared exact but rounds too much: the outputs are {rounding:.1e} from those in float64 "
            f"(relative L2), and were, or may have been by rounding, {own:.1e} from them"
        )
    return _largest(wide)


def _rounding_drawn(program: Program, truth: Mapping[str, Tensor], result: PassResult) -> float:
    """Return how far rounding at random puts the program's outputs from `truth`; infinity if it cannot run so."""
    try:
        noisy = run_wide(program, program.sample, noisy=True)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return math.inf
    return _largest(_differences(truth, noisy, result.dropped, 0.0))


def _all_within(found: Mapping[str, Difference], tolerance: float) -> bool:
    return all(difference.within(tolerance) for difference in found.values())


def _largest(found: Mapping[str, Difference]) -> float:
    return rounded(max((difference.relative for difference in found.values()), default=0.0))


def _described(found: Mapping[str, Difference]) -> str:
    errors = ", ".join(f"{role} {difference.relative:.3g}" for role, difference in found.items())
    order = f", and {REORDERED}" if any(difference.reordered for difference in found.values()) else ""
    return f"relative L2 error: {errors}{order}"


def _unquestioned(program: Program) -> float:
    dtype = _dtype(program)
    return _TOLERANCE_64 if dtype == torch.float64 else _UNQUESTIONED * torch.finfo(dtype).eps


def _dtype(program: Program) -> torch.dtype:
    """Return the dtype of the program's first floating-point input, or float32 if it has none."""
    floating = [v.dtype for v in program.sample.values() if v.dtype.is_floating_point]
    return floating[0] if floating else torch.float32


def _where(before: Sequence[Pass], step: Pass, program: Program, problem: Exception) -> str:
    """Write the message of a pass that failed, with the program and the passes before it."""
    ran = ", ".join(p.name for p in before) or "none"
    reason = problem if isinstance(problem, FlashuError) else repr(problem)
    return f"Pass {step.name} failed on program {program.name!r}: {reason} (passes before it: {ran})."


class _ShapeCheck(fx.Interpreter):
    """An interpreter that compares the shape and dtype of every value it computes with the node's metadata."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # what is wrong names its node

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        declared = n.meta.get("val")
        if isinstance(value, Tensor) and isinstance(declared, Tensor):
            _check_value(n, value, declared)
        return value


class _SymbolCheck(_ShapeCheck):
    """The same of fake values, whose dynamic sizes are symbols. Nodes without metadata get what was computed."""

    def __init__(self, module: fx.GraphModule, calls: RepeatedCalls) -> None:
        super().__init__(module)
        self._calls = calls

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.meta.get("val") is None:
            n.meta["val"] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._calls.call(target, args, kwargs)


def _run_checked(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lint the graph and run it. Raises `PassError` naming the node whose value differs from its metadata."""
    graph_module = program.exported.graph_module
    try:
        graph_module.graph.lint()
        with torch.no_grad():
            return program.run(inputs, _ShapeCheck(graph_module))
    except (RuntimeError, TypeError, KeyError, AssertionError, ValueError) as error:
        raise PassError(f"it left an invalid graph: {error}") from error


def check_graph(program: Program) -> None:
    """Lint the graph and propagate shapes through it, with dynamic dimensions as symbols.

    Raises `PassError` naming the node whose shape or dtype differs from its metadata.
    """
    graph_module = program.exported.graph_module
    try:
        graph_module.graph.lint()
        inputs = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
        fake_mode = torch._guards.detect_fake_mode(inputs) or FakeTensorMode()
        # PyTorch 2.11 has no other way than the Python dispatcher's to size products of dynamic rows.
        with fake_mode, torch.no_grad(), enable_python_dispatcher():
            _SymbolCheck(graph_module, program.calls).run(*inputs, enable_io_processing=False)
    except (RuntimeError, TypeError, KeyError, AssertionError, ValueError) as error:
        raise PassError(f"it left an invalid graph: {error}") from error


def _check_value(node: fx.Node, value: Tensor, declared: Tensor) -> None:
    """Raise `PassError` if the dtype or shape of `value` is not that of the metadata of node `n`, `declared`."""
    if declared.dtype != value.dtype or not _same_shape(declared, value):
        raise PassError(
            f"it left node {node.name} as {value.dtype}{list(value.shape)}, "
            f"but its metadata says {declared.dtype}{list(declared.shape)}"
        )


def _same_shape(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors have equal ranks, and equal sizes wherever both are known numbers."""
    sizes: list[Any] = list(zip(first.shape, second.shape, strict=False))
    known = [(a, b) for a, b in sizes if not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt)]
    return len(first.shape) == len(second.shape) and all(a == b for a, b in known)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Compute `agreement.relative_error` of two tensors."""
    return agreement.relative_error(_array(value), _array(truth))


def compare(before: Program, after: PassResult) -> dict[str, float]:
    """Compute the relative L2 error of every output the pass kept, on the sample inputs."""
    with torch.no_grad():
        truth = before.run(before.sample)
        values = run_chain(after.programs, _sample(before, after))
    found = _differences(truth, values, after.dropped, _unquestioned(before))
    return {role: difference.relative for role, difference in found.items()}


def _differences(
    truth: Mapping[str, Tensor], values: Mapping[str, Tensor], dropped: tuple[str, ...], tolerance: float
) -> dict[str, Difference]:
    """Compare each output by role with its expected value, except those that were dropped."""
    return {
        role: output_difference(role, _array(values[role]), _array(expected), tolerance)
        for role, expected in truth.items()
        if role not in dropped
    }


def _array(value: Tensor) -> NDArray[Any]:
    """Convert a tensor to NumPy, bfloat16 as float32."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
