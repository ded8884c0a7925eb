"""What engines compute in, as bundles name it: one precision, or one for each part, such as `head=float32,llm=int8`."""

from __future__ import annotations

from typing import Literal

from flashu_compile.errors import ConfigurationError
from flashu_compile.tasks import HEAD, LLM, SEMANTIC

#: The stacks of a model, and whatever belongs to none of them.
PARTS = (LLM, SEMANTIC, HEAD, "other")

#: What a part computes in, which editors complete; a text such as `llm=int8,head=float16` names several.
PrecisionName = Literal["float32", "float16", "bfloat16", "int8"]

#: Relative L2 from the reference that is recorded with an engine. 16-bit engines are held against float32, and errors
#: of layers add up (float16 has eleven bits, bfloat16 eight). int8 engines have that of the same int8 program in
#: PyTorch, where a value that lies between two bytes may fall to either side; how much that may change an engine's
#: outputs depends on its weights, and is in its reference file where it is more.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 3e-2}

#: The name of an engine's own tolerance among the tensors of its reference file.
OWN_TOLERANCE = "tolerance"


def checked_parts(precision: str) -> dict[str, str]:
    """Return the precision of every part as `by_part` does. Raises `ConfigurationError` on parts that no model has."""
    named = [entry.partition("=")[0] for entry in precision.split(",") if "=" in entry]
    unknown = [part for part in named if part not in PARTS]
    if unknown or (named and len(named) != precision.count(",") + 1):
        what = (
            f"Unknown part {unknown[0]!r}" if unknown else f"Precision {precision!r} names no part for a name"
        )
        raise ConfigurationError(f"{what}; the parts of a model are {', '.join(PARTS)}.")
    return by_part(precision)


def by_part(precision: str) -> dict[str, str]:
    """Return the precision of every part, float32 for those not named. The text must be well formed."""
    entries = [entry.partition("=") for entry in precision.split(",")]
    if len(entries) == 1 and not entries[0][1]:
        return dict.fromkeys(PARTS, precision)
    return dict.fromkeys(PARTS, "float32") | {part: name for part, _, name in entries}


def tolerance(precision: str) -> float:
    """Return the largest tolerance of the precision's parts; that of float32 for a name that is not known here."""
    return max(TOLERANCES.get(name, TOLERANCES["float32"]) for name in by_part(precision).values())


def tolerance_between_int8(precision: str) -> float:
    """Return the tolerance of what is computed between a precision's int8 layers."""
    return tolerance(precision.replace("int8", "float32"))
