"""What is said on a pull request about the rounds after the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bot.models import Json, OutcomeKind, Source
from bot.replies._text import LISTED, SHORT_SHA, _person, _verb, code, escape, plural, quoted, says
from bot.replies._words import failure_in_words


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
    """Red in the same way as before a follow-up that was to mend it."""
    return (
        f"🛑 **Still red: {escape(why)}**, in the same way as before a follow-up of mine, so I stop here ({plural(tries, 'try')} so far). "
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
