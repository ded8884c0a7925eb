"""Loading and running bundles: numpy, ONNX Runtime, tokenizers and Pillow, no framework.

`load` and `Pipeline` are imported when first used, so that the data modules beside them (manifest, prompts) stay
usable without starting ONNX Runtime.
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
