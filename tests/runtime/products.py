"""A small bundle of engines that multiply by weights they have in common, and tanh, for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from flashu_compile.bundle.manifest import WEIGHTS, EngineSpec, Manifest, TensorSpec, file_entry

WIDTH = 192  # so that a weight fills some pages
WEIGHT = 4 * WIDTH * WIDTH
#: The weights that each engine multiplies by, by their place in the store.
ENGINES = {"whole": (0, 1, 2), "skipping": (0, 2), "alone": (3,)}
INPUT = np.random.default_rng(1).standard_normal((7, WIDTH), np.float32)


def _graph(weights: tuple[int, ...]) -> bytes:
    """x -> y, a chain of products, with a bias of a few bytes that stays in the graph."""
    tensors, nodes, value = [], [], "x"
    for place, index in enumerate(weights):
        tensor = TensorProto(
            name=f"w{place}", data_type=1, dims=[WIDTH, WIDTH], data_location=TensorProto.EXTERNAL
        )
        for key, entry in (("location", WEIGHTS), ("offset", index * WEIGHT), ("length", WEIGHT)):
            tensor.external_data.add(key=key, value=str(entry))
        tensors.append(tensor)
        nodes.append(helper.make_node("MatMul", [value, f"w{place}"], [f"p{place}"]))
        nodes.append(helper.make_node("Tanh", [f"p{place}"], [value := f"t{place}"]))
    tensors.append(helper.make_tensor("bias", TensorProto.FLOAT, [1], [0.5]))
    nodes.append(helper.make_node("Add", [value, "bias"], ["y"]))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in "xy")
    graph = helper.make_graph(nodes, "chain", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def write_products(folder: Path) -> Path:
    """Write the bundle, whose weights lie in the store once."""
    folder.mkdir()
    store = np.random.default_rng(0).standard_normal((4, WIDTH, WIDTH), np.float32) / WIDTH**0.5
    (folder / WEIGHTS).write_bytes(store.tobytes())
    specs = []
    for name, weights in ENGINES.items():
        (folder / f"{name}.onnx").write_bytes(_graph(weights))
        x, y = (TensorSpec(n, "float32", ("rows", WIDTH)) for n in "xy")
        specs.append(EngineSpec(name, "t2i", f"{name}.onnx", (x,), (y,), "none"))
    files = {path.name: file_entry(path) for path in folder.iterdir()}
    manifest = Manifest("tiny", (), "onnxruntime", "float32", "exact", tuple(specs), None, None, {}, files)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder
