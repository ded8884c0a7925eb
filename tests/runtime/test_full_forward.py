"""Decoding without caches: the whole sequence for every token."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.runtime import decoding
from flashu_compile.runtime.decoding import Picture, tokens
from flashu_compile.runtime.onnxruntime_engine import OnnxRuntimeEngine
from flashu_compile.runtime.sessions import create_session
from tests.runtime.test_decoding import BEGIN, END, PREFIX, SIZE, FakeEngines, questions


def _whole() -> OnnxRuntimeEngine:
    """An engine without a prologue: it reads prefix, picture and suffix at each call, and says (their sum) next."""
    nodes = [
        ("Concat", ["prefix_ids", "suffix_ids"], ["ids"], {"axis": 1}),
        ("Cast", ["ids"], ["numbers"], {"to": TensorProto.FLOAT}),
        ("ReduceSum", ["numbers", "one"], ["text"], {"keepdims": 0}),
        ("ReduceSum", ["image_embeds", "one_two"], ["picture"], {"keepdims": 0}),
        ("Add", ["text", "picture"], ["sum"], {}),
        ("Mod", ["sum", "size"], ["next"], {"fmod": 1}),
        ("Cast", ["next"], ["next_id"], {"to": TensorProto.INT64}),
        ("OneHot", ["next_id", "depth", "off_on"], ["logits"], {}),
    ]
    constants = {
        "one": np.array([1]), "one_two": np.array([1, 2]), "size": np.float32(SIZE), "depth": np.array(SIZE),
        "off_on": np.array([0, 1], np.float32),
    }  # fmt: skip
    inputs = (
        TensorSpec("prefix_ids", "int64", ("batch", "prefix")),
        TensorSpec("image_embeds", "float32", ("batch", "tokens", 1)),
        TensorSpec("suffix_ids", "int64", ("batch", "suffix")),
    )
    outputs = (TensorSpec("logits", "float32", ("batch", SIZE)),)
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    described = [
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], list(t.shape)) for t in tensors]
        for tensors in (inputs, outputs)
    ]
    graph = helper.make_graph(
        [helper.make_node(op, takes, gives, **attributes) for op, takes, gives, attributes in nodes],
        "language",
        *described,
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    spec = EngineSpec("language", "mmu", "language.onnx", inputs, outputs, "references/language.safetensors")
    return OnnxRuntimeEngine(spec, create_session(model.SerializeToString(), "cpu", 1))


@pytest.fixture(scope="module")
def engine() -> OnnxRuntimeEngine:
    return _whole()


class TestFullForward:
    """Answers of an engine that is given the whole sequence for every token."""

    EMBEDS = np.array([[[2.0], [4.0]]], np.float32)

    def rows(self) -> dict[str, np.ndarray]:
        return {"prefix_ids": np.array([PREFIX]), "image_embeds": self.EMBEDS}

    def going(self, engine: OnnxRuntimeEngine, suffixes: list[list[int]]) -> decoding.Answers:
        return Picture(FakeEngines(engine), self.rows()).answers(suffixes)

    def following(self, *ids: int) -> int:
        return (sum(PREFIX) + 6 + sum(ids)) % SIZE

    def test_every_token_follows_from_the_whole_sequence(self, engine: OnnxRuntimeEngine) -> None:
        going = self.going(engine, [[BEGIN, 1], [BEGIN, 9, 8, 2]])
        assert isinstance(going, decoding._FullForward)
        first = going.first()
        assert first.shape == (2, SIZE)
        assert first.argmax(1).tolist() == [self.following(BEGIN, 1), self.following(BEGIN, 9, 8, 2)]
        assert going.after([5, 7]).argmax(1).tolist() == [
            self.following(BEGIN, 1, 5),
            self.following(BEGIN, 9, 8, 2, 7),
        ]
        assert going.after([1, 1]).argmax(1).tolist() == [
            self.following(BEGIN, 1, 5, 1),
            self.following(BEGIN, 9, 8, 2, 7, 1),
        ]

    def test_the_last_takes_the_place_of_one_that_is_dropped(self, engine: OnnxRuntimeEngine) -> None:
        going = self.going(engine, [[BEGIN, 1], [BEGIN, 2], [BEGIN, 3, 3]])
        going.drop(0)
        assert going.after([0, 7]).argmax(1).tolist() == [
            self.following(BEGIN, 3, 3),
            self.following(BEGIN, 2, 7),
        ]
        going.drop(1)
        assert going.first().argmax(1).tolist() == [self.following(BEGIN, 3, 3)]

    def test_what_is_given_stays_what_it_is(self, engine: OnnxRuntimeEngine) -> None:
        suffixes = [[BEGIN, 1]]
        self.going(engine, suffixes).after([3])
        assert suffixes == [[BEGIN, 1]]

    def test_a_list_of_questions_gives_what_each_gives_alone(self, engine: OnnxRuntimeEngine) -> None:
        suffixes, limit = questions(decoding.BATCH + 3), 12
        said: list[list[int]] = [[] for _ in suffixes]
        for number, token in tokens(Picture(FakeEngines(engine), self.rows()), suffixes, (END,), limit):
            said[number].append(token)
        for suffix, answer in zip(suffixes, said, strict=True):
            ids = list(suffix)
            for token in answer:
                assert token == self.following(*ids) != END
                ids.append(token)
            assert len(answer) == limit or self.following(*ids) == END
        assert min(map(len, said)) < limit
