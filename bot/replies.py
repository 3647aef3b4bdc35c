"""Every sentence the bot says: pure functions from facts to Markdown, in which nothing untrusted can act and no command of ours is live."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, assert_never

from bot.models import (
    RUNNING,
    FailureReason,
    IssueRef,
    Json,
    OutcomeKind,
    Position,
    Reply,
    Source,
    SprintState,
    SprintView,
    Stop,
    WaitingReason,
)
from bot.redaction import neutralise

VERSION_MARK = "<!-- timmy-dispatch:v1"
TEXT_CAP = 60_000
SUMMARY_CAP = 8_000
TITLE_CAP = 200
LISTED = 20
SHORT_SHA = 10

_SAID: dict[str, Callable[..., str]] = {}
_Said = TypeVar("_Said", bound=Callable[..., str])


@dataclass(frozen=True, slots=True)
class Links:
    """Our own configured addresses without a trailing slash: the forge as people open it, and our pages ("" where there are none)."""

    forge: str
    pages: str = ""

    def sprint(self, sprint_id: str) -> str:
        """The page of a sprint, or ""."""
        return f"{self.pages}/sprints/{sprint_id}" if self.pages else ""

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
            return "an operator has paused the bot here"
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
        Source.SCHEDULE: "picked from the backlog",
        Source.REVIEW: "after a review",
        Source.CHECKS: "after a red check",
        Source.RECONCILE: "found afterwards, because no delivery announced it",
        Source.RETRY: "as a retry",
    }[source]


def status_comment(view: SprintView, *, position: Position | None, now_ms: int, links: Links) -> str:
    """The one comment that follows a sprint; the caller adds the marker `sprint:ID`."""
    blocks = [*_headline(view, position, now_ms, links), *_warnings(view), _figures(view, now_ms), _origin(view, links)]
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
            steps = f"Working, step {view.steps}" + (f" of {view.limits.steps}" if view.limits else "") if view.steps else "Working"
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
        return [f"⏳ **Queued{place}.**"]
    note = f" ({escape(view.waiting_note)})" if view.waiting_note else ""
    later = f" Not before {duration(view.not_before_ms - now_ms)} from now." if view.not_before_ms > now_ms else ""
    place = f" It is {place_in_words(position.place, capped=position.capped)}." if position and view.waiting.runnable else ""
    return [f"⏳ **Queued, waiting.** It waits because {waiting_in_words(view.waiting)}{note}.{place}{later}"]


def _running(view: SprintView, doing: str, detail: str) -> str:
    match view.stop:
        case Stop.CANCEL:
            return f"🛑 **Stopping**, because {_person(view.stop_by)} cancelled it. What runs is being ended."
        case Stop.REQUEUE | Stop.DRAIN:
            return "🔁 **Going back into the queue.** It goes on from there by itself."
        case None:
            return f"🔧 **{doing}.**" + (f" {detail}" if detail else "")
        case _:
            assert_never(view.stop)


def _settled(view: SprintView, links: Links) -> list[str]:
    detail = escape(view.detail, 600) if view.detail else ""
    pull = f"[pull request {_hash(view.pr)}]({links.pull(view.issue, view.pr)})" if view.pr else ""
    draft = f"What there is so far is in the draft {pull}." if pull else _unpublished(view)
    match view.outcome:
        case OutcomeKind.PULL_REQUEST | OutcomeKind.UPDATED:
            verb = "is updated" if view.outcome is OutcomeKind.UPDATED else "is open"
            head = f"✅ **Done: {pull} {verb}**, {plural(view.files, 'file')} changed.{_fate(view)}"
            following = "" if view.pr_state in ("merged", "closed") else "Merging it closes this issue. For another try: `/dispatch retry`."
            return [
                head,
                detail,
                _checks(view.checks) or "No checks are declared for this repository: nothing was tested.",
                _review(view),
                following,
            ]
        case OutcomeKind.NO_CHANGE:
            following = "If something should change here, say what in the issue or in a comment such as `/dispatch run please also ...`."
            return ["🟰 **Done: nothing was changed**, so there is no pull request.", detail, following]
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
            following = "Look at what is there. `/dispatch retry` starts again; a smaller task or a larger limit helps."
            return [f"⏸️ **Stopped at a limit{limit}.** {draft}", detail, _checks(view.checks), _review(view), following]
        case OutcomeKind.CANCELLED:
            by = f" by {_person(view.stop_by)}" if view.stop_by else ""
            return [f"🛑 **Cancelled{by}.** Nothing was published.", detail, "To start again: `/dispatch retry`."]
        case OutcomeKind.FAILED | None:
            what, following = failure_in_words(view.reason)
            return [f"❌ **Failed.** {what} {draft}", detail, _checks(view.checks), _review(view), following]
        case _:
            assert_never(view.outcome)


def _unpublished(view: SprintView) -> str:
    if view.reason == FailureReason.PR and view.branch:
        return f"The work is on the branch {code(view.branch)}."
    return "No pull request was opened."


def _fate(view: SprintView) -> str:
    return {"merged": " It has been merged.", "closed": " It was closed without being merged."}.get(view.pr_state, "")


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
    return ["⚠️ Runs **without a sandbox**, as the operator has set it."] if view.sandbox == "none" and view.state in RUNNING else []


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
    page = f" · [live transcript]({links.sprint(view.id)})" if links.pages else ""
    stop = (
        " · stop it with `/dispatch cancel`" if view.state is not SprintState.SETTLED and view.state is not SprintState.PUBLISHING else ""
    )
    return f"<sub>Asked for{by} {source_in_words(view.source)}{page}{stop}</sub>"


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
        ("The agent says:\n\n" + quoted(summary)) if summary.strip() else "The agent left no summary.",
        "**Checks**, run by the bot on exactly this tree:\n\n" + _checks(checks)
        if checks
        else "**Checks**: none are declared for this repository.",
        "**Look closely at:**\n\n" + _list([code(path) for path in flagged]) if flagged else "",
        f"<sub>Written{by} by {models_said}, {level}. Read it like a stranger's work before you merge.{page}</sub>",
    ]
    return with_marker("\n\n".join(block for block in blocks if block), key)


def commit_message(view: SprintView, *, summary: str, trailer: str = "") -> str:
    """Subject from the issue's title, the summary's first paragraph, the issue's number and the operator's trailer; plain text."""
    subject = _disarm(neutralise(_one_line(view.title, 72))) or f"Work on issue {view.issue.number}"
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
        because = (
            f"waiting because {waiting_in_words(waiting)}" + (f" ({escape(sprint['note'])})" if sprint["note"] else "") if waiting else ""
        )
        return ", ".join(part for part in ("queued", place, because) if part)
    if sprint["stopping"] == Stop.CANCEL:
        return "being cancelled"
    if state is SprintState.WORKING and sprint["steps"]:
        limit = f" of {sprint['max_steps']}" if sprint["max_steps"] else ""
        return f"working, step {sprint['steps']}{limit}, {money(sprint['usd'])} so far"
    return {
        SprintState.ADMITTED: "about to start",
        SprintState.PREPARING: "preparing",
        SprintState.WORKING: "working",
        SprintState.VETTING: "checking its result",
        SprintState.PUBLISHING: "publishing its pull request",
    }[state]


def _outcome_in_words(sprint: Mapping[str, Any]) -> str:
    pull = f"pull request #{sprint['pr']}" if sprint["pr"] else ""
    fate = {"merged": ", merged", "closed": ", closed unmerged"}.get(sprint["pr_state"], "") if pull else ""
    draft = f"; the draft is {pull}{fate}" if pull else ""
    match OutcomeKind(sprint["outcome"]) if sprint["outcome"] else None:
        case OutcomeKind.PULL_REQUEST | OutcomeKind.UPDATED:
            return f"done: {pull or 'a pull request'}{fate}"
        case OutcomeKind.NO_CHANGE:
            return "done: nothing was changed"
        case OutcomeKind.REFUSED:
            return "not published, because the change breaks a rule"
        case OutcomeKind.BUDGET:
            return f"stopped at a limit{draft}"
        case OutcomeKind.CANCELLED:
            return "cancelled"
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
def status(active: Json | None, last: Json | None, now_ms: int) -> str:
    """Where this issue stands."""
    if active is None and last is None:
        return "Nothing has run on this issue yet. `/dispatch run` starts."
    lines = []
    if active is not None:
        lines.append(f"**Now:** {sprint_in_words(active)} (for {duration(now_ms - active['since_ms'])}).")
    if last is not None:
        lines.append(f"**{'Before' if active else 'Last'}:** {sprint_in_words(last)} ({duration(now_ms - last['since_ms'])} ago).")
    if active is None:
        lines.append("`/dispatch retry` starts again.")
    return "\n\n".join(lines)


@says
def queue(rows: Sequence[Json], running: int, waiting: int, hidden: int) -> str:
    """The fleet's line. References stand in code spans, so that asking leaves no trace in the other issues."""
    head = f"{plural(running, 'sprint')} running, {waiting:,} waiting."
    more = f"{hidden:,} of them not shown: in other repositories, or further down." if hidden else ""
    if not rows:
        return " ".join(part for part in (head, "None of this repository is among the first." if hidden else "", more) if part)
    lines = ["| Issue | State |", "|---|---|"]
    for row in rows:
        this = " (this one)" if row["here"] else ""
        lines.append(f"| `{row['ref']}` {_cell(escape(row['title'], 80))}{this} | {_cell(sprint_in_words(row))} |")
    return "\n\n".join(part for part in (head, "\n".join(lines), more) if part)


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
def not_our_pull() -> str:
    """A person's pull request."""
    return "Not started: this is a pull request of a person, and I do not work on those. Open an issue that says what to do, and ask there."


@says
def our_pull(issue: int) -> str:
    """A pull request of the bot's own."""
    return f"Not started: this is my pull request for #{issue}. Ask there: `/dispatch retry` on that issue starts again, with your words after it."


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
def unknown_answer() -> str:
    """A row of another version."""
    return "This was answered by another version of the bot, and the words are lost. `/dispatch status` tells how things stand."


def _verb(verb: str) -> str:
    return _one_line(verb, 40).replace("`", "'")


def _problem(problem: str) -> str:
    # A problem quotes what a person wrote, in code spans that the grammar has made harmless; outside of those nothing is theirs.
    return neutralise(_one_line(problem, 400))
