"""Write the pages that are made from docstrings: api.md, and the parameters in recipes.md.

python docs/generate.py             writes them
python docs/generate.py --check     says which are out of date
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashu_compile
from flashu_compile.compiler.export import Bundle
from flashu_compile.evaluation.judging import Part
from flashu_compile.evaluation.timing import SideCost, TaskTime
from flashu_compile.looking.benchmark import Benchmark
from flashu_compile.looking.comparison.compare import LayerComparison
from flashu_compile.looking.evaluate import Evaluation
from flashu_compile.recipe.config import CONFIGS
from flashu_compile.recipe.plan import Step, StepPlan

DOCS = Path(__file__).resolve().parent
BEGIN, END = "<!-- parameters -->", "<!-- end of parameters -->"
# What a reader looks for first.
ORDER = (
    "export",
    "load",
    "Pipeline",
    "benchmark",
    "evaluate",
    "calibrate",
    "Recipe",
    "T2IConfig",
    "MMUConfig",
    "TextConfig",
)
RESULTS = (Bundle, Benchmark, SideCost, TaskTime, Evaluation, Part, LayerComparison, StepPlan, Step)
_PROPERTIES = (property, functools.cached_property)
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):\s*$")
_ENTRY = re.compile(r"^    (?! )([\w, *]+): (.*)$")


def api() -> str:
    """Return the page of the public names, in Markdown."""
    public = [name for name in flashu_compile.__all__ if not name.startswith("_")]
    names = [*ORDER, *(name for name in sorted(public) if name not in ORDER)]
    parts = [
        "# Reference",
        "What `import flashu_compile` offers, and at the end the types that it gives back. Errors are in "
        "`flashu_compile.errors`, subclasses of `FlashuError`. Made from docstrings by `docs/generate.py`.",
    ]
    given = {name: getattr(flashu_compile, name) for name in names} | {
        kind.__name__: kind for kind in RESULTS
    }
    for name, value in given.items():
        parts.append(f"## {name}")
        parts.extend(_described(name, value))
    return "\n\n".join(parts) + "\n"


def _described(name: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value) or dataclasses.is_dataclass(value):
        yield f"```python\n{_signature(name, value)}\n```"
    yield _markdown(inspect.getdoc(value) or "")
    if inspect.isclass(value):
        bases = [base for base in value.__mro__ if base.__module__.startswith("flashu_compile")]
        ours = {member for base in bases for member in vars(base)}
        for member, function in inspect.getmembers(value):
            described = inspect.isroutine(function) or isinstance(function, _PROPERTIES)
            if described and not member.startswith("_") and inspect.getdoc(function) and member in ours:
                yield f"### {name}.{member}"
                if inspect.isroutine(function):
                    yield f"```python\n{_signature(member, function)}\n```"
                yield _markdown(inspect.getdoc(function) or "")


def _signature(name: str, value: Any) -> str:
    parameters = [p for p in inspect.signature(value).parameters.values() if p.name != "self"]
    rows = [_parameter(p) for p in parameters]
    first = next((n for n, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if first is not None:
        rows.insert(first, "*")
    returned = getattr(value, "__annotations__", {}).get("return")
    end = f" -> {returned}" if returned and not inspect.isclass(value) else ""
    single = f"{name}({', '.join(rows)}){end}"
    return single if len(single) <= 100 else f"{name}(\n    " + ",\n    ".join(rows) + f",\n){end}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = "*" * (parameter.kind is parameter.VAR_POSITIONAL) + "**" * (
        parameter.kind is parameter.VAR_KEYWORD
    )
    kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{stars}{parameter.name}{kind}{default}"


def _markdown(docstring: str) -> str:
    """Turn a docstring's sections into lists."""
    lines: list[str] = []
    for line in docstring.splitlines():
        section, entry = _SECTION.match(line), _ENTRY.match(line)
        if section is not None:
            lines += [f"*{section[1]}*", ""]
        elif entry is not None:
            names = ", ".join(f"`{name.strip()}`" for name in entry[1].split(","))
            lines.append(f"- {names}: {entry[2]}")
        else:
            lines.append("  " + line.strip() if line.startswith("    ") and lines and lines[-1] else line)
    return "\n".join(lines).strip()


def parameters() -> str:
    """Return the tables of all parameters of recipes, in Markdown."""
    parts = []
    for task, config in CONFIGS.items():
        told = _attributes(inspect.getdoc(config) or "")
        rows = [
            f"| `{task}.{field.name}` | `{_shown(field.default)}` | {told[field.name]} |"
            for field in dataclasses.fields(config)
        ]
        parts.append("\n".join(["| parameter | default | what it does |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _attributes(docstring: str) -> dict[str, str]:
    body = docstring.split("Attributes:\n", 1)[1].split("\n\n", 1)[0]
    entries = re.split(r"^    (?=\w+: )", body, flags=re.MULTILINE)[1:]
    pairs = (" ".join(entry.split()).split(": ", 1) for entry in entries)
    return {name: text.replace("|", "\\|") for name, text in pairs}


def _shown(default: object) -> str:
    return str(default) if isinstance(default, (tuple, float, int)) or default is None else f'"{default}"'


def pages() -> dict[Path, str]:
    """Return what every generated page should hold."""
    recipes = DOCS / "recipes.md"
    before, _, rest = recipes.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return {DOCS / "api.md": api(), recipes: f"{before}{BEGIN}\n\n{parameters()}\n\n{END}{after}"}


def main() -> int | str:
    """Write the pages, or check them; return the exit code, or what to exit with."""
    found = pages()
    stale = [
        path for path, text in found.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        names = ", ".join(path.name for path in stale)
        return f"out of date: {names}; run python docs/generate.py" if stale else 0
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
