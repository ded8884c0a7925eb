"""Files read safely: what is strict JSON, what fits a type, and that nothing reads JSON by itself."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypedDict

import pytest

from flashu_compile import reading
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.errors import BundleError, ConfigurationError, FlashuError
from flashu_compile.reading import Count, Few
from flashu_compile.runtime import load
from flashu_compile.runtime.verify import verify
from tests.runtime.tiny_bundle import write_bundle

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Inner:
    size: Few
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "bad" in self.names:
            raise ConfigurationError("A name is bad.")


class Told(TypedDict, total=False):
    bytes: Count


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: dict[str, Inner]
    told: Told | None = None
    blocks: dict[int, float] = dataclasses.field(default_factory=dict)
    anything: Any = None


def decoded(text: str | bytes, **options: Any) -> Outer:
    return reading.decode(text, Outer, "The file", BundleError, **options)


def test_types_are_those_declared() -> None:
    text = '{"inner": {"a": {"size": 3, "names": ["x"]}}, "told": {"bytes": 0}, "blocks": {"4": 1}, "anything": [{}]}'
    assert decoded(text) == Outer({"a": Inner(3, ("x",))}, {"bytes": 0}, {4: 1.0}, [{}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"inner": {"a": {"size": true}}}', r"expected int, got bool at \$.inner"),
        ('{"inner": {"a": {"size": 1.0}}}', "expected int, got float"),
        ('{"inner": {"a": {"size": 5000}}}', "expected int <= 1024"),
        ('{"inner": {"a": {"size": 1, "names": ["bad"]}}}', "A name is bad; build it again"),
        ('{"inner": {"a": {"size": 1, "size": 1}}}', "the field 'size' is there twice"),
        ('{"inner": {"a": {"size": 1, "sizes": 1}}}', r"no field 'sizes' in \$.inner.a, only size, names"),
        ('{"inner": {}, "told": {"bytes": 1, "more": 1}}', r"no field 'more' in \$.told, only bytes"),
        ('{"inner": {}, "blocks": {"4": NaN}}', "'NaN' is not finite"),
        ('{"inner": {}, "blocks": {"4": 1e999}}', "'1e999' is not finite"),
        ('{"inner": {}, "anything": -Infinity}', "'-Infinity' is not finite"),
        ('{"inner": {}, "anything": 18446744073709551616}', "more than 64 bits"),
        (f'{{"inner": {{}}, "anything": {"9" * 5000}}}', "more than 64 bits"),
        ('{"inner": {}, "anything": "\\ud800"}', "surrogates not allowed"),
        ('{"inner": {}, "anything": ' + "[" * 99 + "]" * 99 + "}", None),
        ('{"inner": {}, "anything": ' + "[" * 100 + "]" * 100 + "}", "more than 100 levels"),
        ("[" * 100_000, "more than 100 levels"),
        ('{"inner": {}, "blocks": {"04": 1}}', "key in"),
        (b"\xff", "no strict JSON"),
        ("", "no strict JSON"),
        ("[]", "expected object, got array"),
    ],
)
def test_what_is_refused(text: str | bytes, message: str | None) -> None:
    if message is None:
        decoded(text)
        return
    with pytest.raises(BundleError, match=message) as caught:
        decoded(text, advice="build it again")
    assert str(caught.value).startswith("The file is not valid: ")
    assert str(caught.value).endswith("; build it again.")


def test_whole_pairs_of_surrogates_are_text() -> None:
    assert decoded('{"inner": {}, "anything": "\\ud83d\\ude00"}').anything == "😀"


def test_foreign_files_may_hold_more() -> None:
    assert decoded('{"inner": {"a": {"size": 1, "sizes": 1}}, "x": 1}', foreign=True) == Outer(
        {"a": Inner(1)}
    )


def test_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def read(limit: int = 10, **options: Any) -> bytes:
        return reading.read_bytes(path, BundleError, limit=limit, **options)

    with pytest.raises(BundleError, match="does not exist"):
        read()
    with pytest.raises(BundleError, match=r"^Nothing here$"):
        read(absent="Nothing here")
    path.mkdir()
    with pytest.raises(BundleError, match="is not a file"):
        read()
    path.rmdir()
    path.write_bytes(bytes(11))
    with pytest.raises(BundleError, match="has more than 10 bytes"):
        read()
    assert read(11) == bytes(11)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="is not a file"):
        read()
    for target in ("/dev/zero", "/proc/self/mem"):
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(BundleError, match=r"is not a file|cannot be read|no such file"):
            read()


@pytest.mark.parametrize("dtype", ["F4", "F8_E4M3"])
def test_arrays_of_types_that_numpy_lacks(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BundleError, match="cannot be read as NumPy's arrays"):
        reading.read_tensors(tmp_path / "a", BundleError)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="not a POSIX system")
@pytest.mark.parametrize("closed", ["bundle", "bundle/manifest.json", "."])
def test_what_may_not_be_read(tmp_path: Path, closed: str) -> None:
    write_bundle(tmp_path / "bundle")
    (tmp_path / closed).chmod(0)
    root = os.geteuid() == 0  # who may read everything
    try:
        if root:
            os.seteuid(65534)
        for read in (read_manifest, load, verify):
            with pytest.raises(FlashuError, match=r"cannot be (read|used)"):
                read(tmp_path / "bundle")
    finally:
        if root:
            os.seteuid(0)
        (tmp_path / closed).chmod(0o755)


def test_nothing_else_reads_json() -> None:
    """All JSON that the package reads goes through `reading`, whose checks a bare `json.loads` lacks."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for room in ("flashu_compile", "passes", "export")
        for path in sorted((ROOT / room).rglob("*.py"))
        if path != ROOT / "flashu_compile" / "reading.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in ("load", "loads") and _names_json(node.value))
        or (isinstance(node, ast.ImportFrom) and node.module == "json")
        or (isinstance(node, ast.Attribute) and node.attr == "JSONDecoder")
    ]
    assert not found


def _names_json(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("json", "orjson", "msgspec")


def test_numbers_of_a_report_stay_numbers() -> None:
    from flashu_compile.report.contents import decoded as report

    row = {"parameters": {"llm": 1}, "flops": {}}
    assert report(json.dumps({"engines": {"a": row}}), "r") == {"engines": {"a": row}}
    for changed in (
        {"engines": {"a": {**row, "flops": {"llm": "9"}}}},
        {"sizes": {"a": -1}},
        {"passes": [1]},
        {"x": 1},
    ):
        with pytest.raises(FlashuError, match="r is not valid"):
            report(json.dumps(changed), "r")
