"""What attention would gain from products of bytes in ONNX Runtime, against the float32 attention that engines have.

    python -m benchmarks.int8_attention --geometry bench-small --threads 1 --output int8_attention.json

One attention of each stack at the sizes of a denoising evaluation (a batch of two, without a mask), in milliseconds.
`float32` is the operator of the engines; `int8` quantizes queries, keys, values and the weights of the softmax, and
multiplies bytes; `rest` is `int8` without its two products and without what turns their results into float32: what it
would take if products of bytes took no time. `error` is the relative error of `int8`.
"""

from __future__ import annotations

import functools

import numpy as np
from onnx import TensorProto, helper

from benchmarks.geometries import GEOMETRIES
from benchmarks.graphs import Row, serialized_graph
from benchmarks.measuring import in_turn, machine, parser, relative, report
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.runtime.sessions import create_session

BATCH, PROMPT = 2, 24
_FLOAT = {"to": TensorProto.FLOAT}
# Query heads that share keys are rows of one product, so nothing is repeated. Keys come transposed.
_QUANTIZED: list[Row] = [
    ("DynamicQuantizeLinear", "q", "qb qs qz", {}),
    ("DynamicQuantizeLinear", "kt", "kb ks kz", {}),
    ("DynamicQuantizeLinear", "values", "vb vs vz", {}),
]
# Weights are divided by their sum behind the product: before it nearly all of them are below a step of 1/255.
_WEIGHTS: list[Row] = [
    ("ReduceMax", "scores last", "largest", {}),
    ("Sub", "scores largest", "below", {}),
    ("Exp", "below", "p", {}),
    ("ReduceSum", "p last", "total", {}),
    ("QuantizeLinear", "p share zero", "pb", {}),
]
FORMS: dict[str, list[Row]] = {
    "float32": [("Attention", "heads keys values", "y", {})],
    "int8": [
        *_QUANTIZED,
        ("MatMulInteger", "qb kb qz kz", "qk", {}),
        ("Mul", "qs ks", "qks", {}),
        ("Mul", "qks scale", "scaling", {}),
        ("Cast", "qk", "whole", _FLOAT),
        ("Mul", "whole scaling", "scores", {}),
        *_WEIGHTS,
        ("MatMulInteger", "pb vb zero vz", "pv", {}),
        ("Mul", "share vs", "pvs", {}),
        ("Cast", "pv", "sum", _FLOAT),
        ("Div", "pvs total", "each", {}),
        ("Mul", "sum each", "y", {}),
    ],
    "rest": [*_QUANTIZED, *_WEIGHTS],
}


def attentions(config: Showo2Config) -> dict[str, tuple[int, int, int, int, int]]:
    """Return query heads, heads of keys, width of a head, rows and keys of each stack's attention."""
    span, image = config.span_length, config.image_tokens
    found = {}
    for name, stack, rows, keys in (
        ("llm", config.llm, span, span + PROMPT),
        ("semantic", config.semantic, image, image),
        ("head", config.head, span, span + PROMPT),
    ):
        heads = stack.num_attention_heads
        shared = getattr(stack, "num_key_value_heads", heads)
        found[name] = (heads, shared, stack.hidden_size // heads, rows, keys)
    return found


def inputs(heads: int, shared: int, width: int, rows: int, keys: int) -> dict[str, np.ndarray]:
    """Draw normal queries, keys and values, in both layouts."""
    draw = np.random.default_rng(0)
    queries = draw.standard_normal((BATCH, heads, rows, width), np.float32)
    key, value = (draw.standard_normal((BATCH, shared, keys, width), np.float32) for _ in range(2))
    grouped = queries.reshape(BATCH, shared, -1, width)
    turned = np.ascontiguousarray(key.swapaxes(2, 3))
    scores = grouped @ turned / np.float32(np.sqrt(width))
    return {"heads": queries, "keys": key, "values": value, "q": grouped, "kt": turned, "scores": scores}


def model(form: str, given: dict[str, np.ndarray]) -> bytes:
    """Return one attention as a serialized model; `rest` gives out what the products read, and takes scores."""
    constants = {
        "share": np.float32(1 / 255),
        "zero": np.uint8(0),
        "last": np.array([-1]),
        "scale": np.float32(given["q"].shape[-1] ** -0.5),
    }
    ends = {"y": TensorProto.FLOAT}
    if form == "rest":
        ends = {**dict.fromkeys(("qb", "kb", "vb", "pb"), TensorProto.UINT8), "total": TensorProto.FLOAT}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in given.items()]
    outputs = [helper.make_tensor_value_info(n, dtype, [None] * 4) for n, dtype in ends.items()]
    return serialized_graph(FORMS[form], values, outputs, constants, opset=24)


def measure(config: Showo2Config, threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each form, and the relative error of `int8`, for each stack."""
    found = {}
    for stack, sizes in attentions(config).items():
        given = inputs(*sizes)
        calls = {}
        for form in FORMS:
            session = create_session(model(form, given), "cpu", threads=threads)
            fed = {value.name: given[value.name] for value in session.get_inputs()}
            calls[form] = functools.partial(session.run, None, fed)
        (truth,), (near,) = (calls[form]() for form in ("float32", "int8"))
        times = in_turn(calls, repeats)
        found[stack] = {form: 1e3 * time for form, time in times.items()}
        found[stack]["error"] = relative(near.reshape(truth.shape), truth)
    return found


def main() -> None:
    options = parser(__doc__, repeats=30)
    options.add_argument("--geometry", choices=GEOMETRIES, default="bench-small")
    given = options.parse_args()
    found = measure(GEOMETRIES[given.geometry], given.threads, given.repeats)
    setting = {"machine": machine(), "geometry": given.geometry, "threads": given.threads}
    report({**setting, "attentions": found}, given.output)


if __name__ == "__main__":
    main()
