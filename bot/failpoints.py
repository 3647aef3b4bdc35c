"""Named points at which a test kills the process; armed only by the composition root, free of cost otherwise."""

from __future__ import annotations

import os
import signal
from pathlib import Path

POINTS = (
    "inbox.inserted",
    "inbox.taken",
    "inbox.decided",
    "admit.before_commit",
    "admit.after_commit",
    "prepare.done",
    "work.step_reserved",
    "work.step_stored",
    "work.tool_row",
    "work.tool_running",
    "vet.done",
    "commit.made",
    "publish.head_recorded",
    "push.after",
    "pr.created",
    "settle.row",
    "projector.rendered",
    "projector.sent",
    "projector.id_stored",
)


class Failpoints:
    """At the armed point the process kills itself with SIGKILL, once: `mark` is the file that remembers it over the restart."""

    def __init__(self, armed: str = "", mark: Path | None = None) -> None:
        if armed and armed not in POINTS:
            raise ValueError(f"no kill point {armed!r}; there are {', '.join(POINTS)}")
        self._armed = armed
        self._mark = mark

    def __call__(self, name: str) -> None:
        """Passing `name`."""
        if name != self._armed or self._mark is None:
            return
        try:
            self._mark.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
