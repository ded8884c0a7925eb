"""What a scale of activations for each row costs an int8 layer, against one scale for all rows and against float32.

    python -m benchmarks.int8_rows --rows 498 --rows 1

One layer of each width in ONNX Runtime on one thread, in milliseconds. `tensor` is what engines have, which it fuses;
`row` finds a scale for each row in standard operators; `blocks` is its own product with weights in blocks of 128, whose
activations have a scale for each row and block.
"""

from __future__ import annotations

import functools

import numpy as np
from onnx import TensorProto, helper

from benchmarks.graphs import Row, serialized_graph
from benchmarks.measuring import in_turn, machine, parser, report
from flashu_compile.runtime.sessions import create_session

WIDTHS = ((512, 2048), (2048, 512), (512, 512))
_BLOCK = 128
_PRODUCT = [("Cast", "m", "c", {"to": TensorProto.FLOAT}), ("Mul", "c sw", "p", {})]
_INT8 = ("Transpose", "w", "wt", {"perm": [1, 0]})
FORMS: dict[str, list[Row]] = {
    "float32": [("Gemm", "x f b", "y", {"transB": 1})],
    "tensor": [
        _INT8,
        ("DynamicQuantizeLinear", "x", "q s z", {}),
        ("MatMulInteger", "q wt z", "m", {}),
        ("Mul", "s ws", "sw", {}),
        *_PRODUCT,
        ("Add", "p b", "y", {}),
    ],
    "row": [
        _INT8,
        ("Abs", "x", "a", {}),
        ("ReduceMax", "a last", "largest", {"keepdims": 1}),
        ("Mul", "largest share", "s", {}),
        ("Div", "x s", "d", {}),
        ("QuantizeLinear", "d one middle", "q", {}),
        ("MatMulInteger", "q wt middle", "m", {}),
        ("Mul", "one ws", "sw", {}),
        *_PRODUCT,
        ("Mul", "p s", "scaled", {}),
        ("Add", "scaled b", "y", {}),
    ],
    "blocks": [
        (
            "MatMulNBits",
            "x blocks bs",
            "y",
            {"domain": "com.microsoft", "bits": 8, "block_size": _BLOCK, "accuracy_level": 4},
        )
    ],
}


def layer(form: str, depth: int, width: int) -> bytes:
    """Return one layer as a serialized model."""
    draw = np.random.default_rng(0)
    constants = {
        "f": draw.standard_normal((width, depth), np.float32),
        "w": draw.integers(-127, 128, (width, depth), np.int8),
        "ws": draw.random(width, np.float32) / 100,
        "b": draw.standard_normal(width, np.float32),
        "blocks": draw.integers(0, 256, (width, depth // _BLOCK, _BLOCK), np.uint8),
        "bs": draw.random(width * depth // _BLOCK, np.float32) / 100,
        "last": np.array([-1]),
        "share": np.float32(1 / 127),
        "one": np.float32(1),
        "middle": np.uint8(128),
    }
    sizes = {"K": depth, "N": width}
    rows = [
        (operator, given, made, attributes | sizes if operator == "MatMulNBits" else attributes)
        for operator, given, made, attributes in FORMS[form]
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", depth), ("y", width))
    ]
    return serialized_graph(rows, ends[:1], ends[1:], constants, opset=21)


def measure(rows: int, repeats: int) -> dict[str, dict[str, float]]:
    found = {}
    for depth, width in WIDTHS:
        x = np.random.default_rng(1).standard_normal((rows, depth), np.float32)
        sessions = {form: create_session(layer(form, depth, width), "cpu", threads=1) for form in FORMS}
        calls = {form: functools.partial(s.run, None, {"x": x}) for form, s in sessions.items()}
        found[f"{depth} to {width}"] = {name: 1e3 * s for name, s in in_turn(calls, repeats).items()}
    return found


def main() -> None:
    options = parser(__doc__, repeats=15)
    options.add_argument("--rows", type=int, action="append", help="repeatable; default: 498 and 1")
    given = options.parse_args()
    milliseconds = {f"{rows} rows": measure(rows, given.repeats) for rows in given.rows or (498, 1)}
    report({"machine": machine(), "repeats": given.repeats, "milliseconds": milliseconds}, given.output)


if __name__ == "__main__":
    main()
