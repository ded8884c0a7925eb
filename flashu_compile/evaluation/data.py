"""The prompts and questions that a bundle is judged on: from a file, a folder or Python values."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from flashu_compile import reading
from flashu_compile.arguments import shown
from flashu_compile.bundle.images import Picture, read_picture
from flashu_compile.errors import EvaluationError, InputError
from flashu_compile.evaluation.splits import ALL, canonical, split_of
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import MMU, T2I, TASKS

FILES = ("data.jsonl", "data.json", "questions.jsonl", "questions.json")
"""What holds the questions of a folder of pictures."""

ASKED = ("What is in this picture?", "Which colours does it have?")
"""What is asked about the pictures of a folder without questions."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_SPACE = re.compile(r"[ \t\r\n]*")
_WAYS = 'records {"prompt": "…"} or {"image": "…", "question": "…", "answer": "…"}'


@dataclasses.dataclass(frozen=True)
class PromptSample:
    """A prompt, and the seed of its picture. Samples of one `key` ask for the same; `kind` may be empty."""

    task: ClassVar[str] = T2I.name
    prompt: str
    seed: int
    key: str
    kind: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class QuestionSample:
    """A question about a picture; `answer` is None if no right one is known. `key` is the hash of the picture."""

    task: ClassVar[str] = MMU.name
    image: Picture
    question: str
    key: str
    answer: str | None = None
    kind: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Samples in their order, what they are called, and a hash of them all."""

    title: str
    prompts: tuple[PromptSample, ...]
    questions: tuple[QuestionSample, ...]

    @property
    def sha256(self) -> str:
        """Return a hash of all that is asked, and of the pictures."""
        told = [
            *([sample.prompt, sample.key, sample.kind] for sample in self.prompts),
            *([sample.key, sample.question, sample.answer, sample.kind] for sample in self.questions),
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def tasks(self) -> list[str]:
        """Return the tasks that there are samples of."""
        return [task for task in TASKS if self.of(task)]

    def of(self, task: str) -> Sequence[PromptSample] | Sequence[QuestionSample]:
        """Return the samples of a task."""
        if task not in (T2I.name, MMU.name):
            return ()
        return self.prompts if task == T2I.name else self.questions

    def splits(self, task: str, seed: int) -> dict[str, str]:
        """Return the split of each key of a task, in the order in which they are chosen."""
        samples: Sequence[Any] = self.of(task)
        return split_of((sample.key for sample in samples), self.sha256, seed)

    def chosen(self, task: str, split: str, seed: int, count: int | None = None) -> list[Any]:
        """Return the samples of a task in a split, of at most `count` keys.

        Raises `EvaluationError` if there are none.
        """
        keys = [key for key, name in self.splits(task, seed).items() if split in (ALL, name)]
        samples: Sequence[Any] = self.of(task)
        if not keys:
            what = "prompts" if task == T2I.name else "questions"
            raise EvaluationError(
                f"{self.title} has {len(samples)} {what}, and none of them in the split {split!r}; give more data, or "
                "another split."
            )
        wanted = set(keys[:count])
        return [sample for sample in samples if sample.key in wanted]


def read_data(source: str | os.PathLike[str] | Mapping[str, Any]) -> Data:
    """Read prompts and questions.

    `source` is a JSON file, {"prompts": […], "questions": […]} or a list of records; a JSONL file, a record a line; a
    folder of pictures, with one of `FILES` in it or asked what is `ASKED`; or a mapping as in a JSON file. Images of
    a file are paths from its folder. Raises `EvaluationError`, naming file and line, on anything else.
    """
    if isinstance(source, Mapping):
        records = [
            (f"{name}[{index}]", item)
            for name in source
            for index, item in enumerate(_listed(source[name], "data", name))
        ]
        return _data("the data given", records, None)
    path = absolute(source)
    if path.is_dir():
        return _from_folder(path)
    return _data(str(path), list(_records(path)), path.parent)


def _from_folder(folder: Path) -> Data:
    for name in FILES:
        if os.path.isfile(folder / name):  # unlike the method, False where that may not be known
            return read_data(folder / name)
    try:
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    except OSError as error:
        raise EvaluationError(f"{folder} cannot be read: {error}.") from error
    if not pictures:
        raise EvaluationError(f"{folder} has no picture in it, and none of {', '.join(FILES)}.")
    records = [(str(path), {"image": path.name, "question": text}) for path in pictures for text in ASKED]
    return _data(str(folder), records, folder)


# --- files, with the line of each record ------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record of a file with the place it is at, for errors."""
    try:
        text = reading.read_bytes(path, EvaluationError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} cannot be read as data: {error}.") from error
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, reading.parse(line, where, EvaluationError)
        return
    whole = reading.parse(text, str(path), EvaluationError)
    breaks = [found.start() for found in re.finditer("\n", text)]
    lists = _members(text) if isinstance(whole, dict) else {"": 0}
    for name, start in lists.items():
        items = whole[name] if isinstance(whole, dict) else whole
        _listed(items, str(path), name)
        for offset, item in _elements(text, _after(text, start)):
            yield f"{path}, line {bisect.bisect_left(breaks, offset) + 1}", item


def _listed(items: Any, where: str, name: str) -> Sequence[Any]:
    if name not in ("prompts", "questions", ""):
        raise EvaluationError(f"{where} has no entry {shown(name)}; it has 'prompts' and 'questions'.")
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise EvaluationError(f"{where}: {name or 'the data'} must be a list of {_WAYS}, not {shown(items)}.")
    return items


def _after(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _elements(text: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yield the offset and value of each element of the JSON list that begins at `start` of a valid text."""
    at = _after(text, start + 1)
    while text[at] != "]":
        value, end = reading.value_at(text, at)
        yield at, value
        at = _after(text, end)
        at = _after(text, at + 1) if text[at] == "," else at


def _members(text: str) -> dict[str, int]:
    """Return the offset of each value of the JSON object that a valid text is."""
    offsets: dict[str, int] = {}
    at = _after(text, _after(text, 0) + 1)
    while text[at] != "}":
        name, end = reading.value_at(text, at)
        offsets[name] = _after(text, _after(text, end) + 1)
        at = _after(text, reading.value_at(text, offsets[name])[1])
        at = _after(text, at + 1) if text[at] == "," else at
    return offsets


# --- records ----------------------------------------------------------------------------------------------------------


def _data(title: str, records: Sequence[tuple[str, Any]], folder: Path | None) -> Data:
    prompts: list[PromptSample] = []
    questions: list[QuestionSample] = []
    hashes: dict[Path, str] = {}
    for where, item in records:
        record = {"prompt": item} if isinstance(item, str) else item
        if not isinstance(record, Mapping):
            raise EvaluationError(f"{where}: a record is one of {_WAYS}, not {shown(item)}.")
        if "prompt" in record:
            text = _texts(record, where, ("prompt",), ("key", "kind"))
            key = text.get("key") or canonical(text["prompt"])
            prompts.append(PromptSample(text["prompt"], len(prompts), key, text.get("kind", "")))
        else:
            questions.append(_question(record, where, folder, hashes))
    if not prompts and not questions:
        raise EvaluationError(f"{title} holds no prompt and no question; give {_WAYS}.")
    return Data(title, tuple(prompts), tuple(questions))


def _question(
    record: Mapping[str, Any], where: str, folder: Path | None, hashes: dict[Path, str]
) -> QuestionSample:
    image = record.get("image")
    text = _texts({k: v for k, v in record.items() if k != "image"}, where, ("question",), ("answer", "kind"))
    if image is None:
        raise EvaluationError(f"{where}: a question has an 'image'; a prompt has 'prompt'.")
    try:
        if isinstance(image, str | os.PathLike):
            path = absolute(image if folder is None else folder / image)
            if path not in hashes:
                hashes[path] = _hash(read_picture(path))
            return QuestionSample(path, key=hashes[path], **_fields(text))
        picture = read_picture(image)
        return QuestionSample(picture, key=_hash(picture), **_fields(text))
    except InputError as error:
        raise EvaluationError(f"{where}: {error}") from error


def _fields(text: Mapping[str, str]) -> dict[str, Any]:
    return {"question": text["question"], "answer": text.get("answer"), "kind": text.get("kind", "")}


def _hash(picture: Image.Image) -> str:
    """Return a hash of what a picture shows, whatever its file is like."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _texts(
    record: Mapping[str, Any], where: str, required: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """Return the entries of a record, all of them texts."""
    unknown = [name for name in record if name not in (*required, *optional)]
    if unknown:
        raise EvaluationError(
            f"{where}: unknown entry {shown(unknown[0])}; there are {', '.join((*required, *optional))}."
        )
    for name in required:
        if name not in record:
            raise EvaluationError(f"{where}: {name!r} is missing.")
    for name, value in record.items():
        if not isinstance(value, str) or (name in required and not value.strip()):
            raise EvaluationError(f"{where}: {name!r} must be a text that is not empty, not {shown(value)}.")
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # no UTF-8, and so no hash, has these
            raise EvaluationError(f"{where}: {name!r} must be valid Unicode, not {shown(value)}.")
    return dict(record)
