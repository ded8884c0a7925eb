"""Compare every engine of a bundle with a reference, down to the first node that departs."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from flashu_compile import arguments, reading
from flashu_compile.bundle import precision
from flashu_compile.bundle.agreement import Difference, output_difference
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import EngineSpec, Manifest, read_manifest
from flashu_compile.errors import BundleError, ConfigurationError
from flashu_compile.looking.comparison.search import Departure, LayerDifference, find_departure
from flashu_compile.looking.comparison.sides import BundleSide, ModelSide, OnnxSide, Side
from flashu_compile.runtime.backends import find_run_backend, open_engines
from flashu_compile.runtime.engine import Engines
from flashu_compile.runtime.providers import ProviderOptions
from flashu_compile.system.paths import absolute

EAGER, ONNX = "eager", "onnx"


@dataclasses.dataclass(frozen=True)
class EngineComparison:
    """One engine. `outputs` are of the engine as it runs in a pipeline, `layers` of it with inner values exposed.

    ONNX Runtime does not fuse operators across exposed values. So the outputs may depart while no value does:
    then ONNX Runtime's optimised form of the whole graph is wrong, and no single node.
    """

    engine: str
    tolerance: float
    outputs: Mapping[str, Difference]
    layers: tuple[LayerDifference, ...]
    departure: Departure | None

    @property
    def ok(self) -> bool:
        """Return whether outputs and values all agree within the tolerance."""
        return self.departure is None and all(found.within(self.tolerance) for found in self.outputs.values())


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """The comparison of a bundle's engines; `against` names the reference."""

    against: str
    engines: tuple[EngineComparison, ...]

    @property
    def ok(self) -> bool:
        """Return whether all engines agree with the reference."""
        return all(engine.ok for engine in self.engines)


@dataclasses.dataclass(frozen=True)
class _Comparing:
    files: BundleFiles
    engines: Engines
    subject: Side
    reference: Side
    tolerance: float

    def engine(self, spec: EngineSpec, tell: Callable[[str], None]) -> EngineComparison:
        stored = {find_run_backend(self.files.manifest.backend).weights} & self.files.manifest.files.keys()
        with self.files.held(spec.file, *stored):
            return self._engine(spec, tell)

    def _engine(self, spec: EngineSpec, tell: Callable[[str], None]) -> EngineComparison:
        inputs = _recorded_inputs(self.files, spec)
        subject, reference = self.subject.of(spec, inputs), self.reference.of(spec, inputs)
        names = [name for name in (tensor.name for tensor in spec.outputs) if name in reference.naming.values]
        missing = sorted({tensor.name for tensor in spec.outputs} - set(names))
        if missing:
            raise BundleError(
                f"Engine {spec.name!r} gives {missing[0]!r}, which the reference does not give."
            )
        tell(f"{spec.name}: outputs")
        given = self.engines.engine(spec.name).run(inputs)
        places = {name: reference.naming.values[name] for name in names}
        expected = reference.compute(list(places.values()))
        outputs = {
            name: output_difference(name, given[name], expected[place], self.tolerance)
            for name, place in places.items()
        }
        found = find_departure(subject, reference, self.tolerance, lambda what: tell(f"{spec.name}: {what}"))
        return EngineComparison(spec.name, self.tolerance, outputs, found.layers, found.departure)


def compare_layers(
    bundle: str | os.PathLike[str],
    against: str | os.PathLike[str] = EAGER,
    *,
    model: Any = None,
    vae: object = None,
    tokenizer: object = None,
    llm_config: Mapping[str, Any] | str | Path | None = None,
    engines: Sequence[str] | None = None,
    tolerance: float | None = None,
    provider: str = "cpu",
    provider_options: ProviderOptions | None = None,
    threads: int | None = None,
    memory: str = "fast",
    trust: bool = False,
    digest: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> LayerComparison:
    """Compare every engine of a bundle with a reference, on the inputs recorded when it was built.

    Args:
        bundle: the bundle's directory.
        against: "eager" (the model's programs in PyTorch, made by the bundle's recipe), "onnx" (the same graphs by
            onnx's reference evaluator), or the directory of another bundle.
        model, vae, tokenizer, llm_config: with "eager", the model that the bundle was made of, as for `export`; the one
            that the bundle names if not given.
        engines: the engines to compare; all of them if not given.
        tolerance: the largest relative L2 error that is agreement; by the precision of the bundles if not given.
        provider, provider_options, threads, memory, trust: how the bundle's engines run; see `load`. Another bundle
            runs on the CPU.
        digest: the SHA-256 that the bundle's manifest must have; see `load`.
        progress: called with what is being compared.

    Raises:
        FlashuError: a subclass that says why the comparison cannot be made. A departure is a result, not an error.

    Example:
        >>> found = compare_layers("build/shapes", "onnx")  # doctest: +SKIP
        >>> [engine.departure.node.name for engine in found.engines if not engine.ok]  # doctest: +SKIP
        []
    """
    arguments.function("progress", progress)
    if not isinstance(against, str) or against not in (EAGER, ONNX):
        against = absolute(against)
    if engines is not None and (isinstance(engines, str) or not isinstance(engines, Sequence)):
        raise ConfigurationError(f"engines must be a list of names, not {arguments.shown(engines)}.")
    path, tell = absolute(bundle), progress or (lambda stage: None)
    manifest = read_manifest(path, digest=digest)
    files = BundleFiles(path, manifest)
    chosen = [manifest.engine(name) for name in engines] if engines else list(manifest.engines)
    parts = {"vae": vae, "tokenizer": tokenizer, "llm_config": llm_config}
    if against != EAGER and (model is not None or any(part is not None for part in parts.values())):
        raise ConfigurationError("A model, or a part of one, is given for a comparison with 'eager' alone.")
    settings = {"provider": provider, "provider_options": provider_options, "threads": threads}
    subject = BundleSide(files, settings, trust=trust)
    reference: Side
    others = [manifest]
    if against == EAGER:
        tasks = tuple(task for task in manifest.tasks if any(spec.task == task for spec in chosen))
        reference = ModelSide(files, tasks, model, parts, tell)
    elif against == ONNX:
        reference = OnnxSide(files, trust=trust)
    else:
        other = absolute(against)
        reference = BundleSide(BundleFiles(other, read_manifest(other)), {"threads": threads}, trust=trust)
        others.append(reference.files.manifest)
        _check_engines(other, reference.files.manifest, chosen)
    running = open_engines(
        files,
        provider=provider,
        provider_options=provider_options,
        threads=threads,
        memory=memory,
        trust=trust,
    )
    comparing = _Comparing(files, running, subject, reference, _tolerance(tolerance, others))
    rows = [comparing.engine(spec, tell) for spec in chosen]
    return LayerComparison(os.fspath(against), tuple(rows))


def _tolerance(given: float | None, manifests: Sequence[Manifest]) -> float:
    if given is None:
        return max(precision.tolerance(manifest.precision) for manifest in manifests)
    return arguments.number("tolerance", given, 0, sys.float_info.max)


def _check_engines(path: Path, manifest: Manifest, chosen: Sequence[EngineSpec]) -> None:
    known = [engine.name for engine in manifest.engines]
    missing = [spec.name for spec in chosen if spec.name not in known]
    if missing:
        raise BundleError(
            f"{path} has no engine {missing[0]!r} to compare with; it has {', '.join(known)}. Name the engines to be "
            "compared: engines=[…] (--engine)."
        )


def _recorded_inputs(files: BundleFiles, spec: EngineSpec) -> dict[str, NDArray[Any]]:
    path = files.path(spec.reference)
    tensors = reading.read_tensors(path, BundleError)
    found = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
    missing = [tensor.name for tensor in spec.inputs if tensor.name not in found]
    if missing:
        raise BundleError(f"{path} holds no input {missing[0]!r}; build the bundle again.")
    return found
