"""Run Programs in PyTorch while recording some of their values, for calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.program.program import Program

#: The precision that programs are captured in.
PRECISION = "float32"

Tap = Callable[[Tensor], None]


def joined_taps(taps: Iterable[tuple[fx.Node, Tap]]) -> dict[fx.Node, Tap]:
    """Return one tap for each node; where there are several, such as at the end of a stack, it calls them in order."""
    found: dict[fx.Node, list[Tap]] = {}
    for node, tap in taps:
        found.setdefault(node, []).append(tap)

    def each(several: list[Tap]) -> Tap:
        def tap(value: Tensor) -> None:
            for one in several:
                one(value)

        return tap

    return {node: several[0] if len(several) == 1 else each(several) for node, several in found.items()}


class Recorder(fx.Interpreter):
    """Runs a program and passes the value of every node in `taps` to its tap, in graph order.

    `overrides` replaces the value of a node, such as the embeddings of the rows of a stack.
    """

    def __init__(
        self,
        program: Program,
        taps: Mapping[fx.Node, Tap],
        overrides: Mapping[fx.Node, Tensor] | None = None,
    ) -> None:
        super().__init__(program.exported.graph_module)
        self.program = program
        self._taps = {node.name: tap for node, tap in taps.items()}
        self._overrides = {node.name: value for node, value in (overrides or {}).items()}
        self._calls = {n: [_fetched(a) for a in n.args] for n in self.graph.nodes if _is_plain(n)}

    @torch.inference_mode()
    def record(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on inputs by role, and return the outputs by role."""
        return self.program.run(inputs, self)

    def run_node(self, n: fx.Node) -> Any:
        """Compute or override a node, and pass its value to its tap."""
        value = self._overrides[n.name] if n.name in self._overrides else self._computed(n)
        tap = self._taps.get(n.name)
        if tap is not None:
            tap(value)
        return value

    def _computed(self, n: fx.Node) -> Any:
        """Compute a node as `fx.Interpreter` does, but for what that does around each call, a tenth of a trajectory."""
        call = self._calls.get(n)
        if call is None:
            return super().run_node(n)
        env = self.env
        arguments = [env[given] if fetch is None else fetch(env, given) for fetch, given in call]
        return n.target(*arguments, **n.kwargs)  # type: ignore[operator]


def _is_plain(n: fx.Node) -> bool:
    """Return whether a node calls a function, and no keyword's value is computed."""
    given: list[fx.Node] = []
    fx.node.map_arg(n.kwargs, given.append)
    return n.op == "call_function" and not given


def _fetched(given: Any) -> tuple[Callable[[Mapping[fx.Node, Any], Any], Any] | None, Any]:
    """Return how an argument is found among the values of nodes: None of a node, which is looked up."""
    if isinstance(given, fx.Node):
        return None, given
    inner: list[fx.Node] = []
    fx.node.map_arg(given, inner.append)
    return (_nested if inner else _constant), given


def _nested(env: Mapping[fx.Node, Any], given: Any) -> Any:
    return fx.node.map_arg(given, env.__getitem__)


def _constant(env: Mapping[fx.Node, Any], given: Any) -> Any:
    return given


def captured_source(program: Program) -> Source:
    """Name the program as captured, which computes in float32, for errors about its outputs."""
    return Source(f"The model's program {program.name!r}", PRECISION)


class RecordingEngine:
    """Engines for the sampler, all of which are one Recorder; `before` is called with the inputs of each evaluation."""

    def __init__(self, recorder: Recorder, before: Callable[[Mapping[str, Tensor]], None]) -> None:
        self._recorder, self._before = recorder, before
        program = recorder.program
        given = [TensorSpec(str(role), str(v.dtype), tuple(v.shape)) for role, v in program.sample.items()]
        self.spec = EngineSpec(program.name, program.task, "", tuple(given), (), "")

    @property
    def precision(self) -> str:
        """Return the precision that programs are captured in."""
        return PRECISION

    def engine(self, name: str) -> RecordingEngine:
        """Return this engine, whatever the name."""
        return self

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run on inputs by role while recording, and return the outputs by role."""
        values = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        self._before(values)
        return {role: value.numpy() for role, value in self._recorder.record(values).items()}
