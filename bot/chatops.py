"""The `/dispatch` grammar on Markdown blocks, the keys of what it finds, and what a command is; a typo is a value, never an exception."""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeAlias

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from bot.figures import Figures
from bot.models import (
    Actor,
    Ask,
    CancelResult,
    Decision,
    DispatchError,
    IssueFacts,
    IssueRef,
    LogLine,
    Pause,
    PauseScope,
    Permission,
    Plan,
    PlanState,
    Position,
    Reaction,
    Reply,
    RepoId,
    RepositoryLoad,
    Skip,
    Source,
    SprintId,
    SprintState,
    SprintView,
    UserError,
    Verdict,
)
from bot.settings import RepositorySettings, Settings
from bot.snapshot import FleetSnapshot, ProbeState

NAMESPACE = "/dispatch"
DEFAULT_VERB = "run"
MARKER = "<!-- timmy-dispatch:v1"
BODY_CAP = 65_536
TEXT_CAP = 2_000
# Links are matched in quadratic time: of one paragraph no more is read, so that no comment holds everything up.
PARAGRAPH_CAP = 4_000

_CANDIDATE = re.compile(r"(?im)^[^A-Za-z/\n]*/dispatch(?:\s|$)")
_COMMAND = re.compile(r"/dispatch(?:[^\S\n][^\n]*)?(?=\n|\Z)", re.IGNORECASE)
_WORD = re.compile(r"""(?P<key>[A-Za-z][A-Za-z0-9_-]*)=(?:"(?P<quoted>[^"]*)"(?=\s|\Z)|(?P<plain>[^\s"]*)(?=\s|\Z))|(?P<word>\S+)""")
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*=")


@dataclass(frozen=True, slots=True)
class Invocation:
    """One command as written. `args` are the words before the first `key=value`, `instructions` the free text after the last one.

    `instructions` also holds the lines below the command in its paragraph. `text` is the command line alone with whitespace folded, in NFC,
    verb spelt out: what makes two commands equal; `ordinal` counts equal texts in one comment from 0. Keys of options are lower case.
    """

    verb: str
    args: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    instructions: str = ""
    text: str = ""
    ordinal: int = 0


@dataclass(frozen=True, slots=True)
class ParseError:
    """A command that cannot be read: what is wrong with it in one sentence, and the nearest thing that can be, or ""."""

    text: str
    problem: str
    suggestion: str = ""
    ordinal: int = 0


Found: TypeAlias = Invocation | ParseError


def parse(body: str, verbs: Collection[str]) -> list[Found]:
    """Every command of a comment in order. A command stands at the start of a line of an ordinary paragraph, list items included.

    Quotes, code, headings, tables, links, HTML and comments are no paragraphs. A text that carries our marker outside a quote is ours and holds none.
    Reads the first 65,536 characters.
    """
    text = body[:BODY_CAP].replace("\r\n", "\n").replace("\r", "\n")
    if has_marker(body) or not _CANDIDATE.search(text):
        return []
    seen: Counter[str] = Counter()
    found: list[Found] = []
    for line, below in _commands(text):
        item = _read(line, below, verbs)
        found.append(replace(item, ordinal=seen[item.text]))
        seen[item.text] += 1
    return found


def capped(found: Sequence[Found], limit: int) -> list[Found]:
    """The first `limit` commands; the rest is one ParseError."""
    if len(found) <= limit:
        return list(found)
    rest = len(found) - limit
    problem = f"One comment may hold {limit} commands; {rest} more {'was' if rest == 1 else 'were'} left out. Put them into a new comment."
    return [*found[:limit], ParseError(text="", problem=problem)]


def new_commands(old_body: str, new_body: str, verbs: Collection[str], limit: int | None = None) -> list[Found]:
    """What an edit added: the commands of `new_body` (at most `limit`, see `capped`) that `old_body` did not hold as often."""
    before, after = parse(old_body, verbs), parse(new_body, verbs)
    if limit is not None:
        before, after = capped(before, limit), capped(after, limit)
    known = {(item.text, item.ordinal) for item in before}
    return [item for item in after if (item.text, item.ordinal) not in known]


def has_marker(body: str) -> bool:
    """True for a text of the bot's own. A marker in a quoted line is a person answering the bot."""
    return any(MARKER in line and not line.lstrip().startswith(">") for line in body.splitlines()) if MARKER in body else False


def command_key(comment_id: int, command: Found) -> str:
    """The intent key of a command in a comment."""
    digest = hashlib.sha256(command.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"command:{comment_id}:{digest}:{command.ordinal}"


def label_key(event_id: int) -> str:
    """The intent key of a trigger label: the id of the timeline item that added it."""
    return f"label:{event_id}"


def assignment_key(event_id: int) -> str:
    """The intent key of an assignment to the bot: the id of the timeline item that tells of it."""
    return f"assignment:{event_id}"


def mention_key(repo_id: int, issue: int) -> str:
    """The intent key of the bot's mention in an issue's text; an issue has one."""
    return f"mention:{repo_id}:{issue}"


def addressed_key(repo_id: int, issue: int) -> str:
    """The intent key of the one hint on an issue whose comments mention the bot and command nothing."""
    return f"addressed:{repo_id}:{issue}"


def unread_key(repo_id: int, issue: int) -> str:
    """The intent key of the one hint on an issue or pull request where somebody wrote a command in a place that none is read from."""
    return f"unread:{repo_id}:{issue}"


def launcher_key(repo_id: int, issue: int, attempt: int) -> str:
    """The intent key of a backlog pick."""
    return f"launch:{repo_id}:{issue}:{attempt}"


def gave_up_key(repo_id: int, issue: int, attempts: int) -> str:
    """The intent key of the word that the backlog pick gives up on an issue."""
    return f"gave_up:{repo_id}:{issue}:{attempts}"


def terminal_key(fresh_id: str) -> str:
    """The intent key of one call on the command line."""
    return f"terminal:{fresh_id}"


def unlabel_key(event_id: int) -> str:
    """The intent key of the trigger label's removal, by the id of the item that had added it."""
    return f"unlabel:{event_id}"


def unassign_key(event_id: int) -> str:
    """The intent key of the end of an assignment, by the id of the item that had told of it."""
    return f"unassign:{event_id}"


def closed_key(repo_id: int, issue: int, at_ms: int) -> str:
    """The intent key of an issue's closing; `at_ms` is when, 0 for its deletion."""
    return f"closed:{repo_id}:{issue}:{at_ms}"


def review_key(review_id: int) -> str:
    """The intent key of a review that requests changes."""
    return f"review:{review_id}"


def check_key(head_sha: str, failures: Iterable[tuple[str, str]]) -> str:
    """The intent key of a red commit: its head, and what is red there as (context, state)."""
    red = "\0".join(f"{context}={state}" for context, state in sorted(failures))
    return f"check:{head_sha}:{hashlib.sha256(red.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def is_forge_act(ask: Ask) -> bool:
    """True for a cancel that follows from what the forge let somebody do (close, delete, remove the label, unassign the bot): no right of ours is
    needed and no answer but the status comment's.
    """
    return ask.key.startswith(("unlabel:", "unassign:", "closed:"))


def trigger_of(ask: Ask) -> str:
    """What kind of trigger brought an Ask, as the setting `triggers` names it; "" for what no such setting governs."""
    kind = ask.key.partition(":")[0]
    return {"label": "label", "command": "command", "assignment": "assignment", "mention": "mention", "addressed": "mention"}.get(kind, "")


def mentions(body: str, login: str) -> bool:
    """Whether a text speaks to `@login`: as a whole word in any case, outside of quotes, code, links, HTML and comments; our own texts never do."""
    text = body[:BODY_CAP].replace("\r\n", "\n").replace("\r", "\n")
    if not login or f"@{login}".casefold() not in text.casefold() or has_marker(body):
        return False
    name = re.compile(rf"(?i)(?<![\w@/.+-])@{re.escape(login)}(?![\w@/+-]|\.\w)")
    references: dict[str, object] = {}
    quotes = 0
    for token in _markdown().parse(text, references):
        quotes += (token.type == "blockquote_open") - (token.type == "blockquote_close")
        said = token.content[:PARAGRAPH_CAP] if token.type == "inline" and not quotes else ""
        if name.search(said) and name.search(_said(said, references)):
            return True
    return False


def _said(source: str, references: dict[str, object]) -> str:
    """The plain words of one block: what stands in code, links, HTML and commands is a blank."""
    tokens: list[Token] = []
    _markdown().inline.parse(source, _markdown(), references, tokens)
    links, words = 0, []
    for token in tokens:
        links += (token.type == "link_open") - (token.type == "link_close")
        words.append(token.content if token.type == "text" and not links else "\n" if token.type.endswith("break") else " ")
    return "".join(words)


@cache
def _markdown() -> MarkdownIt:
    # Emphasis is switched off because it cannot hide a line and its matching is the slowest rule on hostile input.
    markdown = MarkdownIt("commonmark").enable("table").disable(["emphasis", "inline"])
    markdown.inline.ruler.before("text", "dispatch", _rule)
    return markdown


def _rule(state: StateInline, silent: bool) -> bool:  # noqa: FBT001 - markdown-it calls it by position
    match = None if silent or state.linkLevel else _COMMAND.match(state.src, state.pos)
    if match is None or state.src[: state.pos].rstrip(" \t")[-1:] not in ("", "\n"):
        return False
    token = state.push("dispatch", "", 0)
    token.meta = {"start": match.start(), "end": match.end()}
    state.pos = match.end()
    return True


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """Yields each command line with the lines below it, up to the next command of the paragraph."""
    references: dict[str, object] = {}
    for source in _paragraphs(_markdown().parse(text, references)):
        tokens: list[Token] = []
        _markdown().inline.parse(source[:PARAGRAPH_CAP], _markdown(), references, tokens)
        spans = [token.meta for token in tokens if token.type == "dispatch"]
        ends = [span["start"] for span in spans[1:]] + [len(source)]
        for span, end in zip(spans, ends, strict=False):
            yield source[span["start"] : span["end"]], source[span["end"] : end]


def _paragraphs(tokens: Sequence[Token]) -> Iterator[str]:
    quotes = 0
    for before, token in pairwise(tokens):
        quotes += (before.type == "blockquote_open") - (before.type == "blockquote_close")
        if before.type == "paragraph_open" and not quotes and _CANDIDATE.search(token.content):
            yield token.content


def _read(line: str, below: str, verbs: Collection[str]) -> Found:
    words = fold(line)[len(NAMESPACE) :].strip()
    first, _, rest = words.partition(" ")
    if not first or _OPTION.match(first):
        first, rest = DEFAULT_VERB, words
    verb = first.casefold()
    text = f"{NAMESPACE} {verb} {rest}".rstrip()
    if len(text) > TEXT_CAP:
        return ParseError(
            text[:TEXT_CAP], f"This command is longer than {TEXT_CAP} characters. Put the instructions on the lines below it."
        )
    if verb not in verbs:
        near = difflib.get_close_matches(verb, sorted(verbs), n=1, cutoff=0.6)
        return ParseError(text, f"There is no verb `{_shown(first)}`.", f"{NAMESPACE} {near[0]}" if near else "")
    return _arguments(text, verb, rest, "\n".join(part.strip() for part in below.strip().split("\n")))


def _arguments(text: str, verb: str, rest: str, below: str) -> Found:
    args: list[str] = []
    options: dict[str, str] = {}
    position = 0
    while match := _WORD.search(rest, position):
        key = (match["key"] or "").lower()
        if not key:
            if problem := _unreadable(match["word"]):
                return ParseError(text, problem)
            if options:
                break
            args.append(match["word"])
        else:
            value = match["plain"] if match["quoted"] is None else match["quoted"]
            if not value.strip():
                return ParseError(text, f"The option `{key}=` has no value.")
            if key in options:
                return ParseError(text, f"The option `{key}=` is given twice.")
            options[key] = value
        position = match.end()
    free = "\n".join(part for part in (rest[position:].strip(), _clean(below)) if part)
    return Invocation(verb=verb, args=tuple(args), options=options, instructions=free, text=text)


def _unreadable(word: str) -> str:
    """Why a word that looks like an option is none, or ""."""
    option = _OPTION.match(word)
    return f'The value of `{option[0]}` has a quote that does not end: write `{option[0]}"a b"`.' if option else ""


def _clean(text: str) -> str:
    return "".join(char for char in text if char in "\n\t" or char.isprintable()).strip()


def fold(text: str) -> str:
    """One line in NFC: every run of whitespace is one blank, control and invisible format characters are gone."""
    plain = "".join(" " if char.isspace() else char for char in unicodedata.normalize("NFC", text) if char.isspace() or char.isprintable())
    return " ".join(plain.split())


def _shown(word: str) -> str:
    return word.replace("`", "'")[:40]


class LabelAdded(NamedTuple):
    """Who put the trigger label on, or assigned the bot, from the timeline; `event_id` is that item's id."""

    event_id: int
    actor: Actor
    at_ms: int


@dataclass(frozen=True, slots=True)
class PullFate:
    """What became of a pull request: `state` is merged, closed or open. `merged_sha` is "" unless merged."""

    repo_id: RepoId
    number: int
    head_branch: str
    state: str
    at_ms: int
    merged_sha: str = ""


@dataclass(frozen=True, slots=True)
class RepositoryFact:
    """The current address of a repository; `deleted` when it is gone."""

    repo_id: RepoId
    full_name: str
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class TextEdited:
    """Somebody edited an issue's text; `digest` is `text_hash` of what it says now."""

    repo_id: RepoId
    issue: IssueRef
    actor: Actor
    digest: str


@dataclass(frozen=True, slots=True)
class PullNews:
    """Something moved at a pull request that may be ours, found by its number, its head commit or its branch: it is worth a look.

    `what` is `reviews`, `checks` or `branch` (deleted).
    """

    repo_id: RepoId
    what: str
    number: int = 0
    sha: str = ""
    branch: str = ""
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class Reverted:
    """A commit on the way to others says that it reverts these commits."""

    repo_id: RepoId
    shas: tuple[str, ...]
    at_ms: int


class NotNow(DispatchError):
    """What was asked cannot be decided while a sprint runs; the one who asks comes again when it has ended."""


Finding: TypeAlias = Ask | PullFate | PullNews | RepositoryFact | Reverted | TextEdited


class Desk(Protocol):
    """What a handler may look at."""

    @property
    def settings(self) -> Settings:
        """The configuration."""

    @property
    def verbs(self) -> Collection[str]:
        """The verbs of `commands/`."""

    @property
    def me_id(self) -> int:
        """The bot's own user id."""

    async def label_adder(self, repo: str, number: int, label: str) -> LabelAdded | None:
        """The newest timeline item of `owner/repo` issue `number` that added `label` and is not followed by its removal; asks the forge."""

    @property
    def me_login(self) -> str:
        """The bot's own login."""

    async def assigner(self, repo: str, number: int) -> LabelAdded | None:
        """The newest timeline item of an issue that assigned the bot and is not followed by its unassignment; asks the forge."""

    async def active_trigger(self, repo_id: RepoId, number: int) -> str:
        """The intent key of what started the issue's active sprint, or else the one that made the plan that waits; "" where there is neither."""


class Queue(Protocol):
    """The queue as one command sees it: inside the deciding transaction, for the issue of its Ask."""

    def active(self) -> SprintView | None:
        """The sprint of this issue that has not settled."""

    def last(self) -> SprintView | None:
        """The newest settled sprint of this issue."""

    def enqueue(
        self, *, source: Source, priority: int, instructions: str, options: Mapping[str, str], text_hash: str, title: str
    ) -> SprintView | None:
        """A new sprint; None where one is active already."""

    def cancel(self, sprint_id: SprintId, by: str, why: str = "") -> CancelResult:
        """Stops a sprint, or tells why not; `why` names the act of the forge that it follows from (`bot.replies.stopped_because`)."""

    def plan(self) -> Plan | None:
        """The plan of this issue that waits for a person, else the newest one, else None."""

    def end_plan(self, plan: Plan, state: PlanState, *, by: str, reason: str = "") -> bool:
        """A plan that waits, waits no longer; False where somebody was first."""

    def revise(self, sprint_id: SprintId, by: str, *, instructions: str, options: Mapping[str, str]) -> bool:
        """A planning sprint makes its plan with these instructions and options, anew where it has begun; False where it ends already."""

    def told_of_text(self, plan: Plan, digest: str) -> None:
        """People were told that the issue's text is another one than the plan's; that very text may be approved now."""

    def plans(self, limit: int) -> Sequence[tuple[Plan, str]]:
        """(plan, the issue's title) of plans that wait for a person, in the whole fleet, the one that ends first in front."""

    def position(self, sprint_id: SprintId) -> Position | None:
        """Its place in line; None where it does not wait."""

    def listing(self, limit: int) -> list[SprintView]:
        """At most `limit` sprints of the fleet: those in flight, then those queued, in order."""

    def counts(self) -> Mapping[SprintState, int]:
        """How many sprints of the fleet are in each state; a state without any may be missing."""

    def prioritise(self, sprint_id: SprintId, priority: int) -> bool:
        """Another priority for a sprint that waits; False where it waits no longer."""

    def trail(self, limit: int) -> list[Decision]:
        """The newest decisions about this issue, oldest first."""

    def log(self, sprint_id: SprintId, limit: int) -> list[LogLine]:
        """The last things a sprint did, oldest first; secrets were taken out before they were stored."""

    def pauses(self) -> Sequence[Pause]:
        """Every pause of the fleet, of any repository and of a provider that holds now, the fleet's first, and then the open breakers."""

    def pause(self, scope: PauseScope, *, until_ms: int | None, reason: str, provider: str = "") -> Pause:
        """Pauses the fleet, this repository or a provider, in the place of an earlier pause of the same."""

    def resume(self, scope: PauseScope, *, provider: str = "") -> Pause | None:
        """Ends a pause, and closes the breaker of the same; returns what held, or None where nothing did."""

    def skipped(self) -> Skip | None:
        """The entry of this issue on the skip list."""

    def skip(self, reason: str) -> Skip:
        """Puts this issue on the skip list."""

    def unskip(self) -> Skip | None:
        """Takes this issue off the skip list; returns the entry, or None where there was none."""

    def open_pulls(self) -> int:
        """Open pull requests of the bot in this repository."""

    def spent_usd(self, since_ms: int) -> float:
        """Money that all sprints of the fleet have used since then."""

    def snapshot(self) -> FleetSnapshot:
        """The fleet as the store knows it at this moment."""

    def load(self) -> Sequence[RepositoryLoad]:
        """What each repository has in flight and queued, the busiest first."""

    def watchdog(self) -> Sequence[ProbeState]:
        """The watchdog's probes as they stand."""

    def wish_probes(self, names: Sequence[str]) -> None:
        """Asks for these probes to run at once and to act on what they find."""

    def figures(self, *, since_ms: int, until_ms: int) -> Figures:
        """What happened in a window of time, in this repository; in the whole fleet where the Ask names none."""


class Fact(StrEnum):
    """What a command must know of the forge before it can decide; asked before the transaction opens.

    ISSUE: the issue itself, also on the terminal. AUTHOR: what the issue's author may do here, for a verb that takes the text as an order.
    WORK: open pull requests and open dependencies. COMMENTS: what people with write access have said.
    """

    ISSUE = "issue"
    AUTHOR = "author"
    WORK = "work"
    COMMENTS = "comments"


@dataclass(frozen=True, slots=True)
class Context:
    """All a command may know. `facts` is None where the forge could not be asked (the terminal while it is down).

    `permission` is the live level of the person who asks, `author_permission` that of the issue's author (NONE where it was not asked for).
    """

    ask: Ask
    facts: IssueFacts | None
    permission: Permission
    queue: Queue
    settings: Settings
    repository: RepositorySettings
    now_ms: int
    commands: Mapping[str, Command]
    author_permission: Permission = Permission.NONE


@dataclass(frozen=True, slots=True)
class Command:
    """One verb. `run` is synchronous, because it runs inside the one write transaction; `summary` defaults to the first line of its docstring.

    `usage` and every example start with `/dispatch VERB` and must parse; `pulls` says whether it may be used on a person's pull request (on one of
    ours it is about the issue); `hidden` leaves it out of the help. `wants` are the facts it cannot do without: one that wants none works on the
    terminal while the forge is down. `likes` are facts it tells more with, where the forge answers. `of_issue` is False for one that is about a
    repository or the fleet: the terminal need not name an issue.
    """

    run: Callable[[Context], Verdict]
    usage: str
    needs: Permission
    examples: tuple[str, ...]
    summary: str = ""
    pulls: bool = True
    hidden: bool = False
    wants: frozenset[Fact] = frozenset()
    likes: frozenset[Fact] = frozenset()
    of_issue: bool = True

    def __post_init__(self) -> None:
        if not self.summary:
            object.__setattr__(self, "summary", (self.run.__doc__ or "").strip().partition("\n")[0].rstrip("."))


def needed(command: Command, verb: str, repository: RepositorySettings) -> Permission:
    """The level a verb needs in a repository: its own, or a higher one that the operator's settings name for it there."""
    role = repository.roles.get(verb)
    return command.needs if role is None else max(command.needs, Permission[role.upper()])


def invalid(reason: str, name: str, **data: object) -> Verdict:
    """A verdict on what cannot be done as asked; `reason` is for `explain`, `name` and `data` are the reply."""
    return Verdict("invalid", reason, Reply(name, dict(data), Reaction.CONFUSED))


def denied(reason: str, name: str, **data: object) -> Verdict:
    """A refusal of the person or of the place."""
    return Verdict("denied", reason, Reply(name, dict(data), Reaction.CONFUSED))


def decide(context: Context) -> Verdict:
    """The answer to an Ask whose person the gate has let in: what stands against it whatever the verb, else what the command says."""
    ask, facts = context.ask, context.facts
    off = unheard(ask, context.settings, context.repository)
    if off is not None:
        return off
    if ask.error:
        return invalid("grammar", "not_understood", text=ask.text, problem=ask.error, suggestion=ask.suggestion)
    command = context.commands.get(ask.verb)
    if command is None:
        return invalid("unknown verb", "not_understood", text=ask.text, problem=f"There is no verb `{_shown(ask.verb)}`.", suggestion="")
    if is_old(ask, now_ms=context.now_ms, settings=context.settings):
        return invalid("found late", "too_old", text=ask.text or f"{NAMESPACE} {ask.verb}", asked_ms=ask.asked_ms, now_ms=context.now_ms)
    needs = needed(command, ask.verb, context.repository)
    if context.permission < needs and not is_forge_act(ask):
        return denied("permission", "not_permitted", login=ask.actor.login, verb=ask.verb, needs=needs.name, has=context.permission.name)
    if facts is not None and facts.is_pull and not command.pulls:
        return invalid("pull request", "not_on_pull", verb=ask.verb, issue=issue_of_branch(facts.head_branch))
    try:
        return command.run(context)
    except UserError as error:
        return invalid("options", "not_understood", text=ask.text, problem=str(error), suggestion="")


def unheard(ask: Ask, settings: Settings, repository: RepositorySettings) -> Verdict | None:
    """What is no trigger here starts nothing and is not answered. A comment is heard all the same; only its verbs that start something refuse."""
    trigger = trigger_of(ask)
    if trigger in ("", "command") or trigger in settings.triggers_of(repository):
        return None
    return Verdict("invalid", f"the {trigger} is no trigger here", Reply())


def is_old(ask: Ask, *, now_ms: int, settings: Settings) -> bool:
    """True for what reconciliation found so late that it is asked about instead of run."""
    return ask.source is Source.RECONCILE and now_ms - ask.asked_ms > settings.reconcile.ask_after_seconds * 1000


def issue_of_branch(branch: str) -> int:
    """The issue whose sprint made `dispatch/issue-<n>` (or `dispatch/issue-<n>-<k>`); 0 for any other branch."""
    match = re.fullmatch(r"dispatch/issue-([1-9][0-9]{0,8})(?:-[0-9]+)?", branch)
    return int(match[1]) if match else 0


_CLOSING = re.compile(r"(?i)\b(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?):?\s+(?:[\w.-]+/[\w.-]+)?#([0-9]{1,9})\b")


def closes(text: str, issue: int) -> bool:
    """Whether a pull request's text closes the issue in the words that Gitea reads."""
    return any(int(match[1]) == issue for match in _CLOSING.finditer(text))


def to_ask(
    command: Found,
    *,
    comment_id: int,
    repo_id: RepoId,
    issue: IssueRef,
    actor: Actor,
    asked_ms: int,
    delivered_hash: str = "",
    source: Source = Source.COMMAND,
) -> Ask:
    """The wish behind one command of a comment, readable or not."""
    ask = Ask(
        key=command_key(comment_id, command),
        repo_id=repo_id,
        issue=issue,
        actor=actor,
        source=source,
        verb="",
        asked_ms=asked_ms,
        comment_id=comment_id,
        delivered_hash=delivered_hash,
        text=command.text,
    )
    if isinstance(command, ParseError):
        return replace(ask, error=command.problem, suggestion=command.suggestion)
    return replace(ask, verb=command.verb, args=command.args, options=command.options, instructions=command.instructions)


def docs_table(commands: Mapping[str, Command]) -> str:
    """The Markdown table of docs/commands.md: one row a verb, from the declarations."""
    rows = ["| Command | Who | What it does | Examples |", "|---|---|---|---|"]
    for _, command in sorted(commands.items()):
        if not command.hidden:
            examples = "<br>".join(f"`{example}`" for example in command.examples)
            cells = (f"`{command.usage}`", command.needs.name.lower(), command.summary, examples)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"
