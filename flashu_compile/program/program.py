"""Program: a traced graph and what the compiler must know about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from flashu_compile.errors import CaptureError
from flashu_compile.program.repeated_calls import RepeatedCalls

#: The dynamic dimension along which samples lie.
BATCH = "batch"


class Role(StrEnum):
    """The meaning of a program's input or output. The role is also the name of the tensor in the engine."""

    PROMPT_IDS = "prompt_ids"
    PROMPT_MASK = "prompt_mask"
    TAIL_IDS = "tail_ids"
    LATENTS = "latents"
    TIMESTEP = "timestep"
    VELOCITY = "velocity"
    HEAD_FEATURES = "head_features"
    CODES = "codes"
    PIXELS = "pixels"
    IMAGE_EMBEDS = "image_embeds"
    CONTEXT_IDS = "context_ids"
    PREFIX_IDS = "prefix_ids"
    IMAGE_END_IDS = "image_end_ids"
    SUFFIX_IDS = "suffix_ids"
    ROWS_BEFORE = "rows_before"
    LOGITS = "logits"


@dataclasses.dataclass(frozen=True)
class Input:
    """An input by role. `axes` names each dynamic dimension and holds None for a static one.

    A name may be a number of times another: `8 * height`.
    """

    role: str
    axes: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A torch.export graph in its analysable form, with the roles of its inputs and outputs.

    `exported` takes `inputs` and gives `outputs`, in these orders, as flat positional tensors. `stacks` names the
    roots of the repeated structures by module path (such as `{"trunk": "model.layers"}`), `decoder` that of them which
    attends over all rows, the first if it is not told. `sample` is one set of inputs by role, for checks. `calls` gives
    what operators make of the fake values of its graph; programs made of one another share it. A program never changes;
    passes make new ones.

    A program holds tensors, so it is equal to itself alone, as every dataclass here that holds tensors or arrays is.
    """

    name: str
    task: str
    exported: ExportedProgram
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    stacks: Mapping[str, str]
    sample: Mapping[str, Tensor]
    decoder: str = ""
    calls: RepeatedCalls = dataclasses.field(default_factory=RepeatedCalls, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder", self.decoder or next(iter(self.stacks), ""))
        signature = self.exported.graph_signature
        given, taken = len(signature.user_inputs), len(self.inputs)
        if given != taken:
            raise CaptureError(f"Program {self.name!r} declares {taken} inputs but its graph takes {given}.")
        given, taken = len(signature.user_outputs), len(self.outputs)
        if given != taken:
            raise CaptureError(f"Program {self.name!r} declares {taken} outputs but its graph gives {given}.")

    @property
    def input_roles(self) -> tuple[str, ...]:
        """The roles of the inputs, in order."""
        return tuple(i.role for i in self.inputs)

    def stored(self) -> dict[fx.Node, Tensor]:
        """Return the parameter, buffer or constant behind each placeholder that is not an input."""
        exported = self.exported
        placeholders = exported.graph.find_nodes(op="placeholder")
        values: dict[fx.Node, Tensor] = {}
        for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
            if spec.kind is not InputKind.USER_INPUT:
                target = str(spec.target)
                constants = exported.constants
                values[node] = constants[target] if target in constants else exported.state_dict[target]
        return values

    def run(
        self, inputs: Mapping[str, Tensor], interpreter: fx.Interpreter | None = None
    ) -> dict[str, Tensor]:
        """Run the graph eagerly on inputs by role, at least the program's own, and return its outputs by role.

        `interpreter`, of the program's graph module, may observe what it runs. An interpreter is also the cheap
        way: `exported.module()` copies and compiles the graph at each call.
        """
        missing = [role for role in self.input_roles if role not in inputs]
        if missing:
            raise CaptureError(
                f"Program {self.name!r} needs inputs that were not given: {', '.join(missing)}."
            )
        given, stored = iter([inputs[role] for role in self.input_roles]), self.stored()
        placeholders = self.exported.graph.find_nodes(op="placeholder")
        arguments = [stored[node] if node in stored else next(given) for node in placeholders]
        interpreter = interpreter or fx.Interpreter(self.exported.graph_module)
        results = interpreter.run(*arguments, enable_io_processing=False)
        return dict(zip(self.outputs, results, strict=True))


def run_chain(programs: tuple[Program, ...], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run programs in order, each reading the inputs and the outputs of those before it, by role."""
    values = dict(inputs)
    for program in programs:
        values |= program.run(values)
    return values
