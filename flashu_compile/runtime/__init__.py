"""Loading and running bundles: numpy, ONNX Runtime, tokenizers and Pillow, no framework.

Front door: `load`, which returns a `Pipeline` (pipeline.py); both are imported when first used. Imports bundle and
recipe alone; torch only in the files of backends that run in it. For a new backend copy backends/torch.py, and its
other half in `export/backends/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashu_compile.runtime.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashu_compile.runtime import pipeline

    return getattr(pipeline, name)
