"""Computing in the precision that was asked for, whatever autocast the caller has switched on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Switch PyTorch's autocast off in this thread."""
    import torch

    with contextlib.ExitStack() as switched:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                switched.enter_context(torch.autocast(device, enabled=False))
        yield
