"""The service: the rooms of a process that runs sprints, with the way in and the listeners; `serve`, `demo`, tests and benchmarks start the same."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

import structlog

import handlers as handlers_package
from bot import replies
from bot.desk import ForgeDesk
from bot.discovery import discover
from bot.fleet.alerts import Mirror
from bot.fleet.reconcile import Reconciler
from bot.follow_ups import FollowUps
from bot.gitea.aiohttp import GiteaClient
from bot.gitea.forge import Forge
from bot.gitea.routing import Router
from bot.inbox import Inbox
from bot.providers.health import available
from bot.redaction import Secret
from bot.rooms import Rooms, now_ms, program_version
from bot.snapshot import FleetSnapshot
from bot.store import Store
from bot.store.fleet import snapshot
from bot.web.alerts import receiver
from bot.web.app import build
from bot.web.intake import Intake
from bot.web.observability import observability_app
from bot.web.pages import Gate, Openness, Pages

log = structlog.get_logger()


class StoreReader:
    """The snapshot that /metrics, /readyz and the verdict read."""

    def __init__(self, store: Store, timeout_ms: int, node_id: str) -> None:
        self._store = store
        self._timeout_ms = timeout_ms
        self._node_id = node_id

    def snapshot(self) -> FleetSnapshot:
        """As of now; blocks."""
        return self._store.read_sync(
            lambda conn: snapshot(conn, worker_timeout_ms=self._timeout_ms, available=available, node_id=self._node_id)
        )


class Service(Rooms):
    """Everything in one process: the rooms, and what listens, hears of the forge and shows pages."""

    serves = True
    inbox: Inbox
    follow_ups: FollowUps
    intake: Intake
    reconciler: Reconciler
    pages: Pages | None
    mirror: Mirror | None
    webhook_port = 0

    def _build_rooms(self, me: Mapping[str, Any]) -> None:
        super()._build_rooms(me)
        settings, store, forge = self.settings, self.store, self.forge
        desk = ForgeDesk(settings, tuple(self.commands), int(me["id"]), str(me["login"]), forge, store)
        router = Router.merge(*(plugin for _, plugin in discover(handlers_package, Router)))
        self.inbox = Inbox(
            store,
            router,
            self.decider,
            self.repositories,
            desk=desk,
            kick_projector=self.projector.kick,
            handled=self._handled,
            handler_ran=self._handler_ran,
            failpoint=self._failpoint,
            now_ms=now_ms,
            observe=self._observe,
            settle_ms=int(settings.follow_ups.settle_seconds * 1000),
        )
        self.follow_ups = FollowUps(
            store,
            forge,
            self.repositories,
            self.decider,
            settings=settings,
            take_in=self.inbox.take_in,
            scrub=self.scrub,
            kick_projector=self.projector.kick,
            held=self.lease.held,
            now_ms=now_ms,
        )
        self.intake = Intake(
            store,
            router,
            self.repositories,
            secrets=self.secrets.webhook_secrets,
            me_id=int(me["id"]),
            max_bytes=settings.webhook.max_body_bytes,
            read_seconds=settings.webhook.read_timeout_seconds,
            offer=self.inbox.offer,
            count=self.metrics.delivery,
            handled=self.metrics.webhook_handled,
            failpoint=self._failpoint,
            now_ms=now_ms,
            hidden=[key for key in (self.secrets.forge_token, self.secrets.pages_token, self.secrets.alerts_token) if key],
        )
        self.pages = self._build_pages(me, self.links)
        self.mirror = self._build_mirror()
        self.reconciler = Reconciler(
            store,
            forge,
            self.repositories,
            self.decider,
            desk=desk,
            settings=settings,
            verbs=tuple(self.commands),
            take_in=self.inbox.take_in,
            missed=self.metrics.missed,
            tested=self.metrics.canary_sent,
            last_delivery_ms=lambda: self.intake.last_ms,
            hook_url=settings.webhook.hook_url(),
            is_leader=lambda: self.lease.leader and self.lease.held(),
            now_ms=now_ms,
        )

    def _works(self) -> list[Coroutine[Any, Any, None]]:
        works = [*super()._works(), self.inbox.run(), self.follow_ups.run(), self.reconciler.run(), self.intake.run()]
        return works if self.mirror is None else [*works, self.mirror.run()]

    async def _end_tasks(self) -> None:
        await super()._end_tasks()
        await self.intake.flush()

    def _started(self) -> None:
        log.info(
            "service.started",
            webhook=self.webhook_port,
            metrics=self.metrics_port,
            sandbox=self.sandbox.level,
            executor=self.lease.executor_id,
        )

    def _build_pages(self, me: Mapping[str, Any], links: replies.Links) -> Pages | None:
        settings = self.settings
        if not settings.pages.enabled:
            return None
        # Without the token and out of the metrics: what a stranger is refused is no trouble of the forge.
        stranger = GiteaClient(
            settings.forge.url, Secret(""), ca_file=settings.forge.ca_file, user_agent=f"timmy-dispatch/{program_version()}"
        )
        self._closers.append(stranger.close)
        gate = Gate(
            settings.pages, links=links, token=self.secrets.pages_token, secret=self._pages_secret(), is_open=Openness(Forge(stranger))
        )
        return Pages(
            self.store,
            gate,
            links=links,
            fleet=self._fleet,
            kept_patch=self.workspaces.kept_patch,
            scrub=self.scrub,
            commands=self.commands,
            trigger_label=settings.trigger_label,
            bot=str(me["login"]),
            version=program_version(),
            now_ms=now_ms,
        )

    def _build_mirror(self) -> Mirror | None:
        if self.secrets.alerts_token is None:
            return None
        return Mirror(
            self.store,
            self.forge,
            repository=self.settings.alerts.repository,
            scrub=self.scrub,
            held=self.lease.held,
            failed=self.metrics.outbox_failed,
            count=self.metrics.notified,
            tick_seconds=self.settings.timing.tick_seconds,
            now_ms=now_ms,
        )

    def _handler_ran(self, name: str, seconds: float) -> None:
        """`name` is `module.function`; the metric counts by file."""
        self.metrics.handler_ran(name.rpartition(".")[0].rpartition(".")[2], seconds)

    def _handled(self, result: str, tries: int) -> None:
        self.metrics.inbox_handled(result)
        if result in ("done", "dead"):
            self.metrics.inbox_tries(tries)

    async def _listen(self) -> None:
        settings = self.settings
        reader = StoreReader(self.store, int(settings.timing.lease_seconds * 1000), self.lease.node_id)
        self.metrics.read_store(reader, self._judge, started_ms=now_ms())
        self.metrics.read_logins(self._login_expiries)
        token = self.secrets.alerts_token
        watched = observability_app(
            render=lambda accept, compress: self.metrics.render(accept, compress=compress),
            health=lambda: self._judge(reader.snapshot()),
            unready=self._unready,
            alerts=receiver(self.mirror.take, token) if self.mirror is not None and token is not None else None,
        )
        self.metrics_port = await self._serve(watched, settings.metrics.listen)
        self.webhook_port = await self._serve(build(self.intake.receive, self.pages), settings.webhook.listen)

    def _canary_age(self, found: FleetSnapshot) -> float | None:
        tested = self.reconciler.tested_ms
        return (found.now_ms - tested) / 1000 if tested else None

    def _unready(self) -> str:
        if self._stopping:
            return "draining"
        return "" if self.webhook_port else "starting"
