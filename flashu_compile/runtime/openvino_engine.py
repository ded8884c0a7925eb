"""Engines of a bundle's ONNX graphs in OpenVINO, which reads the same files that ONNX Runtime does.

By itself OpenVINO computes in what a processor is fastest at: in bfloat16, with activations quantised in groups and
caches in 8 bits. Here every such property is set and read back, so that engines compute what the graphs say unless
something else is asked for. OpenVINO reads all operators of our graphs but TensorScatter, for which it is given a form
(`_write_rows`) that copies the buffers it writes to. It would compute int8 layers in floats, bytes of activations
included; so activations stay what they are (`_leave`), and int8 weights are what its kernels take (`_product`). That is
faster, nearer to float32, and a row does not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile import arguments
from flashu_compile.arguments import shown
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS, EngineSpec
from flashu_compile.bundle.signatures import check_inputs, check_outputs
from flashu_compile.errors import BackendUnavailableError, BundleError, ConfigurationError
from flashu_compile.runtime.checked_graph import read_graph
from flashu_compile.runtime.engine import Tensors
from flashu_compile.runtime.lifetime import Lifetime, OwnedEngines
from flashu_compile.system.libraries import import_openvino
from flashu_compile.system.paths import absolute
from flashu_compile.system.threads import default_threads

ADVICE = 'Install it with: pip install "flashu-compile[openvino]"'
#: Precisions that engines may be asked to compute in: what the device's capabilities and the manifest call them.
PRECISIONS = {"f32": ("FP32", "float32"), "bf16": ("BF16", "bfloat16"), "f16": ("FP16", "float16")}
PRECISION_HINT, THREADS, CACHE = "INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS", "CACHE_DIR"
#: What a device is told unless the user says otherwise, of the properties that it has.
_DEFAULTS = {
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
    "CPU_DENORMALS_OPTIMIZATION": "NO",
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
}


class OpenVINOEngine:
    """A compiled model of OpenVINO with its signature. Calls from several threads take turns."""

    def __init__(self, spec: EngineSpec, compiled: Any, lifetime: Lifetime) -> None:
        self.spec, self._lifetime = spec, lifetime
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()
        for side, tensors, values in (
            ("in", spec.inputs, compiled.inputs),
            ("out", spec.outputs, compiled.outputs),
        ):
            listed = sorted(tensor.name for tensor in tensors)
            found = sorted(name for value in values for name in value.get_names())
            if not set(listed) <= set(found) or len(values) != len(listed):
                raise BundleError(
                    f"Engine {spec.name!r}: the {side}puts of {spec.file} are {', '.join(found)} to OpenVINO, the "
                    f"manifest's are {', '.join(listed)}; build the bundle again."
                )

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the model; see `Engine.run`. Raises `BundleError` if OpenVINO fails."""
        self._lifetime.check()
        sizes = check_inputs(self.spec, inputs)
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            with self._lock:
                self._request.infer(given)
                outputs = {t.name: np.array(self._request.get_tensor(t.name).data) for t in self.spec.outputs}
        except RuntimeError as error:
            raise BundleError(f"Engine {self.spec.name!r} failed in OpenVINO: {_reason(error)}") from error
        return check_outputs(self.spec, outputs, sizes)


class OpenVINOEngines(OwnedEngines[OpenVINOEngine]):
    """Models of a bundle on one device of OpenVINO, by its name there ("cpu" is "CPU"); see `OwnedEngines`.

    `precision` is one of `PRECISIONS`; `provider_options` are properties of the device by OpenVINO's names; `cache` is
    a folder for compiled models, which otherwise are kept nowhere. With `trust`, graphs may have any operators. Raises
    `ConfigurationError` on what the device does not offer, `BackendUnavailableError` if it does not work.
    """

    def __init__(
        self,
        files: BundleFiles,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        precision: str = "f32",
        provider_options: Mapping[str, object] | None = None,
        cache: str | Path | None = None,
        trust: bool = False,
    ) -> None:
        self._device, self._trust = provider.upper() if provider == "cpu" else provider, trust
        self._core = open_core()
        given = {name: str(value) for name, value in (provider_options or {}).items()}
        self._config = configuration(self._core, self._device, given, threads=threads, precision=precision)
        self._computes = self._config[PRECISION_HINT]
        if cache is not None:
            self._config[CACHE] = str(absolute(cache))
        probe_device(self._core, self._device, self._config)
        super().__init__(files)

    @property
    def precision(self) -> str:
        """The manifest's precision, or the lower one that was asked for."""
        return super().precision if self._computes == "f32" else PRECISIONS[self._computes][1]

    def _create(self, spec: EngineSpec, lifetime: Lifetime) -> OpenVINOEngine:
        read_graph(self._files, spec, trust=self._trust)
        stored = WEIGHTS in self._files.manifest.files
        with self._files.held(spec.file, *[WEIGHTS] * stored) as (path, *_):
            try:
                compiled = self._core.compile_model(
                    self._core.read_model(str(path)), self._device, self._config
                )
            except RuntimeError as error:
                raise BundleError(
                    f"OpenVINO cannot load engine {spec.name!r} from {path}: {_reason(error)}"
                ) from error
        check_properties(compiled, self._device, self._config)
        return OpenVINOEngine(spec, compiled, lifetime)


def open_core() -> Any:
    """Import OpenVINO and return its core, which reads our graphs.

    Raises `BackendUnavailableError` if it is not installed or does not start.
    """
    try:
        openvino = import_openvino()
        from openvino.frontend.onnx import ConversionExtension

        core = openvino.Core()
        for operator, form in _FORMS.items():
            core.add_extension(ConversionExtension(operator, form))
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailableError(f"OpenVINO cannot be imported: {_reason(error)}. {ADVICE}") from error
    return core


def _write_rows(node: Any) -> list[Any]:
    """Translate TensorScatter along axis 2 of buffers [b, heads, capacity, width], as our graphs have it."""
    import openvino.opset14 as op

    buffer, rows, start = (node.get_input(index) for index in range(3))
    rank = buffer.get_partial_shape().rank
    if rank.is_dynamic or rank.get_length() != 4 or node.get_attribute("axis", -2) not in (2, -2):
        raise RuntimeError("TensorScatter is translated along axis 2 of four dimensions alone")
    shape = op.shape_of(rows, "i64")
    count = op.gather(shape, np.int64(2), np.int64(0))
    place = op.add(op.unsqueeze(start, np.int64(1)), op.range(np.int64(0), count, np.int64(1), "i64"))
    places = op.broadcast(op.unsqueeze(place, np.array([1, 3])), shape)
    return [op.scatter_elements_update(buffer, places, rows, np.int64(2)).output(0)]


def _leave(node: Any) -> list[Any]:
    """Translate DynamicQuantizeLinear to its input, with the scale that `_product` leaves to it, and no zero point."""
    import openvino.opset14 as op

    # Not the input itself, whose name would be lost.
    value = op.convert(node.get_input(0), "f32")
    return [
        value.output(0),
        op.constant(np.float32(1 / _SHARE)).output(0),
        op.constant(np.uint8(0)).output(0),
    ]


def _product(node: Any) -> list[Any]:
    """Translate MatMulInteger by int8 weights to a product with compressed weights.

    It is of what `_leave` gives, or of bytes, which become floats.
    """
    import openvino.opset14 as op

    value, weight, zero = (node.get_input(index) for index in range(3))
    if node.get_input_size() != 3 or weight.get_element_type().to_string() != "i8":
        raise RuntimeError("MatMulInteger is translated with int8 weights that have no zero point alone")
    share = _SHARE
    if value.get_element_type().to_string() != "f32":
        value, share = op.subtract(op.convert(value, "f32"), op.convert(zero, "f32")), 1
    maker = weight.get_node()
    turned = maker.get_type_name() == "Transpose"
    stored = maker.input_value(0) if turned else weight
    # Compressed weights are recognised by a scale. It is a power of two, so that nothing is rounded.
    scaled = op.multiply(op.convert(stored, "f32"), op.constant(np.full((1, 1), share, np.float32)))
    return [op.matmul(value, scaled, False, turned).output(0)]


#: The share of the scales of activations and weights that is multiplied with weights.
_SHARE = 1 / 64
_FORMS = {"TensorScatter": _write_rows, "DynamicQuantizeLinear": _leave, "MatMulInteger": _product}


def configuration(
    core: Any, device: str, given: Mapping[str, str], *, threads: int | None, precision: str
) -> dict[str, str]:
    """Return the properties that models are compiled with: those `given`, and ours where the device has them.

    Raises `ConfigurationError` on a property or precision that the device lacks, `BackendUnavailableError` if there is
    no such device.
    """
    here = ", ".join(core.available_devices)
    try:
        offered = core.get_property(device, "SUPPORTED_PROPERTIES")
        capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    except RuntimeError as error:
        raise BackendUnavailableError(
            f"OpenVINO has no device {shown(device)} here (it has {here}): {_reason(error)}"
        ) from error
    unknown = sorted(given.keys() - offered.keys())
    if unknown:
        raise ConfigurationError(f"OpenVINO's device {device} has no property {shown(unknown[0])}.")
    ours = dict(_DEFAULTS)
    if threads is not None or THREADS in offered:
        ours[THREADS] = str(default_threads() if threads is None else threads)
    if threads is not None and THREADS not in offered:
        raise ConfigurationError(
            f"OpenVINO's device {device} takes no number of threads; leave `threads` out."
        )
    hint = given.get(PRECISION_HINT, arguments.name_of("precision", precision))
    if hint not in PRECISIONS:
        raise ConfigurationError(f"precision is one of {', '.join(PRECISIONS)}, not {shown(hint)}.")
    if PRECISION_HINT not in offered:
        raise ConfigurationError(
            f"OpenVINO's device {device} cannot be told to compute in {hint}; name one of {here}."
        )
    if PRECISIONS[hint][0] not in capabilities:
        raise ConfigurationError(
            f"OpenVINO's device {device} does not compute in {hint}; it offers {', '.join(capabilities)}."
        )
    return {n: v for n, v in ours.items() if n in offered} | dict(given) | {PRECISION_HINT: hint}


def probe_device(core: Any, device: str, config: Mapping[str, str]) -> None:
    """Compile and run a tiny model with these properties.

    Raises `ConfigurationError` if the device does not take them, `BackendUnavailableError` if it fails without them.
    """
    import openvino
    import openvino.opset14 as op

    value = op.parameter([-1], np.float32)
    model = openvino.Model([op.add(value, value)], [value], "probe")
    try:
        core.compile_model(model, device, {}).create_infer_request().infer([np.ones(1, np.float32)])
    except RuntimeError as error:
        raise BackendUnavailableError(
            f"OpenVINO's device {device} does not work here: {_reason(error)}"
        ) from error
    try:
        compiled = core.compile_model(model, device, {k: v for k, v in config.items() if k != CACHE})
    except RuntimeError as error:
        raise ConfigurationError(
            f"OpenVINO's device {device} refuses its properties: {_reason(error)}"
        ) from error
    check_properties(compiled, device, config)


def check_properties(compiled: Any, device: str, config: Mapping[str, str]) -> None:
    """Read every property back. Raises `ConfigurationError` if one is not what was set."""
    for name, wanted in config.items():
        if name == CACHE:  # which is the core's, and no model's
            continue
        try:
            found = _text(compiled.get_property(name))
        except RuntimeError as error:
            raise ConfigurationError(
                f"OpenVINO's device {device} does not tell its {name}: {_reason(error)}"
            ) from error
        if not _equal(found, wanted):
            raise ConfigurationError(
                f"OpenVINO's device {device} was asked for {name}={wanted}, and has taken {found}."
            )


def _reason(error: Exception) -> str:
    """Return what OpenVINO says, without the places in its source that it says it from."""
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line and not line.startswith("Exception from"))


def _text(value: Any) -> str:
    named = getattr(value, "to_string", None) or getattr(value, "name", None)
    return str(named() if callable(named) else value if named is None else named)


def _equal(found: str, wanted: str) -> bool:
    """Tell whether two values are one, however a bool, a number or a name is written."""
    spelled = {"yes": "true", "no": "false"}
    first, second = (spelled.get(text.lower(), text.lower()) for text in (found, wanted))
    with contextlib.suppress(ValueError):
        return float(first) == float(second)
    return first == second
