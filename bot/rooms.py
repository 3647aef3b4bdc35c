"""What a process that runs sprints is made of, whether it listens (`bot.service`) or not (`bot.worker`): store, lease, engine, sprint, projector."""

from __future__ import annotations

import asyncio
import os
import random
import secrets as token_source
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from sqlalchemy.engine import Connection

import commands as commands_package
import handlers as handlers_package
from bot import agents as agents_package
from bot import replies
from bot.agents import Backend
from bot.agents import Engine as AgentEngine
from bot.agents._toolbox import Toolbox
from bot.chatops import Command
from bot.config import Secrets, Settings
from bot.decide import Decider
from bot.discovery import discover
from bot.engine import VERSION as ENGINE_VERSION
from bot.engine import Engine
from bot.failpoints import Failpoints
from bot.fleet.chronicle import Chronicle
from bot.fleet.collector import Collector
from bot.fleet.exports import Exporter
from bot.fleet.health import Thresholds, judge
from bot.fleet.holds import Holds
from bot.fleet.lanes import Lanes
from bot.fleet.launcher import Launcher
from bot.fleet.probes import Reach, hermes_root, probes
from bot.fleet.report import MorningReport
from bot.fleet.retention import prune_aged, prune_files, prune_journals, prune_rows
from bot.fleet.watchdog import Watchdog
from bot.gitea.aiohttp import GiteaClient
from bot.gitea.errors import ForgeError
from bot.gitea.forge import ROUTES, Forge
from bot.gitea.routing import Router
from bot.leader import Leader
from bot.lease import Lease, node_name
from bot.listeners import Door
from bot.metrics import Metrics, Vocabulary
from bot.models import EventKind, RepoId, SprintEvent, SprintId
from bot.projector import Projector
from bot.providers.chain import ProviderChain
from bot.providers.entries import Resolver, hermes_home
from bot.providers.health import available
from bot.providers.nous import nous_login
from bot.reader import ROUTES as READER_ROUTES
from bot.reader import IssueReader, read_route
from bot.redaction import Redactor, Secret
from bot.repositories import Repositories
from bot.sandbox import Sandbox, SandboxUnavailable, WorkspaceFiles
from bot.sandbox import build as build_sandbox
from bot.sandbox.absent import NoSandbox
from bot.settings import split_listen
from bot.snapshot import Fault, FleetSnapshot, Health, Reason, Sampled
from bot.sprint import Kit, SprintStages
from bot.store import Store, cursors, explain, may_come_back, samples, waits, watched
from bot.store.fleet import snapshot
from bot.stored_health import StoredHealth
from bot.workspace import Workspaces
from bot.workspace.bound import BoundSandbox

log = structlog.get_logger()

EX_TEMPFAIL = 75
LAG_SECONDS = 1.0
ME_RETRY_SECONDS = 5.0
STORE_RETRY_SECONDS = 5.0
RETENTION_CRON = "0 17 3 * * *"
FILES_EVERY_SECONDS = 3600.0
# The engine looks for new schedules every five seconds.
PICKED_UP_MS = 15_000


def now_ms() -> int:
    """Unix milliseconds by this machine's clock."""
    return time.time_ns() // 1_000_000


class Rooms:
    """What every process that runs sprints is made of. `await start()`, then it runs until `await stop()`; `fatal` is set when it must not go on (exit code)."""

    serves = False
    store: Store
    forge: Forge
    client: GiteaClient
    metrics: Metrics
    sandbox: Sandbox
    lease: Lease
    repositories: Repositories
    links: replies.Links
    decider: Decider
    projector: Projector
    workspaces: Workspaces
    chain: ProviderChain
    stages: SprintStages
    engine: Engine
    leader: Leader
    holds: Holds

    def __init__(
        self,
        settings: Settings,
        secrets: Secrets,
        *,
        environ: Mapping[str, str],
        home: Path,
        failpoint: Failpoints | None = None,
        fast_shutdown: bool = False,
        observers: Sequence[Callable[[SprintEvent], None]] = (),
    ) -> None:
        self.settings = settings
        self.secrets = secrets
        self.fatal: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.metrics_port = 0
        self.commands: dict[str, Command] = dict(discover(commands_package, Command))
        self.sandbox_error = ""
        self._environ = environ
        self._home = home
        self._failpoint = failpoint or Failpoints()
        self._fast = fast_shutdown
        self._observers = list(observers)
        self._tasks: list[asyncio.Task[None]] = []
        self._doors: list[Door] = []
        self._closers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._known_secrets = 0
        self._stopping = False
        self._taken_over: set[str] = set()
        self._resolver = Resolver(settings.providers, environ=environ, home=home, keys=secrets.provider_keys)
        self.redactor = Redactor(self._all_secrets())

    def _all_secrets(self) -> list[Secret]:
        found = [self.secrets.forge_token, *self.secrets.webhook_secrets, *(key for key in self.secrets.provider_keys if key is not None)]
        found += [token for token in (self.secrets.pages_token, self.secrets.alerts_token) if token is not None]
        for entry in self._resolver():
            found += entry.secrets()
        return [secret for secret in found if secret]

    def scrub(self, text: str) -> str:
        """Takes every secret out of a text that leaves the service; also those that a provider's login renewed meanwhile."""
        current = self._all_secrets()
        if len(current) != self._known_secrets:
            self.redactor = Redactor(current)
            self._known_secrets = len(current)
        return self.redactor.scrub(text)

    async def start(self) -> None:
        """Order as in engine.md, "Configuration": tables, slot, lease, engine, recovery, beat, consumers, listeners."""
        self._known_secrets = len(self._all_secrets())
        settings = self.settings
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        settings = self.settings
        self.store = Store(settings.database_url())
        self._closers.append(self._close_store)
        await self._open_store()
        self._build_forge()
        self._closers.append(self.client.close)
        self._build_sandbox()
        self._closers.append(self.sandbox.close)
        node_id = node_name(settings.state_dir)
        self._lease(node_id)
        dead = self.lease.take()
        self._closers.append(self._leave)
        # A second of imports at the first model call would hold up every acknowledgement and the lease's beat.
        await asyncio.to_thread(import_module, "openai")
        me = await self._me()
        self._build_rooms(me)
        self._closers.append(self.chain.aclose)
        await self.repositories.load()
        await self._remember_start()
        self._closers.append(self._close_engine)
        await self.engine.launch()
        await self._serve_schedules()
        dead += [executor for executor in await asyncio.to_thread(self.lease.left_behind) if executor not in dead]
        if dead:
            self._take_over(dead)
        self.lease.start()
        self._closers.append(self._end_tasks)
        for work in self._works():
            self._run(work)
        await self._listen()
        self._started()

    async def _open_store(self) -> None:
        """A database server that is down when we start is waited for, as the forge is."""
        while True:
            try:
                return await asyncio.to_thread(self.store.open)
            except Exception as error:
                if not may_come_back(error):
                    raise
                log.warning("service.database_away", error=explain(error), again_in_seconds=STORE_RETRY_SECONDS)
            await asyncio.sleep(STORE_RETRY_SECONDS)

    def _works(self) -> list[Coroutine[Any, Any, None]]:
        """What runs from the start to the end."""
        works = [
            self.projector.run(),
            self.leader.run(),
            self.holds.run(),
            self.chronicle.run(),
            self.stages.watch_stops(),
            self._measure_lag(),
            self._keep_files(),
        ]
        works.append(self.watchdog.run())
        works.append(self.lanes.run(lambda: self.lease.keeper and self.lease.held()))
        return [*works, self.collector.run()] if self.settings.collector.enabled else works

    async def _listen(self) -> None:
        """Opens the listeners there are."""

    def _started(self) -> None:
        """Says that all of it runs."""

    async def _close_store(self) -> None:
        self.store.close()

    async def _leave(self) -> None:
        await asyncio.to_thread(self.lease.leave)

    async def _close_engine(self) -> None:
        await self.stages.halt(self.settings.timing.shutdown_seconds)
        await self.engine.close()
        await self.stages.release()

    async def _end_tasks(self) -> None:
        for door in self._doors:
            await door.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _build_forge(self) -> None:
        settings = self.settings
        entries = list(self._resolver())
        vocabulary = Vocabulary(
            version=program_version(),
            commands=tuple(self.commands),
            handlers=tuple(name for name, _ in discover(handlers_package, Router)),
            agents=tuple(name for name, _ in discover(agents_package, Backend)),
            chain=tuple((entry.provider, entry.model) for entry in entries),
            endpoints=(*ROUTES, *READER_ROUTES),
            logins=tuple({entry.provider: None for entry in entries if entry.login}),
            probes=tuple(probes()),
            profiles=tuple(settings.watchdog.expect),
        )
        self.metrics = Metrics(CollectorRegistry(), vocabulary)
        self.metrics.budget(settings.queue.usd_per_day)
        self._observers.append(self.metrics.observe)
        self._trace()
        self.client = GiteaClient(
            settings.forge.url,
            self.secrets.forge_token,
            ca_file=settings.forge.ca_file,
            user_agent=f"timmy-dispatch/{program_version()}",
            on_request=self._forge_asked,
        )
        self.forge = Forge(self.client)

    def _trace(self) -> None:
        if not self.settings.tracing.endpoint:
            return
        from bot.tracing import connect, trace_id_of

        tracing = connect(self.settings.tracing.endpoint, program_version())
        self._observers.append(tracing.observe)
        self.metrics.traced_by(trace_id_of)
        self._closers.append(lambda: asyncio.to_thread(tracing.close))

    def _build_sandbox(self) -> None:
        settings = self.settings
        try:
            self.sandbox = build_sandbox(settings.sandbox, state_dir=settings.state_dir)
        except SandboxUnavailable as error:
            self.sandbox_error = str(error)
            self.sandbox = NoSandbox(error)
            log.error("sandbox.unavailable", error=str(error))
        if self.sandbox.owner is not None:
            # The sandbox's user must pass through to its workspaces; everything else here is 0600 or 0700 (security.md, "Service secrets, state").
            settings.state_dir.chmod(0o711)
        if settings.sandbox.kind == "none":
            log.warning("sandbox.none", warning="what the model runs is not walled in; it was switched off in the configuration")
        self.metrics.sandbox(settings.sandbox.kind, self.sandbox.level)
        self.metrics.sandbox_probed(ok=not self.sandbox_error)

    def _lease(self, node_id: str) -> None:
        timing = self.settings.timing
        executor = f"{node_id}-{token_source.token_hex(4)}"
        self.lease = Lease(
            self.store,
            state_dir=self.settings.state_dir,
            node_id=node_id,
            host=socket.gethostname(),
            executor_id=executor,
            app_version=ENGINE_VERSION,
            capacity=self.settings.queue.slots,
            beat=timing.beat_seconds,
            timeout=timing.lease_seconds,
            pending_owners=self._pending_owners,
            on_reaped=self._reaped,
            on_dead=self._take_over,
            serves=self.serves,
        )

    def _pending_owners(self, conn: Connection) -> list[str]:
        return self.engine.pending_owners(conn)

    def _kick_queue(self) -> None:
        self.leader.kick()

    def _kick_projector(self) -> None:
        self.projector.kick()

    def _reaped(self) -> None:
        """We were declared dead: what we run must not go on beside its new owner."""
        log.critical("lease.reaped", executor=self.lease.executor_id)
        os._exit(EX_TEMPFAIL)

    def _take_over(self, executors: list[str]) -> None:
        """Repeated at each beat while one of them still owns something; told once."""
        self.engine.recover(executors)
        fresh = set(executors) - self._taken_over
        if fresh:
            log.warning("lease.take_over", executors=sorted(fresh))
        for _ in fresh:
            self._observe(SprintEvent(EventKind.TAKEN_OVER, SprintId(""), now_ms()))
        self._taken_over |= fresh

    async def _me(self) -> Mapping[str, Any]:
        """Who the bot is: asked of the forge, else remembered; without either nothing can be told apart, so the start waits."""
        while True:
            try:
                me = await self.forge.me()
            except ForgeError as error:
                known: Mapping[str, Any] | None = await self.store.read(lambda conn: cursors.get(conn, "me"))
                log.warning("service.forge_silent", error=str(error), known=known is not None)
                if known is not None:
                    self.forge.remember_me(dict(known))
                    return known
                await asyncio.sleep(ME_RETRY_SECONDS)
            else:
                return await self._remember(me)

    async def _remember_start(self) -> None:
        """Reconciliation looks no further back than `init`, or where nobody called it than the first start."""
        try:
            began = int((self.settings.state_dir / "initialised").read_text(encoding="ascii"))
        except (OSError, ValueError):
            began = now_ms()
        await self.store.write(lambda conn: cursors.setdefault(conn, cursors.STARTED, began))

    async def _remember(self, me: Mapping[str, Any]) -> Mapping[str, Any]:
        facts = {"id": me["id"], "login": me["login"], "email": me.get("email") or ""}
        await self.store.write(lambda conn: cursors.put(conn, "me", facts))
        return facts

    def _build_rooms(self, me: Mapping[str, Any]) -> None:
        settings, store, forge = self.settings, self.store, self.forge
        self.repositories = Repositories(store, forge, settings)
        links = self.links = self._links()
        self.decider = Decider(
            store,
            forge,
            settings=settings,
            repositories=self.repositories,
            commands=self.commands,
            kick_queue=self._kick_queue,
            kick_projector=self._kick_projector,
            observe=self._observe,
            count=self.metrics.command,
            failpoint=self._failpoint,
            now_ms=now_ms,
        )
        self.projector = Projector(
            store,
            forge,
            self.repositories,
            links=links,
            scrub=self.scrub,
            held=self.lease.held,
            ack=self.metrics.ack,
            failed=self.metrics.outbox_failed,
            failpoint=self._failpoint,
            caps=partial(waits.caps, settings),
            tick_seconds=settings.timing.tick_seconds,
            now_ms=now_ms,
        )
        self._build_sprint(me, links)
        self._build_fleet()
        self.leader = Leader(
            store,
            self.engine,
            settings=settings,
            is_leader=lambda: self.lease.leader and self.lease.held(),
            observe=self._observe,
            kick_projector=self.projector.kick,
            repo_ids=self.repositories.configured_names,
            failpoint=self._failpoint,
            now_ms=now_ms,
            providers=lambda: tuple(dict.fromkeys(entry.provider for entry in self._resolver())),
        )
        self.holds = Holds(
            store,
            settings=settings,
            repositories=self.repositories.configured_names,
            is_leader=lambda: self.lease.leader and self.lease.held(),
            kick_queue=self._kick_queue,
            now_ms=now_ms,
        )

    def _fleet(self, conn: Connection) -> tuple[FleetSnapshot, Health]:
        """The facts of this moment and what they come to."""
        lease_ms = int(self.settings.timing.lease_seconds * 1000)
        found = snapshot(conn, worker_timeout_ms=lease_ms, available=available, node_id=self.lease.node_id)
        return found, self._judge(found)

    def _judge(self, found: FleetSnapshot) -> Health:
        also = (Reason(Fault.SANDBOX_UNPROVEN, self.sandbox_error),) if self.sandbox_error else ()
        return judge(found, Thresholds.of(self.settings, canary_age=self._canary_age(found)), also)

    def _canary_age(self, _found: FleetSnapshot) -> float | None:
        """How long ago (seconds) the forge agreed to send a test delivery; None where this process asks for none."""
        return None

    def _links(self) -> replies.Links:
        """What is shown to people; a sprint's link carries a key unless everybody may see every page."""
        settings = self.settings
        forge = settings.forge.public_url or settings.forge.url
        if not settings.pages.enabled:
            return replies.Links(forge, trace_of=self._trace_of())
        secret = None if settings.pages.visibility == "public" else self._pages_secret()
        return replies.Links(forge, settings.webhook.pages_url(), secret, self._trace_of())

    def _trace_of(self) -> Callable[[str], str] | None:
        if not self.settings.tracing.endpoint:
            return None
        from bot.tracing import trace_id_of

        return trace_id_of

    def _pages_secret(self) -> Secret:
        return Secret(self.store.write_sync(lambda conn: str(cursors.setdefault(conn, "pages_secret", token_source.token_hex(32)))))

    def _build_sprint(self, me: Mapping[str, Any], links: replies.Links) -> None:
        settings, store = self.settings, self.store
        self.workspaces = Workspaces(
            settings.state_dir / "sprints",
            sandbox=self.sandbox,
            forge_url=settings.forge.url,
            login=str(me["login"]),
            token=self.secrets.forge_token,
            ca_file=settings.forge.ca_file,
            sandbox_uid=self.sandbox.owner,
            user_name=str(me["login"]),
            user_email=str(me["email"]) or f"{me['login']}@noreply.invalid",
            protected=settings.protected_paths,
        )
        health = StoredHealth(store, now_ms)
        self.logins = self._logins(health)
        self.chain = ProviderChain(
            self._resolver,
            health=health,
            now_ms=now_ms,
            sleep=asyncio.sleep,
            random=random.random,
            on_call=self._model_called,
            in_flight=self.metrics.llm_inflight,
            on_fallback=lambda **facts: self._observe(SprintEvent(EventKind.FALLBACK, SprintId(""), now_ms(), dict(facts))),
            logins=self.logins,
        )
        toolbox = Toolbox(
            chain=self.chain,
            sandbox=BoundSandbox(self.sandbox, self.workspaces),
            files=WorkspaceFiles,
            forge_reader=self._reader,
            scrub=self.scrub,
            now_ms=now_ms,
            loop_time=asyncio.get_running_loop().time,
            command_seconds=settings.sandbox.command_seconds,
        )
        engines: dict[str, AgentEngine] = {name: backend.build(toolbox) for name, backend in discover(agents_package, Backend)}
        salt = store.write_sync(lambda conn: str(cursors.setdefault(conn, "prompt_salt", token_source.token_hex(16))))
        self.stages = SprintStages(
            Kit(
                store=store,
                forge=self.forge,
                repositories=self.repositories,
                decider=self.decider,
                workspaces=self.workspaces,
                sandbox=self.sandbox,
                engines=engines,
                settings=settings,
                lease=self.lease,
                links=links,
                scrub=self.scrub,
                observe=self._observe,
                kick_queue=self._kick_queue,
                kick_projector=self.projector.kick,
                failpoint=self._failpoint,
                now_ms=now_ms,
                login=str(me["login"]),
                salt=salt,
                sandbox_refusal=lambda: self.sandbox_error,
            )
        )
        self.engine = Engine(
            watched(settings.database_url()),
            executor_id=self.lease.executor_id,
            stages=self.stages,
            slots=settings.queue.slots,
            poll_seconds=settings.timing.queue_poll_seconds,
            fast_shutdown=self._fast,
            fired=self._fired,
        )
        self.engine.schedule("retention", RETENTION_CRON, self._retention)

    def _build_fleet(self) -> None:
        """What works by the clock; before the engine is launched."""
        self.lanes = Lanes(self.store, self.settings, node_id=self.lease.node_id, environ=self._environ, now_ms=now_ms)
        self.launcher = Launcher(
            self.store,
            self.forge,
            self.repositories,
            self.decider,
            settings=self.settings,
            kick_projector=self.projector.kick,
            now_ms=now_ms,
        )
        for name, (cron, run) in self.launcher.schedules().items():
            self.engine.schedule(name, cron, run)
        self.exports_folder = self.settings.state_dir / "exports"
        self.exporter = Exporter(self.store, self.exports_folder, scrub=self.scrub)
        self.watchdog = Watchdog(
            Reach(
                settings=self.settings,
                store=self.store,
                forge=self.forge,
                names=self.repositories.names,
                chain=self.chain,
                entries=self._resolver,
                hermes=hermes_root(self.settings, environ=self._environ, home=self._home),
                environ=self._environ,
                now_ms=now_ms,
                logins=self.logins,
                lanes=self.lanes,
                make_room=self._make_room,
                webhook_secret=next(iter(self.secrets.webhook_secrets), None),
                kick_queue=self._kick_queue,
                kick_projector=self.projector.kick,
            ),
            is_leader=lambda: self.lease.leader and self.lease.held(),
            acted=self.metrics.watchdog_acted,
            scrub=self.scrub,
        )
        self.morning_report = MorningReport(
            self.store, self.repositories, settings=self.settings, kick_projector=self.projector.kick, now_ms=now_ms
        )
        if self.settings.report.issue:
            self.engine.schedule("report", self.settings.report.schedule, self.morning_report.post)
        self.chronicle = Chronicle(
            self.store, settings=self.settings, judge=self._fleet, is_leader=lambda: self.lease.leader and self.lease.held()
        )
        self.collector = Collector(
            self.store,
            self.forge,
            settings=self.settings,
            node_id=self.lease.node_id,
            repositories=self.repositories.names,
            environ=self._environ,
            is_keeper=lambda: self.lease.keeper and self.lease.held(),
            missed=self.metrics.uncollected,
            scrub=self.scrub,
        )

    async def _serve_schedules(self) -> None:
        """From now on somebody looks after the schedules, so that one that does not fire is late; samples that nobody takes any more are dropped."""
        served: dict[str, str | int] = dict(self.engine.schedules)
        if self.settings.exports.enabled:
            served["exports"] = int(self.settings.exports.every_seconds * 1000)

        def write(conn: Connection) -> None:
            samples.serve(conn, served, now_ms() + PICKED_UP_MS)
            samples.forget(conn, self.lease.node_id, keep=tuple(Sampled) if self.settings.collector.enabled else ())

        await self.store.write(write)

    async def _fired(self, name: str, due_ms: int) -> None:
        await self.store.write(lambda conn: samples.fired(conn, name, seen_ms=now_ms(), expected_ms=due_ms))

    def _logins(self, health: StoredHealth) -> dict[str, Any]:
        setting = next((provider for provider in self.settings.providers if provider.from_hermes), None)
        if setting is None:
            return {}
        home = hermes_home(setting, environ=self._environ, home=self._home)
        login = nous_login(home, self._environ, lease=health.try_lease, now_ms=now_ms, on_refresh=self._login_refreshed)
        return {"nous": login}

    def _login_refreshed(self, result: str) -> None:
        for provider in {entry.provider for entry in self._resolver() if entry.login == "nous"}:
            self.metrics.login_refreshed(provider, ok=result == "ok")

    def _login_expiries(self) -> dict[str, int]:
        return {entry.provider: entry.key_expires_ms for entry in self._resolver() if entry.login}

    def _reader(self, repo: str, issue: int) -> IssueReader:
        repo_id = next((RepoId(key) for key, name in self.repositories.names().items() if name == repo), RepoId(0))
        return IssueReader(self.client, self.decider.permission_of, repo_id=repo_id, repo=repo, issue=issue)

    def _forge_asked(self, route: str, method: str, status: int | str, attempt: int, seconds: float) -> None:
        self.metrics.forge_request(read_route(route), method, status, attempt, seconds)

    def _model_called(self, *, provider: str, model: str, result: str, seconds: float, **_: object) -> None:
        self.metrics.llm_attempt(provider, model, result, seconds)

    def _observe(self, event: SprintEvent) -> None:
        for observer in self._observers:
            try:
                observer(event)
            except Exception:
                log.exception("observer.failed", kind=event.kind)

    async def _serve(self, app: web.Application, address: str) -> int:
        # Where a body was refused half-way, or a client only waits, the connection is not kept for the library's long defaults.
        door = Door(app, access_log=None, shutdown_timeout=1.0, lingering_time=1.0, keepalive_timeout=75.0)
        self._doors.append(door)
        return await door.open(*split_listen(address))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None and not self.fatal.done():
            log.critical("service.task_died", task=task.get_name(), error=repr(task.exception()), exc_info=task.exception())
            self.fatal.set_result(1)

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self.metrics.loop_lag(max(0.0, loop.time() - due))

    async def _retention(self) -> None:
        """Deletes what was done long ago; what decides (sprints, intents, decisions, spend) stays (engine.md, "Retention")."""
        keep, now = self.settings.retention, datetime.now(UTC)
        schedules, workflows = timedelta(days=keep.schedules_days), timedelta(days=keep.workflows_days)
        await self.engine.prune({"sched-": now - schedules, "sprint:": now - workflows})
        await self.store.write(lambda conn: prune_rows(conn, keep, now_ms()))
        await prune_journals(self.store, keep, now_ms())
        await prune_aged(self.store, keep, now_ms())

    async def _make_room(self) -> str:
        """What retention allows to delete of this state folder, before its hour."""
        gone = await prune_files(self.store, self.workspaces, self.exports_folder, self.settings.retention, now_ms())
        return f"retention deleted {gone.folders} folders of sprints, {gone.patches} patches and {gone.logs} logs"

    async def _keep_files(self) -> None:
        """Exports, and the retention of files, of this state folder: its leader's work, because another host does not see them."""
        pruned = -FILES_EVERY_SECONDS
        while True:
            try:
                if self.lease.keeper:
                    if self.settings.exports.enabled:
                        await self.store.write(lambda conn: samples.fired(conn, "exports", seen_ms=now_ms()))
                        await self.exporter.round()
                    if time.monotonic() - pruned >= FILES_EVERY_SECONDS:
                        await prune_files(self.store, self.workspaces, self.exports_folder, self.settings.retention, now_ms())
                        pruned = time.monotonic()
            except Exception:
                log.exception("service.keep_files")
            await asyncio.sleep(self.settings.exports.every_seconds)

    async def stop(self) -> None:
        """Polite end: no new work, effects in flight are recorded, agents end, rows stay for whoever comes next (engine.md, "Shutdown")."""
        self._stopping = True
        if hasattr(self, "lease") and self.lease.slot >= 0:
            try:
                await asyncio.to_thread(self.lease.drain)
            except Exception:
                log.exception("service.drain")
        while self._closers:
            try:
                await self._closers.pop()()
            except Exception:
                log.exception("service.stop")
        log.info("service.stopped")


async def run_until(rooms: Rooms, stopped: Coroutine[Any, Any, object]) -> int:
    """Runs a started process until `stopped` or until it cannot go on; returns the exit code."""
    wait: asyncio.Future[Any] = asyncio.create_task(stopped)
    ends: set[asyncio.Future[Any]] = {wait, rooms.fatal}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    wait.cancel()
    await rooms.stop()
    return rooms.fatal.result() if rooms.fatal.done() else 0


def program_version() -> str:
    """Of the installed distribution; "0" in a bare checkout."""
    try:
        return version("timmy-dispatch")
    except PackageNotFoundError:
        return "0"
