"""The fleet for people: health, load, probes, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bot.figures import TROUBLED, window_words
from bot.models import Json, OutcomeKind
from bot.replies._pauses import pause_in_words
from bot.replies._text import LISTED, _cell, _list, code, duration, escape, moment, money, plural, says

_SIGNS = {"working": "🟢", "idle": "🟢", "paused": "⏸️", "degraded": "🟡", "stalled": "🔴"}
# A restart is no time without a judge.
UNWATCHED_MS = 60_000


@says
def health(verdict: str, reasons: Sequence[str], pauses: Sequence[Json]) -> str:
    """The verdict on the fleet with its evidence."""
    sign = _SIGNS.get(verdict, "")
    listed = [escape(reason, 400) for reason in reasons] + [pause_in_words(pause) for pause in pauses if pause["scope"] != "fleet"]
    return f"{sign} **{verdict.upper()}**\n\n{_list(listed)}".strip()


@says
def fleet(workers: Sequence[Json], rows: Sequence[Json], hidden: int, pauses: Sequence[Json]) -> str:
    """Workers and their slots, and what each repository has running and waiting."""
    slots, busy = sum(worker["slots"] for worker in workers), sum(worker["running"] for worker in workers)
    head = (
        f"{plural(len(workers), 'worker')}, {busy} of {plural(slots, 'slot')} busy."
        if workers
        else "No worker is there: the service does not run."
    )
    blocks = [" ".join([head, *(f"⏸️ {pause_in_words(pause)}." for pause in pauses)])]
    if workers:
        lines = ["| Worker | State | Busy | Last sign of life |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(code(worker['name'], 60))} | {worker['state']} | {worker['running']} of {worker['slots']} | {duration(worker['age_ms'])} ago |"
            for worker in workers[:LISTED]
        ]
        blocks.append("\n".join(lines))
    if rows:
        lines = ["| Repository | Running | Waiting |", "|---|---|---|"]
        lines += [f"| {_cell(code(row['repo']))} | {row['in_flight']:,} | {row['queued']:,} |" for row in rows[:LISTED]]
        blocks.append("\n".join(lines))
    if hidden:
        blocks.append(f"Besides, {plural(hidden, 'sprint')} in other repositories.")
    elif not rows:
        blocks.append("No sprint is queued or running.")
    return "\n\n".join(blocks)


_SEEN = {"ok": "🟢", "warn": "🟡", "failing": "🔴", "unknown": "⚪"}


@says
def watchdog(rows: Sequence[Json], now_ms: int) -> str:
    """The probes of the watchdog, and what each sees."""
    if not rows:
        return "The watchdog has not looked yet: it is switched off, or the service has just been started."
    bad = sum(row["verdict"] != "ok" for row in rows if row["ran_ms"])
    head = f"{plural(len(rows), 'probe')}, {bad:,} with something to tell." if bad else f"{plural(len(rows), 'probe')}, all is well."
    lines = ["| Probe | Verdict | Looked | What it sees |", "|---|---|---|---|"]
    for row in rows:
        seen = [escape(text, 200) for text in row["reasons"]]
        seen += [f"{row['more']:,} more"] if row["more"] else []
        seen += [f"{row['hidden']:,} in other repositories"] if row["hidden"] else []
        if row["acted_ms"]:
            seen.append(f"last action {duration(now_ms - row['acted_ms'])} ago: {escape(row['acted'], 40)}")
        if row["wished"]:
            seen.append("asked to act now")
        looked = f"{duration(now_ms - row['ran_ms'])} ago" if row["ran_ms"] else "not yet"
        verdict = f"{_SEEN.get(row['verdict'], '')} {row['verdict']}" if row["ran_ms"] else ""
        policy = " (may act)" if row["policy"] == "act" else ""
        lines.append(f"| {_cell(code(row['name'], 40))}{policy} | {verdict} | {looked} | {_cell('; '.join(seen))} |")
    return head + "\n\n" + "\n".join(lines)


@says
def watchdog_wished(names: Sequence[str]) -> str:
    """Probes were asked to act."""
    listed = ", ".join(code(name, 40) for name in names) or "nothing"
    return (
        f"The watchdog looks now and does what helps: {listed}. `/dispatch watchdog` shows in a moment what came of it; a pause holds it."
    )


@says
def report(figures: Json) -> str:
    """What happened in a window of time: the morning report, and the answer to `/dispatch report`. References stand in code spans."""
    since, until = figures["since_ms"], figures["until_ms"]
    where = f" in {code(figures['repo'])}" if figures["repo"] else ""
    head = f"### Report: the last {window_words(until - since)}{where}\n\n{moment(since)} to {moment(until)}."
    now = f"{figures['running']:,} running and {figures['queued']:,} queued now."
    asked = sum(figures["asked"].values())
    fleet_was = _report_fleet(figures)
    if not asked and not figures["settled"] and not figures["calls"] and not any(figures[name] for name in ("opened", "merged", "closed")):
        return "\n\n".join([f"{head} No sprint was asked for and none ended. {now}", *fleet_was])
    blocks = [f"{head} {now}", _report_sums(figures, asked), *fleet_was]
    for title, groups in (("Repository", figures["repositories"]), ("Model", figures["models"])):
        if groups:
            blocks.append(_report_groups(title, groups))
    if figures["failures"]:
        blocks.append(_report_failures(figures["failures"]))
    rest = [
        ("Waited for", figures["waits"]),
        ("Commands", figures["commands"]),
        ("Deliveries", figures["deliveries"]),
        ("Watchdog and breaker", figures["acts"]),
    ]
    lines = [f"**{name}:** {_report_counts(counts)}" for name, counts in rest if counts]
    lines += [f"**Provider down:** {code(outage['name'])} ({escape(outage['reason'], 100)})" for outage in figures["outages"][:LISTED]]
    if figures.get("downtimes"):
        lines.append("**Provider outages:**\n" + "\n".join(f"- {downtime_in_words(row)}" for row in figures["downtimes"][:LISTED]))
    return "\n\n".join([*blocks, *lines])


def _report_sums(figures: Json, asked: int) -> str:
    outcomes = _report_counts(figures["outcomes"]) or "none"
    pulls = f"{figures['opened']:,} opened, {figures['merged']:,} merged, {figures['closed']:,} closed without a merge"
    pulls += f", {figures['reverted']:,} reverted" if figures.get("reverted") else ""
    per_merged = "" if figures["usd_per_merged"] is None else f", {money(figures['usd_per_merged'])} per merged pull request"
    failed = f", {figures['failed_calls']:,} of them failed" if figures["failed_calls"] else ""
    rows = [
        ("Asked for", f"{plural(asked, 'sprint')}" + (f" ({_report_counts(figures['asked'])})" if asked else "")),
        ("Ended", f"{plural(figures['settled'], 'sprint')}: {outcomes}"),
        ("Pull requests", pulls),
        ("Cost", f"{money(figures['usd'])}, {plural(figures['tokens'], 'token')}, {plural(figures['steps'], 'step')}{per_merged}"),
        ("Model calls", f"{figures['calls']:,}{failed}, {money(figures['calls_usd'])}"),
        ("Trigger to pull request", _report_spread(figures["to_pull"])),
        ("Trigger to start", _report_spread(figures["queue_wait"])),
    ]
    trouble = {name: figures[name] for name in ("crashes", "requeues", "stalled") if figures[name]}
    rows += [("Trouble", _report_counts(trouble))] if trouble else []
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _report_fleet(figures: Json) -> list[str]:
    """How long the fleet was what, and its stalls, degradations and pauses one by one; nothing where nobody ever judged it."""
    if not figures.get("verdicts"):
        return []
    blocks = [f"**The fleet was** {verdicts_in_words(figures['verdicts'], figures['unwatched_ms'])}."]
    if figures["spells"]:
        blocks.append("\n".join(f"- {_SIGNS.get(spell['verdict'], '')} {spell_in_words(spell)}" for spell in figures["spells"][-LISTED:]))
    return blocks


def verdicts_in_words(times: Sequence[Mapping[str, Any]], unwatched_ms: int) -> str:
    """`idle 20 h, working 3 h 2 min, stalled 12 min (twice, the longest 10 min)`."""
    parts = []
    for row in times:
        often = (
            f" ({row['count']:,} times, the longest {duration(row['longest_ms'])})"
            if row["count"] > 1 and row["verdict"] in TROUBLED
            else ""
        )
        parts.append(f"{row['verdict']} {duration(row['total_ms'])}{often}")
    if unwatched_ms >= UNWATCHED_MS:
        parts.append(f"and nobody looked for {duration(unwatched_ms)}, because no service ran")
    return ", ".join(parts)


def spell_in_words(spell: Mapping[str, Any]) -> str:
    """When one stall, degradation or pause began, how long it lasted, and of what."""
    whole = duration(spell["until_ms"] - spell["from_ms"])
    lasts = f"for {whole} so far" if spell["lasts"] else f"for {whole}"
    because = "; ".join(part for part in (", ".join(code(cause, 40) for cause in spell["causes"]), escape(spell["reason"], 200)) if part)
    return f"**{spell['verdict']}** {lasts}, from {moment(spell['from_ms'])}" + (f": {because}" if because else "")


def _report_groups(title: str, groups: Sequence[Json]) -> str:
    lines = [f"| {title} | Sprints | Pull requests | Merged | Cost |", "|---|---|---|---|---|"]
    for group in groups[:LISTED]:
        ended = sum(group["outcomes"].values())
        good = sum(group["outcomes"].get(outcome, 0) for outcome in (OutcomeKind.PULL_REQUEST, OutcomeKind.UPDATED))
        lines.append(f"| {_cell(code(group['name'], 80))} | {ended:,} | {good:,} | {group['merged']:,} | {money(group['usd'])} |")
    return "\n".join([*lines, *([f"\n{len(groups) - LISTED} more."] if len(groups) > LISTED else [])])


def _report_failures(failures: Sequence[Json]) -> str:
    lines = ["**Came to nothing:**"]
    for failure in failures[:LISTED]:
        kind = failure["outcome"].replace("_", " ") + (f" ({failure['reason']})" if failure["reason"] else "")
        lines.append(f"- {failure['count']:,} × {code(kind, 60)}")
        lines += [
            f"  - {code(example['ref'])}" + (f": {escape(example['detail'], 160)}" if example["detail"] else "")
            for example in failure["examples"]
        ]
    return "\n".join(lines)


def downtime_in_words(row: Mapping[str, Any]) -> str:
    """How often and how long one provider was away."""
    longest = f", the longest {duration(row['longest_ms'])}" if row["count"] > 1 else ""
    return f"{code(row['name'])}: {plural(row['count'], 'outage')}, {duration(row['total_ms'])} together{longest} ({escape(row['reason'], 100)})"


def _report_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{escape(str(name).replace('_', ' '), 60)} {count:,}" for name, count in list(counts.items())[:LISTED])


def _report_spread(spread: Json) -> str:
    if not spread["count"]:
        return "none"
    median, high, longest = (duration(spread[name]) for name in ("median_ms", "p90_ms", "longest_ms"))
    return f"half within {median}, nine of ten within {high}, the longest {longest}"
