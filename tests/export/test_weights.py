"""The weight store: what is stored once, where it lies, and that models get their own tensors back."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from flashu_compile.exporters.weights import StoreSummary, weight_store


def model_of(**tensors: Tensor | np.ndarray) -> ir.Model:
    """A model that reads its weights in the order given."""
    values, nodes = [], []
    for name, tensor in tensors.items():
        wrapped = ir.tensor(tensor, name=name)
        value = ir.Value(
            name=name, const_value=wrapped, shape=ir.Shape(wrapped.shape), type=ir.TensorType(wrapped.dtype)
        )
        values.append(value)
        nodes.append(ir.node("Identity", inputs=[value]))
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 20}, name="weights")
    return ir.Model(graph, ir_version=10)


def stored(model: ir.Model, name: str) -> ir.ExternalTensor:
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return tensor


def test_equal_tensors_are_stored_once_across_names_and_models(tmp_path: Path) -> None:
    weight = torch.randn(30, 40)
    first, second = model_of(a=weight, b=weight.clone(), c=torch.randn(30, 40)), model_of(z=weight.clone())
    with weight_store([first, second], tmp_path / "weights.bin") as summary:
        places = [stored(first, "a"), stored(first, "b"), stored(second, "z")]
        assert {(place.offset, place.length) for place in places} == {(0, 4800)}
        assert stored(first, "c").offset == 4800
    assert summary == StoreSummary(bytes=9600, tensors=2, references=4, referenced_bytes=4 * 4800)
    assert (tmp_path / "weights.bin").read_bytes()[:4800] == weight.numpy().tobytes()


def test_same_bytes_of_another_shape_or_dtype_are_another_tensor(tmp_path: Path) -> None:
    zeros = model_of(a=torch.zeros(512), b=torch.zeros(16, 32), c=torch.zeros(512, dtype=torch.int32))
    with weight_store([zeros], tmp_path / "weights.bin") as summary:
        assert summary.tensors == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_stored_tensors_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = (torch.randn(48, 64) * 3).to(dtype)
    model = model_of(straight=weight, turned=weight.T)
    with weight_store([model], tmp_path / "weights.bin"):
        for name, tensor in (("straight", weight), ("turned", weight.T)):
            back = stored(model, name)
            assert tuple(back.shape) == tuple(tensor.shape)
            assert back.tobytes() == ir.tensor(tensor.contiguous()).tobytes()


def test_a_range_of_a_tensor_lies_in_its_place(tmp_path: Path) -> None:
    weight = torch.randn(60, 40)
    rows, turned = weight[10:50], torch.randn(40, 60).t()
    first, second = model_of(part=rows, apart=turned), model_of(whole=weight, apart=turned)
    with weight_store([first, second], tmp_path / "weights.bin") as summary:
        whole, part = stored(second, "whole"), stored(first, "part")
        assert (whole.offset, part.offset) == (0, 10 * 40 * 4)
        assert part.numpy().tolist() == rows.tolist()
        assert stored(first, "apart").offset == stored(second, "apart").offset
    assert summary == StoreSummary(bytes=2 * 9600, tensors=2, references=4, referenced_bytes=3 * 9600 + 6400)


def test_of_a_weight_that_nobody_reads_whole_its_parts_are_stored(tmp_path: Path) -> None:
    """Once where they overlap; what nobody reads is left out, and parts that merely touch are two tensors."""
    weight = torch.randn(100, 10)
    model = model_of(early=weight[:40], late=weight[30:70], last=weight[70:])
    with weight_store([model], tmp_path / "weights.bin") as summary:
        assert stored(model, "late").offset - stored(model, "early").offset == 30 * 40
        for name, rows in (("early", weight[:40]), ("late", weight[30:70]), ("last", weight[70:])):
            assert stored(model, name).numpy().tolist() == rows.tolist()
    assert summary.tensors == 2
    assert summary.bytes == 2816 + 1200  # 70 rows up to a line of 64 bytes, and 30 rows


def test_small_tensors_stay_in_the_graph(tmp_path: Path) -> None:
    model = model_of(small=torch.randn(256), large=torch.randn(257))
    with weight_store([model], tmp_path / "weights.bin") as summary:
        assert not isinstance(model.graph.initializers["small"].const_value, ir.ExternalTensor)
        assert stored(model, "large").length == 1028
        assert summary.tensors == 1


def test_alignment(tmp_path: Path) -> None:
    model = model_of(odd=torch.randn(301), line=torch.randn(300), page=torch.randn(128, 128))
    with weight_store([model], tmp_path / "weights.bin"):
        assert [stored(model, name).offset for name in ("odd", "line", "page")] == [0, 1216, 4096]


def test_order_is_that_of_reading(tmp_path: Path) -> None:
    model = model_of(second=torch.randn(300), first=torch.randn(400))
    nodes = list(model.graph)
    model.graph.insert_before(nodes[0], ir.node("Identity", inputs=[model.graph.initializers["first"]]))
    with weight_store([model], tmp_path / "weights.bin"):
        assert stored(model, "first").offset < stored(model, "second").offset


def test_models_get_their_tensors_back_even_after_an_error(tmp_path: Path) -> None:
    model = model_of(a=torch.randn(30, 40))
    before = model.graph.initializers["a"].const_value
    with pytest.raises(KeyError), weight_store([model], tmp_path / "weights.bin"):
        raise KeyError
    assert model.graph.initializers["a"].const_value is before


def test_tensors_are_streamed(tmp_path: Path) -> None:
    """However many weights there are, not even one of them is copied."""
    model = model_of(**{f"w{index}": torch.randn(1 << 18) for index in range(12)})
    tracemalloc.start()
    with weight_store([model], tmp_path / "weights.bin") as summary:
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert summary.bytes == 12 << 20
    assert peak < 1 << 19
