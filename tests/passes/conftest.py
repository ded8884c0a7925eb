from __future__ import annotations

import pytest

from flashu_compile.capture import capture
from flashu_compile.program import Program
from tests.support.fused_lm import fused_capture, fused_model


@pytest.fixture(scope="session")
def fused() -> Program:
    """The captured understanding forward of the second model, before any pass."""
    return capture(fused_capture(fused_model()))
