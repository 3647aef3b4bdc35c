"""The morning report and its other forms: the same figures as a comment, a terminal's tables, a page without any outside asset, and JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy.engine import Connection

from bot import replies
from bot.figures import HOUR_MS, Bucket, Downtime, Figures, Group, Outage, Spell, window_words
from bot.models import IssueRef, OutcomeKind, Reply
from bot.providers.health import EntryHealth, EntryState
from bot.repositories import Repositories
from bot.settings import Settings
from bot.store import Store, figures, intents, outbox

if TYPE_CHECKING:
    from rich.console import RenderableType

log = structlog.get_logger()

GOOD_COLOR, OTHER_COLOR, MONEY_COLOR = "#2f7d4f", "#b5502f", "#3b6ea5"
SPELL_COLORS = {"stalled": "#b5302f", "degraded": "#c79a2b", "paused": "#7a7f87"}
CHART_WIDTH, CHART_HEIGHT, BAR_HEIGHT, GAP = 720, 160, 22, 6


def collect(conn: Connection, *, length_ms: int, now_ms: int, repo_id: int | None = None) -> Figures:
    """The figures of the window that ends now, alone in a read transaction of its own."""
    figures.consistent(conn)
    return figures.figures(conn, since_ms=now_ms - length_ms, until_ms=now_ms, now_ms=now_ms, repo_id=repo_id, outages=outages)


def outages(known: Mapping[str, Mapping[str, Any]], now_ms: int) -> tuple[Outage, ...]:
    """The provider entries that cannot be called now, from their stored health."""
    found = []
    for name, data in sorted(known.items()):
        health = EntryHealth.from_json(data)
        down = health.state is EntryState.DOWN
        if down or (health.state is not EntryState.HEALTHY and health.until_ms > now_ms):
            found.append(Outage(name, health.reason, 0 if down else health.until_ms))
    return tuple(found)


class MorningReport:
    """Posts the fleet's figures to the configured issue, at most once an hour, through the outbox."""

    def __init__(
        self,
        store: Store,
        repositories: Repositories,
        *,
        settings: Settings,
        kick_projector: Callable[[], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._repositories = repositories
        self._settings = settings
        self._kick_projector = kick_projector
        self._now_ms = now_ms

    async def post(self) -> None:
        """One report. The key holds the hour, so that a schedule's step that runs again changes nothing."""
        target = IssueRef.parse(self._settings.report.issue)
        wanted = target.full_name.casefold()
        repo_id = next((key for key, name in self._repositories.configured_names().items() if name.casefold() == wanted), None)
        if repo_id is None:
            log.warning("report.no_repository", issue=str(target))
            return
        now = self._now_ms()
        key = f"report:{repo_id}:{target.number}:{now // HOUR_MS}"
        found = await self._store.read(partial(collect, length_ms=self._settings.report.hours * HOUR_MS, now_ms=now))
        repo = self._repositories.name_of(repo_id, target.full_name)

        def write(conn: Connection) -> bool:
            if not intents.claim(conn, key, now):
                return False
            said = Reply("report", {"figures": found.to_json()})
            outbox.show(conn, key=key, repo_id=repo_id, repo=repo, issue=target.number, comment_id=0, reply=said, now_ms=now)
            return True

        if await self._store.write(write):
            self._kick_projector()
            log.info("report.posted", issue=str(target), settled=found.settled)


def as_markdown(found: Figures) -> str:
    """As the comment has it."""
    return replies.on_terminal(Reply("report", {"figures": found.to_json()})) + "\n"


def as_json(found: Figures) -> str:
    """One document; moments are Unix ms, money is USD."""
    return json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n"


def sums(found: Figures) -> list[tuple[str, str]]:
    """The figures in one line each, name and value, plain text."""
    reverted = f", {found.reverted:,} reverted" if found.reverted else ""
    per_merged = "none merged" if found.usd_per_merged is None else replies.money(found.usd_per_merged)
    return [
        ("Asked for", f"{sum(found.asked.values()):,}{_counts(found.asked, ' (', ')')}"),
        ("Ended", f"{found.settled:,}{_counts(found.outcomes, ' (', ')')}"),
        ("Pull requests", f"{found.opened:,} opened, {found.merged:,} merged, {found.closed:,} closed without a merge{reverted}"),
        ("Cost", f"{replies.money(found.usd)}, {found.tokens:,} tokens, {found.steps:,} steps"),
        ("Per merged pull request", per_merged),
        ("Model calls", f"{found.calls:,}, {found.failed_calls:,} failed, {replies.money(found.calls_usd)}"),
        ("Trigger to pull request", _spread(found.to_pull.count, found.to_pull.median_ms, found.to_pull.p90_ms, found.to_pull.longest_ms)),
        (
            "Trigger to start",
            _spread(found.queue_wait.count, found.queue_wait.median_ms, found.queue_wait.p90_ms, found.queue_wait.longest_ms),
        ),
        ("Waited for", _counts(found.waits) or "nothing"),
        ("Trouble", f"{found.crashes:,} crashes, {found.requeues:,} requeues, {found.stalled:,} stalled"),
        ("The fleet was", replies.verdicts_in_words([asdict(one) for one in found.verdicts], found.unwatched_ms) or "not judged yet"),
        ("Watchdog and breaker", _counts(found.acts) or "nothing"),
        ("Provider outages", "; ".join(_downtime(one) for one in found.downtimes) or "none"),
        ("Providers down", ", ".join(f"{outage.name} ({outage.reason})" for outage in found.outages) or "none"),
        ("Commands", _counts(found.commands) or "none"),
        ("Deliveries", _counts(found.deliveries) or "none"),
        ("Now", f"{found.running:,} running, {found.queued:,} queued"),
    ]


def as_tables(found: Figures) -> list[RenderableType]:
    """For a terminal."""
    from rich.table import Table
    from rich.text import Text

    from bot.redaction import terminal

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for place, column in enumerate(columns):
            made.add_column(column, justify="right" if place and len(columns) > 2 else "left", overflow="fold")  # noqa: PLR2004
        return made

    shown = table(title_of(found), "", "")
    for name, value in sums(found):
        shown.add_row(Text(name, "bold"), Text(terminal(value)))
    parts = [shown]
    for title, groups in (("Repositories", found.repositories), ("Models", found.models)):
        if groups:
            part = table(f"\n{title}", "", "sprints", "pull requests", "merged", "steps", "tokens", "cost")
            for group in groups:
                part.add_row(Text(terminal(group.name)), *_cells(group))
            parts.append(part)
    if found.spells:
        part = table("\nStalled, degraded, paused", "", "from", "for", "because")
        part.columns[1].justify = part.columns[3].justify = "left"
        for spell in found.spells:
            part.add_row(spell.verdict, replies.moment(spell.from_ms), _lasted(spell), Text(terminal(_because(spell))))
        parts.append(part)
    if found.failures:
        part = table("\nCame to nothing", "", "sprints", "examples")
        part.columns[2].justify = "left"
        for failure in found.failures:
            examples = "\n".join(f"{example.ref} {example.detail}".strip()[:160] for example in failure.examples)
            part.add_row(Text(_kind(failure.outcome, failure.reason)), f"{failure.count:,}", Text(terminal(examples)))
        parts.append(part)
    return list(parts)


def _lasted(spell: Spell) -> str:
    return replies.duration(spell.until_ms - spell.from_ms) + (" so far" if spell.lasts else "")


def _because(spell: Spell) -> str:
    return "; ".join(part for part in (", ".join(spell.causes), spell.reason) if part)


def _downtime(one: Downtime) -> str:
    return f"{one.name} {one.count} in {replies.duration(one.total_ms)} ({one.reason})"


def title_of(found: Figures) -> str:
    """What it is about."""
    where = f" in {found.repo}" if found.repo else ""
    return f"The last {window_words(found.until_ms - found.since_ms)}{where}, until {replies.moment(found.until_ms)}"


def as_html(found: Figures) -> str:
    """A page that stands alone: style and charts are inside it, nothing is fetched, nothing runs."""
    groups = [("Repositories", found.repositories), ("Models", found.models)]
    parts = [
        f"<h1>{_text(title_of(found))}</h1>",
        "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in sums(found)) + "</dl>",
        _figure("Sprints that ended", "green: a pull request, red: all else", _columns(found.buckets)),
        _figure("Cost of them", f"USD, {replies.money(found.usd)} in all", _money_columns(found.buckets)),
        _figure("How they ended", "", _bars(found.outcomes)),
    ]
    for title, rows in groups:
        if rows:
            head = "<tr><th></th>" + "".join(
                f"<th>{name}</th>" for name in ("sprints", "pull requests", "merged", "steps", "tokens", "cost")
            )
            body = "".join(
                f"<tr><td>{_text(group.name)}</td>" + "".join(f"<td class=n>{cell}</td>" for cell in _cells(group)) + "</tr>"
                for group in rows
            )
            parts.append(f"<h2>{title}</h2><table>{head}</tr>{body}</table>")
    if found.spells:
        body = "".join(
            f"<tr><td>{_text(spell.verdict)}</td><td>{replies.moment(spell.from_ms)}</td><td class=n>{_lasted(spell)}</td>"
            f"<td>{_text(_because(spell))}</td></tr>"
            for spell in found.spells
        )
        head = "<tr><th></th><th>from</th><th class=n>for</th><th>because</th></tr>"
        parts.append(f"<h2>Stalled, degraded, paused</h2>{_figure('', '', _strip(found))}<table>{head}{body}</table>")
    if found.failures:
        body = "".join(
            f"<tr><td>{_text(_kind(failure.outcome, failure.reason))}</td><td class=n>{failure.count:,}</td><td>"
            + "<br>".join(_text(f"{example.ref} {example.detail}".strip()) for example in failure.examples)
            + "</td></tr>"
            for failure in found.failures
        )
        parts.append(f"<h2>Came to nothing</h2><table><tr><th></th><th class=n>sprints</th><th>examples</th></tr>{body}</table>")
    return _PAGE.format(title=_text(title_of(found)), body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem }} dt {{ font-weight: 600 }} dd {{ margin: 0 }}
table {{ border-collapse: collapse; width: 100% }} th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884; vertical-align: top }}
td.n, th.n {{ text-align: right; white-space: nowrap }} figure {{ margin: 2rem 0 }} svg {{ width: 100%; height: auto }} svg text {{ fill: currentColor; font-size: 12px }}
</style></head><body>
{body}
</body></html>
"""


def _figure(title: str, note: str, svg: str) -> str:
    return f"<figure><figcaption><strong>{_text(title)}</strong> {_text(note)}</figcaption>{svg}</figure>" if svg else ""


def _columns(buckets: tuple[Bucket, ...]) -> str:
    most = max((bucket.good + bucket.other for bucket in buckets), default=0)
    if not most:
        return ""
    shapes = []
    for place, bucket in enumerate(buckets):
        x, width = _slot(place, len(buckets))
        good, other = (CHART_HEIGHT * count / most for count in (bucket.good, bucket.other))
        title = f"<title>{replies.moment(bucket.since_ms)}: {bucket.good} and {bucket.other}</title>"
        shapes.append(
            f'<g>{title}<rect x="{x:.1f}" y="{CHART_HEIGHT - good:.1f}" width="{width:.1f}" height="{good:.1f}" fill="{GOOD_COLOR}"/>'
            f'<rect x="{x:.1f}" y="{CHART_HEIGHT - good - other:.1f}" width="{width:.1f}" height="{other:.1f}" fill="{OTHER_COLOR}"/></g>'
        )
    return _chart(shapes, buckets, f"{most}")


def _money_columns(buckets: tuple[Bucket, ...]) -> str:
    most = max((bucket.usd for bucket in buckets), default=0.0)
    if most <= 0:
        return ""
    shapes = []
    for place, bucket in enumerate(buckets):
        x, width = _slot(place, len(buckets))
        height = CHART_HEIGHT * bucket.usd / most
        title = f"<title>{replies.moment(bucket.since_ms)}: {replies.money(bucket.usd)}</title>"
        shapes.append(
            f'<rect x="{x:.1f}" y="{CHART_HEIGHT - height:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{MONEY_COLOR}">{title}</rect>'
        )
    return _chart(shapes, buckets, replies.money(most))


def _strip(found: Figures) -> str:
    """The window as one line of time, with what was amiss in it; the worst is drawn last."""
    scale = CHART_WIDTH / max(1, found.until_ms - found.since_ms)
    shapes = [f'<rect x="0" y="0" width="{CHART_WIDTH}" height="{BAR_HEIGHT}" fill="currentColor" opacity="0.12"/>']
    order = list(SPELL_COLORS)
    for spell in sorted(found.spells, key=lambda one: -order.index(one.verdict)):
        x, width = (max(spell.from_ms, found.since_ms) - found.since_ms) * scale, max(1.0, spell.inside_ms * scale)
        title = f"<title>{spell.verdict} {replies.moment(spell.from_ms)}, {_lasted(spell)}</title>"
        shapes.append(
            f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{SPELL_COLORS[spell.verdict]}">{title}</rect>'
        )
    first, last, below = replies.moment(found.since_ms), replies.moment(found.until_ms), BAR_HEIGHT + 16
    return (
        f'<svg viewBox="0 0 {CHART_WIDTH} {BAR_HEIGHT + 20}" role="img">{"".join(shapes)}<text x="0" y="{below}">{first}</text>'
        f'<text x="{CHART_WIDTH}" y="{below}" text-anchor="end">{last}</text></svg>'
    )


def _slot(place: int, count: int) -> tuple[float, float]:
    slot = CHART_WIDTH / max(1, count)
    return place * slot, max(1.0, slot - 2)


def _chart(shapes: Iterable[str], buckets: tuple[Bucket, ...], most: str) -> str:
    first, last = replies.moment(buckets[0].since_ms), replies.moment(buckets[-1].since_ms)
    return (
        f'<svg viewBox="0 -16 {CHART_WIDTH} {CHART_HEIGHT + 36}" role="img">{"".join(shapes)}'
        f'<line x1="0" y1="{CHART_HEIGHT}" x2="{CHART_WIDTH}" y2="{CHART_HEIGHT}" stroke="currentColor" stroke-width="1"/>'
        f'<text x="0" y="-4">{_text(most)}</text><text x="0" y="{CHART_HEIGHT + 16}">{first}</text>'
        f'<text x="{CHART_WIDTH}" y="{CHART_HEIGHT + 16}" text-anchor="end">{last}</text></svg>'
    )


def _bars(counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    most, height = max(counts.values()), len(counts) * (BAR_HEIGHT + GAP)
    shapes = []
    for place, (name, count) in enumerate(counts.items()):
        y, width = place * (BAR_HEIGHT + GAP), max(1.0, (CHART_WIDTH - 260) * count / most)
        color = GOOD_COLOR if name in (OutcomeKind.PULL_REQUEST, OutcomeKind.UPDATED) else OTHER_COLOR
        shapes.append(
            f'<text x="0" y="{y + 15}">{_text(name.replace("_", " "))}</text>'
            f'<rect x="160" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{color}"/>'
            f'<text x="{165 + width:.1f}" y="{y + 15}">{count:,}</text>'
        )
    return f'<svg viewBox="0 0 {CHART_WIDTH} {height}" role="img">{"".join(shapes)}</svg>'


def _cells(group: Group) -> tuple[str, str, str, str, str, str]:
    return (
        f"{group.sprints:,}",
        f"{group.good:,}",
        f"{group.merged:,}",
        f"{group.steps:,}",
        f"{group.tokens:,}",
        replies.money(group.usd),
    )


def _kind(outcome: str, reason: str) -> str:
    return outcome.replace("_", " ") + (f" ({reason})" if reason else "")


def _counts(counts: Mapping[str, int], before: str = "", after: str = "") -> str:
    text = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())
    return f"{before}{text}{after}" if text else ""


def _spread(count: int, median_ms: int, p90_ms: int, longest_ms: int) -> str:
    if not count:
        return "none"
    median, high, longest = (replies.duration(value) for value in (median_ms, p90_ms, longest_ms))
    return f"half within {median}, nine of ten within {high}, the longest {longest}"


def _text(text: str) -> str:
    return html.escape("".join(letter if letter.isprintable() else " " for letter in text))
