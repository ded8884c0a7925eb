"""Finished engines, cached in memory and on disk, so that a build makes only those whose inputs are new.

An entry on disk is data alone: a graph, one eager run, statistics, and the records of passes. Weights are
stored as references to the model's own tensors (see weight_sources.py), which a build has loaded anyway; an
entry's key contains the hash of every one of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from flashu_compile import reading
from flashu_compile.compiler.cache import EngineCache
from flashu_compile.compiler.captured import BuiltEngines, CapturedModel, CapturedProgram
from flashu_compile.compiler.fingerprints import (
    TensorHashes,
    UnknownCodeError,
    captured_fingerprint,
    environment,
)
from flashu_compile.compiler.weight_sources import WeightSources
from flashu_compile.errors import CacheError
from flashu_compile.exporters.backends import Backend, Packed
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.passes.manager import PassRecord

FORMAT = 2
#: An entry with more tensors of its own than this (such as weights in another precision) would fill the disk.
OWN_BYTES = 256 << 20
_METADATA = "metadata"

_log = logging.getLogger(__name__)


class _TooLargeError(Exception):
    """An engine holds too many bytes that are not the model's."""


@dataclasses.dataclass
class EngineShelf:
    """Engines of `source` that were built before: in this process, and, with a `cache`, in any other."""

    source: CapturedModel
    backend: Backend
    cache: EngineCache | None
    _hashes: TensorHashes = dataclasses.field(default_factory=TensorHashes)
    _fingerprints: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def fetch(self, captured: CapturedProgram, key: str, make: Callable[[], BuiltEngines]) -> BuiltEngines:
        """Return the engines cached under `key`, building them with `make` on a miss.

        `key` identifies all that they depend on but the captured program.
        """
        built = self.source.built
        if key not in built:
            built[key] = self._from_disk(captured, key) or self._made(captured, key, make)
        return built[key]

    def _made(self, captured: CapturedProgram, key: str, make: Callable[[], BuiltEngines]) -> BuiltEngines:
        made, name = make(), self._name(captured, key)
        if self.cache is not None and name is not None:
            try:
                content = _encode(made, self.backend, self._weights(captured))
            except _TooLargeError as reason:
                _log.info("Engines of %s are not kept for later builds: %s.", captured.spec.name, reason)
            else:
                if content is not None:
                    self.source.loaded.check_unchanged()  # or these may be engines of weights of another hash
                    self.cache.write(name, content)
        return made

    def _from_disk(self, captured: CapturedProgram, key: str) -> BuiltEngines | None:
        name = self._name(captured, key)
        content = None if self.cache is None or name is None else self.cache.read(name)
        if self.cache is None or name is None or content is None:
            return None
        try:
            return _decode(content, self.backend, self._weights(captured))
        except Exception as problem:  # whatever was wrong with it when it was written
            self.cache.refuse(name, f"{type(problem).__name__}: {problem}")
            return None

    def _weights(self, captured: CapturedProgram) -> WeightSources:
        return WeightSources(captured.spec.module, self.source.ordered_weights)

    def _name(self, captured: CapturedProgram, key: str) -> str | None:
        """Return the entry's name, a hash of all that its engines depend on; None if that has no fingerprint."""
        if self.cache is None:
            return None
        known, spec = self._fingerprints, captured.spec
        if spec.name not in known:
            try:
                known[spec.name] = captured_fingerprint(spec, self._hashes)
            except UnknownCodeError as reason:
                _log.info(
                    "Engines of %s are not kept for later builds, which only costs time: %s.",
                    spec.name,
                    reason,
                )
                known[spec.name] = None
        fingerprint = known[spec.name]
        if fingerprint is None:
            return None
        return hashlib.sha256(json.dumps([FORMAT, environment(), fingerprint, key]).encode()).hexdigest()


def _encode(built: BuiltEngines, backend: Backend, weights: WeightSources) -> bytes | None:
    """Serialise engines, or return None if the backend's cannot be kept. Raises `_TooLargeError`."""
    tensors: dict[str, Tensor] = {}
    engines = []
    for number, engine in enumerate(built.engines):
        packed = backend.pack(engine.model)
        if packed is None:
            return None
        engines.append(_engine_metadata(engine, packed, weights, tensors, f"{number}"))
    metadata = {
        "engines": engines,
        "orders": list(weights.orders),
        "statistics": built.statistics,
        "records": [dataclasses.asdict(record) for record in built.records],
    }
    tensors |= weights.orders
    tensors[_METADATA] = _bytes(json.dumps(metadata).encode())
    return save({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()})


def _engine_metadata(
    engine: EngineBuild, packed: Packed, weights: WeightSources, tensors: dict[str, Tensor], prefix: str
) -> dict[str, Any]:
    """Return an engine as JSON values, and add what cannot be JSON to `tensors`. Raises `_TooLargeError`."""
    places: dict[str, Any] = {}
    own = 0
    for name, tensor in packed.tensors.items():
        places[name] = weights.reference(tensor)
        if places[name] is None:
            tensors[f"{prefix}/own/{name}"] = tensor
            own += tensor.nbytes
    if own > OWN_BYTES:
        raise _TooLargeError(f"{engine.name} has {own} bytes of tensors that are not the model's")
    tensors[f"{prefix}/content"] = _bytes(packed.content)
    for kind, run in (("input", engine.reference_inputs), ("output", engine.reference_outputs)):
        tensors |= {f"{prefix}/{kind}/{role}": tensor for role, tensor in run.items()}
    return {
        "name": engine.name,
        "task": engine.task,
        "prologue": engine.prologue,
        "schedule": engine.schedule,
        "inputs": list(engine.reference_inputs),
        "outputs": list(engine.reference_outputs),
        "tensors": places,
        "metadata": packed.metadata,
    }


@dataclasses.dataclass(frozen=True)
class _EngineFacts:
    """An engine as `_engine_metadata` writes it."""

    name: str
    task: str
    prologue: str | None
    schedule: str | None
    inputs: list[str]
    outputs: list[str]
    tensors: dict[str, Any]
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What `_encode` writes beside tensors."""

    engines: list[_EngineFacts]
    orders: list[str]
    statistics: dict[str, dict[str, Any]]
    records: tuple[PassRecord, ...]


def _decode(content: bytes, backend: Backend, weights: WeightSources) -> BuiltEngines:
    tensors = load(content)
    facts = reading.decode(_content(tensors[_METADATA]), _Facts, "Its metadata", CacheError)
    weights.orders = {name: tensors[name] for name in facts.orders}
    engines = [
        _engine(told, backend, weights, tensors, f"{number}") for number, told in enumerate(facts.engines)
    ]
    return BuiltEngines(tuple(engines), facts.statistics, facts.records)


def _engine(
    told: _EngineFacts,
    backend: Backend,
    weights: WeightSources,
    tensors: Mapping[str, Tensor],
    prefix: str,
) -> EngineBuild:
    own = {
        name: tensors[f"{prefix}/own/{name}"] if place is None else weights.tensor(place)
        for name, place in told.tensors.items()
    }
    packed = Packed(_content(tensors[f"{prefix}/content"]), own, told.metadata)
    return EngineBuild(
        name=told.name,
        task=told.task,
        model=backend.unpack(packed),
        reference_inputs={role: tensors[f"{prefix}/input/{role}"] for role in told.inputs},
        reference_outputs={role: tensors[f"{prefix}/output/{role}"] for role in told.outputs},
        prologue=told.prologue,
        schedule=told.schedule,
    )


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def _content(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
