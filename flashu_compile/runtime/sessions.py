"""Engines of a bundle in ONNX Runtime sessions.

A provider that was asked for is the provider that runs, or a `BackendUnavailableError` says what is missing;
ONNX Runtime's own habit of falling back to the CPU is switched off and checked for, in the session and for each node.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import io
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile.arguments import shown
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS, EngineSpec
from flashu_compile.bundle.precision import by_part
from flashu_compile.bundle.profiles import dimension_ranges, engine_profile
from flashu_compile.errors import BackendUnavailableError, BundleError, ConfigurationError
from flashu_compile.runtime.binding import BoundRuns
from flashu_compile.runtime.checked_graph import read_graph
from flashu_compile.runtime.engine import Tensors
from flashu_compile.runtime.lifetime import Lifetime, OwnedEngines
from flashu_compile.runtime.onnx_file import OnnxFile
from flashu_compile.runtime.onnxruntime_engine import OnnxRuntimeEngine
from flashu_compile.runtime.packed_weights import (
    FAILURES,
    PackedWeights,
    give_back_memory,
    packed_weights,
    read_packed,
)
from flashu_compile.runtime.plugins import LIBRARY, add_provider, devices, plug_in
from flashu_compile.runtime.providers import (
    CUDA_GRAPH,
    TENSORRT,
    ProviderOptions,
    check_options,
    check_placements,
    configure,
    engine_options,
    entered,
    session_request,
)
from flashu_compile.runtime.saturation import products_saturate
from flashu_compile.runtime.shared_weights import SharedWeights, check_memory
from flashu_compile.system.onnxruntime_library import ERRORS, ort
from flashu_compile.system.threads import default_threads

# A short name stands for every provider that must be there: TensorRT leaves what it does not support to CUDA.
PROVIDERS: dict[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}

ADVICE: dict[str, str] = {
    "CUDAExecutionProvider": (
        'It needs an NVIDIA driver and CUDA libraries: pip install "onnxruntime-gpu[cuda,cudnn]", '
        "without the package onnxruntime beside it."
    ),
    "TensorrtExecutionProvider": (
        "It needs onnxruntime-gpu, CUDA and TensorRT 10, whose libraries (libnvinfer.so.10) must be on "
        "LD_LIBRARY_PATH before Python starts."
    ),
}

_LIBRARY_STEMS = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "tensorrt"}

# x -> y = x + x over float32 [1]. Made once with
# onnx.helper.make_model(make_graph([make_node("Add", ["x", "x"], ["y"])], "probe", [x], [y]), opset 13, ir_version 7)
# and base64 of SerializeToString(), so that judging a provider needs no onnx package.
_PROBE = base64.b64decode(
    "CAc6OQoOCgF4CgF4EgF5IgNBZGQSBXByb2JlWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ=="
)

# How ONNX Runtime computes layers that read weights in 4 or 8 bits: 4, by activations in bytes, with a scale for each
# block of a row; 1, in float32. Its kernels for 0 are slower by far.
BYTES, FLOATS = 4, 1
# The block of activations where weights have a scale for each channel; 32 by default, which is slower.
_BLOCK = 128

_NOT_CAPTURED = "cannot use the graph capture feature"
_NO_KERNEL = "Could not find an implementation"

_log = logging.getLogger(__name__)


class OnnxRuntimeEngines(OwnedEngines[OnnxRuntimeEngine]):
    """Sessions of a bundle on one execution provider; see `OwnedEngines`.

    `provider` is `cpu`, `cuda`, `tensorrt` or a provider's name in ONNX Runtime, `provider_options` are options of it
    and the `library` of a plug-in (see `plug_in`); `threads` is the number of threads an engine computes with (None:
    see `default_threads`); `memory` is `fast`, or `low` for engines that share one map of the weights. Without
    `packed_weights`, nothing is kept on disk for `fast` (see the module `packed_weights`). Without `contrib_operators`,
    ONNX Runtime keeps to the operators that the graphs have. With `trust`, graphs may have any operators. Raises
    `ConfigurationError` if one of them makes no sense, `BackendUnavailableError` if the provider
    does not work here, or cannot compute what the bundle does.
    """

    def __init__(
        self,
        files: BundleFiles,
        *,
        provider: str = "cpu",
        provider_options: ProviderOptions | None = None,
        threads: int | None = None,
        memory: str = "fast",
        contrib_operators: bool = True,
        packed_weights: bool = True,
        trust: bool = False,
    ) -> None:
        for name, value in {
            "contrib_operators": contrib_operators,
            "packed_weights": packed_weights,
        }.items():
            if not isinstance(value, bool):
                raise ConfigurationError(f"Option {name!r} is True or False, not {value!r}.")
        given = entered(provider_options)
        plug_in(PROVIDERS.get(provider, (provider,))[0], given.pop(LIBRARY, None))
        wanted = resolve_provider(provider)
        check_memory(memory, wanted[0])
        session_request(provider, wanted, given)
        self._in_bfloat16 = "bfloat16" in by_part(files.manifest.precision).values()
        if self._in_bfloat16 and wanted == PROVIDERS["cpu"]:
            raise BackendUnavailableError(
                "The bundle computes in bfloat16, for which ONNX Runtime's CPU provider has no kernels; make TensorRT "
                "engines of it (flashu-compile tensorrt), run it in OpenVINO (backend openvino), which computes it in "
                "float32, or build it in another precision."
            )
        if wanted != PROVIDERS["cpu"]:
            probe_provider(provider)
        self.provider, self.options = provider, given
        self._shares, self._contrib, self._trust = memory == "low", contrib_operators, trust
        self._packs = packed_weights and memory == "fast" and wanted == PROVIDERS["cpu"]
        self._weights: SharedWeights | None = None
        self._packed: PackedWeights | None = None
        self._threads = threads
        super().__init__(files)

    def _release(self) -> None:
        self._weights = self._packed = None

    def _create(self, spec: EngineSpec, lifetime: Lifetime) -> OnnxRuntimeEngine:
        if self._packs:
            self._packs = False  # asked for once
            read = functools.partial(read_graph, self._files, trust=self._trust)
            told = {"contrib": self._contrib, "saturates": products_saturate()}
            self._packed = packed_weights(self._files, read, self._open_to_pack, **told)
        stored = WEIGHTS in self._files.manifest.files or (self._files.directory / WEIGHTS).exists()
        if stored and self._shares and self._weights is None:
            with self._files.held(WEIGHTS) as (path,):
                shared = SharedWeights(path)
            self._weights = shared
        with self._files.held(spec.file, *[WEIGHTS] * stored) as (path, *_):
            return self._opened(spec, path, lifetime)

    def _opened(self, spec: EngineSpec, path: Path, lifetime: Lifetime) -> OnnxRuntimeEngine:
        graph = read_graph(self._files, spec, trust=self._trust)
        wanted = resolve_provider(self.provider)
        manifest = self._files.manifest
        profile = engine_profile(spec, dimension_ranges(manifest, spec)) if TENSORRT in wanted else None
        wished = engine_options(manifest, spec, wanted, profile, self.options)
        session, options = self._session(spec, path, graph, wished)
        request = session_request(self.provider, wanted, options)
        outputs = [tensor.name for tensor in spec.outputs]
        device = int(str(self.options.get("device_id", 0)))
        bound = BoundRuns(session, outputs, "cuda", device) if request.cuda_graph else None
        engine = OnnxRuntimeEngine(spec, session, weights=self._weights, bound=bound, lifetime=lifetime)
        check_placements(spec.name, self.provider, wanted, engine.placements)
        if len(engine.placements) > 1:
            told = ", ".join(map(str, engine.placements))
            _log.warning("Engine %r, asked for on %r, runs on: %s.", spec.name, self.provider, told)
        return engine

    def _open_to_pack(self, spec: EngineSpec, save: Callable[[ort.SessionOptions], None]) -> None:
        with self._files.held(spec.file, WEIGHTS) as (path, _):
            create_session(path, self.provider, self._threads, self.options, save, contrib=self._contrib)

    def _packed_session(self, spec: EngineSpec) -> ort.InferenceSession | None:
        """Create the session of an engine on packed weights, or return None, with a warning if there should be some."""
        if self._packed is None:
            return None
        try:
            session = create_session(
                self._packed.graph(spec.name), self.provider, self._threads, self.options, read_packed
            )
        except FAILURES as error:
            _log.warning("Engine %r keeps packed weights of its own: %s", spec.name, error)
            return None
        finally:
            give_back_memory()
        return session

    def _session(
        self, spec: EngineSpec, path: Path, graph: OnnxFile, options: ProviderOptions
    ) -> tuple[ort.InferenceSession, ProviderOptions]:
        """Create a session and return it with its options.

        An engine that cannot be captured gets no CUDA graph, which is logged.
        """
        if (packed := self._packed_session(spec)) is not None:
            return packed, options
        shared = self._weights
        place = None if shared is None else functools.partial(shared.configure, graph=graph)
        try:
            session = create_session(
                path, self.provider, self._threads, options, place, contrib=self._contrib
            )
        except ERRORS as error:
            if CUDA_GRAPH in options and _NOT_CAPTURED in str(error):
                _log.warning(
                    "Engine %r runs without a CUDA graph: some of its nodes are not on CUDA.", spec.name
                )
                rest = {k: v for k, v in options.items() if k != CUDA_GRAPH}
                return self._session(spec, path, graph, rest)
            if self._in_bfloat16 and _NO_KERNEL in str(error):
                raise BackendUnavailableError(
                    f"Provider {self.provider!r} cannot run engine {spec.name!r}, which computes in bfloat16: {error}"
                ) from error
            raise BundleError(
                f"ONNX Runtime cannot load engine {spec.name!r} from {path}: {error}"
            ) from error
        return session, options


def resolve_provider(provider: str) -> tuple[str, ...]:
    """Return ONNX Runtime's names of the providers asked for. Raises `ConfigurationError` on an unknown name."""
    if provider in PROVIDERS:
        return PROVIDERS[provider]
    if provider.endswith("ExecutionProvider") or devices(provider):
        return (provider,)
    raise ConfigurationError(
        f"Unknown provider {shown(provider)}: give {', '.join(PROVIDERS)}, or a name of ONNX Runtime's that ends in "
        "ExecutionProvider."
    )


def create_session(
    model: Path | bytes,
    provider: str,
    threads: int | None = None,
    provider_options: ProviderOptions | None = None,
    place_weights: Callable[[ort.SessionOptions], None] | None = None,
    *,
    contrib: bool = True,
    few_bits: int = BYTES,
) -> ort.InferenceSession:
    """Create a session that has every provider asked for, with no fallback to others.

    `place_weights`, if given, tells a session where its weights are, which must outlive it. `contrib`: ONNX Runtime may
    fuse nodes into operators of its own when it loads the graph. `few_bits` says how layers with weights in 4 or 8 bits
    are computed: in `BYTES` or `FLOATS`.

    Raises `BackendUnavailableError` if a provider is missing, `ConfigurationError` on an option that it does not
    know, and whatever ONNX Runtime raises on a bad model.
    """
    wanted = resolve_provider(provider)
    request = session_request(provider, wanted, provider_options or {})
    built_in = ort.get_available_providers()
    plugged = [] if wanted[0] in built_in else devices(provider)
    for name in wanted:
        if name not in built_in and not plugged:
            raise BackendUnavailableError(
                f"Provider {provider!r} is not available: {name} is not part of this onnxruntime {ort.__version__} "
                f"(it has {', '.join(built_in)}). {ADVICE.get(name, '')}".rstrip()
            )
    if "CUDAExecutionProvider" in wanted:
        _preload_cuda_libraries()
    options = ort.SessionOptions()
    options.use_deterministic_compute = True
    if products_saturate():  # and would be wrong by more than rounding to bytes is
        options.add_session_config_entry("session.x64quantprecision", "1")
        # With it ONNX Runtime makes unsigned bytes of weights that are only read, too, with a zero point that
        # DequantizeLinear does not take; here they stay signed, and are fused as on other processors.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(few_bits))
    options.add_session_config_entry("session.qdq_matmulnbits_block_size", str(_BLOCK))
    if not contrib:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    configure(options, request)
    options.intra_op_num_threads = default_threads() if threads is None else threads
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever a file's name is
    if place_weights is not None:
        place_weights(options)
    if plugged:
        add_provider(options, provider, dict(request.providers)[provider], plugged)
    session = ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=None if plugged else list(request.providers),
        enable_fallback=0,
    )
    got = session.get_providers()
    missing = [name for name in wanted if name not in got]
    if missing:
        raise BackendUnavailableError(
            f"Provider {provider!r} was asked for, but ONNX Runtime gave {', '.join(got)}. "
            + " ".join(_shortfall(name) for name in missing)
        )
    if not plugged:  # whose options are not told
        check_options(session, request)
    return session


def run_once(
    model: Path, outputs: list[str], inputs: Tensors, *, few_bits: int = BYTES
) -> list[NDArray[Any]]:
    """Run a graph once on one thread of the CPU; `outputs` are given in this order. See `create_session`."""
    options = ort.RunOptions()
    # It warns of every buffer that is not updated in place, as none is where inputs must stay what they are.
    options.log_severity_level = 3
    session = create_session(model, "cpu", threads=1, few_bits=few_bits)
    return list(session.run(outputs, dict(inputs), options))


def probe_provider(provider: str) -> list[str]:
    """Run a tiny model on the provider and return the providers its session really has.

    Nothing less is a test: `onnxruntime.get_available_providers` lists what was compiled in, not what works. Raises
    `BackendUnavailableError` saying what is missing.
    """
    try:
        session = create_session(_PROBE, provider)
        session.run(None, {"x": np.ones(1, np.float32)})
    except ERRORS as error:
        missing = resolve_provider(provider)[0]
        raise BackendUnavailableError(
            f"Provider {provider!r} does not work here. {_shortfall(missing, str(error))}"
        ) from error
    return session.get_providers()


def _shortfall(name: str, symptom: str = "it could not be created") -> str:
    """Explain what keeps a provider from working, and what it requires.

    Call this only after ONNX Runtime has tried: it must be first to load these libraries.
    """
    stem = _LIBRARY_STEMS.get(name)
    if stem is not None and sys.platform == "linux":
        try:
            ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{stem}.so"))
        except OSError as error:
            symptom = str(error)
    return f"{name}: {symptom.strip().rstrip('.')}. {ADVICE.get(name, '')}".rstrip()


_preload_lock = threading.Lock()


def _preload_cuda_libraries() -> None:
    with _preload_lock:  # redirecting stdout is for one thread at a time
        _preload_once()


@functools.cache
def _preload_once() -> None:
    """Preload the CUDA libraries that pip installs for ONNX Runtime; its printed output goes to the log."""
    if not hasattr(ort, "preload_dlls"):
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    if printed.getvalue():
        _log.debug("onnxruntime.preload_dlls: %s", printed.getvalue().strip())
