"""Every sentence the bot says: pure functions from facts to Markdown, in which nothing untrusted can act and no command of ours is live."""

from __future__ import annotations

# Whole modules: an answer is found by its name in the register, which importing its module fills.
from bot.replies import _alerts, _fleet, _follow_ups, _pauses, _plans, _pulls, _refusals, _status, _text, _words, _work  # noqa: F401
from bot.replies._alerts import alert_body, alert_comment, alert_key, alert_title, mirrors_alerts
from bot.replies._fleet import health, verdicts_in_words
from bot.replies._pauses import paused, skipped
from bot.replies._pulls import commit_message, pr_body, pr_title
from bot.replies._refusals import in_the_way, not_permitted, text_changed
from bot.replies._status import status_comment
from bot.replies._text import (
    LISTED,
    VERSION_MARK,
    Links,
    about,
    code,
    duration,
    escape,
    marker,
    moment,
    money,
    on_terminal,
    ordinal,
    place_in_words,
    plural,
    quoted,
    render,
    reply_names,
    with_marker,
)
from bot.replies._words import (
    OTHER_WORK,
    OVERTAKEN,
    POLICY,
    failure_in_words,
    source_in_words,
    sprint_data,
    sprint_in_words,
    stopped_because,
    waiting_in_words,
)
from bot.replies._work import already_active, decision_in_words, log, not_understood, prompt_text, queue, status, too_late

__all__ = [
    "LISTED",
    "OTHER_WORK",
    "OVERTAKEN",
    "POLICY",
    "VERSION_MARK",
    "Links",
    "about",
    "alert_body",
    "alert_comment",
    "alert_key",
    "alert_title",
    "already_active",
    "code",
    "commit_message",
    "decision_in_words",
    "duration",
    "escape",
    "failure_in_words",
    "health",
    "in_the_way",
    "log",
    "marker",
    "mirrors_alerts",
    "moment",
    "money",
    "not_permitted",
    "not_understood",
    "on_terminal",
    "ordinal",
    "paused",
    "place_in_words",
    "plural",
    "pr_body",
    "pr_title",
    "prompt_text",
    "queue",
    "quoted",
    "render",
    "reply_names",
    "skipped",
    "source_in_words",
    "sprint_data",
    "sprint_in_words",
    "status",
    "status_comment",
    "stopped_because",
    "text_changed",
    "too_late",
    "verdicts_in_words",
    "waiting_in_words",
    "with_marker",
]
