"""An engine in an ONNX Runtime session, held to its signature in the manifest."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from flashu_compile.bundle.manifest import EngineSpec
from flashu_compile.bundle.signatures import check_inputs, check_outputs, state_of, updated
from flashu_compile.errors import BundleError
from flashu_compile.runtime.binding import BoundRuns, StateRuns
from flashu_compile.runtime.engine import State, Tensors
from flashu_compile.runtime.lifetime import Lifetime
from flashu_compile.runtime.providers import Placement, placements
from flashu_compile.runtime.shared_weights import SharedWeights
from flashu_compile.system.onnxruntime_library import ERRORS, ort

_ORT_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxRuntimeEngine:
    """An ONNX Runtime session with its signature. `InferenceSession.run` may be called from several threads.

    `placements` says which provider runs how many nodes. With `bound`, runs go through fixed buffers, one at a
    time.
    """

    def __init__(
        self,
        spec: EngineSpec,
        session: ort.InferenceSession,
        *,
        weights: SharedWeights | None = None,
        bound: BoundRuns | None = None,
        lifetime: Lifetime | None = None,
    ) -> None:
        self.spec = spec
        self._lifetime = lifetime or Lifetime()
        self.placements: tuple[Placement, ...] = placements(session)
        self._session, self._bound = session, bound
        self._weights = weights  # the session reads them for as long as it lives
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._state = state_of(spec)
        self._stateful = StateRuns(session, spec)
        for side, tensors, values in (
            ("inputs", spec.inputs, session.get_inputs()),
            ("outputs", spec.outputs, session.get_outputs()),
        ):
            listed = {(tensor.name, tensor.dtype) for tensor in tensors}
            found = {(value.name, _ORT_DTYPES.get(value.type, value.type)) for value in values}
            if listed != found:
                raise BundleError(
                    f"Engine {spec.name!r}: the {side} of {spec.file} are {sorted(found)}, "
                    f"the manifest's are {sorted(listed)}; build the bundle again."
                )

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the session; see `Engine.run`. Raises `BundleError` if ONNX Runtime fails."""
        self._lifetime.check()
        sizes = check_inputs(self.spec, inputs)
        if self._state:
            state = {name: inputs[name].copy() for name in self._state}
            rest = {name: value for name, value in inputs.items() if name not in state}
            outputs = self.update(rest, state)
            return outputs | {updated(name): array for name, array in state.items()}
        try:
            if self._bound is not None:
                values = self._bound.run(inputs)
            else:
                values = self._session.run(self._outputs, dict(inputs))
        except ERRORS as error:
            raise self._failed(error) from error
        return check_outputs(self.spec, dict(zip(self._outputs, values, strict=True)), sizes)

    def update(self, inputs: Tensors, state: State) -> dict[str, NDArray[Any]]:
        """Run the session and update `state` in place; see `Updating.update` and `StateRuns`."""
        self._lifetime.check()
        sizes = check_inputs(self.spec, {**inputs, **state})
        try:
            outputs = self._stateful.run(inputs, state, sizes)
        except ERRORS as error:
            raise self._failed(error) from error
        return check_outputs(self.spec, outputs, sizes)

    def _failed(self, error: Exception) -> BundleError:
        return BundleError(f"Engine {self.spec.name!r} failed in ONNX Runtime: {error}")
