"""What every sentence is made of: the register of answers, hidden markers, and the escapes that keep foreign words from acting."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from bot.models import IssueRef, Reply
from bot.redaction import Secret, neutralise

VERSION_MARK = "<!-- timmy-dispatch:v1"
TEXT_CAP = 60_000
SUMMARY_CAP = 8_000
TITLE_CAP = 200
LISTED = 20
SHORT_SHA = 10
KEY_DIGITS = 32
# They join letters of a word in some scripts, and the parts of an emoji.
_JOINERS = "\u200c\u200d"
_PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.-]+(?::[0-9]+)?(?:/[A-Za-z0-9._~/-]*)?")
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
    line = " ".join("".join(char if char.isprintable() or char in _JOINERS else " " for char in text).split())
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


@says
def unknown_answer() -> str:
    """A row of another version."""
    return "This was answered by another version of the bot, and the words are lost. `/dispatch status` tells how things stand."


def _verb(verb: str) -> str:
    return _one_line(verb, 40).replace("`", "'")


def _problem(problem: str) -> str:
    # A problem quotes what a person wrote, in code spans that the grammar has made harmless; outside of those nothing is theirs.
    # An example is there to be copied: at the beginning of a code span a command cannot act.
    return neutralise(_one_line(problem, 400)).replace("`/\u200bdispatch ", "`/dispatch ")
