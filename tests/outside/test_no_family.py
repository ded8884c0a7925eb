"""No code knows a family but that of the families: a package outside finds nothing in its way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = re.compile(
    r"show-?o|janus|llava|emu-?3|qwen|llama|siglip|mistral|gemma|omnigen|bagel|internvl|chameleon",
    re.IGNORECASE,
)
#: The bundled model and a published one, which examples in help texts name.
EXAMPLES = re.compile(r"showo2-shapes|show-o2-1\.5B(-HQ)?")
DEMO = ROOT / "flashu_compile" / "cli" / "demo.py"


def named(source: str) -> list[str]:
    """Names of families in code, constants and regular expressions; docstrings and comments may have some."""
    return [text for text in _texts(ast.parse(source)) if FAMILIES.search(EXAMPLES.sub("", text))]


def _texts(tree: ast.Module) -> Iterator[str]:
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        for name, value in ast.iter_fields(node):
            if isinstance(value, str) and name != "type_comment":
                yield value
            elif isinstance(value, bytes):
                yield value.decode("latin-1")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import flashu_compile.models.showo2", ["flashu_compile.models.showo2"]),
        ("def f(qwen): return qwen", ["qwen", "qwen"]),
        ('X = re.compile(r"(llava|x)_y")', ["(llava|x)_y"]),
        ('x = f"{y} of a Janus"', [" of a Janus"]),
        ('x.llama_layers["emu3"]', ["llama_layers", "emu3"]),
        ('"""Of Show-o2."""\nclass A:\n    """Qwen."""\n    # llava\n    x = "build showo2-shapes"', []),
    ],
)
def test_the_scan_sees_code_and_leaves_texts_to_readers(source: str, found: list[str]) -> None:
    assert sorted(named(source)) == sorted(found)


def test_only_the_families_know_families() -> None:
    folders = [ROOT / name for name in ("flashu_compile", "passes", "export")]
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    files -= {DEMO, *(ROOT / "flashu_compile" / "models").rglob("*.py")}
    assert len(files) > 200
    found = {
        str(path.relative_to(ROOT)): names
        for path in sorted(files)
        if (names := named(path.read_text(encoding="utf-8")))
    }
    assert found == {}
