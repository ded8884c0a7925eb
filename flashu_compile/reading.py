"""Files read safely: bounded in size, parsed as strict JSON, and decoded to the types that a reader declares.

All JSON that this package reads comes through here. Strict means: UTF-8, no field twice in an object, finite numbers,
integers of 64 bits, texts of valid Unicode, and at most `DEEPEST` levels. Types are those of dataclasses and typed
dictionaries, checked by msgspec without conversions: `true` is no number, and `1.0` no integer. What is left to
`__post_init__` may raise any `FlashuError`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from flashu_compile.arguments import shown
from flashu_compile.errors import FlashuError

#: Bytes of a file that is read whole, unless its reader says otherwise.
LARGEST = 64 << 20
LARGEST_TENSORS = 4 << 30
DEEPEST = 100

#: Bytes, elements and the like.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
#: Sizes of a model along one dimension; published ones stay below 2**18.
Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
#: Layers, heads, rows of tokens or of pixels: what work and memory grow with.
Few = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]

if TYPE_CHECKING:  # the command's help does without NumPy
    from numpy.typing import NDArray

T = TypeVar("T")

_TOO_DEEP = f"it has more than {DEEPEST} levels"
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1
# What JSON can spell and UTF-8 cannot: halves of surrogate pairs, here also those in whole pairs.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bytes(
    path: Path, error: type[FlashuError], *, limit: int = LARGEST, absent: str | None = None
) -> bytes:
    """Read a file whole.

    Raises `error` if it is no regular file, larger than `limit` bytes or cannot be read; with the message `absent`, if
    one is given, where there is no file.
    """
    size = _size(path, error, absent)
    try:
        with path.open("rb") as file:
            content = b"" if size > limit else file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem}.") from problem
    if size > limit or len(content) > limit:
        raise error(f"{path} has more than {limit:,} bytes, which no such file needs.")
    return content


def read_tensors(
    path: Path, error: type[FlashuError], *, absent: str | None = None
) -> dict[str, NDArray[Any]]:
    """Read the arrays of a safetensors file.

    Raises `error` if there is no such file, with the message `absent` if one is given, or if it is damaged, holds
    types that NumPy lacks, or has more than `LARGEST_TENSORS` bytes.
    """
    from safetensors import SafetensorError  # recipes without kept neurons do without
    from safetensors.numpy import load_file

    if _size(path, error, absent) > LARGEST_TENSORS:
        raise error(f"{path} has more than {LARGEST_TENSORS:,} bytes, which no such file needs.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as problem:
        raise error(f"{path} cannot be read as NumPy's arrays: {problem}.") from problem


def _size(path: Path, error: type[FlashuError], absent: str | None) -> int:
    """Return the size of a file in bytes. Raises `error` if it is no regular file."""
    try:
        status = path.stat()
    except FileNotFoundError as problem:
        raise error(absent or f"{path} does not exist.") from problem
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}.") from problem
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} is not a file.")
    return status.st_size


def read_json(
    path: Path,
    kind: type[T],
    error: type[FlashuError],
    *,
    limit: int = LARGEST,
    absent: str | None = None,
    foreign: bool = False,
    advice: str = "",
) -> T:
    """Read a JSON file as a value of type `kind`. Raises `error` as `read_bytes` and `decode` do."""
    content = read_bytes(path, error, limit=limit, absent=absent)
    return decode(content, kind, str(path), error, foreign=foreign, advice=advice)


def decode(
    content: bytes | str,
    kind: type[T],
    where: str,
    error: type[FlashuError],
    *,
    foreign: bool = False,
    advice: str = "",
) -> T:
    """Decode strict JSON as a value of type `kind`. Raises `error` as `parse` and `convert` do."""
    return convert(parse(content, where, error, advice), kind, where, error, foreign=foreign, advice=advice)


def parse(content: bytes | str, where: str, error: type[FlashuError], advice: str = "") -> Any:
    """Parse strict JSON into dicts, lists and the like.

    Raises `error`, naming `where` and ending with `advice`, on anything else.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
        _check_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as problem:
        raise error(_message(where, _TOO_DEEP, advice)) from problem
    except ValueError as problem:
        raise error(_message(where, f"it is no strict JSON: {problem}", advice)) from problem
    return value


def value_at(text: str, start: int) -> tuple[Any, int]:
    """Return the value that begins at an offset of a text which `parse` took, and the offset of its end."""
    return json.JSONDecoder().raw_decode(text, start)


def convert(
    data: object,
    kind: type[T],
    where: str,
    error: type[FlashuError],
    *,
    foreign: bool = False,
    advice: str = "",
) -> T:
    """Convert parsed JSON to a value of type `kind`.

    Fields that dataclasses and typed dictionaries do not know are refused, unless the file is `foreign`: written by
    other programs, for their own purposes too. Raises `error`, naming `where` and ending with `advice`, if the value is
    not of the type or its own checks refuse it.
    """
    try:
        value: T = msgspec.convert(data, kind, strict=True, str_keys=True)
        if not foreign:
            _check_known(data, value, "$")
    except FlashuError as problem:
        raise error(_message(where, str(problem), advice)) from problem
    except msgspec.ValidationError as problem:
        reason = str(problem).replace("`", "").replace(" - at ", " at ")
        raise error(_message(where, reason[:1].lower() + reason[1:], advice)) from problem
    return value


def _message(where: str, reason: str, advice: str) -> str:
    reason = reason.removesuffix(".")
    return f"{where} is not valid: {reason}; {advice}." if advice else f"{where} is not valid: {reason}."


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the field {shown(twice)} is there twice")
    return data


def _integer(text: str) -> int:
    if len(text) > 20 or not _LOWEST <= (value := int(text)) <= _HIGHEST:
        raise ValueError(f"the integer {shown(text)} has more than 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is not finite")
    return value


def _check_depth(value: object) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise RecursionError


def _children(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_known(data: object, value: object, path: str) -> None:
    """Raise `msgspec.ValidationError` on a field in `data` that is lost in `value`, which was made of it."""
    if isinstance(data, dict):
        known = _fields(value)
        for name, inner in data.items():
            if name not in known:
                raise msgspec.ValidationError(
                    f"there is no field {shown(name)} in `{path}`, only {', '.join(known)}"
                )
            _check_known(inner, known[name], f"{path}.{name}")
    elif isinstance(data, list) and isinstance(value, list | tuple):
        for index, pair in enumerate(zip(data, value, strict=True)):
            _check_known(*pair, f"{path}[{index}]")


def _fields(value: object) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {str(name): inner for name, inner in value.items()} if isinstance(value, Mapping) else {}
