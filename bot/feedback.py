"""What people and checks say of a pull request of ours, gathered within bounds: for the prompt, for the answers, and to tell one failure from another."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bot.chatops import has_marker, issue_of_branch
from bot.gitea.errors import ForgeError, may_recover
from bot.gitea.forge import Forge
from bot.models import Actor, Json, PullFacts

REMARKS = 50
REVIEWS = 20
FAILURES = 10
TEXT_CAP = 4_000
HUNK_CAP = 2_000
HUNK_LINES = 12
LOG_TAIL = 4_000
LOGS = 3
RED = ("failure", "error")
ANSWER = re.compile(r"(?m)^[ \t>*-]*\[?\**C([1-9][0-9]?)\**\]?\**[ \t]*[:.)–-]+[ \t]*(\S[^\n]*)")


@dataclass(frozen=True, slots=True)
class Review:
    """What a review says as a whole; `asks` where it requests changes."""

    id: int
    author: str
    body: str
    asks: bool


@dataclass(frozen=True, slots=True)
class Remark:
    """An unresolved comment on a line; `line` counts in the new file, or the old one where `removed`. `answered` in an earlier round."""

    id: int
    review: int
    author: str
    path: str
    line: int
    removed: bool
    hunk: str
    text: str
    answered: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A red check of a commit; `log` is the tail of its log where the forge gives one."""

    context: str
    state: str
    description: str
    url: str
    log: str = ""


@dataclass(frozen=True, slots=True)
class Feedback:
    """All that a follow-up takes along; `omitted` counts remarks that were too many."""

    reviews: tuple[Review, ...] = ()
    remarks: tuple[Remark, ...] = ()
    failures: tuple[Failure, ...] = ()
    omitted: int = 0

    def stored(self) -> Json:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Feedback:
        """From what `stored` gave."""
        return cls(
            tuple(Review(**item) for item in data.get("reviews") or ()),
            tuple(Remark(**item) for item in data.get("remarks") or ()),
            tuple(Failure(**item) for item in data.get("failures") or ()),
            int(data.get("omitted") or 0),
        )

    @property
    def new_remarks(self) -> tuple[Remark, ...]:
        """Those that nobody answered yet, in the order of their names C1, C2, ..."""
        return tuple(remark for remark in self.remarks if not remark.answered)

    @property
    def askers(self) -> tuple[str, ...]:
        """Who wants to look again: whoever requested changes, once each."""
        return tuple(dict.fromkeys(review.author for review in self.reviews if review.asks))


def pull_facts(pull: Mapping[str, Any], *, repo_id: int, me_id: int) -> PullFacts | None:
    """A pull request of ours by the forge's record: opened by the bot, from a branch of ours in the repository itself; None for any other."""
    head, base, user = pull.get("head") or {}, pull.get("base") or {}, pull.get("user") or {}
    branch = str(head.get("label") or "")
    issue = issue_of_branch(branch) if head.get("repo_id") == repo_id and user.get("id") == me_id else 0
    if not issue:
        return None
    return PullFacts(
        number=int(pull["number"]),
        issue=issue,
        state="merged" if pull.get("merged") else str(pull.get("state") or "open"),
        head_branch=branch,
        head_sha=str(head.get("sha") or ""),
        base_branch=str(base.get("ref") or ""),
        labels=tuple(str(label.get("name") or "") for label in pull.get("labels") or ()),
    )


def requests(reviews: Iterable[Mapping[str, Any]], *, me_id: int) -> list[Mapping[str, Any]]:
    """The reviews that request changes and stand: the newest word of each reviewer, not dismissed; never our own, never a team's request."""
    latest: dict[int, Mapping[str, Any]] = {}
    for review in reviews:
        user = review.get("user") or {}
        if user.get("id") and review.get("state") in ("APPROVED", "REQUEST_CHANGES"):
            latest[int(user["id"])] = review
    return [
        review
        for user, review in latest.items()
        if review.get("state") == "REQUEST_CHANGES" and user != me_id and not review.get("dismissed")
    ]


async def gather(
    forge: Forge, repo: str, number: int, *, may: Callable[[Actor], Awaitable[bool]], earlier: Sequence[Mapping[str, Any]] = ()
) -> Feedback:
    """The reviews and unresolved remarks of people that `may` speak here; `earlier` is what former rounds had taken along and answered.

    Raises ForgeError where the forge cannot say now.
    """
    me_id = int((await forge.me())["id"])
    listed = [review for review in await forge.reviews(repo, number) if review.get("state") not in ("PENDING", "REQUEST_REVIEW")]
    asking = {int(review["id"]) for review in requests(listed, me_id=me_id)}
    done = {int(item["id"]) for before in earlier for item in before.get("reviews") or ()}
    answered = {int(item["id"]) for before in earlier for item in before.get("remarks") or ()}
    allowed: dict[int, bool] = {}
    reviews: list[Review] = []
    remarks: list[Remark] = []
    for review in listed:
        user = review.get("user") or {}
        actor = Actor(int(user.get("id") or -1), str(user.get("login") or ""))
        if actor.id in (-1, me_id):
            continue
        if actor.id not in allowed:
            allowed[actor.id] = await may(actor)
        if not allowed[actor.id]:
            continue
        body, review_id = str(review.get("body") or ""), int(review["id"])
        asks = review_id in asking
        if review_id not in done and not has_marker(body) and (asks or (body and not review.get("dismissed"))):
            reviews.append(Review(review_id, actor.login, body[:TEXT_CAP], asks))
        if review.get("comments_count") != 0:
            for item in await forge.review_comments(repo, number, review_id):
                remark = _remark(item, review_id, me_id, answered)
                if remark is not None:
                    remarks.append(remark)
    # Those of earlier rounds give way first, then the oldest.
    remarks.sort(key=lambda remark: (not remark.answered, remark.id))
    return Feedback(tuple(reviews[-REVIEWS:]), tuple(remarks[-REMARKS:]), omitted=max(0, len(remarks) - REMARKS))


def _remark(item: Mapping[str, Any], review_id: int, me_id: int, answered: Collection[int]) -> Remark | None:
    user, text = item.get("user") or {}, str(item.get("body") or "")
    if item.get("resolver") is not None or user.get("id") == me_id or not text.strip() or has_marker(text):
        return None
    new, old = int(item.get("position") or 0), int(item.get("original_position") or 0)
    return Remark(
        id=int(item["id"]),
        review=review_id,
        author=str(user.get("login") or ""),
        path=str(item.get("path") or ""),
        line=new or old,
        removed=not new and bool(old),
        hunk=_tail(str(item.get("diff_hunk") or ""), HUNK_LINES, HUNK_CAP),
        text=text[:TEXT_CAP],
        answered=int(item["id"]) in answered,
    )


def red(status: Mapping[str, Any]) -> list[Failure]:
    """The failing checks of a combined status, each context once, as its newest status says."""
    newest: dict[str, Mapping[str, Any]] = {}
    for item in sorted(status.get("statuses") or (), key=lambda item: int(item.get("id") or 0)):
        newest[str(item.get("context") or "")] = item
    return [
        Failure(
            context=context[:200],
            state=str(item.get("status") or item.get("state") or ""),
            description=str(item.get("description") or "")[:TEXT_CAP],
            url=str(item.get("target_url") or "")[:500],
        )
        for context, item in sorted(newest.items())
        if (item.get("status") or item.get("state")) in RED
    ]


def pending(status: Mapping[str, Any]) -> bool:
    """Whether a check of this commit has not ended."""
    newest = {
        str(item.get("context") or ""): item for item in sorted(status.get("statuses") or (), key=lambda item: int(item.get("id") or 0))
    }
    return any((item.get("status") or item.get("state")) == "pending" for item in newest.values())


async def with_logs(forge: Forge, repo: str, head_sha: str, failures: Sequence[Failure], *, scrub: Callable[[str], str]) -> list[Failure]:
    """The same with the tail of their logs, where the forge has Actions and gives them; the words of a check are foreign words all the same."""
    if not failures:
        return []
    logs: list[tuple[str, str]] = []
    try:
        for run in await forge.action_runs(repo, head_sha):
            for job in await forge.action_jobs(repo, int(run["id"])):
                if job.get("conclusion") == "failure" and len(logs) < LOGS:
                    text = await forge.action_log(repo, int(job["id"]))
                    logs.append((str(job.get("name") or ""), _tail(scrub(text), 60, LOG_TAIL)))
    except ForgeError as error:
        if may_recover(error):
            raise
    return [
        Failure(
            failure.context,
            failure.state,
            scrub(failure.description),
            scrub(failure.url),
            next((log for name, log in logs if name and name in failure.context), ""),
        )
        for failure in failures
    ]


def signature(failures: Iterable[Failure]) -> str:
    """What kind of failure this is: contexts and their words without numbers, hashes and times, so that the same failure looks the same again."""
    lines = [f"{failure.context}\0{_normal(failure.description)}\0{_normal(failure.log)}" for failure in failures]
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _normal(text: str) -> str:
    text = re.sub(r"\b[0-9a-f]{7,64}\b|\b0x[0-9a-f]+\b", "#", text.casefold())
    return " ".join(re.sub(r"[0-9]+(?:[.:,][0-9]+)*", "#", text).split())


def answers(summary: str) -> dict[int, str]:
    """What the agent says it did about each remark: {1: ...} of the lines that begin with `C1:`."""
    return {int(match[1]): match[2].strip()[:500] for match in ANSWER.finditer(summary)}


def _tail(text: str, lines: int, cap: int) -> str:
    return "\n".join(text.splitlines()[-lines:])[-cap:]
