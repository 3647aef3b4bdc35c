"""Mirrors Alertmanager's notifications into one issue an alert group: a row first, then whatever the forge shows is brought to it, never twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import structlog
from sqlalchemy.engine import Connection

from bot import replies
from bot.gitea.errors import ForgeError, Moved, NotFound
from bot.gitea.forge import Forge
from bot.models import Json, UserError
from bot.store import Store, alerts

log = structlog.get_logger()

REOPEN_MS = 86_400_000
LEASE_MS = 60_000
SWEEP_SECONDS = 300.0
FIRST_BACKOFF_MS = 1_000
LAST_BACKOFF_MS = 300_000
SINCE = timedelta(minutes=5)
OPEN, CHANGED, AGAIN, RESOLVED, EDIT = "open", "changed", "again", "resolved", "edit"
VERSION = "4"


def parse(body: bytes) -> alerts.Notice:
    """Reads the body of Alertmanager's webhook; raises UserError that says what is wrong with it."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise UserError(f"this is no notification of version {VERSION} of Alertmanager's webhook")
    items = data.get("alerts")
    if not isinstance(items, list) or not items:
        raise UserError("`alerts` is not a list with alerts")
    truncated = data.get("truncatedAlerts")
    return alerts.Notice(_texts(data, "groupLabels"), tuple(_alert(item) for item in items), truncated=bool(truncated))


def _alert(item: Any) -> alerts.Alert:
    if not isinstance(item, dict) or item.get("status") not in ("firing", "resolved"):
        raise UserError("an alert is neither firing nor resolved")
    fingerprint = item.get("fingerprint")
    if not isinstance(fingerprint, str) or not fingerprint:
        raise UserError("an alert has no fingerprint")
    try:
        starts = datetime.fromisoformat(str(item.get("startsAt")))
        starts_us = int(starts.replace(tzinfo=starts.tzinfo or UTC).timestamp() * 1_000_000)
    except (ValueError, OverflowError):
        raise UserError("an alert has no time at which it began") from None
    return alerts.Alert(fingerprint, item["status"] == "firing", _texts(item, "labels"), _texts(item, "annotations"), starts_us)


def _texts(data: Mapping[str, Any], name: str) -> dict[str, str]:
    found = data.get(name)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"`{name}` is not a mapping of texts")
    return found


def next_step(group: alerts.Group, now_ms: int) -> Json | None:
    """What to do next so that the issue tells what the row says: begin it, record it with `begun`, do it. None where it does already."""
    if group.plan is not None:
        return dict(group.plan)
    firing, told = set(group.firing), set(group.told)
    kind = ""
    if firing and not group.opened:
        kind = AGAIN if group.issue is not None and group.closed_ms > now_ms - REOPEN_MS else OPEN
    elif group.opened and not firing:
        kind = RESOLVED
    elif group.opened and firing != told:
        kind = CHANGED
    elif group.opened and group.projected_rev < group.rev:
        kind = EDIT
    if not kind:
        return None
    return {
        "kind": kind,
        "n": group.count + (kind != EDIT),
        "firing": sorted(firing),
        "added": sorted(firing - (told if kind == CHANGED else set())),
        "gone": len(told - firing),
        "at_ms": now_ms,
    }


class Mirror:
    """The receiver of /alerts and the one writer of its issues. `take` stores; `run` shows what is stored, also what another process took."""

    def __init__(
        self,
        store: Store,
        forge: Forge,
        *,
        repository: str,
        scrub: Callable[[str], str],
        held: Callable[[], bool],
        failed: Callable[[str], None],
        count: Callable[[str, str], None],
        tick_seconds: float,
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._forge = forge
        self._repo = repository
        self._scrub = scrub
        self._held = held
        self._failed = failed
        self._count = count
        self._tick = tick_seconds
        self._now_ms = now_ms
        self._event = asyncio.Event()
        self._swept = 0.0

    async def take(self, body: bytes) -> None:
        """Stores one notification; durable when it returns. Raises UserError for what is none, and what the store raises."""
        try:
            notice = parse(body)
        except UserError:
            self._count("other", "error")
            raise
        status = "firing" if any(alert.firing for alert in notice.alerts) else "resolved"
        try:
            changed = await self._store.write(lambda conn: alerts.heard(conn, notice, self._now_ms()))
        except Exception:
            self._count(status, "error")
            raise
        self._count(status, "ok")
        if changed:
            self._event.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if self._held():
                    await self._sweep()
                    while await self.show_one():
                        pass
            except Exception:
                log.exception("alerts.mirror")
            try:
                # Not wait_for, which before Python 3.12 swallows a cancellation that meets the event.
                async with asyncio.timeout(self._tick):
                    await self._event.wait()
            except TimeoutError:
                continue
            finally:
                self._event.clear()

    async def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._swept and now - self._swept < SWEEP_SECONDS:
            return
        self._swept = now
        ended = await self._store.write(lambda conn: alerts.sweep(conn, self._now_ms()))
        if ended:
            log.warning("alerts.ended_without_a_word", groups=ended)

    async def show_one(self) -> bool:
        """Brings the next group that is due to what its row says; False where none is due."""
        group = await self._store.write(lambda conn: alerts.take(conn, now_ms=self._now_ms(), lease_ms=LEASE_MS))
        if group is None:
            return False
        tries = group.tries
        try:
            await self._show(group)
        except ForgeError as error:
            due = self._now_ms() + int(min(LAST_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** min(tries - 1, 10)))
            self._failed("alert")
            log.warning("alerts.later", group=group.key, error=str(error), tries=tries)
            if isinstance(error, Moved):
                await self._follow()
            await self._store.write(partial(alerts.failed, key=group.key, error=str(error), due_ms=due))
        return True

    async def _follow(self) -> None:
        """The repository has another name; reads under the old one still tell it."""
        owner, _, name = self._repo.partition("/")
        try:
            self._repo = str((await self._forge.repo(owner, name))["full_name"])
        except ForgeError as error:
            log.warning("alerts.unresolved", repository=self._repo, error=str(error))

    async def _show(self, group: alerts.Group) -> None:
        while True:
            step = next_step(group, self._now_ms())
            if step is None:
                rev = group.rev
                await self._store.write(partial(alerts.shown, key=group.key, rev=rev))
                return
            again = group.plan is not None
            if not again:
                await self._store.write(partial(alerts.begun, key=group.key, plan=step))
            values = await self._do(group, step, again=again)
            await self._store.write(partial(_done, key=group.key, values=values))
            group = await self._store.read(partial(alerts.get, key=group.key))

    async def _do(self, group: alerts.Group, step: Json, *, again: bool) -> Json:
        """Carries a step out and returns the columns that tell of it. `again`: it may have been done before a crash, so it is looked for."""
        if step["kind"] == OPEN:
            return await self._open(group, step, again=again)
        number = int(group.issue or 0)
        try:
            if step["kind"] != EDIT:
                await self._comment(group, number, step, again=again)
            state = {RESOLVED: {"state": "closed"}, AGAIN: {"state": "open"}}.get(step["kind"], {})
            firing = [] if step["kind"] == RESOLVED else [group.alerts[name] for name in group.firing]
            body = self._scrub(replies.with_marker(replies.alert_body(firing), replies.alert_key(group.key, group.mark)))
            await self._forge.edit_issue(self._repo, number, body=body, **state)
        except NotFound:
            # Somebody deleted it, or the whole repository is out of sight: then the next step says so.
            await self._forge.repo(*self._repo.split("/", 1))
            log.warning("alerts.issue_gone", group=group.key, issue=number)
            return {"issue": None, "opened": False, "told": []}
        values: Json = {"told": step["firing"], "opened": step["kind"] != RESOLVED, **_reached(group, step)}
        return values | ({"closed_ms": self._now_ms()} if step["kind"] == RESOLVED else {})

    async def _open(self, group: alerts.Group, step: Json, *, again: bool) -> Json:
        key = replies.alert_key(group.key, step["n"])
        found = await self._find_issue(replies.marker(key), step["at_ms"]) if again else None
        if found is None and not group.firing:
            return {}
        if found is None:
            text = replies.alert_body([group.alerts[name] for name in group.firing])
            body = self._scrub(replies.with_marker(text, key))
            found = await self._forge.create_issue(self._repo, replies.alert_title(group.labels), body)
        return {"issue": int(found["number"]), "mark": step["n"], "opened": True, "told": step["firing"], **_reached(group, step)}

    async def _find_issue(self, marker: str, at_ms: int) -> Mapping[str, Any] | None:
        since = datetime.fromtimestamp(at_ms / 1000, UTC) - SINCE
        own_id = (await self._forge.me())["id"]
        for issue in await self._forge.issues_since(self._repo, since):
            if marker in (issue.get("body") or "") and (issue.get("user") or {}).get("id") == own_id:
                return issue
        return None

    async def _comment(self, group: alerts.Group, number: int, step: Json, *, again: bool) -> None:
        key = replies.alert_key(group.key, step["n"])
        if again:
            since = datetime.fromtimestamp(step["at_ms"] / 1000, UTC) - SINCE
            if await self._forge.find_comment(self._repo, number, replies.marker(key), (await self._forge.me())["id"], since):
                return
        added = [group.alerts[name] for name in step["added"] if name in group.alerts]
        text = replies.alert_comment(step["kind"], added, step["gone"], len(step["firing"]))
        await self._forge.comment(self._repo, number, self._scrub(replies.with_marker(text, key)))


def _reached(group: alerts.Group, step: Json) -> Json:
    """A step taken up again after a crash tells of an older row; then the newest words are still to come."""
    return {"projected_rev": group.rev} if list(group.firing) == step["firing"] else {}


def _done(conn: Connection, *, key: str, values: Json) -> None:
    alerts.done(conn, key, **values)
