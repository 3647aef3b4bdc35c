"""What each source of a sample asks and what it makes of the answer; whatever blocks does so on a thread of its own."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bot.fleet import _drift, _proc
from bot.fleet._facts import Facts
from bot.fleet._sampling import Found, Shared, Take, in_thread
from bot.fleet.lanes import MISUSED, Pane, TmuxMissing, Topology, topology
from bot.fleet.sizes import size_of
from bot.gitea.errors import ForgeError, is_transient
from bot.providers.health import EntryHealth, EntryState, available
from bot.settings import Settings
from bot.snapshot import PaneState, Place, Sampled, WorkerState
from bot.store.lanes import UP

MOST = 64
LOW_SHARE, LOW_BYTES = 0.05, 1 << 30
SIZES_EVERY_MS = 600_000
MOST_ENTRIES = 500_000
BREATH_SECONDS = 0.002
SPREAD_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Moment:
    """When a sample is taken and what its sources remember: `judged_from_ms` is when the clock jumped last, `memory` is by source."""

    now_ms: int
    judged_from_ms: int
    memory: Mapping[str, Any]

    def of(self, source: Sampled) -> Mapping[str, Any]:
        """What one source remembers."""
        found = self.memory.get(source)
        return found if isinstance(found, dict) else {}


class Records(Protocol):
    """What is asked of the forge."""

    async def repo_by_id(self, repo_id: int) -> Mapping[str, Any]:
        """A repository with `full_name`, `open_issues_count` and `open_pr_counter`; raises ForgeError."""
        ...


class Sources:
    """The sources of one host. `rows` reads the facts and may block; `repositories` tells of each served id its name of today."""

    def __init__(
        self,
        settings: Settings,
        forge: Records,
        *,
        rows: Callable[[], Facts],
        repositories: Callable[[], Mapping[int, str]],
        environ: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._forge = forge
        self._repositories = repositories
        self._environ = environ
        self._facts: Shared[Facts] = Shared(lambda: in_thread("rows", rows))

    async def close(self) -> None:
        """Lets go of what hangs."""
        await self._facts.close()

    def at(self, moment: Moment) -> dict[str, Take]:
        """Every source by name, for one sample."""
        self._facts.renew()
        return {
            Sampled.TMUX: self._tmux,
            Sampled.PROCESSES: lambda: self._processes(moment),
            Sampled.CRON: lambda: self._cron(moment),
            Sampled.GITEA: lambda: self._gitea(moment),
            Sampled.SPRINTS: lambda: self._sprints(moment),
            Sampled.DISK: lambda: self._disk(moment),
            Sampled.PROVIDERS: lambda: self._providers(moment),
        }

    async def _tmux(self) -> Found:
        """Our own session only; titles and what runs in a person's pane are nobody's business."""
        data: dict[str, Any]
        try:
            found = await topology(self._settings, self._environ)
            data = {"session": None if found is None else "not ours"}
        except TmuxMissing:
            found, data = None, {"tmux": "missing"}
        facts = await self._facts.get()
        agents: list[tuple[str, int]] = [] if facts.fleet.paused else list(_agents(facts, found))
        if found is None or not found.ours:
            return Found(data=data, gauges={"agent_up": list(agents)})
        busy = frozenset(worker.pid for name, worker in facts.workers.items() if _state(facts, name) is WorkerState.BUSY)
        lanes = [pane for pane in found.panes if pane.lane is not None][:MOST]
        states = dict(zip(lanes, await in_thread("panes", lambda: [_pane(pane, busy) for pane in lanes]), strict=True))
        counts = {state: sum(each is state for each in states.values()) for state in PaneState}
        return Found(
            data={
                "session": found.session,
                "panes": [
                    {"lane": pane.lane, "pid": pane.pid, "state": str(state), "dead_status": pane.dead_status, "started": pane.started}
                    for pane, state in states.items()
                ],
                "other_panes": len(found.panes) - len(lanes),
                "other_sessions": found.others,
            },
            state={f"lane-{pane.lane}": {"pid": pane.pid, "dead": pane.dead} for pane in lanes},
            gauges={"tmux_panes": [(found.session, str(state), count) for state, count in counts.items()], "agent_up": list(agents)},
        )

    async def _processes(self, moment: Moment) -> Found:
        facts = await self._facts.get()
        here = dict(sorted(facts.workers.items())[:MOST])
        alive = await in_thread(
            "processes", lambda: {name: _proc.process(worker.pid, now_ms=moment.now_ms) for name, worker in here.items()}
        )
        data: list[dict[str, Any]] = []
        state: dict[str, dict[str, str | int | bool]] = {}
        memory: list[tuple[str, float]] = []
        started: list[tuple[str, float]] = []
        for name, worker in here.items():
            process = alive[name]
            if process is not None and process.started_ms > worker.started_ms + _drift.GRACE_MS:
                # Its number went to a process that began later.
                process = None
            does = _state(facts, name)
            state[name] = {"state": str(does), "alive": process is not None, "pid": worker.pid}
            data.append(
                {
                    "worker": name,
                    "state": str(does),
                    "pid": worker.pid,
                    "alive": process is not None,
                    "beat_age_seconds": round((facts.fleet.now_ms - worker.beat_ms) / 1000, 1),
                    **({} if process is None else _measures(process, moment.now_ms)),
                }
            )
            if process is not None:
                memory.append((name, process.resident))
                started.append((name, process.started_ms / 1000))
        elsewhere = [beat for beat in facts.fleet.workers if beat.name not in here][:MOST]
        data += [{"worker": beat.name, "state": str(beat.state), "elsewhere": True} for beat in elsewhere]
        state |= {beat.name: {"state": str(beat.state)} for beat in elsewhere}
        return Found({"workers": data}, state, {"worker_memory_bytes": list(memory), "worker_start_timestamp_seconds": list(started)})

    async def _cron(self, moment: Moment) -> Found:
        facts = await self._facts.get()

        def judge() -> dict[str, _drift.Drift]:
            return {each.name: _drift.drift(each, moment.now_ms, trusted_ms=moment.judged_from_ms) for each in facts.schedules[:MOST]}

        judged = await in_thread("cron", judge)
        return Found(
            data={
                "schedules": [
                    {
                        "schedule": each.name,
                        "cron": each.cron or None,
                        "every_seconds": each.every_ms / 1000 or None,
                        "expected_ms": each.expected_ms,
                        "seen_ms": each.seen_ms,
                        "due_ms": judged[each.name].due_ms,
                        "drift_seconds": round(judged[each.name].seconds, 3),
                        "overdue": judged[each.name].overdue,
                        "missed": judged[each.name].missed,
                    }
                    for each in facts.schedules[:MOST]
                ]
            },
            state={name: {"overdue": found.overdue} for name, found in judged.items()},
            gauges={"schedule_drift_seconds": [(name, found.seconds) for name, found in judged.items()]},
        )

    async def _gitea(self, moment: Moment) -> Found:
        """Some repositories a sample, the longest unasked first: one request each, spread."""
        names = self._repositories()
        served = {str(repo_id) for repo_id in names}
        known = {key: dict(counts) for key, counts in moment.of(Sampled.GITEA).items() if key in served and _are_counts(counts)}
        turn = sorted(names, key=lambda repo_id: (int(known.get(str(repo_id), {}).get("asked_ms", 0)), repo_id))
        facts = await self._facts.get()
        for place, repo_id in enumerate(turn[: self._settings.collector.repositories_a_sample]):
            if place:
                await asyncio.sleep(SPREAD_SECONDS)
            try:
                record = await self._forge.repo_by_id(repo_id)
            except ForgeError as error:
                if is_transient(error):
                    raise
                # One that is gone, or not ours to see any more, does not keep the others.
                record = dict[str, Any]()
            known[str(repo_id)] = {
                "repository": str(record.get("full_name") or names[repo_id]),
                "open_issues": int(record.get("open_issues_count") or 0),
                "open_pulls": int(record.get("open_pr_counter") or 0),
                "asked_ms": moment.now_ms,
            }
        for key, counts in known.items():
            counts |= {"bot_pulls": facts.open_prs.get(int(key), 0), "bot_commits": facts.commits.get(int(key), 0)}
        listed = sorted(known.values(), key=lambda counts: str(counts["repository"]))
        bots = sum(counts["bot_pulls"] for counts in listed)
        people = sum(counts["open_pulls"] for counts in listed) - bots
        return Found(
            data={"repositories": listed[:MOST]},
            state={
                str(counts["repository"]): {name: counts[name] for name in ("open_issues", "open_pulls", "bot_pulls", "bot_commits")}
                for counts in listed
            },
            # Sums only once each of them was asked.
            gauges={
                "gitea_open_issues": [(sum(counts["open_issues"] for counts in listed),)],
                "gitea_open_pull_requests": [("bot", bots), ("people", max(0, people))],
            }
            if listed and len(listed) == len(names)
            else {},
            memory=known,
        )

    async def _sprints(self, moment: Moment) -> Found:
        facts = await self._facts.get()
        fleet = facts.fleet
        return Found(
            data={
                "running": fleet.running,
                "in_flight": fleet.in_flight,
                "queued": fleet.runnable,
                "waiting": {str(reason): count for reason, count in sorted(fleet.waiting.items())},
                "oldest_runnable_seconds": fleet.age(fleet.oldest_runnable_ms),
                "since_progress_seconds": fleet.age(fleet.last_progress_ms),
                "paused": fleet.paused,
                "sprints": [
                    {
                        "sprint": row["id"],
                        "issue": f"{row['repo']}#{row['issue']}",
                        "state": row["state"],
                        "engine": row["engine"],
                        "model": row["model"],
                        "steps": row["steps"],
                        "started_ms": row["started_ms"],
                        "step_age_seconds": None if row["step_ms"] is None else max(0, moment.now_ms - row["step_ms"]) / 1000,
                    }
                    for row in facts.sprints
                ],
            },
            state={
                "fleet": {"paused": fleet.paused},
                **{str(row["id"]): {"state": str(row["state"]), "issue": f"{row['repo']}#{row['issue']}"} for row in facts.sprints},
            },
        )

    async def _disk(self, moment: Moment) -> Found:
        return await in_thread("disk", lambda: disk(self._settings, moment))

    async def _providers(self, moment: Moment) -> Found:
        facts = await self._facts.get()
        entries = {key: EntryHealth.from_json(health) for key, health in sorted(facts.providers.items())[:MOST]}
        usable = {key: available(facts.providers[key], moment.now_ms) for key in entries}
        return Found(
            data={
                "entries": [
                    {
                        "entry": key,
                        "state": str(entry.state),
                        "available": usable[key],
                        "reason": entry.reason if entry.state is not EntryState.HEALTHY else "",
                        "until_ms": entry.until_ms,
                        "failures": entry.failures,
                    }
                    for key, entry in entries.items()
                ]
            },
            state={key: {"state": str(entry.state), "available": usable[key]} for key, entry in entries.items()},
        )


def disk(settings: Settings, moment: Moment) -> Found:
    """What is free, and at most every ten minutes what takes the room; blocks."""
    usage = shutil.disk_usage(settings.state_dir)
    known = moment.of(Sampled.DISK)
    sizes: Any = known.get("sizes")
    at_ms = known.get("at_ms")
    if not (_are_sizes(sizes) and isinstance(at_ms, int) and 0 <= moment.now_ms - at_ms < SIZES_EVERY_MS):
        sizes, at_ms = _sizes(settings), moment.now_ms
    low = usage.free < max(LOW_BYTES, usage.total * LOW_SHARE)
    return Found(
        data={"size": usage.total, "free": usage.free, "used_by": sizes},
        state={"state": {"low": low}},
        gauges={
            "disk_size_bytes": [(usage.total,)],
            "disk_free_bytes": [(usage.free,)],
            "disk_used_bytes": [(place, size) for place, size in sizes.items()],
        },
        memory={"at_ms": at_ms, "sizes": sizes},
    )


def _are_counts(found: object) -> bool:
    """What a file says of a repository is used only if it has the shape that this version writes."""
    names = ("open_issues", "open_pulls", "asked_ms")
    return isinstance(found, dict) and isinstance(found.get("repository"), str) and all(isinstance(found.get(name), int) for name in names)


def _are_sizes(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(size, int) for size in found.values())


def _sizes(settings: Settings) -> dict[str, int]:
    folder, address = settings.state_dir, settings.database_url()
    found = {
        str(Place.SPRINTS): size_of(folder / "sprints", most=MOST_ENTRIES, rest_seconds=BREATH_SECONDS),
        str(Place.EXPORTS): size_of(folder / "exports", most=MOST_ENTRIES, rest_seconds=BREATH_SECONDS),
        str(Place.TELEMETRY): size_of(settings.telemetry_dir(), most=MOST_ENTRIES, rest_seconds=BREATH_SECONDS),
    }
    if address.startswith("sqlite:"):
        database = Path(address.removeprefix("sqlite:///"))
        files = [database.with_name(database.name + end) for end in ("", "-wal", "-shm")]
        found[str(Place.DATABASE)] = sum(path.stat().st_size for path in files if path.exists())
    return found


def _agents(facts: Facts, found: Topology | None) -> Iterator[tuple[str, int]]:
    """Whether the worker of each lane that is meant to be up lives. One that refused its configuration is not started again, but nobody stopped it:
    it counts while its pane shows why.
    """
    for lane in facts.lanes[:MOST]:
        pane = found.lane(lane.lane) if found else None
        refused = pane is not None and pane.dead and pane.dead_status == MISUSED
        if lane.wanted == UP or refused:
            yield f"lane-{lane.lane}", int(pane is not None and not pane.dead)


def _pane(pane: Pane, busy: frozenset[int]) -> PaneState:
    if pane.dead:
        return PaneState.DEAD
    return PaneState.ACTIVE if busy & {pane.pid, *_proc.below(pane.pid)} else PaneState.IDLE


def _state(facts: Facts, name: str) -> WorkerState:
    return next((beat.state for beat in facts.fleet.workers if beat.name == name), WorkerState.LOST)


def _measures(process: _proc.Process, now_ms: int) -> dict[str, Any]:
    return {
        "age_seconds": round((now_ms - process.started_ms) / 1000),
        "resident_bytes": process.resident,
        "cpu_seconds": round(process.cpu_seconds, 2),
        "children": process.children,
        "children_resident_bytes": process.children_resident,
    }
