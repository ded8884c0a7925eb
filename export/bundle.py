"""Engines → a bundle directory: complete, checked and reproducible, or not there at all."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from flashu_compile.errors import BundleError, BundleVersionError, EmissionError, OutputExistsError
from flashu_compile.exporters.weights import StoreSummary, weight_store
from flashu_compile.plan import StepPlan
from flashu_compile.recipe import Recipe
from flashu_compile.runtime.files import BundleFiles
from flashu_compile.runtime.manifest import (
    MANIFEST,
    PLAN,
    RECIPE,
    REPORT,
    REPORT_PAGE,
    TOKENIZER,
    WEIGHTS,
    EngineSpec,
    FileEntry,
    GenerationFacts,
    Manifest,
    TensorSpec,
    UnderstandingFacts,
    file_entry,
    read_manifest,
)
from flashu_compile.runtime.sessions import Engines, OnnxRuntimeEngines


@dataclasses.dataclass(frozen=True)
class EngineBuild:
    """An engine on its way into a bundle: the emitted model and one eager run of what it was made from.

    `reference_inputs` and `reference_outputs` are by role; the outputs come from eager PyTorch, never from the
    engine itself. `prologue` names the engine that gives what this one takes with every call.
    """

    name: str
    task: str
    model: ir.Model
    reference_inputs: Mapping[str, Tensor]
    reference_outputs: Mapping[str, Tensor]
    prologue: str | None = None


@dataclasses.dataclass(frozen=True)
class BundleFacts:
    """What the manifest says about the bundle as a whole; `recipe` is the recipe's name."""

    model: str
    tasks: tuple[str, ...]
    backend: str
    precision: str
    recipe: str
    generation: GenerationFacts | None
    understanding: UnderstandingFacts | None
    versions: Mapping[str, str]


def write_bundle(
    output: Path,
    *,
    engines: Sequence[EngineBuild],
    facts: BundleFacts,
    tokenizer: Tokenizer,
    recipe: Recipe,
    plan: StepPlan | None = None,
    report: Mapping[str, Any] | None = None,
    measure: Callable[[Engines], Mapping[str, Any]] | None = None,
    page: Callable[[Manifest, Mapping[str, Any]], str] | None = None,
    checkpoint_bytes: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a bundle to `output`, which appears whole or not at all.

    Everything is written and checked in a temporary directory beside `output` and renamed into place. `report` is
    stored with the entries `sizes` (in bytes) and `weight_store` added, and those that `measure` gives when it has run
    the engines that were written. `page` makes a web page of the whole. `overwrite` replaces an existing bundle, and
    nothing but a bundle.

    Raises:
        OutputExistsError: `output` exists and is not empty.
        EmissionError: an engine's graph does not pass ONNX's checks.
        BundleError: the directory cannot be written.
    """
    ensure_writable(output, overwrite=overwrite)
    output = output.resolve()  # of a symbolic link, what it points to is replaced
    names = [engine.name for engine in engines]
    if len(set(names)) != len(names):
        raise BundleError(f"Two engines of the bundle have the same name: {', '.join(sorted(names))}.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            directory = Path(scratch) / "bundle"
            directory.mkdir()
            specs, store = _write_engines(directory, engines)
            tokenizer.save(str(directory / TOKENIZER))
            recipe.save(directory / RECIPE)
            if plan is not None:
                (directory / PLAN).write_text(plan.to_json(), encoding="utf-8")
            whole = {
                **(report or {}),
                "sizes": _sizes(directory, specs, checkpoint_bytes),
                "weight_store": dataclasses.asdict(store),
            }
            if measure is not None:
                whole |= measure(_written_engines(directory, specs, facts))
            _write_json(directory / REPORT, whole)
            if page is not None:
                unlisted = _manifest(specs, facts, {})
                (directory / REPORT_PAGE).write_text(page(unlisted, whole), encoding="utf-8")
            manifest = _manifest(specs, facts, _entries(directory))
            (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            _readable(directory)
            # Again, since somebody may have filled it meanwhile.
            ensure_writable(output, overwrite=overwrite)
            _put_in_place(directory, output)
    except OSError as error:
        raise BundleError(f"The bundle could not be written to {output}: {error}.") from error
    return manifest


def ensure_writable(output: Path, *, overwrite: bool = False) -> None:
    """Raise what `write_bundle` would raise for `output` later, before any work is done."""
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise OutputExistsError(f"{output} exists and is not a directory; choose another output.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError(f"{output} exists and is not empty; choose another output, or overwrite it.")
    try:
        listed = {*read_manifest(output).files, MANIFEST}
    except BundleVersionError:
        return
    except BundleError as error:
        raise OutputExistsError(
            f"{output} is not empty and not a bundle, so it will not be overwritten; choose another output."
        ) from error
    foreign = sorted(path.name for path in output.iterdir() if path.name not in listed)
    if foreign:
        raise OutputExistsError(
            f"{output} holds {foreign[0]}, which is not part of the bundle there, so it will not be overwritten."
        )


def _write_engines(directory: Path, engines: Sequence[EngineBuild]) -> tuple[list[EngineSpec], StoreSummary]:
    specs = []
    with weight_store([engine.model for engine in engines], directory / WEIGHTS) as store:
        for engine in engines:
            graph, reference = f"{engine.name}.onnx", f"{engine.name}.reference.safetensors"
            ir.save(engine.model, directory / graph)
            check_graph(directory / graph)
            tensors = {f"input.{role}": tensor for role, tensor in engine.reference_inputs.items()}
            tensors |= {f"output.{role}": tensor for role, tensor in engine.reference_outputs.items()}
            save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, directory / reference)
            specs.append(
                EngineSpec(
                    name=engine.name,
                    task=engine.task,
                    file=graph,
                    inputs=tuple(_tensor_spec(value) for value in engine.model.graph.inputs),
                    outputs=tuple(_tensor_spec(value) for value in engine.model.graph.outputs),
                    reference=reference,
                    prologue=engine.prologue,
                )
            )
    return specs, store


def check_graph(path: Path) -> None:
    """ONNX's full check and strict shape inference, by path so that external data is covered."""
    inferred = path.with_suffix(".inferred")
    try:
        onnx.checker.check_model(str(path), full_check=True)
        onnx.shape_inference.infer_shapes_path(str(path), str(inferred), strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EmissionError(f"Graph {path.name} does not pass ONNX's checks: {error}") from error
    finally:
        inferred.unlink(missing_ok=True)


def _tensor_spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None or value.name is None:
        raise EmissionError(f"Engine tensor {value.name!r} has no known type or rank.")
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)


def _sizes(directory: Path, specs: Sequence[EngineSpec], checkpoint_bytes: int | None) -> dict[str, int]:
    sizes = {
        "weights_bytes": (directory / WEIGHTS).stat().st_size,
        "graphs_bytes": sum((directory / spec.file).stat().st_size for spec in specs),
        "references_bytes": sum((directory / spec.reference).stat().st_size for spec in specs),
    }
    return sizes if checkpoint_bytes is None else sizes | {"checkpoint_bytes": checkpoint_bytes}


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _entries(directory: Path) -> dict[str, FileEntry]:
    return {path.name: file_entry(path) for path in sorted(directory.iterdir())}


def _written_engines(directory: Path, specs: Sequence[EngineSpec], facts: BundleFacts) -> Engines:
    """The engines of a bundle that is not complete yet, whose files are therefore taken as they are."""
    files = {path.name: FileEntry("", 0) for path in directory.iterdir()}
    manifest = _manifest(specs, facts, files)
    return OnnxRuntimeEngines(BundleFiles(directory, manifest, verify_hashes=False))


def _manifest(specs: Sequence[EngineSpec], facts: BundleFacts, files: dict[str, FileEntry]) -> Manifest:
    return Manifest(
        model=facts.model,
        tasks=facts.tasks,
        backend=facts.backend,
        precision=facts.precision,
        recipe=facts.recipe,
        engines=tuple(specs),
        generation=facts.generation,
        understanding=facts.understanding,
        versions=dict(sorted(facts.versions.items())),
        files=files,
    )


def _readable(directory: Path) -> None:
    """Give files the permissions of any new file; safetensors writes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.iterdir():
        path.chmod(0o666 & ~umask)


def _put_in_place(directory: Path, output: Path) -> None:
    """Rename `directory` to `output`. An old bundle there ends up at `directory`, for the caller to delete."""
    if not output.exists():
        os.rename(directory, output)
    elif not any(output.iterdir()):
        output.rmdir()
        os.rename(directory, output)
    elif not _exchange(directory, output):
        old = directory.with_name("old")
        os.rename(output, old)
        try:
            os.rename(directory, output)
        except OSError:
            os.rename(old, output)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step, where the system can (Linux's renameat2 with RENAME_EXCHANGE)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0
