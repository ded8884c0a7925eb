"""Execution providers of ONNX Runtime: the options they are given, and where a session's nodes really went.

`get_providers` tells which providers a session has, not what they do: a provider may decline any node, which ONNX
Runtime then gives to the next one. So the assignment of every node is recorded and looked at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from flashu_compile.bundle.manifest import WEIGHTS, EngineSpec, Manifest
from flashu_compile.bundle.profiles import Profile, shapes_text
from flashu_compile.errors import BackendUnavailableError, ConfigurationError
from flashu_compile.system.onnxruntime_library import ort
from flashu_compile.system.paths import absolute, cache_folder

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

CUDA_GRAPH = "enable_cuda_graph"

ProviderOptions = Mapping[str, object]

#: Options whose value is a folder; a relative one would depend on when the engine is made.
_FOLDERS = ("trt_engine_cache_path", "trt_timing_cache_path")

# TF32 keeps 10 bits of mantissa; an engine called float32 computes in float32.
_DEFAULTS: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}}

#: Entries of the session's configuration that may stand among a provider's options. The first makes ONNX Runtime
#: itself refuse a session with any node on the CPU, be it only the arithmetic of sizes.
SESSION_ENTRIES = ("session.disable_cpu_ep_fallback",)

_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"

# ONNX Runtime keeps the arithmetic of sizes, and copies to and from it, on the CPU whichever provider runs the rest.
# fmt: off
_SIZE_OPERATORS = frozenset({
    "Add", "And", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather",
    "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "MemcpyFromHost",
    "MemcpyToHost", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceProd", "Reshape", "Shape",
    "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
})
# fmt: on


@dataclasses.dataclass(frozen=True)
class Placement:
    """The nodes that one provider runs: how many of each operator. `provider` is ONNX Runtime's name of it."""

    provider: str
    operators: dict[str, int]

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return sum(self.operators.values())

    def __str__(self) -> str:
        return f"{self.provider} {self.nodes} nodes"


@dataclasses.dataclass(frozen=True)
class SessionRequest:
    """The providers to request for a session with their options, in order, and its configuration entries."""

    providers: tuple[tuple[str, dict[str, str]], ...]
    entries: dict[str, str]

    @property
    def cuda_graph(self) -> bool:
        """Whether runs are to be captured as CUDA graphs."""
        return dict(self.providers).get(CUDA, {}).get(CUDA_GRAPH) == "1"


def entered(options: ProviderOptions | None) -> dict[str, object]:
    """Return the options with folders as absolute paths, to be kept. Raises `PathError` as `absolute` does."""
    return {
        name: absolute(value) if name in _FOLDERS and isinstance(value, str | os.PathLike) else value
        for name, value in (options or {}).items()
    }


def session_request(provider: str, wanted: tuple[str, ...], options: ProviderOptions) -> SessionRequest:
    """Route each option to its reader. Raises `ConfigurationError` on an option that has none, or that misleads.

    `trt_…` goes to TensorRT, `device_id` to every provider, the names in `SESSION_ENTRIES` to the session, all else
    to the last provider (which is CUDA beside TensorRT).
    """
    each: dict[str, dict[str, str]] = {name: dict(_DEFAULTS.get(name, {})) for name in wanted}
    entries: dict[str, str] = {}
    for name, value in options.items():
        text = _text(name, value)
        if name in SESSION_ENTRIES:
            entries[name] = text
        elif name.startswith("session."):
            raise ConfigurationError(
                f"Provider option {name!r} is not one that may be given; of the session's are: "
                f"{', '.join(SESSION_ENTRIES)}."
            )
        elif wanted == (CPU,):
            raise ConfigurationError(f"Provider {provider!r} takes no option {name!r}; leave it out.")
        elif name == "device_id":
            for chosen in each.values():
                chosen[name] = text
        elif name.startswith("trt_") and TENSORRT not in each:
            raise ConfigurationError(
                f"Option {name!r} is TensorRT's; provider {provider!r} does not read it."
            )
        else:
            each[TENSORRT if name.startswith("trt_") else wanted[-1]][name] = text
    request = SessionRequest(tuple(each.items()), entries)
    _check_graphs(provider, request)
    return request


def _text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, str | int | float | os.PathLike):
        text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
        return {"true": "1", "false": "0"}.get(str(text).lower(), str(text))
    raise ConfigurationError(f"Provider option {name!r} must be text, a number, a truth value or a path.")


def _check_graphs(provider: str, request: SessionRequest) -> None:
    options = dict(request.providers)
    if options.get(TENSORRT, {}).get("trt_cuda_graph_enable") == "1":
        raise ConfigurationError(
            "trt_cuda_graph_enable is not supported: ONNX Runtime's TensorRT provider replays the one graph that it "
            "captured for inputs of any shape. Use provider 'cuda' with enable_cuda_graph."
        )
    if TENSORRT in options and request.cuda_graph:
        raise ConfigurationError(
            f"enable_cuda_graph needs every node on CUDA; with provider {provider!r} TensorRT has them. "
            "Use provider 'cuda'."
        )


def engine_options(
    manifest: Manifest,
    spec: EngineSpec,
    wanted: tuple[str, ...],
    profile: Profile | None,
    given: ProviderOptions,
) -> dict[str, object]:
    """Return the TensorRT provider's options for one engine; those in `given` take precedence.

    Built engines and timings are cached in a folder of their own for each content of graph and weights: the
    provider's own key is the graph alone, so that other weights would be served by an old engine. The ranges of
    dynamic dimensions are given, so that no engine is built again when a longer prompt comes.
    """
    if TENSORRT not in wanted:
        return dict(given)
    options: dict[str, object] = {}
    kept = cache_folder("tensorrt")
    folders = {"engine": None if kept is None else kept / _content(manifest, spec), "timing": kept}
    for what, folder in folders.items():
        enable, path = f"trt_{what}_cache_enable", f"trt_{what}_cache_path"
        if _text(enable, given.get(enable, folder is not None)) != "1":
            continue
        if folder is not None:
            options |= {enable: True, path: folder}
        elif path not in given:  # the provider's own choice is the current directory
            raise ConfigurationError(
                f"Option {enable!r} needs a folder while there is no cache: give {path!r}."
            )
    if profile:
        for limit in ("min", "opt", "max"):
            options[f"trt_profile_{limit}_shapes"] = shapes_text(profile, limit)
    return options | dict(given)


def _content(manifest: Manifest, spec: EngineSpec) -> str:
    entries = [manifest.files[name].sha256 for name in (spec.file, WEIGHTS) if name in manifest.files]
    return hashlib.sha256(" ".join(entries).encode()).hexdigest()[:16]


def configure(options: ort.SessionOptions, request: SessionRequest) -> None:
    """Write the request's entries into `options`, and enable the recording of node assignments."""
    for name, value in {_RECORD_ASSIGNMENT: "1", **request.entries}.items():
        options.add_session_config_entry(name, value)


def check_options(session: Any, request: SessionRequest) -> None:
    """Check that every option was understood by its provider. Raises `ConfigurationError` otherwise."""
    got = session.get_provider_options()
    for provider, options in request.providers:
        unknown = sorted(options.keys() - got.get(provider, {}).keys())
        if unknown:
            raise ConfigurationError(f"{provider} does not know the option {unknown[0]!r}; leave it out.")


def placements(session: Any) -> tuple[Placement, ...]:
    """Return which provider runs which of a session's nodes; its session options went through `configure`."""
    counts: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        counts.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return tuple(
        Placement(name, dict(sorted(operators.items()))) for name, operators in sorted(counts.items())
    )


def check_placements(engine: str, provider: str, wanted: tuple[str, ...], got: Iterable[Placement]) -> None:
    """Check that all nodes but the arithmetic of sizes run on the providers asked for.

    Raises `BackendUnavailableError` naming the operators that do not.
    """
    for placement in got:
        if placement.provider in wanted:
            continue
        elsewhere = {name: n for name, n in placement.operators.items() if name not in _SIZE_OPERATORS}
        if elsewhere:
            listed = ", ".join(f"{count} {name}" for name, count in elsewhere.items())
            raise BackendUnavailableError(
                f"Engine {engine!r} would not run on provider {provider!r} alone: ONNX Runtime gives {listed} to "
                f"{placement.provider}. Use another provider, or another version of ONNX Runtime."
            )
