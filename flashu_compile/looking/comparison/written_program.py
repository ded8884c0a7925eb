"""Read an engine of backend `torch` as the program that was written."""

from __future__ import annotations

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import EngineSpec
from flashu_compile.program.program import Input, Program
from flashu_compile.runtime.backends.torch import read_program


def written_program(files: BundleFiles, spec: EngineSpec) -> Program:
    """Read the program of an engine, which runs code of the bundle. It has no sample and no stacks."""
    axes = {t.name: tuple(d if isinstance(d, str) else None for d in t.shape) for t in spec.inputs}
    return Program(
        name=spec.name,
        task=spec.task,
        exported=read_program(files, spec),
        inputs=tuple(Input(name, names) for name, names in axes.items()),
        outputs=tuple(tensor.name for tensor in spec.outputs),
        stacks={},
        sample={},
    )
