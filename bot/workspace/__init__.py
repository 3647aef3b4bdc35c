"""Git on both sides of the wall; the only package that runs it, and the only one that puts a commit together."""

from __future__ import annotations

from bot.workspace.errors import GitFailed, GitKilled, GitRefused, GitUnavailable, Refusal, TreeRefused
from bot.workspace.manager import Workspaces
from bot.workspace.policy import Change, Policy, Violation
from bot.workspace.secrets_scan import Hit, scan_text

__all__ = [
    "Change",
    "GitFailed",
    "GitKilled",
    "GitRefused",
    "GitUnavailable",
    "Hit",
    "Policy",
    "Refusal",
    "TreeRefused",
    "Violation",
    "Workspaces",
    "scan_text",
]
