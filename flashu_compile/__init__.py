"""A compiler for native unified multimodal models.

    import flashu_compile

    flashu_compile.export("showo2-shapes", ["t2i", "mmu"], output="build/shapes")
    pipe = flashu_compile.load("build/shapes")
    pipe.generate("a red circle left of a blue square", seed=0).save("out.png")
    pipe.ask("out.png", "what is left of the blue square?")

`export`, `estimate`, `calibrate`, `capture_model`, `compare_layers`, and `benchmark` and `evaluate` against "exact" or
"eager" need the extra ``compile``, `load` one of ``cpu`` and ``gpu``. Each name is imported when it is first used, so
`import flashu_compile` is quick and needs no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashu_compile.errors import FlashuError
from flashu_compile.extras import naming_the_extra
from flashu_compile.system.libraries import switch_telemetry_off
from flashu_compile.version import __version__

if TYPE_CHECKING:
    from flashu_compile.bundle.sampling import Sampling
    from flashu_compile.compiler.captured import CapturedModel
    from flashu_compile.compiler.estimate import Estimate, estimate
    from flashu_compile.compiler.export import calibrate, capture_model, export
    from flashu_compile.looking.benchmark import benchmark
    from flashu_compile.looking.comparison import compare_layers
    from flashu_compile.looking.evaluate import evaluate
    from flashu_compile.recipe.config import MMUConfig, T2IConfig, TextConfig
    from flashu_compile.recipe.recipe import Recipe
    from flashu_compile.runtime import Pipeline, load

switch_telemetry_off()  # before anything imports ONNX Runtime

__all__ = [
    "CapturedModel",
    "Estimate",
    "FlashuError",
    "MMUConfig",
    "Pipeline",
    "Recipe",
    "Sampling",
    "T2IConfig",
    "TextConfig",
    "__version__",
    "benchmark",
    "calibrate",
    "capture_model",
    "compare_layers",
    "estimate",
    "evaluate",
    "export",
    "load",
]

_HOMES = {
    "CapturedModel": "flashu_compile.compiler.captured",
    "Estimate": "flashu_compile.compiler.estimate",
    "MMUConfig": "flashu_compile.recipe.config",
    "Pipeline": "flashu_compile.runtime",
    "Recipe": "flashu_compile.recipe.recipe",
    "Sampling": "flashu_compile.bundle.sampling",
    "T2IConfig": "flashu_compile.recipe.config",
    "TextConfig": "flashu_compile.recipe.config",
    "benchmark": "flashu_compile.looking.benchmark",
    "calibrate": "flashu_compile.compiler.export",
    "capture_model": "flashu_compile.compiler.export",
    "compare_layers": "flashu_compile.looking.comparison",
    "estimate": "flashu_compile.compiler.estimate",
    "evaluate": "flashu_compile.looking.evaluate",
    "export": "flashu_compile.compiler.export",
    "load": "flashu_compile.runtime",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with naming_the_extra(f"flashu_compile.{name}"):
        value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
