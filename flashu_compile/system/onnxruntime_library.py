"""ONNX Runtime, which one of several packages brings. Importing this where it is absent or damaged raises our error.

`ort` is the library, `native` its compiled part, `ERRORS` are the types of what it raises.
"""

from __future__ import annotations

from flashu_compile.errors import MissingDependencyError
from flashu_compile.extras import onnxruntime_trouble

__all__ = ["ERRORS", "native", "ort"]

try:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    _ = ort.InferenceSession  # which is not there if only other packages' leftovers are
except (ImportError, AttributeError) as error:
    raise MissingDependencyError(onnxruntime_trouble(error)) from error

#: They share no base but Exception.
ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)
