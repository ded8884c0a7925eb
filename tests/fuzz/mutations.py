"""Damage to files: of JSON by structure, of safetensors by their header, of anything by its bytes; or no files at all.

All of it is drawn from one `random.Random`, so that a case can be repeated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

Place = tuple[Any, Any]  # a container, and a key or an index in it


def _nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"x": value}
    return value


_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 5, 7, 1.0, 1.5, -0.5, 1e-300, 1e30, 2**31, 2**63 - 1, 2**63, 2**64, 10**30,
    float("nan"), float("inf"), -float("inf"), "", " ", "x", "1", "((((", "x + 1", "1 // 0",
    "__import__('os')", "../up",
    "/dev/zero", "a\0b", "\ud800", "\ud83d\ude00", "é" * 300, "x" * 5000, "(" * 90 + ")" * 90, "none", "float32",
    "BF16", "F8_E4M3", "F4", "C64", "U8",
    [], {}, [[]], [None], [0, 1], {"x": 1}, {"": None}, {"file": 5}, _nested(20), _nested(99), _nested(150),
)  # fmt: skip


#: As texts, for values are changed in place.
_TEXTS = tuple(map(json.dumps, _ODD))


def _odd(rng: Random) -> Any:
    return json.loads(rng.choice(_TEXTS))


def damage(rng: Random, path: Path) -> None:
    """Replace the file by something like it that is wrong, or by no file at all."""
    if rng.random() < 0.03:
        _no_file(rng, path)
        return
    content = path.read_bytes()
    suffixes = {".json": _json, ".safetensors": _safetensors}
    change = suffixes.get(path.suffix, _bytes) if rng.random() < 0.85 else _bytes
    changed = change(rng, content)
    path.write_bytes(changed)


def _no_file(rng: Random, path: Path) -> None:
    path.unlink()
    kind = rng.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(path)
    elif kind == 4:
        with path.open("wb") as file:
            file.truncate(1 << 36)  # and no more on the disk than it has here: nothing
    elif kind == 5:
        path.touch()


def _bytes(rng: Random, content: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    kind = rng.randrange(8)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return (
            content[:place] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + content[place:]
        )
    if kind == 2:
        return content[:place] + b"\xff\xfe\xc3" + content[place:]
    if kind == 3:
        return rng.choice((b"[", b'{"a":', b'["', b"-", b"9", b"\xef\xbb\xbf")) * rng.choice(
            (1, 300, 100_000)
        )
    if kind == 4:
        return content + content
    if kind == 5:
        return content[:place] + content[place + rng.randrange(1, 64) :]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 30))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _json(rng: Random, content: bytes) -> bytes:
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.08:
        text = _doubled(rng, text)
    return text.encode()


def _changed(rng: Random, value: Any) -> Any:
    places = list(_places(value)) if isinstance(value, dict | list) else []
    if not places or rng.random() < 0.02:
        return _odd(rng)
    container, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind < 5:
        container[key] = _odd(rng)
    elif kind == 5:
        del container[key]
    elif kind == 6:  # what belongs elsewhere
        other, there = rng.choice(places)
        container[key] = json.loads(json.dumps(other[there]))
    elif kind == 7 and isinstance(container, dict):
        container[rng.choice(("extra", "", "name", "file", "10", "-1", "x" * 999))] = _odd(rng)
    elif kind == 8 and isinstance(container[key], int | float):
        container[key] = container[key] * rng.choice((-1, 0.5, 2, 1000)) + rng.choice((0, 1))
    elif isinstance(container, list):
        container.extend(container[:] * (rng.choice((1, 300)) if len(places) < 300 else 1))
    else:
        container[rng.choice(("other", "1", "ß"))] = container.pop(key)
    return value


def _places(value: Any) -> Iterator[Place]:
    left = [value]
    while left:
        container = left.pop()
        for key in container if isinstance(container, dict) else range(len(container)):
            yield container, key
            if isinstance(container[key], dict | list):
                left.append(container[key])


def _doubled(rng: Random, text: str) -> str:
    """Repeat a field of some object, with another value."""
    fields = list(re.finditer(r'"[^"\\]*": ', text))
    if not fields:
        return text
    field = rng.choice(fields)
    return f"{text[: field.start()]}{field.group()}{json.dumps(_odd(rng))}, {text[field.start() :]}"


def _safetensors(rng: Random, content: bytes) -> bytes:
    """Change the header, a JSON text whose length stands before it."""
    size = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.4:
        told = json.loads(header)
        inner = told.get("__metadata__", {})
        texts = [name for name in inner if inner[name].startswith("{")]
        if texts:  # JSON in JSON
            inner[texts[0]] = _json(rng, inner[texts[0]].encode()).decode()
            header = json.dumps(told).encode()
            return len(header).to_bytes(8, "little") + header + rest
    header = _json(rng, header)
    if rng.random() < 0.1:
        return rng.choice((0, 1, len(header) + 1, 2**31, 2**64 - 1)).to_bytes(8, "little") + header + rest
    return len(header).to_bytes(8, "little") + header + rest
