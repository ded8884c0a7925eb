"""What engines compute in, as bundles name it: one precision, or one for each part, such as `head=float32,llm=int8`."""

from __future__ import annotations

from typing import Literal

from flashu_compile.arguments import shown
from flashu_compile.errors import ConfigurationError
from flashu_compile.tasks import DECODER

#: The part of a model that belongs to none of its stacks, which are its other parts.
OTHER = "other"
#: Stands for every part that a precision does not name.
REST = ""

#: What a part computes in, which editors complete; a text such as `decoder=int8,head=float16` names several.
PrecisionName = Literal["float32", "float16", "bfloat16", "int8", "int4", "int8_weights"]

INT8, INT4, INT8_WEIGHTS = "int8", "int4", "int8_weights"
#: Of these, those whose linear layers have weights in 8 or 4 bits, as far as a budget lets them.
FEW_BITS = (INT8, INT4, INT8_WEIGHTS)
#: Of these, those whose layers may read their weights, and leave it to the runtime what it multiplies them in.
READ = (INT4, INT8_WEIGHTS)

#: Relative L2 from the reference that is recorded with an engine. 16-bit engines are held against float32, and errors
#: of layers add up (float16 has eleven bits, bfloat16 eight). int8 engines have that of the same int8 program in
#: PyTorch, where a value that lies between two bytes may fall to either side; how much that may change an engine's
#: outputs depends on its weights, and is in its reference file where it is more.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, **dict.fromkeys(FEW_BITS, 3e-2)}

#: The name of an engine's own tolerance among the tensors of its reference file.
OWN_TOLERANCE = "tolerance"


def by_part(precision: str) -> dict[str, str]:
    """Return the precision of each part that a text names, and of the `REST`. The text must be well formed."""
    entries = [entry.partition("=") for entry in precision.split(",")]
    if len(entries) == 1 and not entries[0][1]:
        return {REST: precision}
    return {REST: "float32"} | {part: name for part, _, name in entries}


def checked_parts(precision: str) -> dict[str, str]:
    """Return the precision of each part as `by_part` does. Raises `ConfigurationError` on a text of another form."""
    entries = [entry.split("=") for entry in precision.split(",")]
    parts = [entry[0] for entry in entries]
    if not (len(entries) == len(entries[0]) == 1 or all(len(entry) == 2 and all(entry) for entry in entries)):
        raise ConfigurationError(
            f"Precision {shown(precision)} is neither a name nor a list such as {DECODER}=int8,{OTHER}=float16; parts "
            f"are a model's stacks, as `inspect --structure` lists them, and {OTHER!r}."
        )
    if len(set(parts)) < len(parts):
        raise ConfigurationError(f"Precision {shown(precision)} names a part twice; name each once.")
    return by_part(precision)


def tolerance(precision: str) -> float:
    """Return the largest tolerance of the precision's parts; that of float32 for a name that is not known here."""
    return max(TOLERANCES.get(name, TOLERANCES["float32"]) for name in by_part(precision).values())


def tolerance_between_int8(precision: str) -> float:
    """Return the tolerance of what is computed between a precision's layers of 8 or 4 bits."""
    between = {name for name in by_part(precision).values() if name not in FEW_BITS}
    return max(TOLERANCES.get(name, TOLERANCES["float32"]) for name in between | {"float32"})
