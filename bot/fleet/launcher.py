"""Takes the next suitable open issue while nobody asks: a pure ranking in which every issue left out has its reason, and the gate of every trigger."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

import structlog
from sqlalchemy.engine import Connection

from bot import guard, replies
from bot.admission import pause_note
from bot.authorise import Allowed, Denied
from bot.chatops import gave_up_key, launcher_key
from bot.decide import AskAgain, Decider
from bot.gitea.errors import ForgeError
from bot.gitea.forge import Forge
from bot.models import Actor, Ask, IssueRef, Obstacle, ObstacleKind, OpenPull, OutcomeKind, Reply, RepoId, Source, UserError, Verdict
from bot.repositories import Repositories
from bot.settings import LauncherSettings, RepositorySettings, Settings, split_hours
from bot.store import Store, backlog, intents, outbox
from bot.store.backlog import Backlog, Past

log = structlog.get_logger()

PLAIN_RANK = 5
MINUTE_MS = 60_000
LONGEST_BACKOFF_MS = 30 * 24 * 60 * MINUTE_MS
NEWS_A_ROUND = 10
LOOKED_AT = 100
REPO_ID_OF_ALL = 0


class LeftOut(StrEnum):
    """Why an issue is not taken; a closed set."""

    EPIC = "epic"
    STUDY = "study"
    LABEL = "label"
    MINE = "mine"
    ASSIGNED = "assigned"
    AUTHOR = "author"
    SKIPPED = "skipped"
    ACTIVE = "active"
    PULL = "pull"
    DONE = "done"
    CANCELLED = "cancelled"
    BACKOFF = "backoff"
    GAVE_UP = "gave_up"
    PLANNED = "planned"
    DEPENDENCY = "dependency"
    UNKNOWN = "unknown"


class Held(StrEnum):
    """Why nothing is taken in a repository; a closed set."""

    OFF = "off"
    PAUSED = "paused"
    QUIET_HOURS = "quiet_hours"
    OPEN_PRS = "open_prs"
    WAITING = "waiting"
    ARCHIVED = "archived"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Issue:
    """An open issue as the forge lists it. `assignees` are people, never the bot; `adopted` where the text came from another forge, `mirror` where it mirrors alerts."""

    number: int
    title: str
    author: Actor
    labels: tuple[str, ...] = ()
    assignees: tuple[str, ...] = ()
    created_ms: int = 0
    adopted: bool = False
    mirror: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any], *, me_id: int) -> Issue:
        """From the forge's record."""
        author = record.get("user") or {}
        people = [*(record.get("assignees") or ()), *([record["assignee"]] if record.get("assignee") else ())]
        logins = [str(person.get("login") or "") for person in people if person.get("id") != me_id]
        return cls(
            number=int(record["number"]),
            title=str(record.get("title") or ""),
            author=Actor(int(author.get("id") or -1), str(author.get("login") or "")),
            labels=tuple(str(label["name"]) for label in record.get("labels") or ()),
            assignees=tuple(dict.fromkeys(logins)),
            created_ms=_ms(record.get("created_at")),
            adopted=bool(record.get("original_author")),
            mirror=replies.mirrors_alerts(str(record.get("body") or "")),
        )


@dataclass(frozen=True, slots=True)
class Look:
    """What is known when a repository's issues are judged.

    `may` tells of each author's id whether the gate lets them start a sprint: "" or why not; an id that is missing could not be asked about.
    `pulls` are the open pull requests that do an issue's work.
    """

    me_id: int
    backlog: Backlog = field(default_factory=Backlog)
    pulls: Mapping[int, tuple[OpenPull, ...]] = field(default_factory=dict)
    may: Mapping[int, str] = field(default_factory=dict)
    skip_labels: Collection[str] = ()
    open_prs: int = 0
    max_open_prs: int = 0
    archived: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """One issue in the ranking: `left_out` is None where it may be taken, then `attempt` says which one it would be; `why` is half a sentence."""

    issue: Issue
    rank: int
    attempt: int = 1
    left_out: LeftOut | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Ranking:
    """One repository: those that may be taken, the best first, then those left out by number. `held` is why none is taken at all, None for nothing."""

    repo_id: int
    repo: str
    places: tuple[Place, ...] = ()
    held: Held | None = None
    why: str = ""
    turn: int = 0

    @property
    def free(self) -> tuple[Place, ...]:
        """Those that may be taken."""
        return tuple(place for place in self.places if place.left_out is None)


@dataclass(frozen=True, slots=True)
class Launch:
    """One issue that was asked for: what the decision was."""

    repo: str
    issue: int
    title: str
    attempt: int
    result: str
    reason: str


@dataclass(frozen=True, slots=True)
class Round:
    """What one round saw and did; a dry run launches nothing."""

    rankings: tuple[Ranking, ...]
    launches: tuple[Launch, ...] = ()


def rank(issues: Iterable[Issue], look: Look, policy: LauncherSettings, now_ms: int) -> tuple[Place, ...]:
    """Every issue in its place: by rank (label), then the oldest first; what is left out stands behind, by number."""
    places = [judge(issue, look, policy, now_ms) for issue in issues]
    return tuple(sorted(places, key=_order))


def _order(place: Place) -> tuple[bool, int, int, int]:
    if place.left_out is not None:
        return True, 0, 0, place.issue.number
    return False, place.rank, place.issue.created_ms, place.issue.number


def judge(issue: Issue, look: Look, policy: LauncherSettings, now_ms: int) -> Place:
    """One issue, without what it depends on; the first thing that stands against it is its reason."""
    past = look.backlog.past.get(issue.number, Past())
    found = _unwanted(issue, look, policy) or _done_before(past, policy, now_ms)
    left_out, why = found or (None, "")
    return Place(issue, _rank(issue.labels, policy.priority_labels), past.attempts + 1, left_out, why)


def _unwanted(issue: Issue, look: Look, policy: LauncherSettings) -> tuple[LeftOut, str] | None:
    """What the issue itself says, then people, then the work of others."""
    for kind, names in ((LeftOut.EPIC, policy.epic_labels), (LeftOut.STUDY, policy.study_labels)):
        if label := _named(issue, names):
            return kind, f"it is marked {label}"
    if label := _label(issue.labels, policy.skip_labels):
        return LeftOut.LABEL, f"it carries the label {label}"
    if issue.author.id == look.me_id:
        return LeftOut.MINE, "I wrote it myself"
    if issue.mirror:
        return LeftOut.MINE, "it mirrors alerts"
    if issue.assignees:
        return LeftOut.ASSIGNED, f"it is assigned to {', '.join(issue.assignees)}"
    skip = issue.number in look.backlog.skipped
    pulls = look.pulls.get(issue.number, ())
    for obstacle in guard.obstacles(
        labels=issue.labels, pulls=pulls, blockers=(), skip=None, skip_labels=look.skip_labels, source=Source.SCHEDULE
    ):
        return (LeftOut.LABEL if obstacle.kind is ObstacleKind.LABEL else LeftOut.PULL), guard.in_words(obstacle)
    if skip:
        return LeftOut.SKIPPED, "it is on the skip list"
    if issue.adopted:
        return LeftOut.AUTHOR, "its text came from another forge, and nobody here has vouched for it"
    refusal = look.may.get(issue.author.id)
    if refusal is None:
        return LeftOut.UNKNOWN, f"the forge could not say what {issue.author.login} may do here"
    if refusal:
        return LeftOut.AUTHOR, f"{issue.author.login} may not start work here ({refusal}), so somebody who may has to ask"
    return None


def _done_before(past: Past, policy: LauncherSettings, now_ms: int) -> tuple[LeftOut, str] | None:
    """What became of the issue so far."""
    if past.state and past.state != "settled":
        return LeftOut.ACTIVE, f"a sprint is {past.state}"
    if past.pr and past.pr_state in ("merged", "closed", "reverted"):
        end = {"merged": "was merged", "reverted": "was merged and reverted"}.get(past.pr_state, "was closed without a merge")
        return LeftOut.DONE, f"its pull request #{past.pr} {end}; a person decides what is next"
    if past.outcome in (OutcomeKind.PULL_REQUEST, OutcomeKind.UPDATED):
        return LeftOut.DONE, f"its pull request #{past.pr} is there"
    if past.outcome == OutcomeKind.PLANNED:
        return LeftOut.PLANNED, "a plan was made for it, and a person decides what is next"
    if past.outcome == OutcomeKind.CANCELLED:
        return LeftOut.CANCELLED, f"{past.stop_by or 'somebody'} cancelled its last sprint"
    if past.attempts >= policy.max_attempts:
        return LeftOut.GAVE_UP, f"{past.attempts} attempts came to nothing"
    last = max(past.tried_ms, past.settled_ms)
    due = last + backoff_ms(policy, past.attempts)
    if last and now_ms < due:
        minutes = -(-(due - now_ms) // MINUTE_MS)
        return LeftOut.BACKOFF, f"attempt {past.attempts + 1} of {policy.max_attempts} comes in {minutes} min"
    return None


def backoff_ms(policy: LauncherSettings, attempts: int) -> int:
    """The distance after so many attempts: `backoff_minutes`, doubled for each but the first, at most 30 days."""
    return int(min(LONGEST_BACKOFF_MS, policy.backoff_minutes * MINUTE_MS * 2 ** min(max(attempts, 1) - 1, 40)))


def hold(look: Look, policy: LauncherSettings, now_ms: int) -> tuple[Held, str] | None:
    """Why nothing is taken in a repository now, whatever its issues."""
    if look.archived:
        return Held.ARCHIVED, "the repository is archived"
    if look.backlog.pause is not None:
        return Held.PAUSED, f"paused: {pause_note(look.backlog.pause)}"
    if hours := quiet(policy, now_ms):
        return Held.QUIET_HOURS, f"quiet hours {hours} ({policy.timezone})"
    taken = look.open_prs + look.backlog.active
    if look.max_open_prs and taken >= look.max_open_prs:
        return (
            Held.OPEN_PRS,
            f"{look.open_prs} open pull requests and {look.backlog.active} sprints under way, {look.max_open_prs} are allowed",
        )
    if look.backlog.picks_waiting:
        return Held.WAITING, "an issue taken earlier still waits in the queue"
    return None


def quiet(policy: LauncherSettings, now_ms: int) -> str:
    """The quiet hours that hold at this moment, or ""; the end of a span is not part of it."""
    if not policy.quiet_hours:
        return ""
    now = datetime.fromtimestamp(now_ms / 1000, ZoneInfo(policy.timezone))
    minute = now.hour * 60 + now.minute
    for hours in policy.quiet_hours:
        first, last = split_hours(hours)
        inside = first <= minute < last if first < last else minute >= first or minute < last
        if inside:
            return hours
    return ""


def _rank(labels: Iterable[str], ranks: Mapping[str, int]) -> int:
    known = {name.casefold(): value for name, value in ranks.items()}
    return min((known[label.casefold()] for label in labels if label.casefold() in known), default=PLAIN_RANK)


def _label(labels: Iterable[str], names: Collection[str]) -> str:
    """The first label of that name; in a scope (`kind/epic`) its last part counts as well."""
    wanted = {name.casefold() for name in names}
    return next((label for label in labels if {label.casefold(), label.casefold().rpartition("/")[2]} & wanted), "")


def _named(issue: Issue, names: Collection[str]) -> str:
    if label := _label(issue.labels, names):
        return label
    title = issue.title.strip().casefold()
    return next((f"[{name}]" for name in names if title.startswith(f"[{name.casefold()}]")), "")


class Launcher:
    """Asks the forge and the rows, ranks, and hands the best to the decider as an ordinary wish of the issue's author."""

    def __init__(
        self,
        store: Store,
        forge: Forge,
        repositories: Repositories,
        decider: Decider,
        *,
        settings: Settings,
        kick_projector: Callable[[], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._forge = forge
        self._repositories = repositories
        self._decider = decider
        self._settings = settings
        self._kick_projector = kick_projector
        self._now_ms = now_ms

    def schedules(self) -> dict[str, tuple[str, Callable[[], Awaitable[None]]]]:
        """Name -> cron line and what it runs: one for the fleet, one for each repository that has its own."""
        made: dict[str, tuple[str, Callable[[], Awaitable[None]]]] = {}
        shared = []
        for repository in self._settings.repositories:
            if not self._settings.launcher_of(repository).enabled:
                continue
            if repository.launcher.schedule:
                made[f"launcher-{repository.name.casefold()}"] = (repository.launcher.schedule, self._scheduled([repository.name]))
            else:
                shared.append(repository.name)
        if shared:
            made["launcher"] = (self._settings.launcher.schedule, self._scheduled(shared))
        return made

    def _scheduled(self, names: Sequence[str]) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            try:
                done = await self.round(names)
            except (ForgeError, AskAgain) as error:
                log.warning("launcher.later", error=str(error))
                return
            for launch in done.launches:
                log.info("launcher.launched", repository=launch.repo, issue=launch.issue, attempt=launch.attempt, result=launch.result)

        return run

    async def round(self, names: Collection[str] = (), *, dry_run: bool = False) -> Round:
        """One round over these repositories (names of the configuration; all without any). Raises UserError for a name that is not served."""
        wanted = {name.casefold() for name in names}
        served = {name.casefold(): (repo_id, name) for repo_id, name in self._repositories.configured_names().items()}
        strange = sorted(wanted - {repository.name.casefold() for repository in self._settings.repositories})
        if strange:
            raise UserError(f"{strange[0]} is not in the configuration")
        rankings = []
        for repository in self._settings.repositories:
            key = repository.name.casefold()
            if wanted and key not in wanted:
                continue
            if key not in served:
                rankings.append(Ranking(REPO_ID_OF_ALL, repository.name, held=Held.UNREADABLE, why="the forge has not shown it yet"))
                continue
            rankings.append(await self._ranking(repository, RepoId(served[key][0])))
        if dry_run:
            return Round(tuple([await self._with_dependencies(ranking, LOOKED_AT) for ranking in rankings]))
        for ranking in rankings:
            await self._tell_given_up(ranking)
        return await self._launch(rankings)

    async def _ranking(self, repository: RepositorySettings, repo_id: RepoId) -> Ranking:
        name = self._repositories.name_of(repo_id, repository.name)
        policy, now = self._settings.launcher_of(repository), self._now_ms()
        try:
            me = int((await self._forge.me())["id"])
            record = await self._repositories.record(repo_id)
            issues = [Issue.of(issue, me_id=me) for issue in await self._forge.issues_since(name, state="open")]
            pulls = await self._forge.pulls(name, "open")
            rows = await self._store.read(lambda conn: backlog.of_repository(conn, repo_id, now))
            may = await self._may(repo_id, name, issues, me)
        except ForgeError as error:
            return Ranking(repo_id, name, held=Held.UNREADABLE, why=str(error))
        look = Look(
            me_id=me,
            backlog=rows,
            pulls={issue.number: guard.work_of(pulls, me_id=me, repo_id=repo_id, issue=issue.number) for issue in issues},
            may=may,
            skip_labels=self._settings.skip_labels,
            open_prs=sum((pull.get("user") or {}).get("id") == me for pull in pulls),
            max_open_prs=repository.max_open_prs,
            archived=bool(record.get("archived")),
        )
        held, why = hold(look, policy, now) or (None, "")
        return Ranking(repo_id, name, rank(issues, look, policy, now), held, why, turn=rows.active)

    async def _may(self, repo_id: RepoId, name: str, issues: Iterable[Issue], me: int) -> dict[int, str]:
        """Author's id -> "" or why the gate refuses; without those the forge cannot tell of now."""
        found: dict[int, str] = {}
        for actor in {issue.author.id: issue.author for issue in issues if issue.author.id != me}.values():
            judgement = await self._decider.may_run(repo_id, name, actor)
            if isinstance(judgement, Allowed):
                found[actor.id] = ""
            elif isinstance(judgement, Denied):
                found[actor.id] = judgement.reason
        return found

    async def _with_dependencies(self, ranking: Ranking, limit: int) -> Ranking:
        """The same, with the first `limit` that may be taken asked about what they depend on."""
        places, asked = [], 0
        for place in ranking.places:
            if place.left_out is None and asked < limit:
                asked += 1
                places.append(await self._depends(ranking.repo, place))
            else:
                places.append(place)
        return replace(ranking, places=tuple(sorted(places, key=_order)))

    async def _depends(self, repo: str, place: Place) -> Place:
        try:
            blockers = guard.blockers(await self._forge.dependencies(repo, place.issue.number), repo)
        except ForgeError as error:
            return replace(place, left_out=LeftOut.UNKNOWN, why=f"the forge could not say what it depends on: {error}")
        if not blockers:
            return place
        return replace(place, left_out=LeftOut.DEPENDENCY, why=guard.in_words(Obstacle(ObstacleKind.DEPENDENCY, ", ".join(blockers))))

    async def _launch(self, rankings: Sequence[Ranking]) -> Round:
        """Takes the best over all repositories, one of each at most; those with less under way come first within a rank."""
        line = [
            (place.rank, ranking.turn, place.issue.created_ms, index, place)
            for index, ranking in enumerate(rankings)
            for place in ranking.free
        ]
        line = [entry for entry in line if rankings[entry[3]].held is None]
        line.sort(key=lambda entry: (*entry[:4], entry[4].issue.number))
        launches: list[Launch] = []
        seen: dict[tuple[int, int], Place] = {}
        served: set[int] = set()
        for _, _, _, index, place in line:
            if len(served) >= self._settings.launcher.per_round:
                break
            if index in served:
                continue
            ranking = rankings[index]
            known = seen[index, place.issue.number] = await self._depends(ranking.repo, place)
            if known.left_out is not None:
                continue
            launch = await self._ask(ranking, place)
            launches.append(launch)
            if launch.result == "ok":
                served.add(index)
        told = tuple(
            replace(ranking, places=tuple(sorted((seen.get((index, place.issue.number), place) for place in ranking.places), key=_order)))
            for index, ranking in enumerate(rankings)
        )
        return Round(told, tuple(launches))

    async def _ask(self, ranking: Ranking, place: Place) -> Launch:
        issue = place.issue
        ask = Ask(
            key=launcher_key(ranking.repo_id, issue.number, place.attempt),
            repo_id=RepoId(ranking.repo_id),
            issue=IssueRef.of(ranking.repo, issue.number),
            actor=issue.author,
            source=Source.SCHEDULE,
            verb="run",
            asked_ms=self._now_ms(),
        )
        try:
            verdict: Verdict | None = await self._decider.decide(ask)
        except (ForgeError, AskAgain) as error:
            return Launch(ranking.repo, issue.number, issue.title, place.attempt, "later", str(error))
        result, reason = (verdict.result, verdict.reason) if verdict is not None else ("known", "it was taken already")
        return Launch(ranking.repo, issue.number, issue.title, place.attempt, result, reason)

    async def _tell_given_up(self, ranking: Ranking) -> None:
        """One comment on an issue that was tried often enough, once."""
        given_up = [place for place in ranking.places if place.left_out is LeftOut.GAVE_UP]
        if not given_up:
            return
        rows = await self._store.read(lambda conn: backlog.of_repository(conn, ranking.repo_id, self._now_ms()))
        news = [(place, past) for place in given_up if (past := rows.past[place.issue.number]).told < past.attempts][:NEWS_A_ROUND]

        def write(conn: Connection) -> None:
            now = self._now_ms()
            for place, past in news:
                _say_given_up(conn, ranking, place.issue.number, past, now)

        if news:
            await self._store.write(write)
            self._kick_projector()


def _say_given_up(conn: Connection, ranking: Ranking, issue: int, past: Past, now_ms: int) -> None:
    key = gave_up_key(ranking.repo_id, issue, past.attempts)
    if not intents.claim(conn, key, now_ms):
        return
    reason = f"{past.attempts} attempts came to nothing"
    intents.decide(
        conn, repo_id=ranking.repo_id, issue=issue, kind=backlog.GIVE_UP, result="ok", reason=reason, intent_key=key, now_ms=now_ms
    )
    said = Reply("gave_up", {"attempts": past.attempts, "outcome": past.outcome, "detail": past.detail})
    outbox.show(
        conn, key=outbox.reply_key(key), repo_id=ranking.repo_id, repo=ranking.repo, issue=issue, comment_id=0, reply=said, now_ms=now_ms
    )


def _ms(text: object) -> int:
    try:
        return int(datetime.fromisoformat(str(text)).timestamp() * 1000)
    except ValueError:
        return 0
