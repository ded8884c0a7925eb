"""What was found out about a backend or a library on this machine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Finding:
    """The state of one backend or library. `needed_for` says what one cannot do without it.

    `status` is `works` (tried just now), `found` (there, but not tried, or good for a part), `damaged` (there, but to
    be mended) or `missing`; `detail` is the version or provider, or what is lacking or damaged and how to mend that.
    """

    name: str
    status: str
    detail: str
    needed_for: str
