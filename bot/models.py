"""The nouns of the service and the one table of sprint states; values only: no I/O, no clock, no environment."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, NewType

SprintId = NewType("SprintId", str)
RepoId = NewType("RepoId", int)

Json = dict[str, Any]


class DispatchError(Exception):
    """Root of the errors this service raises on purpose; the tree is drawn in `bot/gitea/__init__.py` and ARCHITECTURE.md."""


class UserError(DispatchError):
    """Something the person who asked can mend; its text is the reply."""


class ConfigError(DispatchError):
    """The configuration cannot be used; `faults` holds every fault found, one line each, with its remedy."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class SprintState(StrEnum):
    """Where a sprint is; `waiting(reason)` is `QUEUED` with a waiting reason set."""

    QUEUED = "queued"
    ADMITTED = "admitted"
    PREPARING = "preparing"
    WORKING = "working"
    VETTING = "vetting"
    PUBLISHING = "publishing"
    SETTLED = "settled"


TRANSITIONS: Mapping[SprintState, frozenset[SprintState]] = {
    SprintState.QUEUED: frozenset({SprintState.ADMITTED, SprintState.SETTLED}),
    SprintState.ADMITTED: frozenset({SprintState.PREPARING, SprintState.QUEUED, SprintState.SETTLED}),
    SprintState.PREPARING: frozenset({SprintState.WORKING, SprintState.QUEUED, SprintState.SETTLED}),
    SprintState.WORKING: frozenset({SprintState.VETTING, SprintState.QUEUED, SprintState.SETTLED}),
    SprintState.VETTING: frozenset({SprintState.PUBLISHING, SprintState.QUEUED, SprintState.SETTLED}),
    SprintState.PUBLISHING: frozenset({SprintState.QUEUED, SprintState.SETTLED}),
    SprintState.SETTLED: frozenset(),
}
# Options of a sprint that no person writes: what it is to do, the plan it revises, the approved plan it carries out.
MODE, MODE_PLAN = "mode", "plan"
REVISES_PLAN = "revises_plan"
FOLLOWS_PLAN = "follows_plan"
# The pull request a sprint goes on with, the review or the kind of failure that asked for it.
FOLLOWS_PULL = "pull"
BY_REVIEW = "review"
BY_FAILURE = "failure"
RUNNING = (SprintState.PREPARING, SprintState.WORKING, SprintState.VETTING, SprintState.PUBLISHING)
IN_FLIGHT = (SprintState.ADMITTED, *RUNNING)
# Until it works, a follow-up has not looked at the reviews and checks of its pull request.
NOT_LOOKED_YET = (SprintState.QUEUED, SprintState.ADMITTED, SprintState.PREPARING)


class WaitingReason(StrEnum):
    """Why a queued sprint does not run. The runnable ones stay in the stall clock (observability.md, "Progress")."""

    OPEN_PRS = "open_prs"
    BUDGET = "budget"
    PAUSED = "paused"
    QUIET_HOURS = "quiet_hours"
    APPROVAL = "approval"
    DEPENDENCY = "dependency"
    BACKOFF = "backoff"
    CAP = "cap"
    SLOT = "slot"
    NO_WORKER = "no_worker"
    BREAKER = "breaker"
    PROVIDER = "provider"
    REQUEUED = "requeued"
    FORGE = "forge"

    @property
    def runnable(self) -> bool:
        """False where a policy or a person holds the sprint; True where the fleet owes it a slot."""
        return self in _RUNNABLE


_RUNNABLE = frozenset(
    {
        WaitingReason.CAP,
        WaitingReason.SLOT,
        WaitingReason.NO_WORKER,
        WaitingReason.BREAKER,
        WaitingReason.PROVIDER,
        WaitingReason.REQUEUED,
        WaitingReason.FORGE,
    }
)


class OutcomeKind(StrEnum):
    """How a sprint ended; the row of DESIGN section 4 that decides its PR and its label."""

    PULL_REQUEST = "pull_request"
    UPDATED = "updated"
    NO_CHANGE = "no_change"
    REFUSED = "refused"
    BUDGET = "budget"
    CANCELLED = "cancelled"
    PLANNED = "planned"
    FAILED = "failed"


class PlanState(StrEnum):
    """Where a plan is; only one that waits can be approved, and an issue has at most one of these."""

    WAITING = "waiting"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    CLOSED = "closed"


class FailureReason(StrEnum):
    """Why `failed`; a closed set, also a metric label."""

    CLONE = "clone"
    SANDBOX = "sandbox"
    LLM = "llm"
    TOOL = "tool"
    CHECKS = "checks"
    PUSH = "push"
    PR = "pr"
    AUTH = "auth"
    LEASE_LOST = "lease_lost"
    INTERNAL = "internal"
    DIED = "died"
    STALLED = "stalled"
    PROTOCOL = "protocol"
    MODEL_OUTPUT = "model_output"
    SETUP = "setup"


class Stop(StrEnum):
    """The one stop flag of a sprint."""

    CANCEL = "cancel"
    REQUEUE = "requeue"
    DRAIN = "drain"
    STALLED = "stalled"
    # A planning sprint begins its plan anew, because a person said what should be different.
    REVISE = "revise"


class Source(StrEnum):
    """What asked for a sprint."""

    LABEL = "label"
    COMMAND = "command"
    ASSIGNMENT = "assignment"
    MENTION = "mention"
    SCHEDULE = "schedule"
    REVIEW = "review"
    CHECKS = "checks"
    RECONCILE = "reconcile"
    RETRY = "retry"


class StateLabel(StrEnum):
    """The exclusive labels of scope `dispatch`; every one must be created with `exclusive`."""

    QUEUED = "dispatch/queued"
    RUNNING = "dispatch/running"
    REVIEW = "dispatch/review"
    FAILED = "dispatch/failed"
    BLOCKED = "dispatch/blocked"


STATE_LABEL_COLORS: Mapping[StateLabel, str] = {
    StateLabel.QUEUED: "#c5def5",
    StateLabel.RUNNING: "#1d76db",
    StateLabel.REVIEW: "#0e8a16",
    StateLabel.FAILED: "#b60205",
    StateLabel.BLOCKED: "#d93f0b",
}


class Permission(IntEnum):
    """A person's live level on a repository, as the permission endpoint names it; OPERATOR is ours, from the configuration."""

    NONE = 0
    READ = 1
    WRITE = 2
    ADMIN = 3
    OWNER = 4
    OPERATOR = 5

    @classmethod
    def parse(cls, text: str) -> Permission:
        """The level Gitea calls `text`; anything unknown is NONE, which refuses."""
        return {"read": cls.READ, "write": cls.WRITE, "admin": cls.ADMIN, "owner": cls.OWNER}.get(text, cls.NONE)


class Reaction(StrEnum):
    """What the bot leaves on a comment that asked for something."""

    EYES = "eyes"
    ROCKET = "rocket"
    CONFUSED = "confused"


_REF = re.compile(r"(?P<owner>[A-Za-z0-9_.-]+)/(?P<repo>[A-Za-z0-9_.-]+)#(?P<number>[1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class IssueRef:
    """An issue (or pull request) by address; prints as `owner/repo#12`. State is keyed on `repo_id`, never on this address."""

    owner: str
    repo: str
    number: int

    @property
    def full_name(self) -> str:
        """`owner/repo`."""
        return f"{self.owner}/{self.repo}"

    def __str__(self) -> str:
        return f"{self.full_name}#{self.number}"

    @classmethod
    def parse(cls, text: str) -> IssueRef:
        """Reads `owner/repo#12`; raises UserError naming the text."""
        match = _REF.fullmatch(text.strip())
        if match is None:
            raise UserError(f"`{text}` is not an issue: write OWNER/REPO#NUMBER, for example acme/rocket#12")
        return cls(match["owner"], match["repo"], int(match["number"]))

    @classmethod
    def of(cls, full_name: str, number: int) -> IssueRef:
        """From `owner/repo` and a number."""
        owner, _, repo = full_name.partition("/")
        return cls(owner, repo, number)


@dataclass(frozen=True, slots=True)
class Actor:
    """The person who asked, by the forge's numeric id; `terminal()` is the operator at the service's own machine."""

    id: int
    login: str

    @classmethod
    def terminal(cls) -> Actor:
        """The operator on the command line: allowed whatever an operator may."""
        return cls(0, "operator")

    @property
    def is_terminal(self) -> bool:
        """True for the command line."""
        return self.id == 0


@dataclass(frozen=True, slots=True)
class OpenPull:
    """An open pull request that does the work of an issue; `own` where the bot opened it, `how` says by what it is known (half a sentence).

    `base` is the branch that it goes into.
    """

    number: int
    author: str
    how: str
    own: bool = False
    base: str = ""


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment by somebody with write access; `at` is the forge's time of it."""

    author: str
    text: str
    at: str = ""


@dataclass(frozen=True, slots=True)
class PullFacts:
    """A pull request of ours at the moment of deciding: `state` is open, closed or merged, `issue` that of its branch's name."""

    number: int
    issue: int
    state: str
    head_branch: str = ""
    head_sha: str = ""
    base_branch: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IssueFacts:
    """An issue as the forge told it at the moment of deciding; `text_hash` is that of title and body (`hash_text`).

    `pulls` (open ones that do this work) and `blockers` (open issues it depends on, as words) are there where the command wants
    Fact.WORK, `comments` (by people with write, oldest first) where it wants Fact.COMMENTS. `pull` is the pull request of ours on which
    somebody asked about this issue.
    """

    title: str
    body: str
    author_id: int
    author_login: str
    state: str
    is_pull: bool
    labels: tuple[str, ...]
    head_branch: str = ""
    archived: bool = False
    pulls: tuple[OpenPull, ...] = ()
    blockers: tuple[str, ...] = ()
    comments: tuple[Comment, ...] = ()
    pull: PullFacts | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """The most one sprint may use; a repository or a command may only lower them."""

    steps: int
    seconds: int
    tokens: int
    usd: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens (counts) and money (USD) of one or many model calls; `source` is `reported` or `estimated`."""

    input: int = 0
    output: int = 0
    cached: int = 0
    usd: float = 0.0
    source: str = "reported"

    def __add__(self, other: Usage) -> Usage:
        source = "estimated" if "estimated" in (self.source, other.source) else "reported"
        return Usage(self.input + other.input, self.output + other.output, self.cached + other.cached, self.usd + other.usd, source)

    @property
    def tokens(self) -> int:
        """Input and output together."""
        return self.input + self.output


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a sprint ended: the kind, for `failed` a FailureReason, and one sentence for people (already redacted)."""

    kind: OutcomeKind
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the bot answers, as data: `name` is a function of `bot/replies/`, `data` its keyword arguments (JSON values).

    It is rendered at send time. An empty name means a reaction and no comment.
    """

    name: str = ""
    data: Json = field(default_factory=dict)
    reaction: Reaction | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a command decided, to be stored as a row: `result` is ok, denied, invalid, rate_limited or error; `reason` is for `explain`.

    `exit_code` is what the command line ends with where the result is ok: for a verb whose answer is itself good or bad news.
    """

    result: str
    reason: str
    reply: Reply
    sprint_id: SprintId | None = None
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class StoredStep:
    """One model call of this attempt as the store has it. `reply` is the assistant message (chat-completions form) or None if it never came."""

    n: int
    reply: dict[str, Any] | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class StoredToolCall:
    """One tool call as the store has it; `result` is None while it runs, or for ever if the process died under it."""

    n: int
    i: int
    call_id: str
    result: str | None


class EventKind(StrEnum):
    """What happened to a sprint; observers (metrics, journal) react to these."""

    ENQUEUED = "enqueued"
    ADMITTED = "admitted"
    STARTED = "started"
    STAGE_ENDED = "stage_ended"
    STEP_STARTED = "step_started"
    STEP_ENDED = "step_ended"
    TOOL_ENDED = "tool_ended"
    FALLBACK = "fallback"
    TEXT = "text"
    HEARTBEAT = "heartbeat"
    REQUEUED = "requeued"
    TAKEN_OVER = "taken_over"
    PULL_REQUEST = "pull_request"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True)
class SprintEvent:
    """One fact about a sprint. `data` by kind:

    enqueued {source}; admitted {}; started {source, waited_seconds, agent}; stage_ended {stage, seconds};
    step_ended {step, provider, model, result, seconds, input, output, cached, usd};
    tool_ended {step, tool, result, seconds}; fallback {from_provider, to_provider}; text {step, text};
    requeued {reason}; pull_request {event, number, model};
    settled {outcome, reason, seconds, steps, agent, model, usd}.
    """

    kind: EventKind
    sprint_id: SprintId
    at_ms: int
    data: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ask:
    """One wish of one person (or of the service) about one issue, whatever brought it: webhook, reconciliation, schedule, terminal.

    `key` is the intent key (DESIGN section 3, "Intent"): equal wishes have equal keys. `verb`, `args`, `options` and `instructions` are the parsed
    command (a trigger label is the verb `run`). `comment_id` is where the reaction goes, 0 for none. `asked_ms` is when the person acted.
    `delivered_hash` is `text_hash` of title and body as the verified delivery carried them, or "" where no delivery did. `error` holds what the
    grammar could not read: such an Ask is answered, never run. `pull` is the pull request of ours on which it was asked, and is answered; 0 else.
    """

    key: str
    repo_id: RepoId
    issue: IssueRef
    actor: Actor
    source: Source
    verb: str
    asked_ms: int
    args: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    instructions: str = ""
    comment_id: int = 0
    delivered_hash: str = ""
    error: str = ""
    suggestion: str = ""
    text: str = ""
    pull: int = 0

    @property
    def place(self) -> int:
        """The issue or pull request where the answer belongs."""
        return self.pull or self.issue.number


@dataclass(frozen=True, slots=True)
class SprintView:
    """A sprint as people may see it; read from the store. Moments are Unix milliseconds (0: not yet), money is USD."""

    id: SprintId
    repo_id: RepoId
    issue: IssueRef
    state: SprintState
    title: str = ""
    outcome: OutcomeKind | None = None
    reason: str = ""
    detail: str = ""
    waiting: WaitingReason | None = None
    waiting_note: str = ""
    stop: Stop | None = None
    stop_by: str = ""
    source: Source = Source.COMMAND
    intent_key: str = ""
    requester_id: int = 0
    requester: str = ""
    priority: int = 5
    attempt: int = 1
    admitted_n: int = 0
    queued_ms: int = 0
    not_before_ms: int = 0
    started_ms: int = 0
    settled_ms: int = 0
    updated_ms: int = 0
    steps: int = 0
    tokens: int = 0
    usd: float = 0.0
    limits: Limits | None = None
    engine: str = ""
    provider: str = ""
    model: str = ""
    doing: str = ""
    branch: str = ""
    base_branch: str = ""
    base_sha: str = ""
    lease_sha: str = ""
    head_sha: str = ""
    pr: int = 0
    pr_state: str = ""
    files: int = 0
    checks: tuple[Mapping[str, Any], ...] = ()
    flagged: tuple[str, ...] = ()
    sandbox: str = ""
    instructions: str = ""
    text_hash: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    config_faults: tuple[str, ...] = ()

    @property
    def plans(self) -> bool:
        """True for a sprint that only makes a plan."""
        return self.options.get(MODE) == MODE_PLAN

    @property
    def follows_pull(self) -> int:
        """The pull request of ours that this sprint goes on with, or 0."""
        return int(self.options.get(FOLLOWS_PULL, 0))

    @property
    def follows_plan(self) -> str:
        """The id of the approved plan that this sprint carries out, or ""."""
        return self.options.get(FOLLOWS_PLAN, "")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a planning sprint proposed; `id` is that sprint's id, `sprint_id` the sprint whose row shows people how the plan stands.

    `text_hash` is that of the issue's text the plan was made of, `told_hash` that of a changed text that people were told of and may approve
    ("": none). `options` are those of the sprint that carries it out. `decided_by` is "" while it waits and where time or an event decided.
    """

    id: SprintId
    sprint_id: SprintId
    repo_id: RepoId
    issue: IssueRef
    state: PlanState
    text: str
    text_hash: str
    told_hash: str = ""
    requester_id: int = 0
    requester: str = ""
    instructions: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    made_ms: int = 0
    expires_ms: int = 0
    decided_by: str = ""
    decided_ms: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Position:
    """Place in the queue: 1 is next. `ahead` counts the sprints before it, `capped` says that the count stopped early ("200+").

    `wait_ms` is how long it may take until it begins; 0 where that is not known.
    """

    place: int
    ahead: int
    capped: bool = False
    wait_ms: int = 0


class PauseScope(StrEnum):
    """What a pause or a breaker holds: everything, one repository, or one provider of the chain."""

    FLEET = "fleet"
    REPO = "repo"
    PROVIDER = "provider"


class PauseKind(StrEnum):
    """Who holds: a person, the configured hours, or the breaker."""

    PERSON = "person"
    HOURS = "hours"
    BREAKER = "breaker"


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause that holds now: `repo_id` is 0 and `repo` empty but for a repository, `provider` empty but for a provider.

    `until_ms` is None where only a person ends it; for a breaker it is the moment of the next try.
    """

    scope: PauseScope
    repo_id: int
    repo: str
    by: str
    since_ms: int
    until_ms: int | None = None
    reason: str = ""
    provider: str = ""
    kind: PauseKind = PauseKind.PERSON


@dataclass(frozen=True, slots=True)
class Breaker:
    """An open breaker: `failures` sprints in a row failed, the last for `reason`; the next try may begin at `due_ms`, `probes` failed so far.

    `probe` is the sprint that is the try, "" while there is none.
    """

    scope: PauseScope
    repo_id: int
    repo: str
    provider: str
    since_ms: int
    due_ms: int
    failures: int
    reason: str
    probes: int = 0
    probe: str = ""

    def as_pause(self) -> Pause:
        """The same for whoever only wants to know what holds."""
        why = f"{self.failures} sprints in a row failed ({self.reason})"
        due = None if self.probe else self.due_ms
        return Pause(self.scope, self.repo_id, self.repo, "the breaker", self.since_ms, due, why, self.provider, PauseKind.BREAKER)


@dataclass(frozen=True, slots=True)
class Skip:
    """An issue that a person has put on the skip list."""

    repo_id: int
    issue: int
    by: str
    since_ms: int
    reason: str = ""


class ObstacleKind(StrEnum):
    """What speaks against starting work that may be done already, or should not be done."""

    SKIPPED = "skipped"
    LABEL = "label"
    OWN_PULL = "own_pull"
    PULL = "pull"
    DEPENDENCY = "dependency"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One reason against a start: `subject` is the label, pull request or issue, `who` the person behind it, `note` the words known about it."""

    kind: ObstacleKind
    subject: str = ""
    who: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """One row of the trail that `explain` shows."""

    made_ms: int
    kind: str
    result: str
    reason: str
    actor: str
    sprint_id: SprintId | None
    intent_key: str


@dataclass(frozen=True, slots=True)
class LogLine:
    """One thing a sprint did, in order: a tool call (`result` None while it runs), or a model call that failed (`tool` empty, `result` its error)."""

    attempt: int
    n: int
    tool: str
    arguments: str
    result: str | None


@dataclass(frozen=True, slots=True)
class RepositoryLoad:
    """What one repository has in flight and in the queue."""

    repo_id: int
    repo: str
    in_flight: int
    queued: int


class CancelResult(StrEnum):
    """What a cancel met (engine.md, "Cancel")."""

    CANCELLED = "cancelled"
    STOPPING = "stopping"
    TOO_LATE = "too_late"
    NOTHING = "nothing"


def text_hash(title: str, body: str) -> str:
    """The hash of an issue's text at approval; line ends are folded, because browsers send CRLF and the API does not (gitea.md)."""
    text = title.replace("\r\n", "\n") + "\0" + body.replace("\r\n", "\n")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
