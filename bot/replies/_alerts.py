"""Issues that mirror alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bot.redaction import neutralise
from bot.replies._text import _PLAIN_URL, LISTED, TITLE_CAP, VERSION_MARK, _disarm, _one_line, code, escape, plural

# Keys of what mirrors alerts begin so.
ALERT = "alert:"
ALERTS_LISTED = 50
ALERT_TEXT = 600


def alert_key(group: str, number: int | str) -> str:
    """The key of what is written for a group of alerts: number 3 of group 1f... is `alert:1f...:3`."""
    return f"{ALERT}{group}:{number}"


def mirrors_alerts(body: str) -> bool:
    """True for the text of an issue that mirrors alerts: nothing is ever worked on there."""
    return f"{VERSION_MARK} key={ALERT}" in body


def alert_title(labels: Mapping[str, str]) -> str:
    """One line of plain text: `Alert: DispatchFleetStalled`, with the other labels the group is formed by in brackets."""
    name = labels.get("alertname", "")
    rest = ", ".join(f"{key}={value}" for key, value in sorted(labels.items()) if key not in ("alertname", "service"))
    words = f"{name or 'alerts'} ({rest})" if rest else name or "alerts"
    return f"Alert: {_disarm(neutralise(_one_line(words, TITLE_CAP)))}"


def alert_body(alerts: Sequence[Mapping[str, Any]]) -> str:
    """What the issue of a group says: every alert that fires, since when, and what to do. `alerts` are those that fire, as the store has them."""
    lines = [f"**{plural(len(alerts), 'alert')} firing.**" if alerts else "**Resolved.**", ""]
    lines += [_alert(alert) for alert in alerts[:ALERTS_LISTED]]
    if len(alerts) > ALERTS_LISTED:
        lines.append(f"- and {len(alerts) - ALERTS_LISTED} more")
    lines += ["", "<sub>I mirror Alertmanager here: the issue closes when nothing fires any more, and I never work on it.</sub>"]
    return "\n".join(lines)


def alert_comment(kind: str, added: Sequence[Mapping[str, Any]], gone: int, firing: int) -> str:
    """What changed: `kind` is again, changed or resolved; `added` began to fire, `gone` ended, `firing` are left."""
    if kind == "resolved":
        return "Resolved: nothing of this group fires any more."
    lines = ["It fires again." if kind == "again" else f"{plural(firing, 'alert')} firing now."]
    if added:
        lines += ["", "Began:", "", *(_alert(alert) for alert in added[:ALERTS_LISTED])]
        if len(added) > ALERTS_LISTED:
            lines.append(f"- and {len(added) - ALERTS_LISTED} more")
    if gone and kind == "changed":
        lines += ["", f"Ended: {gone}."]
    return "\n".join(lines)


def _alert(alert: Mapping[str, Any]) -> str:
    labels, notes = alert["labels"], alert["annotations"]
    shown = {key: value for key, value in labels.items() if key not in ("alertname", "service", "severity")}
    since = datetime.fromtimestamp(max(0, alert["starts_us"]) / 1e6, UTC)
    head = f"- **{escape(labels.get('alertname', 'alert'))}** ({escape(labels.get('severity', '') or 'no severity')}), since {since:%Y-%m-%d %H:%M:%S} UTC"
    parts = [head, *(f"  {escape(notes[name], ALERT_TEXT)}" for name in ("summary", "description") if notes.get(name))]
    if notes.get("runbook_url"):
        url = notes["runbook_url"]
        parts.append(f"  What to do: {f'<{url}>' if _PLAIN_URL.fullmatch(url) else code(url)}")
    if shown:
        parts.append("  " + ", ".join(code(f"{key}={value}") for key, value in sorted(shown.items())[:LISTED]))
    return "\n".join(parts)
