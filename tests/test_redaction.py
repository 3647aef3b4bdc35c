"""The redactor sees through disguises, neutralised text does nothing, and logs carry neither secrets nor escapes."""

from __future__ import annotations

import base64
import codecs
import copy
import json
import logging
import pickle
import sys
import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.models import ConfigError
from bot.redaction import MARK, RedactingFilter, Redactor, Secret, neutralise, terminal

VALUE = 'ghp_Ab3/dE5+fG7"hI9=jK1&lM2nO4pQ6rS8'
REDACTOR = Redactor([Secret(VALUE)])

DISGUISES = {
    "exact": lambda v: v,
    "upper case": str.upper,
    "url-quoted": lambda v: quote(v, safe=""),
    "percent everywhere": lambda v: "".join(f"%{b:02X}" for b in v.encode()),
    "json-escaped": lambda v: json.dumps(v)[1:-1],
    "base64": lambda v: base64.b64encode(v.encode()).decode(),
    "base64 off by one": lambda v: base64.b64encode(b"x" + v.encode() + b"yz").decode(),
    "base64url off by two": lambda v: base64.urlsafe_b64encode(b"xy" + v.encode()).decode(),
    "hex": lambda v: v.encode().hex(),
    "hexdump": lambda v: v.encode().hex(" ").upper(),
    "reversed": lambda v: v[::-1],
    "minus seven characters": lambda v: v[:-7],
}
PASSING = {
    "rot13": lambda v: codecs.encode(v, "rot13"),
    "base64 twice": lambda v: base64.b64encode(base64.b64encode(v.encode())).decode(),
}


def leaks(text: str, disguised: str) -> bool:
    return any(disguised[i : i + 14] in text for i in range(len(disguised) - 13))


@pytest.mark.parametrize("name", DISGUISES)
def test_disguise_is_seen_through(name):
    disguised = DISGUISES[name](VALUE)
    out = REDACTOR.scrub(f"before {disguised} after")
    assert MARK in out
    assert not leaks(out, disguised)
    assert out.startswith("before ")
    assert out.endswith(" after")


@pytest.mark.parametrize("name", PASSING)
def test_the_net_has_known_holes(name):
    disguised = PASSING[name](VALUE)
    assert REDACTOR.scrub(disguised) == disguised


@given(
    secret=st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=["Cs"]), min_size=8, max_size=60),
    before=st.text(max_size=40),
    after=st.text(max_size=40),
    name=st.sampled_from([n for n in DISGUISES if n not in ("minus seven characters", "upper case")]),
)
def test_any_secret_in_any_place(secret, before, after, name):
    disguised = DISGUISES[name](secret)
    out = Redactor([Secret(secret)]).scrub(before + disguised + after)
    assert MARK in out
    assert disguised not in out.replace(MARK, "")


@given(
    secret=st.text("abcdefghijklmnop0123456789_-", min_size=12, max_size=40),
    data=st.data(),
    before=st.text(max_size=30),
    after=st.text(max_size=30),
)
def test_any_twelve_characters(secret, data, before, after):
    at = data.draw(st.integers(0, len(secret) - 12))
    window = secret[at : at + 12]
    assert window not in Redactor([Secret(secret)]).scrub(before + window + after)


@given(st.text(max_size=400))
def test_ordinary_text_is_left_alone(text):
    assert REDACTOR.scrub(text) == text


def test_folding_keeps_every_offset():
    assert all(len(chr(c).replace("\u0130", "I").lower()) == 1 for c in range(sys.maxunicode + 1))
    assert REDACTOR.scrub("\u0130\u0130" + VALUE + "\u0130") == "\u0130\u0130" + MARK + "\u0130"


def test_short_secret_is_a_fault_and_an_empty_one_is_none():
    with pytest.raises(ConfigError, match="shorter than 8"):
        Redactor([Secret("short")])
    assert Redactor([Secret("")]).scrub("text") == "text"
    assert Redactor([Secret("eightchr")]).scrub("x EIGHTCHR y") == f"x {MARK} y"


def test_repetitive_text_does_not_hang():
    redactor = Redactor([Secret("a" * 40), Secret("ab" * 20)])
    began = time.thread_time()
    out = redactor.scrub("a" * 60_000 + " " + "ab" * 30_000)
    assert time.thread_time() - began < 4
    assert out.replace(MARK, "").strip() == ""


def test_big_text_is_fast():
    redactor = Redactor([Secret(f"{n:02d}-{VALUE}{n}") for n in range(8)])
    text = "The quick brown fox jumps over the lazy dog 0123456789. " * 1200
    began = time.thread_time()
    redactor.scrub(text)
    assert time.thread_time() - began < 0.5


def test_secret_shows_nothing():
    secret = Secret(VALUE)
    assert f"{secret} {secret!r} {secret:>5}" == "*** *** ***"
    assert secret == Secret(VALUE)
    assert secret != Secret("something else")
    for act in (lambda: pickle.dumps(secret), lambda: copy.deepcopy(secret), lambda: hash(secret), lambda: json.dumps(secret)):
        with pytest.raises(TypeError):
            act()


NEUTRAL = [
    ("/dispatch run", "/dispatch"),
    ("text\n  /Dispatch cancel", "/Dispatch"),
    ("- /dispatch run", "/dispatch"),
    ("ask @alice and (@bob)", "@alice"),
    ("![x](https://evil.example/p.png)", "!["),
    ("![x][ref]", "!["),
    ("<img src=https://evil.example/p.png>", "<img"),
    ("</ IMG>", "</ IMG"),
    ("<video src=x>", "<video"),
    ("<!-- timmy-dispatch: key=sprint:1 -->", "<!-- timmy"),
    ("<!--timmy-dispatch:x-->", "<!--timmy"),
    ("Fixes #3", "Fixes #3"),
    ("resolved: other/repo#9", "resolved"),
    ("close https://forge.example/o/r/issues/4", "close"),
    ("reopens !7", "reopens"),
    ("a\x1b[31mb\x00\x85\u202e", "\x1b"),
    ("/dis\x00patch run", "/dispatch"),
]


@pytest.mark.parametrize(("text", "gone"), NEUTRAL)
def test_neutralised(text, gone):
    assert gone not in neutralise(text)


@pytest.mark.parametrize(
    "text", ["mail a@b.example", "bin/dispatch and ./dispatch", "fix the parser in #3", "a ! b [c](d)", "<b>x</b>", "tab\tand\nline"]
)
def test_harmless_text_stays(text):
    assert neutralise(text) == text


@given(st.text() | st.lists(st.sampled_from([t for t, _ in NEUTRAL])).map("".join))
def test_neutralise_is_idempotent(text):
    once = neutralise(text)
    assert neutralise(once) == once


def test_clean_redacts_neutralises_and_caps():
    out = REDACTOR.clean(f"/dispatch {VALUE} " + "x" * 400_000, cap=500)
    assert len(out) <= 500
    assert "/dispatch" not in out
    assert VALUE not in out
    assert out.endswith("characters in all]")
    assert REDACTOR.clean("short") == "short"


def test_terminal_text_is_inert():
    assert terminal("a\x1b[2Jb\x1b]0;title\x07c\x9b31md\x07\re\tf\ng") == "abcde\tf\ng"


def test_logs_carry_neither_secrets_nor_new_lines():
    record = logging.LogRecord("n", logging.ERROR, "f", 1, "key %s\nforged", (VALUE,), None)
    assert RedactingFilter(REDACTOR).filter(record)
    assert logging.Formatter().format(record) == f"key {MARK}\\nforged"

    try:
        raise RuntimeError(VALUE)
    except RuntimeError:
        record = logging.LogRecord(
            "n", logging.ERROR, "f", 1, {"event": VALUE, "n": 1, "list": [VALUE], "o": Secret("x" * 9)}, (), sys.exc_info()
        )
    RedactingFilter(REDACTOR).filter(record)
    assert record.msg == {"event": MARK, "n": 1, "list": [MARK], "o": "***"}
    assert VALUE not in logging.Formatter().format(record)

    record = logging.LogRecord("n", logging.ERROR, "f", 1, "bad %d", ("x",), None)
    RedactingFilter(REDACTOR).filter(record)
    assert record.msg.startswith("bad %d")
