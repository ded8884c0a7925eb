"""Batches of answers on caches that are updated in place, by engines with a closed form.

The engine keeps the ids it was given as its rows, and says id (sum of all rows of an answer) mod `SIZE` next. `shifted`
is a cache behind token gather: it has fewer rows. It holds the same ids, without those of the first rows.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from transformers import RepetitionPenaltyLogitsProcessor

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.bundle.profiles import ROOM
from flashu_compile.bundle.signatures import state_of, updated
from flashu_compile.errors import BundleError, InputError
from flashu_compile.runtime import decoding
from flashu_compile.runtime.decoding import Caches, Picture, penalised, tokens
from flashu_compile.runtime.engine import Updating, update
from flashu_compile.runtime.onnxruntime_engine import OnnxRuntimeEngine
from flashu_compile.runtime.sessions import create_session

SIZE = 23
PREFIX, BEGIN = [3, 5, 7], 4
FEWER = 2
END = 22


def _language() -> onnx.ModelProto:
    nodes = [
        ("Cast", ["suffix_ids"], ["ids"], {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["ids", "one_three"], ["rows"], {}),
        ("Sub", ["rows_before", "fewer"], ["before"], {}),
        ("TensorScatter", ["seen", "rows", "rows_before"], ["seen.updated"], {"axis": 2}),
        ("TensorScatter", ["shifted", "rows", "before"], ["shifted.updated"], {"axis": 2}),
        ("Shape", ["suffix_ids"], ["new"], {"start": 1, "end": 2}),
    ]
    for name, start in (("seen", "rows_before"), ("shifted", "before")):
        nodes += [
            ("Add", [start, "new"], [f"{name}.end"], {}),
            ("Unsqueeze", [f"{name}.end", "one"], [f"{name}.ends"], {}),
            ("Shape", [name], [f"{name}.capacity"], {"start": 2, "end": 3}),
            ("Squeeze", [f"{name}.capacity"], [f"{name}.limit"], {}),
            ("Range", ["zero", f"{name}.limit", "step"], [f"{name}.place"], {}),
            ("Less", [f"{name}.place", f"{name}.ends"], [f"{name}.valid"], {}),
            ("Squeeze", [f"{name}.updated", "one_three"], [f"{name}.flat"], {}),
            ("Where", [f"{name}.valid", f"{name}.flat", "nothing"], [f"{name}.live"], {}),
            ("ReduceSum", [f"{name}.live", "one"], [f"{name}.sum"], {"keepdims": 0}),
        ]
    nodes += [
        ("Add", ["seen.sum", "shifted.sum"], ["sum"], {}),
        ("Mod", ["sum", "size"], ["next"], {"fmod": 1}),
        ("Cast", ["next"], ["next_id"], {"to": TensorProto.INT64}),
        ("OneHot", ["next_id", "depth", "off_on"], ["logits"], {}),
    ]
    value = helper.make_tensor_value_info
    caches = [
        value(name, TensorProto.FLOAT, ["batch", 1, axis, 1])
        for name, axis in (("seen", "capacity"), ("shifted", f"capacity - {FEWER}"))
    ]
    grown = [
        value(updated("seen"), TensorProto.FLOAT, ["batch", 1, "capacity", 1]),
        value(updated("shifted"), TensorProto.FLOAT, ["batch", 1, f"capacity - {FEWER}", 1]),
    ]
    constant = onnx.numpy_helper.from_array
    constants = {
        "one": np.array([1]), "one_three": np.array([1, 3]), "fewer": np.array(FEWER), "zero": np.array(0),
        "step": np.array(1), "nothing": np.float32(0), "size": np.float32(SIZE), "depth": np.array(SIZE),
        "off_on": np.array([0, 1], np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node(op, takes, gives, **attributes) for op, takes, gives, attributes in nodes],
        "language",
        [
            value("suffix_ids", TensorProto.INT64, ["batch", "suffix"]),
            *caches,
            value("rows_before", TensorProto.INT64, ["batch"]),
        ],
        [value("logits", TensorProto.FLOAT, ["batch", SIZE]), *grown],
        [constant(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def _spec() -> EngineSpec:
    seen, shifted = ("batch", 1, "capacity", 1), ("batch", 1, f"capacity - {FEWER}", 1)
    return EngineSpec(
        "language",
        "mmu",
        "language.onnx",
        (
            TensorSpec("suffix_ids", "int64", ("batch", "suffix")),
            TensorSpec("seen", "float32", seen),
            TensorSpec("shifted", "float32", shifted),
            TensorSpec("rows_before", "int64", ("batch",)),
        ),
        (
            TensorSpec("logits", "float32", ("batch", SIZE)),
            TensorSpec("seen.updated", "float32", seen),
            TensorSpec("shifted.updated", "float32", shifted),
        ),
        "references/language.safetensors",
        prologue="language_prologue",
    )


class _Prologue:
    spec = EngineSpec(
        "language_prologue", "mmu", "", (TensorSpec("image_end_ids", "int64", ("batch", 1)),), (), ""
    )

    def __init__(self) -> None:
        self.runs = 0

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.runs += 1
        ids = np.concatenate([inputs["prefix_ids"], inputs["image_end_ids"]], axis=1).astype(np.float32)
        rows = ids[:, None, :, None]
        return {"seen": rows, "shifted": np.ascontiguousarray(rows[:, :, FEWER:])}


class _Copying:
    """The same engine without a way to update in place, as another backend's may be."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self.spec, self.run = engine.spec, engine.run


class _KeepingPrologue(_Prologue):
    """Its outputs stay tensors, as those of engines in PyTorch may."""

    def keep(self, inputs: Mapping[str, Any], names: Container[str]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(rows) for name, rows in self.run(inputs).items()}


class _Tensors:
    """The same engine for state in tensors, which it replaces."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self.spec, self.run, self._update = engine.spec, engine.run, engine.update

    def update(self, inputs: Mapping[str, Any], state: dict[str, Any]) -> dict[str, NDArray[Any]]:
        arrays = {name: tensor.numpy().copy() for name, tensor in state.items()}
        outputs = self._update(inputs, arrays)
        state.update({name: torch.from_numpy(array) for name, array in arrays.items()})
        return outputs


class FakeEngines:
    precision = "float32"

    def __init__(self, language: Any, prologue: _Prologue | None = None) -> None:
        self.known = {"language": language, "language_prologue": prologue or _Prologue()}

    def engine(self, name: str) -> Any:
        return self.known[name]


@pytest.fixture(scope="module")
def language() -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(_spec(), create_session(_language().SerializeToString(), "cpu", 1))


@pytest.fixture(params=["in place", "copying", "tensors"])
def engines(request: pytest.FixtureRequest, language: OnnxRuntimeEngine) -> FakeEngines:
    if request.param == "tensors":
        return FakeEngines(_Tensors(language), _KeepingPrologue())
    return FakeEngines(language if request.param == "in place" else _Copying(language))


def expected(suffix: list[int], limit: int) -> list[int]:
    """What the answer to `suffix` must be, in whole numbers."""
    ids, said = [*PREFIX, *suffix], []
    for _ in range(limit):
        following = (sum(ids) + sum(ids[FEWER:])) % SIZE
        if following == END:
            break
        said.append(following)
        ids.append(following)
    return said


def answers(engines: FakeEngines, suffixes: list[list[int]], limit: int) -> list[list[int]]:
    picture = Picture(
        engines, {"prefix_ids": np.array([PREFIX]), "image_embeds": np.zeros((1, 1, 1), np.float32)}
    )
    said: list[list[int]] = [[] for _ in suffixes]
    for number, token in tokens(picture, suffixes, (END,), limit):
        said[number].append(token)
    return said


def questions(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [
        [BEGIN, *random.integers(SIZE, size=length).tolist()] for length in random.integers(1, 9, size=count)
    ]


def test_a_batch_gives_what_each_gives_alone(engines: FakeEngines) -> None:
    suffixes = questions(2 * decoding.BATCH + 3)
    together = answers(engines, suffixes, 30)
    assert together == [expected(suffix, 30) for suffix in suffixes]
    assert together == [answers(engines, [suffix], 30)[0] for suffix in suffixes]
    lengths = [len(answer) for answer in together]
    assert min(lengths) < 5
    assert max(lengths) == 30  # they end at different times, some never


def test_suffixes_of_one_length_take_one_run(engines: FakeEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []

    def counted(engine: Any, inputs: Any, state: Any) -> Any:
        sizes.append(inputs["suffix_ids"].shape)
        return update(engine, inputs, state)

    monkeypatch.setattr(decoding, "update", counted)
    answers(engines, [[BEGIN, 1, 2], [BEGIN, 5, 9]], 1)
    assert sizes == [(2, 2)]
    answers(engines, [[BEGIN, 1, 2], [BEGIN, 5, 9, 11]], 1)
    assert sizes[1:] == [(2, 2), (2, 1)]


def test_the_picture_s_rows_are_computed_once(engines: FakeEngines) -> None:
    answers(engines, questions(20), 3)
    assert engines.known["language_prologue"].runs == 1


def test_an_answer_outgrows_its_cache(engines: FakeEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    capacities: list[int] = []
    state = Caches.state

    def watched(self: Caches, *, room_for: int) -> Any:
        found = state(self, room_for=room_for)
        capacities.append(found["seen"].shape[2])
        assert found["shifted"].shape[2] == capacities[-1] - FEWER
        return found

    monkeypatch.setattr(Caches, "state", watched)
    longest = next(s for s in questions(60, seed=3) if len(expected(s, 4 * ROOM)) == 4 * ROOM)
    assert answers(engines, [longest], 4 * ROOM) == [expected(longest, 4 * ROOM)]
    assert len(set(capacities)) >= 4
    assert max(capacities) <= len(PREFIX) + len(longest) + 5 * ROOM


def test_threads_do_not_share_caches(engines: FakeEngines) -> None:
    picture = Picture(
        engines, {"prefix_ids": np.array([PREFIX]), "image_embeds": np.zeros((1, 1, 1), np.float32)}
    )
    suffixes = questions(24, seed=1)

    def answer(suffix: list[int]) -> list[int]:
        return [token for _, token in tokens(picture, [suffix], (END,), 40)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, suffixes)) == [expected(suffix, 40) for suffix in suffixes]


class _Whole:
    """Says (sum of all ids) mod `SIZE` next. `takes_end`: it takes the id that ends the image by itself."""

    def __init__(self, *, takes_end: bool) -> None:
        ids = ["prefix_ids", *(["image_end_ids"] if takes_end else []), "suffix_ids"]
        self.names = [*ids, "image_embeds"]
        inputs = tuple(TensorSpec(name, "", ()) for name in self.names)
        self.spec = EngineSpec("language", "mmu", "", inputs, (), "")

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        assert set(inputs) == set(self.names)
        assert self.names[1] == "suffix_ids" or inputs["image_end_ids"].tolist() == [[BEGIN]]
        said = sum(int(value.sum()) for name, value in inputs.items() if name.endswith("_ids")) % SIZE
        return {"logits": np.eye(SIZE, dtype=np.float32)[[said]]}


@pytest.mark.parametrize("takes_end", [False, True])
def test_without_caches_an_engine_is_given_the_whole_sequence(*, takes_end: bool) -> None:
    suffixes = [suffix for suffix in questions(9, seed=2) if len(suffix) > 1]
    found = answers(FakeEngines(_Whole(takes_end=takes_end)), suffixes, 12)
    for suffix, answer in zip(suffixes, found, strict=True):
        ids = [*PREFIX, *suffix]
        for token in answer:
            assert token == sum(ids) % SIZE != END
            ids.append(token)
        assert len(answer) == 12 or sum(ids) % SIZE == END
    assert len({len(answer) for answer in found}) > 1


def test_no_questions(engines: FakeEngines) -> None:
    assert answers(engines, [], 5) == []


class TestUpdating:
    def inputs(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        state = {
            "seen": np.ones((2, 1, 6, 1), np.float32),
            "shifted": np.ones((2, 1, 6 - FEWER, 1), np.float32),
        }
        return {"suffix_ids": np.array([[7], [9]]), "rows_before": np.array([2, 4])}, state

    def test_state_is_where_it_was(self, language: OnnxRuntimeEngine, capfd: pytest.CaptureFixture) -> None:
        inputs, state = self.inputs()
        arrays = dict(state)
        outputs = update(language, inputs, state)
        assert isinstance(language, Updating)
        assert list(outputs) == ["logits"]
        assert all(state[name] is array for name, array in arrays.items())
        assert state["seen"][:, 0, :, 0].tolist() == [[1, 1, 7, 1, 1, 1], [1, 1, 1, 1, 9, 1]]
        assert state["shifted"][:, 0, :, 0].tolist() == [[7, 1, 1, 1], [1, 1, 9, 1]]
        assert outputs["logits"].argmax(axis=1).tolist() == [(2 + 7 + 7) % SIZE, (4 + 9 + 2 + 9) % SIZE]
        assert "in-place" not in capfd.readouterr().err  # what ONNX Runtime says when it copies first

    def test_by_copies_it_is_the_same(self, language: OnnxRuntimeEngine) -> None:
        inputs, state = self.inputs()
        copying, other = _Copying(language), {name: array.copy() for name, array in state.items()}
        assert not isinstance(copying, Updating)
        outputs, others = update(language, inputs, state), update(copying, inputs, other)
        assert outputs.keys() == others.keys()
        for name in state:
            np.testing.assert_array_equal(state[name], other[name])
        np.testing.assert_array_equal(outputs["logits"], others["logits"])

    def test_a_binding_serves_while_the_arrays_are_the_same(self, language: OnnxRuntimeEngine) -> None:
        inputs, state = self.inputs()
        copying, other = _Copying(language), {name: array.copy() for name, array in state.items()}
        first = update(language, inputs, state)["logits"]
        update(copying, inputs, other)
        kept = first.copy()
        for number in (1, 2):
            following = {**inputs, "suffix_ids": inputs["suffix_ids"] + number}
            outputs, others = update(language, following, state), update(copying, following, other)
            np.testing.assert_array_equal(outputs["logits"], others["logits"])
            for name in state:
                np.testing.assert_array_equal(state[name], other[name])
        np.testing.assert_array_equal(first, kept, "another run writes elsewhere")

    def test_a_binding_is_kept_while_the_arrays_are_the_same_and_keeps_none(
        self, language: OnnxRuntimeEngine
    ) -> None:
        inputs, state = self.inputs()
        update(language, inputs, state)
        binding = language._stateful._idle
        update(language, inputs, state)
        assert language._stateful._idle is binding
        copies = {name: array.copy() for name, array in state.items()}
        update(language, inputs, copies)
        assert language._stateful._idle is not binding
        alive = weakref.ref(copies["seen"])
        del copies
        gc.collect()
        assert alive() is None

    def test_run_leaves_its_inputs_alone(self, language: OnnxRuntimeEngine) -> None:
        inputs, state = self.inputs()
        outputs = language.run({**inputs, **state})
        assert state["seen"].tolist() == np.ones((2, 1, 6, 1)).tolist()
        assert outputs["seen.updated"][0, 0, 2, 0] == 7
        assert set(outputs) == {"logits", "seen.updated", "shifted.updated"}

    def test_what_does_not_fit_is_refused(self, language: OnnxRuntimeEngine) -> None:
        inputs, state = self.inputs()
        with pytest.raises(InputError, match="rows_before"):
            update(language, {"suffix_ids": inputs["suffix_ids"]}, state)
        with pytest.raises(BundleError, match="'language' failed in ONNX Runtime"):
            update(language, {**inputs, "rows_before": np.array([2, 6])}, state)


def test_engines_that_do_not_update_are_refused() -> None:
    spec = _spec()
    old = EngineSpec(spec.name, spec.task, spec.file, spec.inputs, spec.outputs[:1], "", spec.prologue)
    assert state_of(old) == []
    with pytest.raises(BundleError, match="does not update its caches; build the bundle again"):
        Caches(old, {"seen": np.zeros((1, 1, 3, 1), np.float32)}, 1)


def test_a_penalty_is_that_of_the_library() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 12)).astype(np.float32)
    seen = [[1, 2, 3], [], [11, 0, 5, 7]]
    before = logits.copy()
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    rows = [
        processor(torch.tensor([ids], dtype=torch.int64), torch.from_numpy(row[None]))
        for ids, row in zip(seen, logits, strict=True)
    ]
    assert np.array_equal(penalised(logits, seen, 1.7), torch.cat(rows).numpy())
    assert np.array_equal(logits, before)
    assert penalised(logits, seen, 1.0) is logits
