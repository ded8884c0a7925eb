"""ONNX Runtime, which one of several packages brings. Importing this where it is absent or damaged raises our error.

`ort` is the library, `native` its compiled part, with the types of its errors.
"""

from __future__ import annotations

from flashu_compile.errors import MissingDependencyError
from flashu_compile.extras import onnxruntime_trouble

__all__ = ["native", "ort"]

try:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    _ = ort.InferenceSession  # which is not there if only other packages' leftovers are
except (ImportError, AttributeError) as error:
    raise MissingDependencyError(onnxruntime_trouble(error)) from error
