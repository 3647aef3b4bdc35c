"""Prompts: the issue and a bounded trusted context become one self-contained text; what others wrote is cleaned, capped and fenced by a random delimiter."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from bot.models import Comment, IssueRef, Limits

if TYPE_CHECKING:
    import jinja2

TEXT_CAP: Final = 20_000
COMMENTS_CAP: Final = 40_000
_PASSES: Final = 40
_AUTHOR: Final = re.compile(r"[^\w.\- ]")

_COMMENT: Final = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
# C0 but tab and newline, C1, zero-width and joiners, soft hyphen, bidi, variation selectors, interlinear, byte-order mark, tag characters.
_INVISIBLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U000e0000-\U000e0fff\ud800-\udfff]"
)
_ALT: Final = re.compile(r"!\[(?:[^\[\]\n]|\[[^\[\]\n]{0,200}\]){1,400}\]")
_TITLE: Final = re.compile(r"(!\[\])\(\s{0,20}(<[^<>\n]{0,2000}>|[^\s()<>]{0,2000})\s[^()\n]{0,1000}\)")
_DEFINITION: Final = re.compile(r"^( {0,3}\[[^\[\]\n]{1,200}\]:[ \t]*\S{1,2000})[ \t]+[\"'(][^\n]*$", re.MULTILINE)
_IMG: Final = re.compile(r"<\s*img\b[^<>]{0,4000}>", re.IGNORECASE)
_TAGS: Final = re.compile(
    r"<\s*/?\s*(?:system|user|assistant|developer|human|tool|function|instructions?|prompt|task|data|untrusted|context)\b[\w:.-]{0,80}[^<>]{0,200}>"
    r"|<\|[^<>|]{0,80}\|>|\[/?INST\]|<</?SYS>>",
    re.IGNORECASE,
)


def clean(text: str, *, delimiter: str = "", cap: int = TEXT_CAP) -> str:
    """Untrusted text made fit for a prompt: cut at `cap`, then nothing a person cannot see, no look-alike of a delimiter; cleaning twice changes nothing."""
    cut = len(text) > cap
    text = text[:cap].replace("\r\n", "\n").replace("\r", "\n")
    for _ in range(_PASSES):
        before = text
        text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
        text = _IMG.sub("", _COMMENT.sub("", text))
        text = _DEFINITION.sub(r"\1", _TITLE.sub(r"\1(\2)", _ALT.sub("![]", text)))
        text = _TAGS.sub("", text)
        if delimiter:
            text = re.sub(re.escape(delimiter), "", text, flags=re.IGNORECASE)
        if text == before:
            break
    else:
        # Nested beyond reason, so it is an attack; without angle and square brackets nothing is left to nest.
        text = re.sub(r"[<>\[\]]", "", text)
    text = text.strip()
    return f"{text}\n(cut at {cap} characters)" if cut else text


def _author(login: str) -> str:
    return _AUTHOR.sub("", login)[:60] or "somebody"


def system_prompt(
    *,
    repo: str,
    base_branch: str,
    limits: Limits,
    delimiter: str,
    checks: Sequence[str] = (),
    network: bool = False,
    bot: str = "timmy-dispatch",
    planning: bool = False,
) -> str:
    """The rules of a sprint, or of one that only plans. `delimiter` is the random word of this sprint that fences untrusted text in the task."""
    return _render(
        "plan" if planning else "system",
        repo=repo,
        base_branch=base_branch,
        limits=limits,
        delimiter=delimiter,
        checks=checks,
        network=network,
        bot=bot,
    )


def task_prompt(
    *,
    ref: IssueRef,
    title: str,
    body: str,
    author: str,
    delimiter: str,
    comments: Sequence[Comment] = (),
    instructions: str = "",
    asker: str = "",
    agents_md: str = "",
    planning: bool = False,
    plan: str = "",
    follow_up: Mapping[str, Any] | None = None,
) -> str:
    """The issue with its trusted context. `plan` is the approved one, or with `planning` the one to be revised.

    `follow_up` is what a sprint on a pull request of ours takes along (`bot.rounds.in_prompt`).

    Comments are kept newest first up to 40,000 characters, and shown in their order.
    """
    kept: list[Comment] = []
    room = COMMENTS_CAP
    for comment in reversed(comments):
        text = clean(comment.text, delimiter=delimiter)
        if len(text) > room:
            break
        room -= len(text)
        if text:
            kept.append(Comment(_author(comment.author), text, clean(comment.at, cap=40)))
    return _render(
        "task",
        ref=ref,
        title=clean(title, delimiter=delimiter, cap=500),
        body=clean(body, delimiter=delimiter),
        author=_author(author),
        asker=_author(asker),
        instructions=clean(instructions, delimiter=delimiter),
        comments=kept[::-1],
        omitted=len(comments) - len(kept),
        agents_md=clean(agents_md, delimiter=delimiter),
        planning=planning,
        plan=clean(plan, delimiter=delimiter),
        follow_up=_follow_up(follow_up, delimiter) if follow_up else "",
        delimiter=delimiter,
    )


def _follow_up(taken: Mapping[str, Any], delimiter: str) -> str:
    """What others said of a pull request, cleaned; the newest 40,000 characters of remarks, in their order."""

    def fit(text: object, cap: int = TEXT_CAP) -> str:
        return clean(str(text), delimiter=delimiter, cap=cap)

    remarks: list[dict[str, str]] = []
    room = COMMENTS_CAP
    for remark in reversed(taken["remarks"]):
        kept = {
            "name": str(remark["name"]),
            "author": _author(str(remark["author"])),
            "where": re.sub(r"[`\n]", "'", fit(remark["where"], 500)),
            "hunk": fit(remark["hunk"]),
            "text": fit(remark["text"]),
        }
        room -= len(kept["hunk"]) + len(kept["text"])
        if room < 0:
            break
        remarks.append(kept)
    return _render(
        "follow_up",
        pull=int(taken["pull"]),
        branch=str(taken["branch"]),
        reviews=[
            {"author": _author(str(review["author"])), "text": fit(review["text"]), "asks": bool(review["asks"])}
            for review in taken["reviews"]
        ],
        remarks=remarks[::-1],
        omitted=int(taken["omitted"]) + len(taken["remarks"]) - len(remarks),
        failures=[{name: fit(text) for name, text in failure.items()} for failure in taken["failures"]],
        delimiter=delimiter,
    )


def manual_prompt(*, ref: IssueRef, clone_url: str, base_branch: str, checks: Sequence[str], delimiter: str, task: str, bot: str) -> str:
    """All that another agent, or a person with one, needs for an issue: rules, where to work, and the `task` of `task_prompt`; no credential."""
    return _render("manual", ref=ref, clone_url=clone_url, base_branch=base_branch, checks=checks, delimiter=delimiter, task=task, bot=bot)


def warning(left: str, *, planning: bool = False) -> str:
    """Said once when a limit is near; `left` names what is left ("3 steps")."""
    return _render("warning", left=left, planning=planning)


def nudge(*, planning: bool = False) -> str:
    """Said when a reply called no tool."""
    return _render("nudge", planning=planning)


def cutoff() -> str:
    """Said when a reply hit the output limit."""
    return _render("cutoff")


def repeating() -> str:
    """Said when the model goes in circles."""
    return _render("repeating")


def interrupted() -> str:
    """The result of a tool call that a crash cut."""
    return _render("interrupted")


def elided(size: int) -> str:
    """Stands for an older tool result of `size` characters."""
    return _render("elided", size=size)


def digest(lines: Sequence[str]) -> str:
    """Stands for older steps, one line each."""
    return _render("digest", lines=lines)


def _render(name: str, **values: Any) -> str:
    return _templates().get_template(f"{name}.md").render(**values).strip()


@functools.cache
def _templates() -> jinja2.Environment:
    import jinja2

    texts = {entry.name: entry.read_text("utf-8") for entry in resources.files("bot.prompts").iterdir() if entry.name.endswith(".md")}
    return jinja2.Environment(
        loader=jinja2.DictLoader(texts),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - plain text for a model, never HTML
        trim_blocks=True,
        lstrip_blocks=True,
    )
