"""What attention would gain from products of bytes in ONNX Runtime, against the float32 attention that engines have.

    python -m benchmarks.int8_attention --geometry bench-small --threads 1 --output int8_attention.json

One attention of each stack at the sizes of a denoising evaluation (a batch of two, without a mask), in milliseconds.
`float32` is the operator of the engines; `int8` quantizes queries, keys, values and the weights of the softmax, and
multiplies bytes; `rest` is `int8` without its two products and without what turns their results into float32: what it
would take if products of bytes took no time. `error` is the relative error of `int8`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from benchmarks.geometries import GEOMETRIES
from benchmarks.measuring import in_turn, machine, parser, relative, report
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.runtime.sessions import create_session

BATCH, PROMPT = 2, 24
Node = tuple[str, str, str, dict[str, Any]]
_FLOAT = {"to": TensorProto.FLOAT}
# Query heads that share keys are rows of one product, so nothing is repeated. Keys come transposed.
_QUANTIZED: list[Node] = [
    ("DynamicQuantizeLinear", "q", "qb qs qz", {}),
    ("DynamicQuantizeLinear", "kt", "kb ks kz", {}),
    ("DynamicQuantizeLinear", "v", "vb vs vz", {}),
]
# Weights are divided by their sum behind the product: before it nearly all of them are below a step of 1/255.
_WEIGHTS: list[Node] = [
    ("ReduceMax", "scores last", "largest", {}),
    ("Sub", "scores largest", "below", {}),
    ("Exp", "below", "p", {}),
    ("ReduceSum", "p last", "total", {}),
    ("QuantizeLinear", "p share zero", "pb", {}),
]
FORMS: dict[str, list[Node]] = {
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
    llm, semantic, head = config.llm, config.semantic, config.head
    span, image = config.span_length, config.image_tokens
    stacks = {
        "llm": (llm.num_attention_heads, llm.num_key_value_heads, llm.hidden_size, span, span + PROMPT),
        "semantic": (
            semantic.num_attention_heads,
            semantic.num_attention_heads,
            semantic.hidden_size,
            image,
            image,
        ),
        "head": (head.num_attention_heads, head.num_key_value_heads, head.hidden_size, span, span + PROMPT),
    }
    return {
        name: (heads, shared, width // heads, rows, keys)
        for name, (heads, shared, width, rows, keys) in stacks.items()
    }


def inputs(heads: int, shared: int, width: int, rows: int, keys: int) -> dict[str, np.ndarray]:
    """Draw normal queries, keys and values, in both layouts."""
    draw = np.random.default_rng(0)
    queries = draw.standard_normal((BATCH, heads, rows, width), np.float32)
    key, value = (draw.standard_normal((BATCH, shared, keys, width), np.float32) for _ in range(2))
    grouped = queries.reshape(BATCH, shared, -1, width)
    scores = grouped @ key.swapaxes(2, 3) / np.float32(np.sqrt(width))
    return {
        "heads": queries,
        "keys": key,
        "values": value,
        "q": grouped,
        "kt": np.ascontiguousarray(key.swapaxes(2, 3)),
        "v": value,
        "scores": scores,
    }


def model(form: str, given: dict[str, np.ndarray]) -> ModelProto:
    """Return one attention as a graph; `rest` gives out what it quantized, and takes scores."""
    constants = {
        "share": np.float32(1 / 255),
        "zero": np.uint8(0),
        "last": np.array([-1]),
        "scale": np.float32(given["q"].shape[-1] ** -0.5),
    }
    nodes = [
        helper.make_node(kind, read.split(), made.split(), **more) for kind, read, made, more in FORMS[form]
    ]
    read = {name for node in nodes for name in node.input}
    ends = {"y": TensorProto.FLOAT}
    if form == "rest":
        ends = dict.fromkeys(("qb", "kb", "vb", "pb"), TensorProto.UINT8)
    graph = helper.make_graph(
        nodes,
        form,
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, list(array.shape))
            for name, array in given.items()
            if name in read and not any(name in node.output for node in nodes)
        ],
        [helper.make_tensor_value_info(name, dtype, [None] * 4) for name, dtype in ends.items()],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in constants.items()
            if name in read
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def measure(config: Showo2Config, threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each form, and the relative error of `int8`, for each stack."""
    found = {}
    for stack, sizes in attentions(config).items():
        given = inputs(*sizes)
        calls = {}
        for form in FORMS:
            session = create_session(model(form, given).SerializeToString(), "cpu", threads=threads)
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
