"""What is held back by people: pauses and the skip list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bot.models import Json
from bot.replies._text import _person, code, duration, escape, moment, plural, says


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
