"""What a pass is: a frozen dataclass of decisions that, called with a Program, gives new Programs and a report."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from flashu_compile.program.program import Program

Kind = Literal["exact", "lossy"]


@dataclasses.dataclass(frozen=True)
class PassResult:
    """The Programs a pass made and, a line each, what it changed, and why it left alone what it might have changed.

    Several programs form a chain: each reads, by role, the original inputs and the outputs of those before it;
    together they give the original outputs, except those in `dropped`. An unchanged program is returned as the
    same object with no changes, and with `reasons` if the pass declined: it found what it looks for, or was asked
    for something, and could not do it. What is simply not there is no reason. A pass may change some places and
    decline others.
    """

    programs: tuple[Program, ...]
    changes: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @classmethod
    def unchanged(cls, program: Program) -> PassResult:
        """Return `program` as a pass leaves it that has nothing to do."""
        return cls((program,), ())

    @classmethod
    def declined(cls, program: Program, *reasons: str) -> PassResult:
        """Return `program` as a pass leaves it that could do none of what it was to do, for `reasons`."""
        return cls((program,), (), reasons=reasons)


class Pass(ABC):
    """A graph transformation. *Exact* passes are identities of real arithmetic; *lossy* ones report their cost.

    `technique` is what a recipe calls what the pass carries out. A build ends where such a pass declines altogether.
    """

    kind: ClassVar[Kind] = "exact"
    technique: ClassVar[str | None] = None

    @property
    def name(self) -> str:
        return type(self).__name__

    def requires(self, program: Program) -> str | None:
        """Why this pass cannot run on `program`, in words for the user, or None if it can."""
        return None

    @abstractmethod
    def call(self, program: Program) -> PassResult:
        """Transform `program`, which is left as it is."""
