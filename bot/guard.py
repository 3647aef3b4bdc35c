"""The guard against work done twice or not wanted: what stands against a start, as facts; every refusal has its escape."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, assert_never

from bot.chatops import closes, issue_of_branch
from bot.models import Obstacle, ObstacleKind, OpenPull, Skip, Source

# The option of a sprint that was asked for in spite of everything here.
FORCE = "force"
# A pull request of ours is what these work on.
ON_OUR_PULL = frozenset({Source.RETRY, Source.REVIEW, Source.CHECKS})


def work_of(pulls: Iterable[Mapping[str, Any]], *, me_id: int, repo_id: int, issue: int) -> tuple[OpenPull, ...]:
    """Those of the forge's open pull requests that do the work of an issue: on its branch, closing it, or named after it by a person."""
    found = []
    for pull in pulls:
        user, head = pull.get("user") or {}, pull.get("head") or {}
        title, own = str(pull.get("title") or ""), user.get("id") == me_id
        # `ref` is not the branch's name once a branch is gone (gitea.md), `label` always is.
        branch = str(head.get("label") or "").rpartition(":")[2]
        how = ""
        if head.get("repo_id") == repo_id and issue_of_branch(branch) == issue:
            how = "is open on its branch"
        elif closes(f"{pull.get('body') or ''}\n{title}", issue):
            how = "closes it"
        elif not own and re.search(rf"(?<![\w/#])#{issue}\b", title):
            how = "names it in its title"
        elif not own and re.search(rf"(?i)(?:^|[/_-])issues?[/_-]?{issue}(?![0-9])", branch):
            how = "has a branch of its name"
        if how:
            base = str((pull.get("base") or {}).get("ref") or "")
            found.append(OpenPull(int(pull["number"]), str(user.get("login") or ""), how, own, base))
    return tuple(found)


def blockers(dependencies: Iterable[Mapping[str, Any]], repo: str) -> tuple[str, ...]:
    """The open issues among what the forge says an issue depends on, as `#3`; one of another repository, which may be private, is not named."""
    found = []
    for issue in dependencies:
        if issue.get("state") != "open":
            continue
        where = str((issue.get("repository") or {}).get("full_name") or repo)
        here = where.casefold() == repo.casefold() and issue.get("number")
        found.append(f"#{issue['number']}" if here else "an issue of another repository")
    return tuple(found)


def obstacles(
    *,
    labels: Iterable[str],
    pulls: Iterable[OpenPull],
    blockers: Iterable[str],
    skip: Skip | None,
    skip_labels: Collection[str],
    source: Source,
) -> tuple[Obstacle, ...]:
    """What stands against starting on an issue, a person's word first. A retry or a follow-up goes on with our own pull request."""
    found = []
    if skip is not None:
        found.append(Obstacle(ObstacleKind.SKIPPED, who=skip.by, note=skip.reason))
    unwanted = {label.casefold() for label in skip_labels}
    found += [Obstacle(ObstacleKind.LABEL, label) for label in labels if label.casefold() in unwanted]
    for pull in pulls:
        if not pull.own:
            found.append(Obstacle(ObstacleKind.PULL, f"#{pull.number}", pull.author, pull.how))
        elif source not in ON_OUR_PULL:
            found.append(Obstacle(ObstacleKind.OWN_PULL, f"#{pull.number}", pull.author, pull.how))
    found += [Obstacle(ObstacleKind.DEPENDENCY, blocker) for blocker in blockers]
    return tuple(found)


def in_words(obstacle: Obstacle) -> str:
    """One obstacle as plain text, without a full stop; it quotes what people wrote."""
    match obstacle.kind:
        case ObstacleKind.SKIPPED:
            return f"{obstacle.who} has put this issue on the skip list" + (f" ({obstacle.note})" if obstacle.note else "")
        case ObstacleKind.LABEL:
            return f"it carries the label {obstacle.subject}"
        case ObstacleKind.OWN_PULL:
            return f"my pull request {obstacle.subject} {obstacle.note}"
        case ObstacleKind.PULL:
            return f"pull request {obstacle.subject} by {obstacle.who} {obstacle.note}"
        case ObstacleKind.DEPENDENCY:
            return f"it depends on {obstacle.subject}, which is still open"
        case _:
            assert_never(obstacle.kind)
