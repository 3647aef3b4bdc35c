"""Why something was not done, to whoever asked for it."""

from __future__ import annotations

from collections.abc import Sequence

from bot.replies._text import _list, _one_line, _person, _verb, code, duration, escape, says


@says
def in_the_way(*, obstacles: Sequence[str], skipped: bool, verb: str = "run") -> str:
    """The guard: somebody else does this work, or does not want it done; each obstacle is a sentence without a full stop, as plain text."""
    unskip = "To take it off the list: `/dispatch unskip`. " if skipped else ""
    listed = _list([f"{escape(obstacle, 400)}" for obstacle in obstacles])
    return f"Not started:\n\n{listed}\n\n{unskip}To start all the same: `/dispatch {_verb(verb)} force`."


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
