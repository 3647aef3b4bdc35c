"""Title and body of a pull request, and the message of its commit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bot.models import SprintView
from bot.redaction import neutralise
from bot.replies._status import _checks
from bot.replies._text import TITLE_CAP, Links, _disarm, _list, _one_line, _person, code, quoted, with_marker


def pr_title(view: SprintView, *, draft: bool) -> str:
    """The issue's title, plain text; a draft says so in the way Gitea reads."""
    title = _disarm(neutralise(_one_line(view.title, TITLE_CAP))) or f"Issue {view.issue.number}"
    title = re.sub(r"(?i)^(?:\s*(?:wip:|\[wip\]))+\s*", "", title) or f"Issue {view.issue.number}"
    return f"WIP: {title}" if draft else title


def pr_body(
    view: SprintView,
    *,
    summary: str,
    issue: int,
    checks: Sequence[Mapping[str, Any]],
    flagged: Sequence[str],
    models: Sequence[str],
    sandbox: str,
    requester: str,
    links: Links,
    key: str,
) -> str:
    """The description of the pull request with `Closes #n` and the marker; `summary` is the model's own and quoted as such."""
    page = f" · [transcript]({links.sprint(view.id)})" if links.pages else ""
    by = f" for {_person(requester)}" if requester else ""
    models_said = ", ".join(code(model) for model in models) or "no model"
    level = "**without a sandbox**" if sandbox == "none" else f"sandbox {code(sandbox)}" if sandbox else "sandbox unknown"
    blocks = [
        f"Closes #{issue}",
        # Before any word of the agent, which might talk a reviewer out of it.
        "**Look closely at:**\n\n" + _list([code(path) for path in flagged]) if flagged else "",
        ("The agent says:\n\n" + quoted(summary)) if summary.strip() else "The agent left no summary.",
        "**Checks**, run by the bot on exactly this tree:\n\n" + _checks(checks)
        if checks
        else "**Checks**: none are declared for this repository.",
        f"<sub>Written{by} by {models_said}, {level}. Read it like a stranger's work before you merge.{page}</sub>",
    ]
    return with_marker("\n\n".join(block for block in blocks if block), key)


def commit_message(view: SprintView, *, summary: str, trailer: str = "") -> str:
    """Subject from the issue's title, the summary's first paragraph, the issue's number and the operator's trailer; plain text."""
    title = f"Follow-up: {view.title}" if view.follows_pull else view.title
    subject = _disarm(neutralise(_one_line(title, 72))) or f"Work on issue {view.issue.number}"
    paragraph = _disarm(neutralise(_one_line(summary.strip().partition("\n\n")[0], 600)))
    # Git reads a first line that starts with # as a comment in some editors and hooks.
    subject = subject.lstrip("#").strip() or f"Work on issue {view.issue.number}"
    return "\n\n".join(part for part in (subject, paragraph, f"Refs #{view.issue.number}", _one_line(trailer, TITLE_CAP)) if part) + "\n"
