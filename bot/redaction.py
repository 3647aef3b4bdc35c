"""Secrets never print, and whatever leaves the service passes the redactor first."""

from __future__ import annotations

import base64
import hmac
import json
import logging
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn
from urllib.parse import quote

from bot.models import ConfigError

MINIMUM_LENGTH = 8
MARK: Final = "[redacted]"
CAP: Final = 60_000

_WINDOW: Final = 12
_GRAM: Final = 6
_STEP: Final = _WINDOW - _GRAM + 1
_HEX_BYTES: Final = 8
_ZERO_WIDTH: Final = "\u200b"


class Secret:
    """A value that shows itself to nobody but the caller of `reveal`.

    repr, str and format give `***`; pickling, copying and JSON raise; equality is constant-time; there is no hash.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself, for the one place that must send it."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return "***"

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        raise TypeError("a Secret has no hash")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled or copied")


class Redactor:
    """Finds every known secret in a text, as it is or in disguise, and puts `[redacted]` in its place.

    Seen through: any case, URL-quoted, JSON-escaped, base64 at any offset (both alphabets), hex (also spaced), reversed, and any 12 characters
    in a row of each. It is a net, not the wall: other encodings pass.
    """

    def __init__(self, secrets: Iterable[Secret]) -> None:
        """Raises ConfigError for a secret too short to be told from ordinary text (under 8 characters); empty ones are ignored."""
        values = {secret.reveal() for secret in secrets if secret}
        short = sum(len(value) < MINIMUM_LENGTH for value in values)
        if short:
            raise ConfigError([f"{short} of the configured secrets are shorter than {MINIMUM_LENGTH} characters: use longer ones"])
        # A run of `need` characters of a form is a find. Its six-character grams are indexed, so that a text is looked at only every seventh place:
        # any twelve characters in a row hold exactly one gram that starts there.
        self._forms: list[tuple[str, int]] = []
        self._grams: dict[str, list[tuple[int, int]]] = {}
        whole: set[str] = set()
        for value in values:
            for form, need in _forms(value):
                if need >= _WINDOW:
                    self._index(form, need)
                else:
                    whole.add(form)
        parts = sorted(whole, key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, parts))) if parts else None

    def _index(self, form: str, need: int) -> None:
        number = len(self._forms)
        self._forms.append((form, need))
        for at in range(len(form) - _GRAM + 1):
            self._grams.setdefault(form[at : at + _GRAM], []).append((number, at))

    def scrub(self, text: str) -> str:
        """The text without secrets."""
        folded = _fold(text)
        spans = [match.span() for match in self._whole.finditer(folded)] if self._whole else []
        grams, covered = self._grams, 0
        if grams:
            for at in range(0, len(folded) - _GRAM + 1, _STEP):
                found = grams.get(folded[at : at + _GRAM])
                if found is not None and at + _GRAM > covered:
                    for number, place in found:
                        start, end = self._run(folded, at, number, place)
                        if end:
                            spans.append((start, end))
                            covered = max(covered, end)
        return _cut_out(text, spans) if spans else text

    def _run(self, folded: str, at: int, number: int, place: int) -> tuple[int, int]:
        """The longest common run of text and form through one shared gram; (0, 0) where it is too short to matter."""
        form, need = self._forms[number]
        start, left = at, place
        while start > 0 and left > 0 and folded[start - 1] == form[left - 1]:
            start, left = start - 1, left - 1
        end, right = at + _GRAM, place + _GRAM
        while end < len(folded) and right < len(form) and folded[end] == form[right]:
            end, right = end + 1, right + 1
        return (start, end) if end - start >= need else (0, 0)

    def clean(self, text: str, cap: int = CAP) -> str:
        """Text by a model, a person or a program, made fit to be posted: redacted, neutralised, at most `cap` characters."""
        return shorten(neutralise(self.scrub(text[: cap * 4])), cap, whole=len(text))


def shorten(text: str, cap: int, *, whole: int = 0) -> str:
    """At most `cap` characters; what was left out is said in the last line. `whole` is the length of the original, where `text` is already cut."""
    if len(text) <= cap and whole <= cap * 4:
        return text
    note = f"\n\n[cut: {max(whole, len(text))} characters in all]"
    return text[: max(0, cap - len(note))] + note[:cap]


def _fold(text: str) -> str:
    # U+0130 is the one character whose lower case is longer, and offsets must stay those of the original.
    return text.replace("\u0130", "I").lower()


def _cut_out(text: str, spans: list[tuple[int, int]]) -> str:
    pieces: list[str] = []
    at = 0
    for start, end in sorted(spans):
        if start >= at:
            pieces += (text[at:start], MARK)
        at = max(at, end)
    return "".join((*pieces, text[at:]))


def _forms(value: str) -> Iterable[tuple[str, int]]:
    """Each disguise in folded case, with the length of the run that gives it away; a short secret must appear whole."""
    raw = value.encode("utf-8", "surrogatepass")
    plain = {value, value[::-1], quote(value, safe=""), quote(value), json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            # The first and last characters also depend on what stands beside the secret.
            plain.add(encode(bytes(shift) + raw)[(shift * 8 + 5) // 6 : (shift + len(raw)) * 8 // 6].decode())
    for form in sorted(plain):
        yield _fold(form), min(_WINDOW, len(_fold(form)))
    codes = [f"{byte:02x}" for byte in raw]
    for prefix, separator in (("", ""), ("", " "), ("", ":"), ("%", ""), ("\\x", ""), ("0x", ", "), ("0x", ",")):
        yield separator.join(prefix + code for code in codes), _HEX_BYTES * (2 + len(prefix) + len(separator)) - len(separator)
    for shift in range(2):
        pairs = ["".join(codes[:shift]), *("".join(codes[at : at + 2]) for at in range(shift, len(codes), 2))]
        yield " ".join(pair for pair in pairs if pair), _HEX_BYTES * 5 // 2 - 1
    yield "".join(f"\\u{unit:04x}" for unit in memoryview(value.encode("utf-16-le", "surrogatepass")).cast("H")), _HEX_BYTES * 6


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x9b[0-?]*[ -/]*[@-~]")
_TRIGGER = re.compile(r"(?<![\w./-])/(?=dispatch)", re.IGNORECASE)
_MENTION = re.compile(r"(?<!\w)@(?=[A-Za-z0-9_-])")
_IMAGE = re.compile(r"!(?=\[)")
_MEDIA = re.compile(
    r"<(?=/?\s*(?:img|picture|source|video|audio|track|iframe|object|embed|svg|link|style|script|input|meta|base)\b)", re.IGNORECASE
)
_MARKER = re.compile(r"<(?=!--\s*timmy-dispatch)", re.IGNORECASE)
_CLOSING = re.compile(
    r"\b([cfr])(?=(?:lose[sd]?|ix(?:e[sd])?|esolve[sd]?|eopen(?:s|ed)?)\b[:\s]{1,8}(?:[\w./-]{0,200}[#!]\d|https?://))", re.IGNORECASE
)


def encodable(text: str) -> str:
    """Text that UTF-8 can hold. JSON spells some characters as two halves: two that meet become one, a half alone becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def neutralise(text: str) -> str:
    """Takes the effect, not the sense, out of text that is not ours: no command, mention, remote image, hidden marker, closing word, control character.

    Reads the same afterwards (a zero-width space breaks what would act); applying it twice changes nothing more.
    """
    text = _CONTROL.sub("", text.replace("\r\n", "\n"))
    text = _TRIGGER.sub("/" + _ZERO_WIDTH, text)
    text = _MENTION.sub("@" + _ZERO_WIDTH, text)
    text = _IMAGE.sub("!" + _ZERO_WIDTH, text)
    text = _MARKER.sub("&lt;", _MEDIA.sub("&lt;", text))
    return _CLOSING.sub(lambda match: match[1] + _ZERO_WIDTH, text)


def terminal(text: str) -> str:
    """Text that cannot steer a terminal: escape sequences and control characters dropped, line ends and tabs kept."""
    return _CONTROL.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))


class RedactingFilter(logging.Filter):
    """For every log handler: message, exception and stack leave redacted and inert, one record a line."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the record; never drops it."""
        if isinstance(record.msg, Mapping):
            record.msg = self._value(record.msg)
        else:
            record.msg, record.args = self._text(_message(record)).replace("\n", "\\n"), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info))
            record.exc_info = None
        if record.exc_text:
            record.exc_text = self._text(record.exc_text)
        if record.stack_info:
            record.stack_info = self._text(record.stack_info)
        return True

    def _text(self, text: str) -> str:
        return terminal(self._redactor.scrub(text))

    def _value(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self._text(str(key)): self._value(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._value(entry) for entry in value]
        return self._text(str(value))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):
        return f"{record.msg} {record.args}"
