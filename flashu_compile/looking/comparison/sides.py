"""The two sides of a comparison: a bundle's engines, value by value, and their reference.

Each library is imported where it is needed: onnx by what reads graphs, torch by what runs programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import EngineSpec
from flashu_compile.bundle.signatures import check_inputs
from flashu_compile.errors import BundleError, ConfigurationError, InputError
from flashu_compile.extras import naming_the_extra
from flashu_compile.looking.comparison.computation import Computation
from flashu_compile.runtime.backends import DEFAULT, TORCH
from flashu_compile.runtime.checked_graph import read_graph

Inputs = Mapping[str, NDArray[Any]]


class Side(Protocol):
    """One side of a comparison."""

    def of(self, spec: EngineSpec, inputs: Inputs) -> Computation:
        """Return what this side computes for engine `spec` of the bundle under test.

        Raises a `FlashuError` if it cannot.
        """
        ...


class BundleSide:
    """Engines of a bundle, run as `settings` says (provider, provider_options and threads; see `load`)."""

    def __init__(self, files: BundleFiles, settings: Mapping[str, Any], *, trust: bool = False) -> None:
        self.files, self.settings, self._trust = files, settings, trust
        path = self.path = files.directory
        self.backend = self.files.manifest.backend
        if self.backend not in (DEFAULT, TORCH):
            raise ConfigurationError(
                f"{path} was built for backend {self.backend!r}, whose engines do not give the values inside them; "
                f"bundles of {DEFAULT!r} and {TORCH!r} can be compared layer by layer."
            )
        if self.backend == TORCH and not trust:
            raise ConfigurationError(
                f"{path} was built for backend {TORCH!r}, whose engines are code that loading runs; if you know who "
                "built it, compare it with trust=True (--trust)."
            )
        if self.backend == TORCH and settings.get("provider", "cpu") != "cpu":
            raise ConfigurationError(
                f"The values inside engines of backend {TORCH!r} are computed on the CPU alone; leave the provider out."
            )

    def of(self, spec: EngineSpec, inputs: Inputs) -> Computation:
        """Return the values of the bundle's engine of that name. Raises `BundleError` if its inputs differ."""
        own = self.files.manifest.engine(spec.name)
        try:
            check_inputs(own, inputs)
        except InputError as error:
            raise BundleError(f"{self.path} takes other inputs: {error}") from error
        if self.backend == TORCH:
            with naming_the_extra("Comparing layers"):
                from flashu_compile.looking.comparison.traced_program import ProgramValues
                from flashu_compile.looking.comparison.written_program import written_program
            return ProgramValues(written_program(self.files, own), inputs)
        with naming_the_extra("Comparing layers"):
            from flashu_compile.looking.comparison.onnx_graph import Placing, RuntimeValues
        with _graph(self.files, own, trust=self._trust) as path:
            return RuntimeValues(path, inputs, Placing(**self.settings))


class OnnxSide:
    """The bundle's own graphs, computed by onnx's reference evaluator."""

    def __init__(self, files: BundleFiles, *, trust: bool = False) -> None:
        self.files, self._trust = files, trust
        backend = files.manifest.backend
        if backend != DEFAULT:
            raise ConfigurationError(
                f"{files.directory} was built for backend {backend!r}, so it has no ONNX graphs."
            )

    def of(self, spec: EngineSpec, inputs: Inputs) -> Computation:
        """Return the values of the engine's graph."""
        with naming_the_extra("Comparing layers"):
            from flashu_compile.looking.comparison.onnx_graph import ReferenceValues
        with _graph(self.files, spec, trust=self._trust) as path:
            return ReferenceValues(path, inputs)


class ModelSide:
    """The programs of some tasks that the recipe of a bundle makes of its model, in PyTorch.

    `model` and `parts` (vae, tokenizer, llm_config) are as for `export`; if `model` is None, it is found by
    the name that the bundle records.
    """

    def __init__(
        self,
        files: BundleFiles,
        tasks: Sequence[str],
        model: Any,
        parts: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        with naming_the_extra("Comparing against the model"):
            from flashu_compile.looking.comparison.model_programs import specialised_programs
        self.programs = specialised_programs(files, tasks, model, parts, tell)

    def of(self, spec: EngineSpec, inputs: Inputs) -> Computation:
        """Return the values of the engine's program. Raises `BundleError` if it is missing or takes other inputs."""
        from flashu_compile.looking.comparison.traced_program import ProgramValues

        program = self.programs.get(spec.name)
        if program is None:
            raise BundleError(
                f"The bundle's recipe makes no engine {spec.name!r} of this model; it makes "
                f"{', '.join(self.programs)}."
            )
        if set(program.input_roles) != set(inputs):
            raise BundleError(
                f"Engine {spec.name!r} takes {', '.join(inputs)}, but its program takes "
                f"{', '.join(program.input_roles)}; is this the model that the bundle was made of?"
            )
        return ProgramValues(program, inputs)


@contextmanager
def _graph(files: BundleFiles, spec: EngineSpec, *, trust: bool) -> Iterator[Path]:
    """Yield the path of an engine's graph, checked, to be read before this ends. Raises as `read_graph`."""
    with files.held(spec.file) as (path,):
        read_graph(files, spec, trust=trust)
        yield path
