"""Templates become HTML in one place, where every value is redacted, stripped of control characters and escaped; no template can forget it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

from bot import replies
from bot.redaction import terminal
from bot.web.pages import sight

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

STATIC = {"pages.css": "text/css", "pages.js": "text/javascript", "icon.svg": "image/svg+xml"}


class Renderer:
    """`scrub` takes the service's secrets out of a text. Rendering blocks: call it in a thread."""

    def __init__(self, scrub: Callable[[str], str], **common: Any) -> None:
        self._scrub = scrub
        self._common = common
        folder = resources.files("bot.web") / "static"
        self.static = {name: (folder / name).read_bytes() for name in STATIC}
        self._mark = hashlib.sha256(b"".join(self.static.values())).hexdigest()[:12]

    def __call__(self, name: str, **values: Any) -> str:
        """The template `name` with these values."""
        return self._environment.get_template(name).render(mark=self._mark, **self._common, **values)

    @functools.cached_property
    def _environment(self) -> jinja2.Environment:
        import jinja2
        from markupsafe import Markup, escape

        def clean(value: Any) -> Any:
            # Strings that the templates themselves made out of cleaned pieces are Markup already.
            if isinstance(value, Markup | jinja2.Undefined) or value is None or isinstance(value, bool | int | float):
                return value
            return self._scrub(terminal(str(value)))

        def prose(text: str) -> Markup:
            """A sentence of ours, in which backticks stand for code."""
            pieces = str(clean(text)).split("`")
            parts = (Markup("<code>{}</code>").format(piece) if odd % 2 else escape(piece) for odd, piece in enumerate(pieces))
            return Markup("").join(parts)

        texts = {
            entry.name: entry.read_text("utf-8")
            for entry in (resources.files("bot.web") / "templates").iterdir()
            if entry.name.endswith(".html")
        }
        made = jinja2.Environment(
            loader=jinja2.DictLoader(texts),
            undefined=jinja2.StrictUndefined,
            autoescape=True,
            finalize=clean,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        made.filters |= {
            "prose": prose,
            "money": replies.money,
            "duration": replies.duration,
            "plural": replies.plural,
            "place": replies.place_in_words,
            "source": replies.source_in_words,
            "state_word": sight.state_word,
            "decision": sight.decision_in_words,
            "sentence": sight.sentence,
            "why_it_waits": sight.why_it_waits,
            "advice": sight.advice,
            "iso": iso,
            "clock": clock,
        }
        return made


def iso(ms: int) -> str:
    """`2031-05-04T03:02:01Z`."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clock(ms: int) -> str:
    """`4 May 2031, 03:02 UTC`."""
    moment = datetime.fromtimestamp(ms / 1000, UTC)
    return f"{moment.day} {moment:%b %Y, %H:%M} UTC"
