"""Answers of the verbs that start, stop, show and explain work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bot.models import Json, PlanState, Stop
from bot.redaction import neutralise
from bot.replies._pauses import pause_in_words, skip_in_words
from bot.replies._plans import _plans_that_wait
from bot.replies._status import _plan_next
from bot.replies._text import _cell, _list, _one_line, _person, _problem, code, duration, escape, fenced, moment, plural, says
from bot.replies._words import sprint_in_words

LOG_CAP = 16_000
RESULT_CAP = 800
PROMPT_CAP = 50_000


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
    if sprint.get("planning") and sprint["stopping"] != Stop.CANCEL:
        following += " To say what the plan should be like: `/dispatch revise` with your words after it."
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
    over = last is not None and last["pr_state"] == "merged"
    if active is None and not skip and (plan or not over):
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
    reason = escape(row["reason"], 300).rstrip(".")
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
def addressed() -> str:
    """A comment mentions the bot and commands nothing; said once in an issue."""
    return (
        "I act on commands only, so that people can talk about me as well as to me. `/dispatch run` at the start of a line starts work on this "
        "issue, with your words after it as instructions; `/dispatch help` lists the rest."
    )


@says
def command_unread() -> str:
    """A command stands in the text of an issue, or in a review; said once in an issue or pull request."""
    # Without the command itself: what is neutralised here could be copied, and would not be heard either.
    return (
        "I read commands in comments only, not in the text of an issue or in a review, so the one that is there was not obeyed. "
        "Write it as a comment of its own, at the start of a line."
    )


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
