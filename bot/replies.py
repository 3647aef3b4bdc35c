"""Every sentence the bot says: pure functions from facts to Markdown, in which nothing untrusted can act and no command of ours is live."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar, assert_never

from bot.figures import window_words
from bot.models import (
    RUNNING,
    FailureReason,
    IssueRef,
    Json,
    OutcomeKind,
    PlanState,
    Position,
    Reply,
    Source,
    SprintState,
    SprintView,
    Stop,
    WaitingReason,
)
from bot.redaction import Secret, neutralise

VERSION_MARK = "<!-- timmy-dispatch:v1"
TEXT_CAP = 60_000
SUMMARY_CAP = 8_000
TITLE_CAP = 200
LISTED = 20
SHORT_SHA = 10
KEY_DIGITS = 32
# The reason of a refusal that the change itself has earned; any other is told by its detail alone.
POLICY = "policy"
# Keys of what mirrors alerts begin so.
ALERT = "alert:"
ALERTS_LISTED = 50
ALERT_TEXT = 600
_PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.-]+(?::[0-9]+)?(?:/[A-Za-z0-9._~/-]*)?")
# The reason of a refusal that `force` overrides: the work is done by somebody else, or not wanted.
OTHER_WORK = "other_work"
# The reason of a pull request that a person merged or closed before the sprint was done with it.
OVERTAKEN = "overtaken"
LOG_CAP = 16_000
RESULT_CAP = 800
PROMPT_CAP = 50_000
# A plan longer than this is folded, so that the comment can be read at a glance.
PLAN_SHOWN, PLAN_LINES = 3_000, 40

_SAID: dict[str, Callable[..., str]] = {}
_Said = TypeVar("_Said", bound=Callable[..., str])


@dataclass(frozen=True, slots=True)
class Links:
    """Our own configured addresses without a trailing slash: the forge as people open it, and our pages ("" where there are none).

    `secret` makes the key that a sprint's link carries; None where the pages need none. `trace_of` gives the trace of a sprint where there are traces.
    """

    forge: str
    pages: str = ""
    secret: Secret | None = None
    trace_of: Callable[[str], str] | None = None

    def sprint(self, sprint_id: str) -> str:
        """The page of a sprint with the key that opens it, or ""."""
        key = self.key(sprint_id)
        return f"{self.pages}/sprints/{sprint_id}{'?key=' if key else ''}{key}" if self.pages else ""

    def key(self, sprint_id: str) -> str:
        """The key of one sprint's page: nobody can guess it, and whoever may read the issue finds it there; "" where none is needed."""
        if self.secret is None:
            return ""
        return hmac.new(self.secret.reveal().encode(), f"sprint:{sprint_id}".encode(), hashlib.sha256).hexdigest()[:KEY_DIGITS]

    def pull(self, issue: IssueRef, number: int) -> str:
        """A pull request of the issue's repository."""
        return f"{self.forge}/{issue.full_name}/pulls/{number}"


def says(function: _Said) -> _Said:
    """Makes a function a reply: `Reply.name` is its name, `Reply.data` its keyword arguments."""
    _SAID[function.__name__] = function
    return function


def reply_names() -> tuple[str, ...]:
    """Every name a Reply may carry."""
    return tuple(sorted(_SAID))


def render(reply: Reply, *, key: str) -> str:
    """The comment for a reply, hidden marker included; "" where the reply is a reaction alone.

    A name this version does not know (a row written by another one) becomes a general sentence, so that the row can be shown and done with.
    """
    if not reply.name:
        return ""
    said = _SAID.get(reply.name)
    return with_marker(said(**reply.data) if said else unknown_answer(), key)


def on_terminal(reply: Reply) -> str:
    """A reply for the command line: without folds and marker; the prompt is the prompt and nothing else."""
    if reply.name == "prompt_text":
        return str(reply.data["text"])
    text = render(reply, key="").partition(VERSION_MARK)[0]
    return re.sub(r"</?details>|</summary>", "", text.replace("<summary>", "")).replace("\u200b", "").strip()


def marker(key: str) -> str:
    """The hidden line by which the bot finds its own text again."""
    return f"{VERSION_MARK} key={key} -->"


def with_marker(text: str, key: str) -> str:
    """Text of ours, at most 60,000 characters, with its marker."""
    cut = text if len(text) <= TEXT_CAP else text[:TEXT_CAP].rstrip() + "\n\n[cut]"
    return f"{cut.rstrip()}\n\n{marker(key)}"


def escape(text: str, limit: int = TITLE_CAP) -> str:
    """One line of somebody else's words inside a sentence of ours: no markup, mention, reference or command of it acts."""
    line = _one_line(text, limit)
    return _disarm(re.sub(r"([\\`*_{}\[\]<>|~&!])", r"\\\1", neutralise(line)))


def code(text: str, limit: int = TITLE_CAP) -> str:
    """The same as a code span, for names, paths and commands of a person or a model."""
    return f"`{neutralise(_one_line(text, limit)).replace('`', chr(39)) or ' '}`"


def quoted(text: str, limit: int = SUMMARY_CAP) -> str:
    """Several lines of somebody else's Markdown as a quote, in which nothing left open can swallow what follows."""
    plain = _disarm(re.sub(r"<(?=[A-Za-z/!?])", "<\u200b", neutralise(text[:limit])))
    return "\n".join(f"> {line}".rstrip() for line in plain.strip().split("\n"))


def _one_line(text: str, limit: int) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _disarm(text: str) -> str:
    return re.sub(r"([#!])(?=\d)", "\\1\u200b", text)


def fenced(text: str) -> str:
    """Text as a code block that it cannot end by itself."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"


def moment(ms: int) -> str:
    """`2026-11-25 14:03 UTC`."""
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def plural(number: int, noun: str) -> str:
    """`1 file`, `2 files`, `12,000 tokens`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def money(usd: float) -> str:
    """`$0.38`; `$0.0042` where cents would show nothing."""
    return f"${usd:.4f}" if 0 < usd < 0.01 else f"${usd:,.2f}"  # noqa: PLR2004 - one cent


def duration(ms: int) -> str:
    """`42 s`, `4 min 10 s`, `2 h 5 min`, `3 d 4 h`; never negative."""
    seconds = max(0, ms) // 1000
    for size, unit, part, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // part
            return f"{seconds // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"


def about(ms: int) -> str:
    """A time that is only guessed: `about a minute`, `about 12 minutes`, `about 3 hours`."""
    minutes = max(1, round(ms / 60_000))
    hours = round(ms / 3_600_000)
    if minutes == 1:
        return "about a minute"
    return f"about {minutes} minutes" if minutes < 100 else f"about {hours} hours"  # noqa: PLR2004 - beyond that minutes say too much


def place_in_words(place: int, *, capped: bool = False) -> str:
    """`next in line`, `3rd in line`, `beyond the first 200 in line`."""
    if capped:
        return f"beyond the first {place} in line"
    return "next in line" if place <= 1 else f"{ordinal(place)} in line"


def waiting_in_words(reason: WaitingReason) -> str:
    """Why a queued sprint does not run, as half a sentence after "It waits because"."""
    match reason:
        case WaitingReason.OPEN_PRS:
            return "this repository already has as many open pull requests of the bot as it may have"
        case WaitingReason.BUDGET:
            return "the budget of the day is used up"
        case WaitingReason.PAUSED:
            return "the bot is paused"
        case WaitingReason.QUIET_HOURS:
            return "these are quiet hours"
        case WaitingReason.APPROVAL:
            return "somebody has to approve it first"
        case WaitingReason.DEPENDENCY:
            return "an issue this one depends on is still open"
        case WaitingReason.BACKOFF:
            return "an attempt failed a moment ago and the next one comes a little later"
        case WaitingReason.CAP:
            return "as many sprints as allowed are running already"
        case WaitingReason.SLOT:
            return "every slot is busy"
        case WaitingReason.NO_WORKER:
            return "no worker is alive; the operator has been told"
        case WaitingReason.BREAKER:
            return "too many sprints failed in a row; the operator has been told"
        case WaitingReason.PROVIDER:
            return "no model provider answers at the moment"
        case WaitingReason.REQUEUED:
            return "it was interrupted and goes on as soon as there is room"
        case WaitingReason.FORGE:
            return "the forge does not answer at the moment"
        case _:
            assert_never(reason)


def failure_in_words(reason: str) -> tuple[str, str]:
    """What went wrong, and what to do next; each one sentence or two. An unknown reason is told in general words."""
    again = "Ask again with `/dispatch retry`; if it happens again, the operator's log has the details."
    operator = "This is for the operator: `timmy-dispatch doctor` names the cause and its remedy. Afterwards: `/dispatch retry`."
    words = {
        FailureReason.CLONE: ("The repository could not be fetched.", operator),
        FailureReason.SANDBOX: ("The sandbox could not be set up, and nothing runs without it.", operator),
        FailureReason.LLM: ("No model gave a usable answer.", again),
        FailureReason.TOOL: ("A tool of the agent broke down.", again),
        FailureReason.CHECKS: (
            "The checks of this repository fail on the change.",
            "Look at the output of the checks, then finish the draft by hand, or say what to do differently with `/dispatch retry` and your words after it.",
        ),
        FailureReason.PUSH: ("The branch could not be pushed.", operator),
        FailureReason.PR: ("The branch was pushed, but the pull request could not be opened.", operator),
        FailureReason.AUTH: ("The forge no longer accepts the bot's token, or the right to do this is gone.", operator),
        FailureReason.SETUP: (
            "A setup command of this repository's `.dispatch.yml` fails, so no model was asked.",
            "Try it in a fresh clone without network, mend it on the default branch, then `/dispatch retry`.",
        ),
        FailureReason.LEASE_LOST: ("The worker lost its hold on this sprint too often.", again),
        FailureReason.INTERNAL: ("Something in the bot itself went wrong.", again),
        FailureReason.DIED: ("The worker died in the middle of it, more than once.", again),
        FailureReason.STALLED: ("Nothing moved for too long, so it was stopped.", again),
        FailureReason.PROTOCOL: ("The agent did not keep to its protocol.", again),
        FailureReason.MODEL_OUTPUT: (
            "The model kept answering with something that cannot be used.",
            "Try another model (`/dispatch retry model=NAME`), or describe the task more closely.",
        ),
    }
    try:
        return words[FailureReason(reason)]
    except ValueError:
        return ("It could not be finished.", again)


def source_in_words(source: Source) -> str:
    """How it was asked for."""
    return {
        Source.LABEL: "by label",
        Source.COMMAND: "by comment",
        Source.ASSIGNMENT: "by assignment",
        Source.MENTION: "by a mention in the issue's text",
        Source.SCHEDULE: "picked from the backlog",
        Source.REVIEW: "after a review",
        Source.CHECKS: "after a red check",
        Source.RECONCILE: "found afterwards, because no delivery announced it",
        Source.RETRY: "as a retry",
    }[source]


def status_comment(view: SprintView, *, position: Position | None, now_ms: int, links: Links) -> str:
    """The one comment that follows a sprint; the caller adds the marker `sprint:ID`."""
    blocks = [
        *_headline(view, position, now_ms, links),
        *_warnings(view),
        _config_faults(view),
        _figures(view, now_ms),
        _origin(view, links),
    ]
    return "\n\n".join(block for block in blocks if block)


def _headline(view: SprintView, position: Position | None, now_ms: int, links: Links) -> list[str]:
    match view.state:
        case SprintState.QUEUED:
            return _queued(view, position, now_ms)
        case SprintState.ADMITTED:
            return ["⏳ **About to start.** A slot is reserved."]
        case SprintState.PREPARING:
            return [_running(view, "Preparing", "Reading the issue and fetching the repository.")]
        case SprintState.WORKING:
            work = "Planning" if view.plans else "Working"
            steps = f"{work}, step {view.steps}" + (f" of {view.limits.steps}" if view.limits else "") if view.steps else work
            return [_running(view, steps, f"Now: {escape(view.doing)}." if view.doing else "")]
        case SprintState.VETTING:
            return [_running(view, "Checking the result", "Running the checks of the repository and looking at what changed.")]
        case SprintState.PUBLISHING:
            return [_running(view, "Publishing", "Pushing the branch and opening the pull request.")]
        case SprintState.SETTLED:
            return _settled(view, links)
        case _:
            assert_never(view.state)


def _queued(view: SprintView, position: Position | None, now_ms: int) -> list[str]:
    if view.waiting is None:
        place = f", {place_in_words(position.place, capped=position.capped)}" if position else ""
        wait = f" It should begin in {about(position.wait_ms)}." if position and position.wait_ms else ""
        return [f"⏳ **Queued{place}.**{wait}"]
    note = f" ({escape(view.waiting_note)})" if view.waiting_note else ""
    later = f" Not before {duration(view.not_before_ms - now_ms)} from now." if view.not_before_ms > now_ms else ""
    place = ""
    if position and view.waiting.runnable:
        wait = f" and should begin in {about(position.wait_ms)}" if position.wait_ms else ""
        place = f" It is {place_in_words(position.place, capped=position.capped)}{wait}."
    return [f"⏳ **Queued, waiting.** It waits because {waiting_in_words(view.waiting)}{note}.{place}{later}"]


def _running(view: SprintView, doing: str, detail: str) -> str:
    match view.stop:
        case Stop.CANCEL:
            because = stopped_because(view.reason) or f", because {_person(view.stop_by)} cancelled it"
            return f"🛑 **Stopping**{because}. What runs is being ended."
        case Stop.REQUEUE | Stop.DRAIN:
            return "🔁 **Going back into the queue.** It goes on from there by itself."
        case Stop.STALLED:
            return "🛑 **Stopping**, because it took no step for a long time. What runs is being ended."
        case None:
            return f"🔧 **{doing}.**" + (f" {detail}" if detail else "")
        case _:
            assert_never(view.stop)


def _settled(view: SprintView, links: Links) -> list[str]:
    detail = escape(view.detail, 600) if view.detail else ""
    pull = f"[pull request {_hash(view.pr)}]({links.pull(view.issue, view.pr)})" if view.pr else ""
    draft = f"What there is so far is in the draft {pull}." if pull and _pushed(view) else _unpublished(view)
    match view.outcome:
        case OutcomeKind.PULL_REQUEST | OutcomeKind.UPDATED:
            verb = "is updated" if view.outcome is OutcomeKind.UPDATED else "is open"
            head = f"✅ **Done: {pull} {verb}**, {plural(view.files, 'file')} changed.{_fate(view)}"
            following = "Merging it closes this issue. For another try: `/dispatch retry`."
            if view.follows_pull:
                following = (
                    "Merging it closes this issue. For more on the same branch, comment on it: `/dispatch run` with your words after it."
                )
            if view.pr_state in ("merged", "closed", "reverted"):
                following = ""
            if detail and view.reason != OVERTAKEN:
                detail = f"The agent says: {detail}"
            return [
                head,
                detail,
                _checks(view.checks) or "No checks are declared for this repository: nothing was tested.",
                _review(view),
                following,
            ]
        case OutcomeKind.NO_CHANGE:
            following = "If something should change here, say what in the issue or in a comment such as `/dispatch run please also ...`."
            if view.follows_pull:
                return [f"🟰 **Done: nothing was changed** on {pull}.{_fate(view)}", detail, following]
            return ["🟰 **Done: nothing was changed**, so there is no pull request.", detail, following]
        case OutcomeKind.PLANNED:
            return [f"📝 **{_plan_fate(view.reason)}**", detail, _plan_next(view.reason)]
        case OutcomeKind.REFUSED if view.reason != POLICY:
            following = (
                f"To start all the same: `/dispatch {'plan' if view.plans else 'retry' if view.follows_plan else 'run'} force`."
                if view.reason == OTHER_WORK
                else "When that has changed, ask again with `/dispatch retry`."
            )
            return ["⛔ **Refused: nothing was published.**", detail, following]
        case OutcomeKind.REFUSED:
            kept = f" The patch is kept on the [sprint's page]({links.sprint(view.id)})." if links.pages else ""
            head = f"⛔ **Not published: the change breaks a rule of this repository.**{kept}"
            return [
                head,
                detail,
                _review(view),
                "Narrow the task and ask again with `/dispatch retry`, or let the operator change the rule.",
            ]
        case OutcomeKind.BUDGET:
            limit = f" ({escape(view.reason)})" if view.reason else ""
            again = "goes on from there, `/dispatch retry fresh` begins anew" if view.pr else "starts again"
            following = f"Look at what is there. `/dispatch retry` {again}; a smaller task or a larger limit helps."
            return [f"⏸️ **Stopped at a limit{limit}.** {draft}", detail, _checks(view.checks), _review(view), following]
        case OutcomeKind.CANCELLED:
            by = f" by {_person(view.stop_by)}" if view.stop_by else ""
            because = stopped_because(view.reason)
            # That it was cancelled, and by whom, stands in the headline already.
            detail = "" if view.detail.startswith("cancelled") else detail
            again = (
                "Reopen the issue and ask again with `/dispatch retry`."
                if view.reason == "closed"
                else "To start again: `/dispatch retry`."
            )
            return [f"🛑 **Cancelled{by}{because}.** Nothing was published.", detail, again]
        case OutcomeKind.FAILED | None:
            what, following = failure_in_words(view.reason)
            return [f"❌ **Failed.** {what} {draft}", detail, _checks(view.checks), _review(view), following]
        case _:
            assert_never(view.outcome)


def _plan_fate(state: str) -> str:
    return {
        PlanState.WAITING: "A plan waits for approval; it is in a comment of its own.",
        PlanState.APPROVED: "A plan was made and approved.",
        PlanState.DENIED: "A plan was made and denied. Nothing was changed.",
        PlanState.EXPIRED: "A plan was made, and nobody approved it in time. Nothing was changed.",
        PlanState.SUPERSEDED: "A plan was made, and something newer took its place.",
        PlanState.CLOSED: "A plan was made, and the issue was closed before it was approved. Nothing was changed.",
    }.get(PlanState(state) if state in set(PlanState) else PlanState.SUPERSEDED, "")


def _plan_next(state: str) -> str:
    if state == PlanState.WAITING:
        return "`/dispatch approve` goes on with it, `/dispatch revise` and your words change it, `/dispatch deny` lets it go."
    return "" if state in (PlanState.APPROVED, PlanState.SUPERSEDED) else "`/dispatch plan` makes a new one."


def stopped_because(why: str) -> str:
    """Which act of a person on the forge a cancel follows from, as the end of a sentence; "" where somebody asked for it."""
    acts = {
        "closed": "the issue was closed",
        "deleted": "the issue was deleted",
        "unlabelled": "the label that had started it was taken off",
        "unassigned": "I was unassigned",
    }
    return f", because {acts[why]}" if why in acts else ""


def _unpublished(view: SprintView) -> str:
    if view.plans:
        return "There is no plan, and nothing was changed."
    if view.reason == FailureReason.PR and view.branch:
        return f"The work is on the branch {code(view.branch)}."
    if view.follows_pull:
        return f"Nothing was pushed to pull request {_hash(view.follows_pull)}."
    return "No pull request was opened."


def _fate(view: SprintView) -> str:
    return {
        "merged": " It has been merged.",
        "closed": " It was closed without being merged.",
        "reverted": " It was merged, and reverted afterwards.",
    }.get(view.pr_state, "")


def _pushed(view: SprintView) -> bool:
    """Whether something of this very sprint is on its pull request."""
    return not view.follows_pull or bool(view.head_sha)


def _review(view: SprintView) -> str:
    if not view.flagged:
        return ""
    return "**Look closely at:**\n\n" + _list([code(path) for path in view.flagged])


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return ""
    rows = [
        "| Check | Result |",
        "|---|---|",
        *(f"| {_cell(code(str(check.get('command', ''))))} | {_check_result(check)} |" for check in checks),
    ]
    return "\n".join(rows[: LISTED + 2])


def _check_result(check: Mapping[str, Any]) -> str:
    exit_code = check.get("exit_code")
    took = f" in {duration(int(float(check['seconds']) * 1000))}" if check.get("seconds") is not None else ""
    if exit_code is None:
        return f"❌ cut off{took}"
    return f"✅ passed{took}" if exit_code == 0 else f"❌ exit code {int(exit_code)}{took}"


def _warnings(view: SprintView) -> list[str]:
    if view.sandbox != "none" or view.state not in {*RUNNING, SprintState.SETTLED}:
        return []
    return [f"⚠️ {'Runs' if view.state in RUNNING else 'Ran'} **without a sandbox**, as the operator has set it."]


def _config_faults(view: SprintView) -> str:
    """What is wrong with the repository's `.dispatch.yml`, folded out: whoever asked can mend it."""
    if not view.config_faults:
        return ""
    listed = _list([escape(fault, 400) for fault in view.config_faults])
    return (
        f"⚠️ `.dispatch.yml` on the default branch has faults. What is at fault is left out, and the operator's settings stand:\n\n{listed}"
    )


def _figures(view: SprintView, now_ms: int) -> str:
    if not view.started_ms:
        return ""
    limits = view.limits
    end = view.settled_ms or now_ms
    model = f"{code(view.model)}" + (f" ({escape(view.provider)})" if view.provider else "") if view.model else "none yet"
    rows = (
        ("Model", model),
        ("Steps", _of(f"{view.steps:,}", f"{limits.steps:,}" if limits else "")),
        ("Tokens", _of(f"{view.tokens:,}", f"{limits.tokens:,}" if limits else "")),
        ("Cost", _of(money(view.usd), money(limits.usd) if limits and limits.usd else "")),
        ("Time", _of(duration(end - view.started_ms), duration(limits.seconds * 1000) if limits else "")),
        ("Waited before", duration(view.started_ms - view.queued_ms)),
        ("Attempt", str(view.attempt) if view.attempt > 1 else ""),
        ("Sandbox", escape(view.sandbox)),
    )
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows if value)])
    short = f"{plural(view.steps, 'step')}, {money(view.usd)}, {duration(end - view.started_ms)}"
    return f"<details><summary>{short}</summary>\n\n{table}\n\n</details>"


def _origin(view: SprintView, links: Links) -> str:
    by = f" by {_person(view.requester)}" if view.requester else ""
    live = "transcript" if view.state is SprintState.SETTLED else "live transcript"
    page = f" · [{live}]({links.sprint(view.id)})" if links.pages else ""
    stop = (
        " · stop it with `/dispatch cancel`" if view.state is not SprintState.SETTLED and view.state is not SprintState.PUBLISHING else ""
    )
    trace = f" · trace {code(links.trace_of(view.id))}" if links.trace_of and view.started_ms else ""
    return f"<sub>Asked for{by} {source_in_words(view.source)}{page}{trace}{stop}</sub>"


def _of(value: str, limit: str) -> str:
    return f"{value} of {limit}" if limit else value


def _person(login: str) -> str:
    return code(login or "somebody", 60)


def _hash(number: int) -> str:
    return f"#{number}"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _list(items: Sequence[str]) -> str:
    more = [f"- and {len(items) - LISTED} more"] if len(items) > LISTED else []
    return "\n".join([*(f"- {item}" for item in items[:LISTED]), *more])


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


def sprint_data(view: SprintView, position: Position | None = None) -> Json:
    """What a reply may say of a sprint, as JSON values."""
    return {
        "issue": view.issue.number,
        "title": view.title,
        "state": view.state.value,
        "waiting": view.waiting.value if view.waiting else "",
        "note": view.waiting_note,
        "place": position.place if position else 0,
        "capped": position.capped if position else False,
        "wait_ms": position.wait_ms if position else 0,
        "steps": view.steps,
        "max_steps": view.limits.steps if view.limits else 0,
        "usd": view.usd,
        "model": view.model,
        "outcome": view.outcome.value if view.outcome else "",
        "reason": view.reason,
        "pr": view.pr,
        "pr_state": view.pr_state,
        "requester": view.requester,
        "since_ms": view.settled_ms or view.started_ms or view.queued_ms,
        "stopping": view.stop.value if view.stop else "",
        "planning": view.plans,
    }


def sprint_in_words(sprint: Mapping[str, Any]) -> str:
    """Half a sentence on where a sprint is: `queued, 3rd in line`, `working, step 4 of 60, $0.02 so far`, `done: pull request #12`."""
    state = SprintState(sprint["state"])
    if state is SprintState.SETTLED:
        return _outcome_in_words(sprint)
    if state is SprintState.QUEUED:
        waiting = WaitingReason(sprint["waiting"]) if sprint["waiting"] else None
        place = (
            place_in_words(sprint["place"], capped=sprint["capped"]) if sprint["place"] and (waiting is None or waiting.runnable) else ""
        )
        # A row of an earlier version has no such figure.
        if place and sprint.get("wait_ms"):
            place += f", to begin in {about(sprint['wait_ms'])}"
        because = (
            f"waiting because {waiting_in_words(waiting)}" + (f" ({escape(sprint['note'])})" if sprint["note"] else "") if waiting else ""
        )
        return ", ".join(part for part in ("queued for a plan" if sprint.get("planning") else "queued", place, because) if part)
    if sprint["stopping"] == Stop.CANCEL:
        return "being cancelled"
    work = "planning" if sprint.get("planning") else "working"
    if state is SprintState.WORKING and sprint["steps"]:
        limit = f" of {sprint['max_steps']}" if sprint["max_steps"] else ""
        return f"{work}, step {sprint['steps']}{limit}, {money(sprint['usd'])} so far"
    return {
        SprintState.ADMITTED: "about to start",
        SprintState.PREPARING: "preparing",
        SprintState.WORKING: work,
        SprintState.VETTING: "checking its result",
        SprintState.PUBLISHING: "publishing its pull request",
    }[state]


def _outcome_in_words(sprint: Mapping[str, Any]) -> str:
    pull = f"pull request #{sprint['pr']}" if sprint["pr"] else ""
    fates = {"merged": ", merged", "closed": ", closed unmerged", "reverted": ", merged and reverted"}
    fate = fates.get(sprint["pr_state"], "") if pull else ""
    draft = f"; the draft is {pull}{fate}" if pull else ""
    match OutcomeKind(sprint["outcome"]) if sprint["outcome"] else None:
        case OutcomeKind.PULL_REQUEST | OutcomeKind.UPDATED:
            return f"done: {pull or 'a pull request'}{fate}"
        case OutcomeKind.NO_CHANGE:
            return "done: nothing was changed"
        case OutcomeKind.REFUSED:
            return "not published, because the change breaks a rule" if sprint["reason"] == POLICY else "refused"
        case OutcomeKind.BUDGET:
            return f"stopped at a limit{draft}"
        case OutcomeKind.CANCELLED:
            return "cancelled"
        case OutcomeKind.PLANNED:
            return {
                PlanState.WAITING: "a plan waits for approval",
                PlanState.APPROVED: "its plan was approved",
                PlanState.DENIED: "its plan was denied",
                PlanState.EXPIRED: "nobody approved its plan in time",
                PlanState.CLOSED: "the issue was closed before its plan was approved",
            }.get(sprint["reason"], "its plan gave way to something newer")
        case OutcomeKind.FAILED | None:
            what = failure_in_words(sprint["reason"])[0]
            return f"failed: {what[0].lower()}{what[1:].rstrip('.')}{draft}"


@says
def not_understood(text: str, problem: str, suggestion: str) -> str:
    """The grammar or a command could not read it."""
    heard = f" in {code(text)}" if text else ""
    mean = f" Did you mean `{_one_line(suggestion, 80)}`?" if suggestion else ""
    return f"I could not read the command{heard}. {_problem(problem)}{mean}\n\n`/dispatch help` lists what I can do."


@says
def queued(sprint: Json) -> str:
    """A new sprint waits."""
    return f"Understood. This issue is {sprint_in_words(sprint)}. The status comment follows it from here."


@says
def already_active(sprint: Json) -> str:
    """A sprint is active, there is no second."""
    by = f", asked for by {_person(sprint['requester'])}" if sprint["requester"] else ""
    following = (
        "Ask again when it has ended." if sprint["stopping"] == Stop.CANCEL else "It stays one sprint. To stop it: `/dispatch cancel`."
    )
    return f"This issue is already {sprint_in_words(sprint)}{by}. {following}"


@says
def status(
    active: Json | None, last: Json | None, now_ms: int, pauses: Sequence[Json] = (), skip: Json | None = None, plan: Json | None = None
) -> str:
    """Where this issue stands, and what holds it back."""
    held = [f"⏸️ {pause_in_words(pause)}." for pause in pauses] + ([f"⏭️ {skip_in_words(skip, now_ms)}."] if skip else [])
    if active is None and last is None:
        return "\n\n".join([*held, "Nothing has run on this issue yet." + ("" if skip else " `/dispatch run` starts.")])
    lines = held
    if plan is not None:
        lines.append(f"📝 A plan waits for a person's decision until {moment(plan['until_ms'])}.")
    if active is not None:
        lines.append(f"**Now:** {sprint_in_words(active)} (for {duration(now_ms - active['since_ms'])}).")
    if last is not None:
        lines.append(f"**{'Before' if active else 'Last'}:** {sprint_in_words(last)} ({duration(now_ms - last['since_ms'])} ago).")
    if active is None and not skip:
        lines.append(_plan_next(PlanState.WAITING) if plan else "`/dispatch retry` starts again.")
    return "\n\n".join(lines)


@says
def queue(rows: Sequence[Json], running: int, waiting: int, hidden: int, pauses: Sequence[Json] = (), plans: Sequence[Json] = ()) -> str:
    """The fleet's line. References stand in code spans, so that asking leaves no trace in the other issues."""
    head = " ".join([f"{plural(running, 'sprint')} running, {waiting:,} waiting.", *(f"⏸️ {pause_in_words(pause)}." for pause in pauses)])
    more = f"{hidden:,} of them not shown: in other repositories, or further down." if hidden else ""
    waits = _plans_that_wait(plans)
    if not rows:
        told = " ".join(part for part in (head, "None of this repository is among the first." if hidden else "", more) if part)
        return "\n\n".join(part for part in (told, waits) if part)
    lines = ["| Issue | State |", "|---|---|"]
    for row in rows:
        this = " (this one)" if row["here"] else ""
        lines.append(f"| `{row['ref']}` {_cell(escape(row['title'], 80))}{this} | {_cell(sprint_in_words(row))} |")
    return "\n\n".join(part for part in (head, "\n".join(lines), more, waits) if part)


def _plans_that_wait(plans: Sequence[Json]) -> str:
    if not plans:
        return ""
    items = [f"`{plan['ref']}` {escape(plan['title'], 80)}, until {moment(plan['until_ms'])}" for plan in plans]
    return f"📝 {plural(len(plans), 'plan')} waiting for a person's `/dispatch approve`:\n\n{_list(items)}"


@says
def plan(
    *, text: str, requester: str, state: str, until_ms: int, by: str = "", reason: str = "", follow_up: bool = False, edited: bool = False
) -> str:
    """A plan, and what becomes of it: this comment is edited when somebody decides. `follow_up` where it revises an earlier one.

    `edited` where the issue's text was changed after an approval, so that it waits again.
    """
    what = "A revised plan" if follow_up else "A plan"
    head = f"📝 **{what} for this issue**" + (f", asked for by {_person(requester)}" if requester else "") + ". The agent says:"
    said = quoted(text, len(text))
    if len(text) > PLAN_SHOWN or text.count("\n") > PLAN_LINES:
        said = f"<details><summary>The plan ({plural(len(text.splitlines()), 'line')})</summary>\n\n{said}\n\n</details>"
    return "\n\n".join([head, said, _plan_end(state, until_ms=until_ms, by=by, reason=reason, edited=edited)])


def _plan_end(state: str, *, until_ms: int, by: str, reason: str, edited: bool) -> str:
    person, why = _person(by), f": {escape(reason, 400)}" if reason else ""
    match state:
        case PlanState.WAITING:
            again = (
                "The issue was edited after this plan was approved, so it **waits again**"
                if edited
                else "Nothing was changed so far. It waits"
            )
            return (
                f"{again} for somebody with the right to decide, until {moment(until_ms)}:\n\n"
                "- `/dispatch approve` goes on with exactly this plan\n"
                "- `/dispatch revise` with your words after it makes another one\n"
                "- `/dispatch deny` lets it go"
            )
        case PlanState.APPROVED:
            return f"✅ **Approved** by {person}."
        case PlanState.DENIED:
            return f"⛔ **Denied** by {person}{why}. `/dispatch plan` makes a new one."
        case PlanState.EXPIRED:
            return "⌛ **Nobody decided in time**, so this plan is let go; nothing was changed. `/dispatch plan` makes a new one."
        case PlanState.CLOSED:
            return "🗄️ **The issue was closed**, so this plan is let go; nothing was changed."
    return f"🔁 **Not valid any more**{why or ': something newer has taken its place'}."


@says
def plan_edited(author: str) -> str:
    """The text is another one than the plan was made of; it may be approved for that text, once somebody has read it."""
    return (
        f"Not started: the text of this issue, written by {_person(author)}, was changed after the plan was made. Read both again. "
        "If the plan still fits: `/dispatch approve` once more. If not: `/dispatch revise` with your words after it, or `/dispatch plan`."
    )


@says
def plan_waits_again() -> str:
    """After an approval the issue was edited before the work began."""
    return (
        "The issue was edited after its plan was approved, so nothing was started. Read both again. "
        "If the plan still fits: `/dispatch approve`. If not: `/dispatch revise` with your words after it, or `/dispatch plan`."
    )


@says
def plan_denied(reason: str) -> str:
    """A person let the plan go; seen on the terminal, where no comment is edited before somebody's eyes."""
    why = f" ({escape(reason, 400)})" if reason else ""
    return f"The plan is let go{why}; nothing was changed. `/dispatch plan` makes a new one."


@says
def no_plan(*, verb: str, state: str = "", by: str = "") -> str:
    """Nothing waits for a decision; `state` is what became of the last plan, "" where there never was one."""
    became = {
        PlanState.APPROVED: f"The last one was approved by {_person(by)} already.",
        PlanState.DENIED: f"The last one was denied by {_person(by)}.",
        PlanState.EXPIRED: "Nobody decided on the last one in time.",
        PlanState.SUPERSEDED: "Something newer took the place of the last one.",
        PlanState.CLOSED: "The last one ended when the issue was closed.",
    }
    said = became[PlanState(state)] if state in became else ""
    return " ".join(part for part in (f"There is no plan to {_verb(verb)} here.", said, "`/dispatch plan` makes one.") if part)


@says
def plan_in_work(sprint: Json) -> str:
    """A plan is still being made, or carried out."""
    if sprint.get("planning"):
        return (
            f"The plan is still being made: this issue is {sprint_in_words(sprint)}. Decide when it is here; `/dispatch cancel` stops it."
        )
    return f"This issue is already {sprint_in_words(sprint)}: there is no plan to change any more. `/dispatch cancel` stops it."


@says
def cancelled(issue: int) -> str:
    """It had not begun."""
    return f"Cancelled. The sprint of issue #{issue} had not begun, so nothing was changed. To start again: `/dispatch run`."


@says
def stopping() -> str:
    """It runs and is being ended."""
    return "Stopping it now; what runs is ended within seconds. The status comment says when it is done."


@says
def too_late(sprint: Json) -> str:
    """Publishing or settled."""
    pull = f"pull request #{sprint['pr']}" if sprint["pr"] else "its pull request"
    return f"Too late to cancel: the sprint is already {'past' if sprint['state'] == 'settled' else 'at'} publishing {pull}. Close that if you do not want it."


@says
def nothing_to_cancel() -> str:
    """No active sprint."""
    return "There is nothing to cancel: no sprint is queued or running for this issue."


@says
def nothing_to_retry() -> str:
    """No settled sprint."""
    return "There is nothing to retry: no sprint has ended on this issue yet. `/dispatch run` starts the first one."


@says
def in_the_way(*, obstacles: Sequence[str], skipped: bool, verb: str = "run") -> str:
    """The guard: somebody else does this work, or does not want it done; each obstacle is a sentence without a full stop, as plain text."""
    unskip = "To take it off the list: `/dispatch unskip`. " if skipped else ""
    listed = _list([f"{escape(obstacle, 400)}" for obstacle in obstacles])
    return f"Not started:\n\n{listed}\n\n{unskip}To start all the same: `/dispatch {_verb(verb)} force`."


@says
def paused(pause: Json, now_ms: int, running: int, waiting: int) -> str:
    """A pause was set."""
    if pause["scope"] == "provider":
        end = f"It ends by itself in {duration(pause['until_ms'] - now_ms)}; earlier with" if pause["until_ms"] else "It ends with"
        name = str(pause["provider"]).replace("`", "'")
        passed = "It is passed over from the next model call on; where it is the only one, sprints wait"
        return f"⏸️ {pause_in_words(pause)}. {passed}. {end} `/dispatch resume provider {name}`."
    what = "fleet" if pause["scope"] == "fleet" else "repo"
    runs = f"{plural(running, 'sprint')} running now will be finished" if running else "Nothing runs at the moment"
    held = f"what waits ({waiting:,}) keeps its place" if waiting else "what is asked for now waits"
    end = f"It ends by itself in {duration(pause['until_ms'] - now_ms)}; earlier with" if pause["until_ms"] else "It ends with"
    return f"⏸️ {pause_in_words(pause)}. {runs}; {held}. {end} `/dispatch resume {what}`."


@says
def resumed(pause: Json, now_ms: int, fleet: Json | None) -> str:
    """A pause was ended."""
    what = _scope(pause)
    held = "held" if pause.get("kind") == "breaker" else "paused"
    head = f"▶️ Resumed: {what} was {held} for {duration(now_ms - pause['since_ms'])} by {_holder(pause)}."
    return f"{head} {_still(fleet) or 'What waited goes on now.'}"


@says
def nothing_to_resume(scope: str, fleet: Json | None, provider: str = "") -> str:
    """No pause held."""
    what = f"the provider {code(provider)}" if provider else "the whole fleet" if scope == "fleet" else "this repository"
    return " ".join(part for part in (f"There is nothing to resume: {what} is not paused.", _still(fleet)) if part)


def _still(fleet: Json | None) -> str:
    return f"But t{pause_in_words(fleet)[1:]}; an operator ends that with `/dispatch resume fleet`." if fleet else ""


def pause_in_words(pause: Mapping[str, Any]) -> str:
    """A pause as a sentence without its full stop."""
    until = f" until {moment(pause['until_ms'])}" if pause["until_ms"] else ""
    why = f": {escape(pause['reason'])}" if pause["reason"] else ""
    what = _scope(pause)
    if pause.get("kind") == "breaker":
        tried = f"one is tried at {moment(pause['until_ms'])}" if pause["until_ms"] else "one is tried now"
        return f"{what[0].upper()}{what[1:]} is held by the breaker{why}; {tried}"
    return f"{what[0].upper()}{what[1:]} is paused by {_holder(pause)}{until}{why}"


def _holder(pause: Mapping[str, Any]) -> str:
    """Who holds: a person, else the words that stand there."""
    return _person(pause["by"]) if pause.get("kind", "person") == "person" else str(pause["by"])


def _scope(pause: Mapping[str, Any]) -> str:
    if pause["scope"] == "fleet":
        return "the whole fleet"
    if pause["scope"] == "provider":
        return f"the provider {code(pause['provider'])}"
    return "this repository" if pause["here"] else f"the repository {code(pause['repo'])}"


@says
def skipped(*, reason: str, cancelled: bool, running: bool) -> str:
    """The issue is on the skip list now."""
    why = f" ({escape(reason)})" if reason else ""
    sprint = (
        " Its sprint had not begun and is cancelled."
        if cancelled
        else (" The sprint that runs goes on; `/dispatch cancel` stops it." if running else "")
    )
    return (
        f"⏭️ On the skip list{why}: I leave this issue alone, whoever asks.{sprint} "
        "Back off the list: `/dispatch unskip`. Once in spite of it: `/dispatch run force`."
    )


@says
def unskipped(skip: Json, now_ms: int) -> str:
    """The issue is off the skip list."""
    return f"Off the skip list, where {_person(skip['by'])} had put it {duration(now_ms - skip['since_ms'])} ago. `/dispatch run` starts."


@says
def not_skipped() -> str:
    """It was not on the list."""
    return "This issue is not on the skip list. `/dispatch run` starts."


def skip_in_words(skip: Mapping[str, Any], now_ms: int) -> str:
    """A skip list entry as a sentence without its full stop."""
    why = f": {escape(skip['reason'])}" if skip["reason"] else ""
    ago = duration(now_ms - skip["since_ms"])
    return f"{_person(skip['by'])} has put this issue on the skip list {ago} ago{why} (`/dispatch unskip` takes it off)"


@says
def explanation(
    rows: Sequence[Json],
    hidden: int,
    active: Json | None,
    last: Json | None,
    pauses: Sequence[Json],
    skip: Json | None,
    now_ms: int,
    dead: int = 0,
    plan: Json | None = None,
    obstacles: Sequence[str] = (),
    *,
    looked: bool = True,
) -> str:
    """Why things are as they are: where it stands now, what is in the way of a start, then every decision about this issue, newest last.

    `dead` counts deliveries, of any issue, that were given up: what is missing here may be in one of them. `looked` is False where the forge did
    not answer.
    """
    lost = "delivery of the forge was" if dead == 1 else "deliveries of the forge were"
    given_up = f"\n\n⚠️ {dead:,} {lost} given up; `timmy-dispatch replay` shows them to the operator." if dead else ""
    now = status(active, last, now_ms, pauses, skip, plan)
    if obstacles:
        now += "\n\n**In the way of a start now:**\n\n" + _list([escape(obstacle, 400) for obstacle in obstacles])
    elif active is None and looked and not pauses and not skip:
        now += "\n\nNothing is in the way of a start now."
    if not looked and active is None:
        now += "\n\nThe forge does not answer just now: what other people work on, and what this issue depends on, is not looked at."
    if not rows:
        return f"{now}\n\nNothing has been decided about this issue so far.{given_up}"
    more = f"{hidden:,} older ones are left out.\n\n" if hidden else ""
    trail = "\n".join(f"- {moment(row['made_ms'])}: {decision_in_words(row)}" for row in rows)
    return f"{now}\n\n**How it came to this**, newest last:\n\n{more}{trail}{given_up}"


def decision_in_words(row: Mapping[str, Any]) -> str:
    """One row of the trail as a sentence."""
    reason = escape(row["reason"], 300)
    match row["kind"]:
        case "admit":
            return "it was its turn: a slot was reserved."
        case "breaker" if row["result"] == "probe":
            return f"it may go although the breaker is open: {reason}."
        case "wait":
            return f"it waits ({_one_line(row['result'], 40)}): {reason}."
        case "requeue":
            return f"back into the queue ({_one_line(row['result'], 40)}): {reason}."
        case "settle":
            detail = f": {reason}" if reason and reason != escape(row["result"]) else ""
            return f"the sprint ended as {_one_line(row['result'], 40).replace('_', ' ')}{detail}."
        case kind if kind.startswith("watchdog "):
            return f"{escape(row['actor'], 60)} acted ({_one_line(row['result'], 40)}): {reason}."
        case "plan_end":
            return f"the plan is let go ({_one_line(row['result'], 40)}): {reason}."
        case "pull":
            return f"{reason}."
        case "review":
            return f"the review by {_person(row['actor'])} that requests changes was {reason}."
        case "plan_again":
            return f"the plan waits for approval again: {reason}."
    asked = f"{_person(row['actor'])} asked for {code(row['kind'], 40)}"
    meaning = {
        "ok": reason,
        "denied": f"refused, {reason}",
        "invalid": f"not possible, {reason}",
        "rate_limited": "refused, too many commands in a short time",
        "error": f"an error, {reason}",
    }.get(row["result"], reason)
    return f"{asked}: {meaning}."


@says
def log(sprint: Json, lines: Sequence[Json]) -> str:
    """The last things a sprint did, folded."""
    head = f"The sprint is {sprint_in_words(sprint)}."
    if not lines:
        return f"{head} The agent has not called a tool so far."
    text = "\n".join(_log_line(line) for line in lines)
    text = text if len(text) <= LOG_CAP else "[cut]\n" + text[-LOG_CAP:]
    return f"{head}\n\n<details><summary>The last {plural(len(lines), 'action')}</summary>\n\n{fenced(neutralise(text))}\n\n</details>"


def _log_line(line: Mapping[str, Any]) -> str:
    result = line["result"]
    shown = "(still running, or cut off)" if result is None else result.strip()
    shown = shown if len(shown) <= RESULT_CAP else f"{shown[:RESULT_CAP].rstrip()} [cut: {len(shown)} characters]"
    what = f"{line['tool']} {_one_line(line['arguments'], 300)}" if line["tool"] else "the model gave no answer"
    return f"{line['n']}. {what}\n" + "\n".join(f"    {part}" for part in shown.splitlines())


@says
def nothing_logged() -> str:
    """No sprint yet."""
    return "There is no log: nothing has run on this issue yet. `/dispatch run` starts."


@says
def priority_set(sprint: Json, before: int, after: int) -> str:
    """A queued sprint has another priority."""
    return f"Priority {after} instead of {before} (1 is most urgent). The sprint is {sprint_in_words(sprint)}."


@says
def not_waiting(sprint: Json | None) -> str:
    """Only what waits has a priority to change."""
    if sprint is None:
        return (
            "There is no sprint of this issue in the queue, so there is no priority to change. `/dispatch run priority=N` starts with one."
        )
    return f"The sprint is {sprint_in_words(sprint)}: it waits for nobody any more, so its priority changes nothing."


@says
def health(verdict: str, reasons: Sequence[str], pauses: Sequence[Json]) -> str:
    """The verdict on the fleet with its evidence."""
    sign = {"working": "🟢", "idle": "🟢", "paused": "⏸️", "degraded": "🟡", "stalled": "🔴"}.get(verdict, "")
    listed = [escape(reason, 400) for reason in reasons] + [pause_in_words(pause) for pause in pauses if pause["scope"] != "fleet"]
    return f"{sign} **{verdict.upper()}**\n\n{_list(listed)}".strip()


@says
def fleet(workers: Sequence[Json], rows: Sequence[Json], hidden: int, pauses: Sequence[Json]) -> str:
    """Workers and their slots, and what each repository has running and waiting."""
    slots, busy = sum(worker["slots"] for worker in workers), sum(worker["running"] for worker in workers)
    head = (
        f"{plural(len(workers), 'worker')}, {busy} of {plural(slots, 'slot')} busy."
        if workers
        else "No worker is there: the service does not run."
    )
    blocks = [" ".join([head, *(f"⏸️ {pause_in_words(pause)}." for pause in pauses)])]
    if workers:
        lines = ["| Worker | State | Busy | Last sign of life |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(code(worker['name'], 60))} | {worker['state']} | {worker['running']} of {worker['slots']} | {duration(worker['age_ms'])} ago |"
            for worker in workers[:LISTED]
        ]
        blocks.append("\n".join(lines))
    if rows:
        lines = ["| Repository | Running | Waiting |", "|---|---|---|"]
        lines += [f"| {_cell(code(row['repo']))} | {row['in_flight']:,} | {row['queued']:,} |" for row in rows[:LISTED]]
        blocks.append("\n".join(lines))
    if hidden:
        blocks.append(f"Besides, {plural(hidden, 'sprint')} in other repositories.")
    elif not rows:
        blocks.append("No sprint is queued or running.")
    return "\n\n".join(blocks)


_SEEN = {"ok": "🟢", "warn": "🟡", "failing": "🔴", "unknown": "⚪"}


@says
def watchdog(rows: Sequence[Json], now_ms: int) -> str:
    """The probes of the watchdog, and what each sees."""
    if not rows:
        return "The watchdog has not looked yet: it is switched off, or the service has just been started."
    bad = sum(row["verdict"] != "ok" for row in rows if row["ran_ms"])
    head = f"{plural(len(rows), 'probe')}, {bad:,} with something to tell." if bad else f"{plural(len(rows), 'probe')}, all is well."
    lines = ["| Probe | Verdict | Looked | What it sees |", "|---|---|---|---|"]
    for row in rows:
        seen = [escape(text, 200) for text in row["reasons"]]
        seen += [f"{row['more']:,} more"] if row["more"] else []
        seen += [f"{row['hidden']:,} in other repositories"] if row["hidden"] else []
        if row["acted_ms"]:
            seen.append(f"last action {duration(now_ms - row['acted_ms'])} ago: {escape(row['acted'], 40)}")
        if row["wished"]:
            seen.append("asked to act now")
        looked = f"{duration(now_ms - row['ran_ms'])} ago" if row["ran_ms"] else "not yet"
        verdict = f"{_SEEN.get(row['verdict'], '')} {row['verdict']}" if row["ran_ms"] else ""
        policy = " (may act)" if row["policy"] == "act" else ""
        lines.append(f"| {_cell(code(row['name'], 40))}{policy} | {verdict} | {looked} | {_cell('; '.join(seen))} |")
    return head + "\n\n" + "\n".join(lines)


@says
def watchdog_wished(names: Sequence[str]) -> str:
    """Probes were asked to act."""
    listed = ", ".join(code(name, 40) for name in names) or "nothing"
    return (
        f"The watchdog looks now and does what helps: {listed}. `/dispatch watchdog` shows in a moment what came of it; a pause holds it."
    )


@says
def prompt_text(text: str, comments: int) -> str:
    """The self-contained prompt, folded; in a fence it can be copied as it is, and nothing in it acts."""
    cut = text if len(text) <= PROMPT_CAP else text[:PROMPT_CAP].rstrip() + "\n[cut]"
    with_comments = f" with {plural(comments, 'comment')} by people with write access" if comments else ""
    return (
        f"The task of this issue{with_comments}, as a prompt for another agent. It holds no secret; whoever uses it brings their own access.\n\n"
        f"<details><summary>The prompt</summary>\n\n{fenced(cut)}\n\n</details>"
    )


@says
def help_text(verbs: Sequence[Json], has: str) -> str:
    """The verbs, from their declarations."""
    rows = "\n".join(f"| {_cell('`' + verb['usage'] + '`')} | {_cell(verb['summary'])} | {verb['needs'].lower()} |" for verb in verbs)
    examples = "\n".join(f"- `{example}`" for verb in verbs for example in verb["examples"][:1])
    return (
        "Write a command at the start of a line, several per comment if you like. Text in quotes and code is never a command.\n\n"
        f"| Command | What it does | Who |\n|---|---|---|\n{rows}\n\n"
        f"<details><summary>Examples</summary>\n\n{examples}\n\n</details>\n\n"
        f"Your own level on this repository is {has.lower()}. What stands on the lines below a `run` or `retry` goes to the agent as instructions."
    )


@says
def not_permitted(login: str, verb: str, needs: str, has: str) -> str:
    """A definite no."""
    level = {
        "NONE": "no rights",
        "READ": "read access",
        "WRITE": "write access",
        "ADMIN": "administrator rights",
        "OWNER": "owner rights",
    }.get(has, "less")
    wanted = {"READ": "read access", "WRITE": "write access", "ADMIN": "administrator rights", "OPERATOR": "an operator of the bot"}.get(
        needs, needs.lower()
    )
    return (
        f"Not done: `/dispatch {_verb(verb)}` needs {wanted} here, and {_person(login)} has {level}. "
        "Somebody with that right can ask for it; nothing was started."
    )


@says
def addressed() -> str:
    """A comment mentions the bot and commands nothing; said once in an issue."""
    return (
        "I act on commands only, so that people can talk about me as well as to me. `/dispatch run` at the start of a line starts work on this "
        "issue, with your words after it as instructions; `/dispatch help` lists the rest."
    )


@says
def not_permitted_mention(login: str) -> str:
    """The issue's text mentions the bot, and who wrote it has no write access."""
    return (
        f"Not started: {_person(login)} mentions me in this issue, but has no write access here. "
        "Somebody with write access can read the issue and ask with `/dispatch run`."
    )


@says
def not_permitted_assignment(login: str) -> str:
    """The bot was assigned by somebody without the right."""
    return (
        f"Not started: {_person(login)}, who assigned me, has no write access here. "
        "Somebody with write access can read the issue and ask with `/dispatch run`."
    )


@says
def commands_off(ways: Sequence[str]) -> str:
    """The setting `triggers` leaves comments out."""
    how = {"label": "put the trigger label on", "assignment": "assign the issue to me", "mention": "mention me in the issue's text"}
    known = [how[way] for way in ways if way in how]
    return (
        f"Not started: a comment starts nothing in this repository. {'To start: ' + ', or '.join(known) if known else 'Nothing else does'}."
    )


@says
def not_permitted_label(login: str, label: str) -> str:
    """The trigger label was put on by somebody without the right."""
    return (
        f"Not started: the label {code(label)} was put on by {_person(login)}, who has no write access here. "
        "Somebody with write access can read the issue, take the label off and put it on again."
    )


@says
def not_on_list(login: str) -> str:
    """The bot is only a writer and cannot ask for levels: the allow-list decides."""
    return (
        f"Not done: I am not an administrator of this repository, so I cannot ask what {_person(login)} may do, and the list of allowed people "
        "does not have that name. The operator can make the bot an administrator or add the name to `allow_users`."
    )


@says
def forge_silent(hours: int) -> str:
    """Asked for a day, never answered."""
    return f"Not done: for {hours} hours the forge could not say whether you may. Nothing was started. Please ask again."


@says
def not_yet() -> str:
    """The terminal, while the forge is down."""
    return "Not started: the forge cannot be asked about the issue just now. Please try again when it answers."


@says
def archived() -> str:
    """The repository takes no writes."""
    return "Not started: this repository is archived, so no branch and no pull request can be made."


@says
def issue_closed() -> str:
    """The issue is closed."""
    return "Not started: this issue is closed. Reopen it first, then ask again."


@says
def report(figures: Json) -> str:
    """What happened in a window of time: the morning report, and the answer to `/dispatch report`. References stand in code spans."""
    since, until = figures["since_ms"], figures["until_ms"]
    where = f" in {code(figures['repo'])}" if figures["repo"] else ""
    head = f"### Report: the last {window_words(until - since)}{where}\n\n{moment(since)} to {moment(until)}."
    now = f"{figures['running']:,} running and {figures['queued']:,} queued now."
    asked = sum(figures["asked"].values())
    if not asked and not figures["settled"] and not figures["calls"] and not any(figures[name] for name in ("opened", "merged", "closed")):
        return f"{head} No sprint was asked for and none ended. {now}"
    blocks = [f"{head} {now}", _report_sums(figures, asked)]
    for title, groups in (("Repository", figures["repositories"]), ("Model", figures["models"])):
        if groups:
            blocks.append(_report_groups(title, groups))
    if figures["failures"]:
        blocks.append(_report_failures(figures["failures"]))
    rest = [
        ("Waited for", figures["waits"]),
        ("Commands", figures["commands"]),
        ("Deliveries", figures["deliveries"]),
        ("Watchdog and breaker", figures["acts"]),
    ]
    lines = [f"**{name}:** {_report_counts(counts)}" for name, counts in rest if counts]
    lines += [f"**Provider down:** {code(outage['name'])} ({escape(outage['reason'], 100)})" for outage in figures["outages"][:LISTED]]
    if figures.get("downtimes"):
        lines.append("**Provider outages:**\n" + "\n".join(f"- {downtime_in_words(row)}" for row in figures["downtimes"][:LISTED]))
    return "\n\n".join([*blocks, *lines])


def _report_sums(figures: Json, asked: int) -> str:
    outcomes = _report_counts(figures["outcomes"]) or "none"
    pulls = f"{figures['opened']:,} opened, {figures['merged']:,} merged, {figures['closed']:,} closed without a merge"
    pulls += f", {figures['reverted']:,} reverted" if figures.get("reverted") else ""
    per_merged = "" if figures["usd_per_merged"] is None else f", {money(figures['usd_per_merged'])} per merged pull request"
    failed = f", {figures['failed_calls']:,} of them failed" if figures["failed_calls"] else ""
    rows = [
        ("Asked for", f"{plural(asked, 'sprint')}" + (f" ({_report_counts(figures['asked'])})" if asked else "")),
        ("Ended", f"{plural(figures['settled'], 'sprint')}: {outcomes}"),
        ("Pull requests", pulls),
        ("Cost", f"{money(figures['usd'])}, {plural(figures['tokens'], 'token')}, {plural(figures['steps'], 'step')}{per_merged}"),
        ("Model calls", f"{figures['calls']:,}{failed}, {money(figures['calls_usd'])}"),
        ("Trigger to pull request", _report_spread(figures["to_pull"])),
        ("Trigger to start", _report_spread(figures["queue_wait"])),
    ]
    trouble = {name: figures[name] for name in ("crashes", "requeues", "stalled") if figures[name]}
    rows += [("Trouble", _report_counts(trouble))] if trouble else []
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _report_groups(title: str, groups: Sequence[Json]) -> str:
    lines = [f"| {title} | Sprints | Pull requests | Merged | Cost |", "|---|---|---|---|---|"]
    for group in groups[:LISTED]:
        ended = sum(group["outcomes"].values())
        good = sum(group["outcomes"].get(outcome, 0) for outcome in (OutcomeKind.PULL_REQUEST, OutcomeKind.UPDATED))
        lines.append(f"| {_cell(code(group['name'], 80))} | {ended:,} | {good:,} | {group['merged']:,} | {money(group['usd'])} |")
    return "\n".join([*lines, *([f"\n{len(groups) - LISTED} more."] if len(groups) > LISTED else [])])


def _report_failures(failures: Sequence[Json]) -> str:
    lines = ["**Came to nothing:**"]
    for failure in failures[:LISTED]:
        kind = failure["outcome"].replace("_", " ") + (f" ({failure['reason']})" if failure["reason"] else "")
        lines.append(f"- {failure['count']:,} × {code(kind, 60)}")
        lines += [
            f"  - {code(example['ref'])}" + (f": {escape(example['detail'], 160)}" if example["detail"] else "")
            for example in failure["examples"]
        ]
    return "\n".join(lines)


def downtime_in_words(row: Mapping[str, Any]) -> str:
    """How often and how long one provider was away."""
    longest = f", the longest {duration(row['longest_ms'])}" if row["count"] > 1 else ""
    return f"{code(row['name'])}: {plural(row['count'], 'outage')}, {duration(row['total_ms'])} together{longest} ({escape(row['reason'], 100)})"


def _report_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{escape(str(name).replace('_', ' '), 60)} {count:,}" for name, count in list(counts.items())[:LISTED])


def _report_spread(spread: Json) -> str:
    if not spread["count"]:
        return "none"
    median, high, longest = (duration(spread[name]) for name in ("median_ms", "p90_ms", "longest_ms"))
    return f"half within {median}, nine of ten within {high}, the longest {longest}"


@says
def gave_up(attempts: int, outcome: str, detail: str) -> str:
    """The backlog pick has tried often enough."""
    last = (
        f" The last one ended as {code(outcome.replace('_', ' '), 40)}" + (f": {escape(detail, 300).rstrip('.')}." if detail else ".")
        if outcome
        else ""
    )
    return (
        f"I took this issue from the backlog {plural(attempts, 'time')} and it came to nothing, so I do not take it up by myself again.{last}\n\n"
        "Say what to do differently, or split it; `/dispatch run` starts whenever you ask, and `/dispatch explain` tells what happened."
    )


@says
def not_our_pull() -> str:
    """A person's pull request."""
    return "Not started: this is a pull request of a person, and I do not work on those. Open an issue that says what to do, and ask there."


@says
def pull_over(pull: int, state: str) -> str:
    """A follow-up was asked for on a pull request that is merged or closed."""
    if state == "merged":
        return f"Not started: pull request #{pull} is merged. What is still to do belongs into a new issue, or comment `/dispatch run` on the old one."
    return f"Not started: pull request #{pull} is closed. Open it again and ask once more, or begin anew with `/dispatch run` on its issue."


@says
def nothing_to_follow() -> str:
    """A follow-up was asked for on an issue that has no pull request of ours."""
    return "Not started: this issue has no open pull request of mine to go on with. `/dispatch run` begins one."


@says
def issue_gone(issue: int) -> str:
    """Our pull request's issue cannot be read any more."""
    return f"Not done: this pull request belongs to issue #{issue}, and I cannot find that issue any more."


@says
def not_permitted_review(login: str) -> str:
    """Somebody without the right requests changes."""
    return (
        f"Not started: {_person(login)} requests changes, but has no write access here. "
        "Somebody with write access can ask for them: a review of their own, or a comment `/dispatch run` with what to do after it."
    )


@says
def follow_up_begins(*, source: str, login: str, issue: int, why: str) -> str:
    """On the pull request: a review or a red check is taken up."""
    if source == Source.CHECKS:
        head = f"🔧 **Red: {escape(why)}.** I try to mend what I pushed"
    else:
        head = f"🔧 **I take up the review by {_person(login)}**, with every unresolved comment"
    return f"{head}, on this branch. How it goes is told on #{issue}; `/dispatch cancel` stops it."


@says
def checks_same(*, why: str, tries: int) -> str:
    """Red in the same way as before the last follow-up."""
    return (
        f"🛑 **Still red: {escape(why)}**, in the same way as before my last follow-up, so I stop here ({plural(tries, 'try')} so far). "
        "`/dispatch run` with a hint after it goes on."
    ).replace("trys", "tries")


@says
def checks_tried(*, why: str, tries: int) -> str:
    """As many follow-ups as are allowed did not make it green."""
    return (
        f"🛑 **Still red: {escape(why)}**. I tried {'once' if tries == 1 else f'{tries} times'} and leave it to you now. "
        "`/dispatch run` with a hint after it goes on."
    )


@says
def round_ended(
    *,
    issue: int,
    outcome: str,
    reason: str,
    detail: str,
    head: str,
    summary: str,
    remarks: Sequence[Json],
    ask_review: Sequence[str],
) -> str:
    """On the pull request: what a follow-up came to, remark by remark; `ask_review` are asked for a review again beside it."""
    match OutcomeKind(outcome):
        case OutcomeKind.UPDATED:
            line = f"✅ **Updated** with {code(head[:SHORT_SHA])}."
        case OutcomeKind.NO_CHANGE:
            line = "🟰 **Nothing was changed.**"
        case OutcomeKind.BUDGET:
            line = f"⏸️ **Stopped at a limit{f' ({escape(reason)})' if reason else ''}.**"
        case OutcomeKind.REFUSED:
            line = "⛔ **Nothing was pushed.**"
        case _:
            line = f"❌ **Failed.** {failure_in_words(reason)[0]}"
    if outcome != OutcomeKind.UPDATED and outcome in (OutcomeKind.BUDGET, OutcomeKind.FAILED):
        line += f" What there is so far is in {code(head[:SHORT_SHA])}, as a draft." if head else " Nothing was pushed."
    said = quoted(summary or detail) if outcome in (OutcomeKind.UPDATED, OutcomeKind.NO_CHANGE) else escape(detail, 600)
    answered = "\n".join(f"- {_remark_answered(remark)}" for remark in remarks[:50])
    return "\n\n".join(
        part
        for part in (
            line,
            f"The agent says:\n\n{said}" if said.startswith("> ") and said != "> " else said.removeprefix("> "),
            f"**The comments, one by one:**\n\n{answered}" if answered else "",
            f"Please look again: {', '.join(_person(login) for login in ask_review[:LISTED])}." if ask_review else "",
            f"<sub>Details on #{issue}</sub>",
        )
        if part.strip()
    )


def _remark_answered(remark: Mapping[str, Any]) -> str:
    if remark["said"]:
        what = escape(remark["said"], 500)
    else:
        what = "the file was changed; the agent says nothing more about it" if remark["changed"] else "not changed in this round"
    return f"{code(remark['where'])} ({_person(remark['author'])}): {what}"


@says
def not_on_pull(verb: str, issue: int) -> str:
    """A verb for issues only."""
    where = f" Use it on #{issue}." if issue else " Use it on an issue."
    return f"`/dispatch {_verb(verb)}` does not work on a pull request.{where}"


@says
def text_changed(author: str) -> str:
    """Approved text and present text differ, and the author has no right to approve."""
    return (
        f"Not started: the text of this issue, written by {_person(author)}, is no longer the one you asked for. "
        "Read it again; if it is right, ask once more."
    )


@says
def text_unverified(author: str) -> str:
    """A stranger's text, and no delivery that shows what was approved."""
    return (
        f"Not started: no delivery reached me when you asked, so I cannot be sure that the text of {_person(author)} is still the one you read. "
        "Read it again; if it is right, ask once more."
    )


@says
def too_old(text: str, asked_ms: int, now_ms: int) -> str:
    """Found by reconciliation long after."""
    return f"I only found {code(text)} now, {duration(now_ms - asked_ms)} after it was asked, so I did not act on it. If it still holds, ask again."


@says
def rate_limited(login: str, limit: int, minutes: int) -> str:
    """Too many commands of one person."""
    return f"Not done: {_person(login)} has used {limit} commands in {minutes} minutes, which is the most I take. Please wait a little and ask again."


@says
def gone() -> str:
    """The issue or repository went away meanwhile; seen on the terminal only."""
    return "Not started: the issue or its repository no longer exists, or the bot may no longer see it."


@says
def over_limit(option: str, asked: str, most: str) -> str:
    """An option beyond what the operator allows."""
    return f"Not started: {code(f'{option}={asked}')} is more than is allowed here. The most is `{option}={_one_line(most, 40)}`."


@says
def option_needs(option: str, needs: str) -> str:
    """An option for administrators."""
    return f"Not started: the option `{_one_line(option, 40)}=` is for people with the level {needs.lower()} here."


@says
def ops_issue() -> str:
    """To whoever asks for work on an issue that mirrors alerts."""
    return "This issue mirrors an alert; I open and close it myself and never work on it. Open an issue that says what should be changed."


@says
def unknown_answer() -> str:
    """A row of another version."""
    return "This was answered by another version of the bot, and the words are lost. `/dispatch status` tells how things stand."


def _verb(verb: str) -> str:
    return _one_line(verb, 40).replace("`", "'")


def _problem(problem: str) -> str:
    # A problem quotes what a person wrote, in code spans that the grammar has made harmless; outside of those nothing is theirs.
    return neutralise(_one_line(problem, 400))


def alert_key(group: str, number: int | str) -> str:
    """The key of what is written for a group of alerts: number 3 of group 1f... is `alert:1f...:3`."""
    return f"{ALERT}{group}:{number}"


def mirrors_alerts(body: str) -> bool:
    """True for the text of an issue that mirrors alerts: nothing is ever worked on there."""
    return f"{VERSION_MARK} key={ALERT}" in body


def alert_title(labels: Mapping[str, str]) -> str:
    """One line of plain text: `Alert: DispatchFleetStalled`, with the other labels the group is formed by in brackets."""
    name = labels.get("alertname", "")
    rest = ", ".join(f"{key}={value}" for key, value in sorted(labels.items()) if key not in ("alertname", "service"))
    words = f"{name or 'alerts'} ({rest})" if rest else name or "alerts"
    return f"Alert: {_disarm(neutralise(_one_line(words, TITLE_CAP)))}"


def alert_body(alerts: Sequence[Mapping[str, Any]]) -> str:
    """What the issue of a group says: every alert that fires, since when, and what to do. `alerts` are those that fire, as the store has them."""
    lines = [f"**{plural(len(alerts), 'alert')} firing.**" if alerts else "**Resolved.**", ""]
    lines += [_alert(alert) for alert in alerts[:ALERTS_LISTED]]
    if len(alerts) > ALERTS_LISTED:
        lines.append(f"- and {len(alerts) - ALERTS_LISTED} more")
    lines += ["", "<sub>I mirror Alertmanager here: the issue closes when nothing fires any more, and I never work on it.</sub>"]
    return "\n".join(lines)


def alert_comment(kind: str, added: Sequence[Mapping[str, Any]], gone: int, firing: int) -> str:
    """What changed: `kind` is again, changed or resolved; `added` began to fire, `gone` ended, `firing` are left."""
    if kind == "resolved":
        return "Resolved: nothing of this group fires any more."
    lines = ["It fires again." if kind == "again" else f"{plural(firing, 'alert')} firing now."]
    if added:
        lines += ["", "Began:", "", *(_alert(alert) for alert in added[:ALERTS_LISTED])]
        if len(added) > ALERTS_LISTED:
            lines.append(f"- and {len(added) - ALERTS_LISTED} more")
    if gone and kind == "changed":
        lines += ["", f"Ended: {gone}."]
    return "\n".join(lines)


def _alert(alert: Mapping[str, Any]) -> str:
    labels, notes = alert["labels"], alert["annotations"]
    shown = {key: value for key, value in labels.items() if key not in ("alertname", "service", "severity")}
    since = datetime.fromtimestamp(max(0, alert["starts_us"]) / 1e6, UTC)
    head = f"- **{escape(labels.get('alertname', 'alert'))}** ({escape(labels.get('severity', '') or 'no severity')}), since {since:%Y-%m-%d %H:%M:%S} UTC"
    parts = [head, *(f"  {escape(notes[name], ALERT_TEXT)}" for name in ("summary", "description") if notes.get(name))]
    if notes.get("runbook_url"):
        url = notes["runbook_url"]
        parts.append(f"  What to do: {f'<{url}>' if _PLAIN_URL.fullmatch(url) else code(url)}")
    if shown:
        parts.append("  " + ", ".join(code(f"{key}={value}") for key, value in sorted(shown.items())[:LISTED]))
    return "\n".join(parts)
