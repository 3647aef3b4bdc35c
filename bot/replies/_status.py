"""The status comment of a sprint, from its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from bot.models import RUNNING, FailureReason, OutcomeKind, PlanState, Position, SprintState, SprintView, Stop
from bot.replies._text import LISTED, Links, _cell, _hash, _list, _of, _person, about, code, duration, escape, money, place_in_words, plural
from bot.replies._words import OTHER_WORK, OVERTAKEN, POLICY, failure_in_words, source_in_words, stopped_because, waiting_in_words


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
        case Stop.REVISE:
            return f"🔁 **Beginning the plan anew**, with what {_person(view.stop_by)} said about it."
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
