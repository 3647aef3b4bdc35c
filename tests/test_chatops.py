"""The grammar: what is a command and what is only text, what an edit adds, and that hostile text is read in bounded time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bot import replies
from bot.chatops import (
    MARKER,
    Command,
    Invocation,
    ParseError,
    capped,
    closed_key,
    command_key,
    docs_table,
    fold,
    has_marker,
    is_forge_act,
    issue_of_branch,
    label_key,
    launcher_key,
    new_commands,
    parse,
    terminal_key,
    to_ask,
    unlabel_key,
)
from bot.models import Actor, IssueRef, Permission, RepoId, Source, Verdict

VERBS = ("cancel", "help", "queue", "retry", "run", "status")


def texts(body: str) -> list[str]:
    return [item.text for item in parse(body, VERBS)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("/dispatch", ["/dispatch run"]),
        ("/dispatch run", ["/dispatch run"]),
        ("/Dispatch  Status ", ["/dispatch status"]),
        ("  /dispatch status", ["/dispatch status"]),
        ("/dispatch\u00a0status", ["/dispatch status"]),
        ("hello\n/dispatch run", ["/dispatch run"]),
        ("hello\r\n/dispatch run\r\n", ["/dispatch run"]),
        ("hello\n      /dispatch run", ["/dispatch run"]),
        ("- /dispatch run", ["/dispatch run"]),
        ("1. first\n2. /dispatch run", ["/dispatch run"]),
        ("> quoted\n\n/dispatch run", ["/dispatch run"]),
        ("<details>\n\n/dispatch run\n\n</details>", ["/dispatch run"]),
        ("/dispatch run\n/dispatch status\n\n/dispatch run", ["/dispatch run", "/dispatch status", "/dispatch run"]),
        ("/dispatch run `a\nb`\n/dispatch status", ["/dispatch run `a", "/dispatch status"]),
        ("```\ncode\n```\n/dispatch run", ["/dispatch run"]),
    ],
)
def test_a_command_at_the_start_of_a_line_is_read(body: str, expected: list[str]) -> None:
    assert texts(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        "",
        "please /dispatch run",
        "/dispatcher run",
        "/dispatch/run",
        "\\/dispatch run",
        "> /dispatch run",
        "> quoted\n/dispatch run",
        "> - /dispatch run",
        "- > /dispatch run",
        "`/dispatch run`",
        "a `b\n/dispatch run\nc` d",
        "``a\n/dispatch run\n`b`` c",
        "```\n/dispatch run\n```",
        "```\r\n/dispatch run\r\n```\r\n",
        "````\n```\n/dispatch run\n```\n````",
        "~~~\n/dispatch run\n~~~",
        "```\n/dispatch run",
        "- ```\n  /dispatch run\n  ```",
        "- ```\r\n  /dispatch run\r\n",
        "    /dispatch run",
        "\t/dispatch run",
        "- item\n\n      /dispatch run",
        "<!--\n/dispatch run\n-->",
        "<!-- never closed\n\n/dispatch run",
        "text <!--\n/dispatch run\n--> text",
        "<details>\n/dispatch run\n</details>",
        "<div>\n/dispatch run\n</div>",
        'text <a title="\n/dispatch run">x</a>',
        "# /dispatch run",
        "/dispatch run\n===",
        "/dispatch run\n---",
        "[text\n/dispatch run](http://x)",
        "[text\n/dispatch run\n][ref]\n\n[ref]: http://x",
        "![text\n/dispatch run\n](http://x)",
        '[text](http://x "\n/dispatch run")',
        "[ref]:\n/dispatch",
        "/dispatch run | a\n--- | ---",
        "| a | b |\n|---|---|\n| x | y |\n/dispatch run",
        "- [ ] /dispatch run",
        "&#47;dispatch run",
        f"/dispatch run\n\n{MARKER} key=sprint:1 -->",
        f"/dispatch run {MARKER}",
    ],
)
def test_everything_else_is_only_text(body: str) -> None:
    assert parse(body, VERBS) == []


def test_a_person_who_quotes_the_bot_is_heard() -> None:
    body = f"> **Failed.** Something.\n>\n> {MARKER} key=sprint:1 -->\n\n/dispatch retry"
    assert not has_marker(body)
    assert texts(body) == ["/dispatch retry"]


def test_arguments_options_and_instructions() -> None:
    body = '/dispatch run keep the API budget=$2 Model="a b" see x=1\nand this\n\tindented\n/dispatch status\n\nnot this'
    assert parse(body, VERBS) == [
        Invocation(
            verb="run",
            args=("keep", "the", "API"),
            options={"budget": "$2", "model": "a b"},
            instructions="see x=1\nand this\nindented",
            text='/dispatch run keep the API budget=$2 Model="a b" see x=1',
        ),
        Invocation(verb="status", text="/dispatch status"),
    ]


def test_an_option_first_means_run() -> None:
    assert parse("/dispatch budget=$2", VERBS) == [Invocation(verb="run", options={"budget": "$2"}, text="/dispatch run budget=$2")]


@pytest.mark.parametrize(
    ("body", "problem", "suggestion"),
    [
        ("/dispatch rnu", "There is no verb `rnu`.", "/dispatch run"),
        ("/dispatch cancle", "There is no verb `cancle`.", "/dispatch cancel"),
        ("/dispatch please fix this", "There is no verb `please`.", ""),
        ("/dispatch `run`", "There is no verb `'run'`.", "/dispatch run"),
        ("/dispatch run budget=", "The option `budget=` has no value.", ""),
        ("/dispatch run steps=1 steps=2", "The option `steps=` is given twice.", ""),
        ('/dispatch run model="a', 'The value of `model=` has a quote that does not end: write `model="a b"`.', ""),
        ("/dispatch run " + "x" * 3000, "This command is longer than 2000 characters. Put the instructions on the lines below it.", ""),
    ],
)
def test_what_cannot_be_read_is_a_value(body: str, problem: str, suggestion: str) -> None:
    (error,) = parse(body, VERBS)
    assert isinstance(error, ParseError)
    assert (error.problem, error.suggestion) == (problem, suggestion)


def test_equal_commands_are_numbered() -> None:
    found = parse("/dispatch\n\n/dispatch  run\n\n/dispatch status\n\n/dispatch oops\n\n/dispatch oops", VERBS)
    assert [(item.text, item.ordinal) for item in found] == [
        ("/dispatch run", 0),
        ("/dispatch run", 1),
        ("/dispatch status", 0),
        ("/dispatch oops", 0),
        ("/dispatch oops", 1),
    ]
    assert len({command_key(7, item) for item in found}) == 5


def test_a_hundred_commands_are_five_and_one_answer() -> None:
    found = capped(parse("\n\n".join(["/dispatch status"] * 100), VERBS), 5)
    assert len(found) == 6
    assert found[-1] == ParseError("", "One comment may hold 5 commands; 95 more were left out. Put them into a new comment.")
    assert capped(found[:5], 5) == found[:5]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("/dispatch run", "/dispatch run", []),
        ("/dispatch", "/dispatch run", []),
        ("/dispatch run\r\n\r\nplease", "/dispatch   run\n\nplease!", []),
        ("/dispatch run", "/dispatch run\n\n/dispatch status", [("/dispatch status", 0)]),
        ("/dispatch run", "/dispatch status\n\n/dispatch run\n\n/dispatch run", [("/dispatch status", 0), ("/dispatch run", 1)]),
        ("/dispatch run\nkeep it", "/dispatch run\nkeep it all", []),
        ("/dispatch rnu", "/dispatch run", [("/dispatch run", 0)]),
        ("> /dispatch run", "/dispatch run", [("/dispatch run", 0)]),
        ("/dispatch run", "", []),
    ],
)
def test_an_edit_adds_only_what_is_new(old: str, new: str, expected: list[tuple[str, int]]) -> None:
    assert [(item.text, item.ordinal) for item in new_commands(old, new, VERBS)] == expected


def test_an_edit_cannot_pass_the_cap() -> None:
    five = "\n\n".join(["/dispatch status"] * 5)
    (error,) = new_commands(five, five + "\n\n/dispatch run", VERBS, 5)
    assert isinstance(error, ParseError)
    assert new_commands(five + "\n\n/dispatch run", five + "\n\n/dispatch run\n\n/dispatch cancel", VERBS, 5) == []


def test_keys() -> None:
    (item,) = parse("/dispatch run", VERBS)
    assert command_key(12, item) == "command:12:0473063aefc2f945:0"
    assert command_key(12, item) != command_key(13, item)
    assert label_key(131) == "label:131"
    assert unlabel_key(131) == "unlabel:131"
    assert launcher_key(5, 1, 2) == "launch:5:1:2"
    assert terminal_key("01J") == "terminal:01J"
    assert closed_key(5, 1, 9) == "closed:5:1:9"


def test_no_person_can_write_a_forge_act() -> None:
    (item,) = parse("/dispatch cancel only_trigger=label:1", VERBS)
    ask = to_ask(item, comment_id=3, repo_id=RepoId(5), issue=IssueRef("a", "b", 1), actor=Actor(3, "bob"), asked_ms=1)
    assert not is_forge_act(ask)
    assert (ask.verb, ask.source, ask.comment_id, ask.options) == ("cancel", Source.COMMAND, 3, {"only_trigger": "label:1"})


def test_an_unreadable_command_becomes_an_ask_that_is_only_answered() -> None:
    (item,) = parse("/dispatch rnu", VERBS)
    ask = to_ask(item, comment_id=3, repo_id=RepoId(5), issue=IssueRef("a", "b", 1), actor=Actor(3, "bob"), asked_ms=1)
    assert (ask.verb, ask.error, ask.suggestion, ask.text) == ("", "There is no verb `rnu`.", "/dispatch run", "/dispatch rnu")


@pytest.mark.parametrize(
    ("branch", "issue"),
    [("dispatch/issue-7", 7), ("dispatch/issue-7-2", 7), ("dispatch/issue-0", 0), ("x/dispatch/issue-7", 0), ("main", 0), ("", 0)],
)
def test_issue_of_branch(branch: str, issue: int) -> None:
    assert issue_of_branch(branch) == issue


def test_the_marker_is_one_and_the_same() -> None:
    assert MARKER == replies.VERSION_MARK


@pytest.mark.parametrize(
    "body",
    [
        ">" * 1_000_000,
        "`" * 1_000_000,
        "[" * 1_000_000,
        "![" * 500_000,
        "[](" * 300_000,
        "- " * 500_000,
        "\n" * 1_000_000,
        " " * 1_000_000,
        "<!--" * 250_000,
        "[a\n" * 300_000,
        "*" * 1_000_000,
        "> " * 20 + "/dispatch run\n" * 50_000,
        "".join("`" * (i % 200 + 1) + " " for i in range(650)),
    ],
    ids=lambda body: repr(body[:4]),
)
@pytest.mark.parametrize("shape", ["{}\n\n/dispatch run", "/dispatch run\n{}", "/dispatch run {}"])
def test_hostile_text_is_read_in_bounded_time(body: str, shape: str) -> None:
    begun = time.process_time()
    parse(shape.format(body), VERBS)
    assert time.process_time() - begun < 4


WORD = st.text(st.characters(codec="utf-8", exclude_characters="="), min_size=1).map(fold).filter(bool)
OPTIONS = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_-]{0,10}", fullmatch=True),
    st.text(st.characters(codec="utf-8", exclude_characters='"'), min_size=1).map(fold).filter(bool),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(verb=st.sampled_from(VERBS), args=st.lists(WORD, max_size=4), options=OPTIONS, free=st.lists(WORD, max_size=3))
def test_what_is_written_is_read(verb: str, args: list[str], options: dict[str, str], free: list[str]) -> None:
    words = [word for arg in args for word in arg.split()]
    line = " ".join(["/dispatch", verb, *words, *(f'{key}="{value}"' for key, value in options.items()), *(free if options else [])])
    (item,) = parse(line, VERBS)
    if len(line) > 1900:
        return
    assert isinstance(item, Invocation)
    assert (item.verb, item.args, item.options) == (verb, tuple(words), options)
    assert item.instructions == (" ".join(free) if options else "")
    assert parse(item.text, VERBS) == [item]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('/dispatch run\n>`[](!<->-# \t\r*="x|'), max_size=200))
def test_any_text_is_read_without_an_error(body: str) -> None:
    found = parse(body, VERBS)
    assert new_commands(body, body, VERBS) == []
    assert len({(item.text, item.ordinal) for item in found}) == len(found)


def _nothing(_: object) -> Verdict:
    """Does a | b."""
    raise AssertionError


def test_docs_table_escapes_its_cells_and_hides_the_hidden() -> None:
    shown = Command(_nothing, usage="/dispatch x [a|b]", needs=Permission.ADMIN, examples=("/dispatch x",))
    hidden = Command(_nothing, usage="/dispatch y", needs=Permission.ADMIN, examples=(), hidden=True)
    assert docs_table({"x": shown, "y": hidden}) == (
        "| Command | Who | What it does | Examples |\n|---|---|---|---|\n| `/dispatch x [a\\|b]` | admin | Does a \\| b | `/dispatch x` |\n"
    )
