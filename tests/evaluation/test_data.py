from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashu_compile.errors import EvaluationError, FlashuError
from flashu_compile.evaluation.data import ASKED, read_data
from flashu_compile.evaluation.neutral import (
    CALIBRATING,
    PROMPTS,
    calibration_prompts,
    calibration_questions,
    neutral_data,
)
from flashu_compile.evaluation.splits import ALL, SPLITS, canonical, split_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, mode in (("a.png", "RGB"), ("b.gif", "P"), ("c.tif", "CMYK"), ("d.bmp", "1"), ("e.png", "LA")):
        pixels = rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
    return tmp_path


class TestRead:
    def test_json_and_jsonl_of_the_same_records_are_the_same_data(self, folder: Path) -> None:
        prompts = [{"prompt": "a red ball", "key": "ball", "kind": "one"}, {"prompt": "The Dogs, two."}]
        questions = [
            {"image": "a.png", "question": "what?", "answer": "noise"},
            {"image": "c.tif", "question": "who?"},
        ]
        (folder / "x.json").write_text(json.dumps({"prompts": prompts, "questions": questions}))
        (folder / "y.jsonl").write_text("\n".join(map(json.dumps, prompts + questions)) + "\n\n")
        one, two = read_data(folder / "x.json"), read_data(str(folder / "y.jsonl"))
        assert one.sha256 == two.sha256
        assert [sample.key for sample in one.prompts] == ["ball", "dogs two"]
        assert [sample.seed for sample in one.prompts] == [0, 1]
        assert [sample.answer for sample in one.questions] == ["noise", None]
        assert one.sha256 != read_data({"prompts": prompts}).sha256

    def test_one_picture_in_two_files_has_one_key(self, folder: Path) -> None:
        Image.open(folder / "a.png").save(folder / "same.bmp")
        data = read_data(
            {"questions": [{"image": folder / n, "question": "?"} for n in ("a.png", "same.bmp", "b.gif")]}
        )
        keys = [sample.key for sample in data.questions]
        assert keys[0] == keys[1] != keys[2]

    def test_a_folder_of_pictures_is_asked_what_is_in_it(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("not a picture")
        assert len(read_data(folder).questions) == 5 * len(ASKED)
        (folder / "questions.jsonl").write_text('{"image": "a.png", "question": "what?", "answer": "a"}')
        assert [sample.answer for sample in read_data(folder).questions] == ["a"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"prompts": [\n "a",\n "b" "c"]}', "line 3.*no strict JSON|no strict JSON.*line 3"),
            ('{"prompts": [\n "a",\n {"promt": "b"}\n]}', "line 3: unknown entry 'promt'"),
            ('{"questions": [{"image":\n "a.png", "question": "x"},\n\n {"image": "no.png", "question": "x"}]}',
             "line 4: Picture .*no.png does not exist"),
            ('[\n{"prompt": "a"},\n5]', "line 3: a record is one of"),
            ('{"prompts": [{"prompt": " "}]}', "line 1: 'prompt' must be a text that is not empty"),
            ('{"questions": [{"question": "x"}]}', "line 1: a question has an 'image'"),
            ('{"pictures": []}', "has no entry 'pictures'"),
            ('{"prompts": "a"}', "prompts must be a list"),
            ('{"prompts": []}', "holds no prompt and no question"),
        ],
    )  # fmt: skip
    def test_errors_name_file_and_line(self, folder: Path, text: str, message: str) -> None:
        path = folder / "data.json"
        path.write_text(text)
        with pytest.raises(EvaluationError, match=message) as raised:
            read_data(path)
        assert str(path) in str(raised.value)

    @pytest.mark.parametrize("entry", ["prompt", "key", "kind"])
    def test_half_a_surrogate_pair_is_no_text(self, entry: str) -> None:
        with pytest.raises(
            EvaluationError, match=rf"prompts\[1\]: '{entry}' must be valid Unicode, not 'a.ud800'"
        ):
            read_data({"prompts": ["a", {"prompt": "b", entry: "a\ud800"}]}).splits("t2i", 0)

    @pytest.mark.skipif(not hasattr(os, "seteuid"), reason="not a POSIX system")
    @pytest.mark.parametrize("mode", [0o000, 0o333, 0o666])
    def test_a_folder_that_may_not_be_read(self, mode: int) -> None:
        root = os.geteuid() == 0  # who may read everything
        with tempfile.TemporaryDirectory() as name:
            inner = Path(name) / "inner"
            inner.mkdir()
            (inner / "a.png").write_bytes(b"")
            Path(name).chmod(0o755)
            inner.chmod(mode)
            try:
                if root:
                    os.seteuid(65534)
                for path in (inner, inner / "data.json"):
                    with pytest.raises(FlashuError, match=r"cannot be (read|used)|does not exist"):
                        read_data(path)
            finally:
                if root:
                    os.seteuid(0)
                inner.chmod(0o700)

    def test_errors_of_jsonl_name_the_line(self, folder: Path) -> None:
        path = folder / "data.jsonl"
        path.write_text('{"prompt": "a"}\n\n{"prompt": }\n')
        with pytest.raises(
            EvaluationError, match=r"data\.jsonl, line 3.*no strict JSON|no strict JSON.*line 3"
        ):
            read_data(path)
        (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:40])
        path.write_text('{"prompt": "a"}\n{"image": "bad.png", "question": "x"}')
        with pytest.raises(EvaluationError, match=r"data\.jsonl, line 2: .*bad\.png"):
            read_data(path)


class TestSplits:
    @pytest.mark.parametrize("count", [1, 3, 20, 400])
    def test_every_key_is_in_one_and_the_held_out_ones_are_most(self, count: int) -> None:
        keys = [str(number) for number in range(count)]
        found = split_of(keys * 2, "hash", 0)
        assert sorted(found) == sorted(keys)
        sizes = [list(found.values()).count(name) for name in SPLITS]
        assert sizes[0] == min(20, count // 4)
        assert sizes[2] >= sizes[1] >= 0
        assert sizes[2] > 0

    def test_they_follow_from_the_data_and_the_seed(self) -> None:
        keys = [str(number) for number in range(100)]
        same = split_of(keys, "hash", 0)
        assert split_of(reversed(keys), "hash", 0) == same
        assert split_of(keys, "hash", 1) != same
        assert split_of(keys, "other", 0) != same

    def test_no_prompt_and_no_picture_is_in_two(self) -> None:
        words = ("a red cup", "The red cup.", "Red CUP!", "two cups")
        data = read_data({"prompts": [f"{word}" for word in words * 3] + [f"thing {n}" for n in range(40)]})
        assert canonical(words[0]) == canonical(words[1]) == canonical(words[2])
        seen: dict[str, set[Any]] = {name: {s.key for s in data.chosen("t2i", name, 0)} for name in SPLITS}
        assert not seen["held-out"] & seen["search"]
        assert not seen["held-out"] & seen["calibration"]
        assert len(data.chosen("t2i", ALL, 0)) == 52
        assert {s.key for s in data.chosen("t2i", "held-out", 0, 5)} < seen["held-out"]

    def test_an_empty_one_is_an_error(self) -> None:
        data = read_data({"prompts": ["one", "two"]})
        with pytest.raises(
            EvaluationError, match="has 2 prompts, and none of them in the split 'calibration'"
        ):
            data.chosen("t2i", "calibration", 0)


def test_no_two_prompts_of_the_neutral_set_mean_the_same() -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    data = neutral_data()
    told = {sample.prompt: sample.key for sample in data.prompts}
    assert len(told) == len(set(told.values())) == PROMPTS
    for prompt in told:
        one, between, two = re.fullmatch(r"(a \w+ \w+) (\D+) (a \w+ \w+)|.*", prompt).groups()  # type: ignore[union-attr]
        if between is not None:
            assert f"{two} {opposite.get(between, between)} {one}" not in told


def test_the_neutral_set_is_the_same_each_time_and_large_enough() -> None:
    data = neutral_data()
    assert data.sha256 == neutral_data().sha256
    for task in ("t2i", "mmu"):
        assert len({sample.key for sample in data.chosen(task, "held-out", 0)}) >= 200


def test_neutral_samples_to_calibrate_on_are_none_of_those_to_judge_by() -> None:
    data, prompts, questions = neutral_data(), calibration_prompts(), calibration_questions()
    assert len(set(map(canonical, prompts))) == len(prompts) == CALIBRATING == len(questions)
    judged = {canonical(sample.prompt) for sample in data.prompts}
    assert judged.isdisjoint(map(canonical, prompts))
    seen = {np.asarray(sample.image).tobytes() for sample in data.questions}
    assert seen.isdisjoint(image.tobytes() for image, _ in questions)
    assert prompts == calibration_prompts()
