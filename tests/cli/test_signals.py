"""Signals that end a command leave no drafts, and what a process ignores stays ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.showo2_shapes.saving import save_model
from flashu_compile.system.drafts import PREFIX
from tests.support.tiny import VAE, tiny_model, tokenizer

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

_SIGNALLED = """
import os, signal, sys
from pathlib import Path
from flashu_compile.cli.base import unwound_by_signals
from flashu_compile.system.drafts import draft_folder

kind, before = getattr(signal, sys.argv[2]), getattr(signal, sys.argv[3])
signal.signal(kind, before)
try:
    with unwound_by_signals(), draft_folder(Path(sys.argv[1])):
        try:
            os.kill(os.getpid(), kind)
        finally:
            os.kill(os.getpid(), kind)
finally:
    assert signal.getsignal(kind) == before
"""


def ended(folder: Path, kind: str, before: str) -> int:
    command = [sys.executable, "-c", _SIGNALLED, str(folder), kind, before]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=60).returncode


@pytest.mark.parametrize(("kind", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_sent_twice_ends_after_the_clean_up(tmp_path: Path, kind: str, code: int) -> None:
    assert ended(tmp_path, kind, "SIG_DFL") == code
    assert list(tmp_path.iterdir()) == []


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    assert ended(tmp_path, "SIGHUP", "SIG_IGN") == 0


@pytest.mark.slow
def test_a_terminated_build_leaves_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_model(), tokenizer(), VAE)
    output = tmp_path / "new" / "bundle"
    arguments = ["build", str(tmp_path / "model"), "--task", "mmu", "--no-cache", "--output", str(output)]
    process = subprocess.Popen([sys.executable, "-m", "flashu_compile", *arguments], cwd=ROOT)
    end = time.monotonic() + 300
    while not list(tmp_path.glob(f"{PREFIX}*")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
