"""Our pull requests after they were opened: what became of them and when, and which of them are worth a look at their reviews or checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.store import sprints, steps
from bot.store._base import BIG, insert, metadata

OPEN, CLOSED, MERGED = "open", "closed", "merged"
# What else is told of a pull request besides the state it is in.
REVERTED, BRANCH_DELETED = "reverted", "branch_deleted"
SHORTEST_SHA = 7

table = sa.Table(
    "pull_fates",
    metadata,
    sa.Column("repo_id", BIG, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.Text, primary_key=True),
    sa.Column("at_ms", BIG, nullable=False),
    sa.Index("ix_pull_fates_at", "at_ms"),
)
merges = sa.Table(
    "pull_merges",
    metadata,
    sa.Column("repo_id", BIG, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("sha", sa.Text, nullable=False),
    sa.Index("ix_pull_merges_sha", "repo_id", "sha"),
)
looks = sa.Table(
    "pull_looks",
    metadata,
    sa.Column("repo_id", BIG, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("what", sa.Text, primary_key=True),
    sa.Column("since_ms", BIG, nullable=False),
    sa.Column("due_ms", BIG, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False, default=0),
    sa.Column("news", sa.Integer, nullable=False, default=1),
    sa.Index("ix_pull_looks_due", "due_ms"),
)


@dataclass(frozen=True, slots=True)
class Look:
    """A pull request that something moved at: `what` is reviews or checks, `since_ms` when we first heard of it, `news` how often since."""

    repo_id: int
    number: int
    what: str
    since_ms: int
    tries: int
    news: int


def fate(conn: Connection, repo_id: int, number: int, *, state: str, at_ms: int, now_ms: int, merged_sha: str = "") -> bool:
    """Records what became of our pull request and when; True where that is news of one of ours.

    What is older than what we know changes nothing, and a merge is final: deliveries come late, twice and out of order.
    """
    if not sprints.pull_states(conn, repo_id, number):
        return False
    when = min(at_ms, now_ms) if at_ms > 0 else now_ms
    if merged_sha:
        merged = insert(conn, merges).values(repo_id=repo_id, number=number, sha=merged_sha)
        conn.execute(merged.on_conflict_do_update(index_elements=["repo_id", "number"], set_={"sha": merged_sha}))
    known = {row.state: row.at_ms for row in _fates(conn, repo_id, number)}
    latest = max(((at, name) for name, at in known.items() if name in (OPEN, CLOSED)), default=(0, OPEN))
    # The forge tells whole seconds: within one, what is heard last counts.
    if MERGED in known or (state != MERGED and when // 1000 < latest[0] // 1000):
        return False
    sprints.pull_fate(conn, repo_id, number, state=state, now_ms=now_ms)
    if state == latest[1]:
        return False
    _note(conn, repo_id, number, state, when)
    return True


def branch_deleted(conn: Connection, repo_id: int, branch: str, *, at_ms: int, now_ms: int) -> list[int]:
    """The branch of these pull requests of ours is gone; those of which it is known already are left out."""
    numbers = [
        number
        for number in sprints.pulls_on(conn, repo_id, branch)
        if BRANCH_DELETED not in {row.state for row in _fates(conn, repo_id, number)}
    ]
    for number in numbers:
        _note(conn, repo_id, number, BRANCH_DELETED, at_ms if 0 < at_ms <= now_ms else now_ms)
    return numbers


def reverted(conn: Connection, repo_id: int, shas: Iterable[str], *, at_ms: int, now_ms: int) -> list[int]:
    """The merged pull requests of ours that a commit reverts, by the commits it names (at least seven digits each); each is told once."""
    names = [sha.lower() for sha in shas if len(sha) >= SHORTEST_SHA]
    if not names:
        return []
    wanted = sa.or_(*(merges.c.sha.startswith(name, autoescape=True) for name in names))
    numbers = conn.execute(sa.select(merges.c.number).where(merges.c.repo_id == repo_id, wanted).order_by(merges.c.number)).scalars()
    found = [number for number in numbers if REVERTED not in {row.state for row in _fates(conn, repo_id, number)}]
    for number in found:
        _note(conn, repo_id, number, REVERTED, at_ms if 0 < at_ms <= now_ms else now_ms)
        sprints.pull_fate(conn, repo_id, number, state=REVERTED, now_ms=now_ms)
    return found


def model_of(conn: Connection, repo_id: int, number: int) -> str:
    """The model that wrote the last of a pull request, or ""."""
    newest = sprints.newest_of_pull(conn, repo_id, number)
    models = steps.models_of(conn, newest) if newest else []
    return models[-1].partition("/")[2] if models else ""


def _fates(conn: Connection, repo_id: int, number: int) -> list[sa.Row[tuple[str, int]]]:
    statement = sa.select(table.c.state, table.c.at_ms).where(table.c.repo_id == repo_id, table.c.number == number)
    return list(conn.execute(statement))


def _note(conn: Connection, repo_id: int, number: int, state: str, at_ms: int) -> None:
    statement = insert(conn, table).values(repo_id=repo_id, number=number, state=state, at_ms=at_ms)
    conn.execute(statement.on_conflict_do_update(index_elements=["repo_id", "number", "state"], set_={"at_ms": at_ms}))


def news(conn: Connection, repo_id: int, number: int, what: str, *, due_ms: int, now_ms: int) -> None:
    """Something moved at an open pull request of ours: it is looked at by `due_ms`, or earlier where that was arranged before."""
    statement = insert(conn, looks).values(repo_id=repo_id, number=number, what=what, since_ms=now_ms, due_ms=due_ms, tries=0, news=1)
    sooner = sa.case((looks.c.due_ms < statement.excluded.due_ms, looks.c.due_ms), else_=statement.excluded.due_ms)
    conn.execute(
        statement.on_conflict_do_update(
            index_elements=["repo_id", "number", "what"], set_={"news": looks.c.news + 1, "due_ms": sooner, "tries": 0}
        )
    )


def due(conn: Connection, now_ms: int, *, limit: int = 50) -> list[Look]:
    """What is to be looked at now, the longest due first."""
    columns = (looks.c.repo_id, looks.c.number, looks.c.what, looks.c.since_ms, looks.c.tries, looks.c.news)
    statement = sa.select(*columns).where(looks.c.due_ms <= now_ms).order_by(looks.c.due_ms).limit(limit)
    return [Look(*row) for row in conn.execute(statement)]


def later(conn: Connection, look: Look, *, due_ms: int) -> None:
    """Looked at in vain; again at `due_ms`."""
    same = (looks.c.repo_id == look.repo_id, looks.c.number == look.number, looks.c.what == look.what)
    conn.execute(looks.update().where(*same).values(due_ms=due_ms, tries=looks.c.tries + 1))


def looked(conn: Connection, look: Look) -> None:
    """Done, unless something moved again while we looked."""
    same = (looks.c.repo_id == look.repo_id, looks.c.number == look.number, looks.c.what == look.what)
    conn.execute(looks.delete().where(*same, looks.c.news == look.news))
