"""What can go wrong between a forge, its git and a tree, told apart by what the caller does next."""

from __future__ import annotations

from enum import StrEnum

from bot.models import DispatchError, UserError


class Refusal(StrEnum):
    """Why git was refused for good."""

    AUTH = "auth"
    PERMISSION = "permission"
    PROTECTED = "protected"
    ARCHIVED = "archived"
    NOT_FOUND = "not_found"
    MOVED = "moved"
    LEASE = "lease"
    OTHER = "other"


class GitRefused(DispatchError):
    """The forge (or git) said no, and asking again would not help. `kind` says why; the message is git's, without secrets."""

    def __init__(self, kind: Refusal, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class GitUnavailable(DispatchError):
    """The forge could not be reached or failed (network, 5xx, timeout): the same call may work later."""


class GitFailed(DispatchError):
    """Git failed on this host, without any forge involved (disk, damaged repository, time)."""


class GitKilled(GitFailed):
    """Somebody else ended git by a signal (the kernel for want of memory, an operator): the same call may work later."""


class TreeRefused(UserError):
    """The agent's tree cannot leave the sandbox (too large, damaged, forged); the message says why."""
