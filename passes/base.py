"""The interface of passes: frozen dataclasses of decisions that, called with a Program, return a PassResult."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from flashu_compile.program.program import Program

Kind = Literal["exact", "lossy"]


@dataclasses.dataclass(frozen=True)
class PassResult:
    """The Programs a pass made, with a line for each change it made, and its reasons for each it declined.

    Several programs form a chain: each reads, by role, the original inputs and the outputs of the programs
    before it; together they compute the original outputs, except those in `dropped`. An unchanged program is
    returned as the same object with no changes, and with `reasons` if the pass declined: it found what it
    looks for, or was asked for something, and could not do it. Where there is nothing of the kind it looks
    for, it gives no reason. A pass may change some places and decline others.
    """

    programs: tuple[Program, ...]
    changes: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @classmethod
    def unchanged(cls, program: Program) -> PassResult:
        """Return the result of a pass that finds nothing to do in `program`."""
        return cls((program,), ())

    @classmethod
    def declined(cls, program: Program, *reasons: str) -> PassResult:
        """Return the result of a pass that could make none of its changes to `program`, for `reasons`."""
        return cls((program,), (), reasons=reasons)


class Pass(ABC):
    """A graph transformation.

    *Exact* passes are identities of real arithmetic; *lossy* ones report their error.

    `technique` is the name by which a recipe asks for what the pass does. A build stops where such a pass
    declines altogether.
    """

    kind: ClassVar[Kind] = "exact"
    technique: ClassVar[str | None] = None

    @property
    def name(self) -> str:
        """The name of the pass, which is that of its class."""
        return type(self).__name__

    def requires(self, program: Program) -> str | None:
        """Return why this pass cannot run on `program`, in words for the user, or None if it can."""
        return None

    def makes(self, name: str) -> tuple[str, ...]:
        """Return the names of the programs that this pass makes of a program called `name`, if it does not decline."""
        return (name,)

    @abstractmethod
    def call(self, program: Program) -> PassResult:
        """Transform `program`; the object itself is left unchanged."""
