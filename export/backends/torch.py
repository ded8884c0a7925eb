"""Programs unchanged, for PyTorch: torch.export's own JSON form of a graph, and one safetensors file of tensors.

`torch.export.save` is not used: its archives hold the example inputs, and some tensors, as pickles, and hold
the weights once for every engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch._export.serde.serialize import serialize

from flashu_compile.bundle.profiles import Range
from flashu_compile.errors import EmissionError
from flashu_compile.exporters.backends import Emitted, Packed, Written
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.parity import written_errors
from flashu_compile.exporters.precision import Precision
from flashu_compile.exporters.statistics import traced_statistics
from flashu_compile.exporters.torch_programs import (
    PRECISIONS,
    TorchModel,
    plain_copy,
    write_engines,
)
from flashu_compile.program.program import Program

# PyTorch 2.11 takes no such wishes: it pickles tensors too, which are thrown away here.
_GRAPH_ALONE: dict[str, Any] = {
    name: False
    for name in ("serialize_state_dict", "serialize_constants", "serialize_example_inputs")
    if name in inspect.signature(serialize).parameters
}


class Torch:
    """The PyTorch backend: each engine is its program in torch.export's JSON form."""

    precisions = PRECISIONS

    def check(self) -> None:
        """Accept every machine, since compiling needs PyTorch anyway."""

    def emit(self, program: Program, precision: Precision, ranges: Mapping[str, Range]) -> Emitted:
        """Serialize the program. Raises `EmissionError` if torch.export cannot."""
        program, records = precision.carry_out(program)
        exported = plain_copy(program)
        try:
            artifact = serialize(exported, **_GRAPH_ALONE)
        except Exception as error:  # torch's serializer raises many unrelated types
            raise EmissionError(
                f"Program {program.name!r} cannot be written by torch.export: {error}"
            ) from error
        tensors = {**exported.state_dict, **exported.constants}
        model = TorchModel.of(program, artifact.exported_program, tensors)
        return Emitted(model, traced_statistics(program), records)

    def pack(self, model: TorchModel) -> Packed:
        """Return the model as data that other builds may use."""
        return model.pack()

    def unpack(self, packed: Packed) -> TorchModel:
        """Rebuild a packed model."""
        return TorchModel.unpack(packed)

    def write(self, engines: Sequence[EngineBuild], directory: Path) -> Written:
        """Write the JSON form of each engine, and one file of tensors."""
        return write_engines(list(engines), directory, ".json")

    def errors(self, engine: EngineBuild, precision: Precision, scratch_parent: Path) -> dict[str, float]:
        """Measure the errors of an engine by running its program as it was written."""
        return written_errors(engine, self, "torch", str(precision), scratch_parent)


BACKEND = Torch()
