"""The mirror of alerts as conversations: Alertmanager posts, and people see one issue a group, in the right state, whatever comes twice or late."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from prometheus_support import GRAFANA, binary, free_port, process
from world import World, make_world, until

from bot import replies
from bot.fleet.alerts import REOPEN_MS, Mirror, next_step, parse
from bot.gitea.errors import Unavailable
from bot.models import UserError
from bot.redaction import Secret
from bot.store import Store, alerts
from bot.web.alerts import BODY_CAP

TOKEN = "alerts-token-of-the-tests"
GROUP = {"alertname": "DispatchFleetStalled", "service": "timmy-dispatch"}


def alert(fingerprint: str = "f1", *, firing: bool = True, start: int = 0, **more: Any) -> dict[str, Any]:
    labels = {**GROUP, "severity": "critical", **more.pop("labels", {})}
    notes = {"summary": "The fleet is stalled", "description": "Nothing moves.", "runbook_url": "https://git.example/runbooks/x.md"}
    return {
        "status": "firing" if firing else "resolved",
        "labels": labels,
        "annotations": {**notes, **more.pop("annotations", {})},
        "startsAt": f"2026-11-25T00:{start:02}:00.123456789Z",
        "endsAt": "0001-01-01T00:00:00Z" if firing else "2026-11-25T01:00:00Z",
        "generatorURL": "http://127.0.0.1:9090/graph",
        "fingerprint": fingerprint,
        **more,
    }


def notice(*found: dict[str, Any], group: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """A body as Alertmanager 0.25 sends it."""
    firing = any(each["status"] == "firing" for each in found)
    labels = GROUP if group is None else group
    return {
        "receiver": "ops-issue",
        "status": "firing" if firing else "resolved",
        "alerts": list(found),
        "groupLabels": labels,
        "commonLabels": labels,
        "commonAnnotations": {},
        "externalURL": "http://127.0.0.1:9093",
        "version": "4",
        "groupKey": '{}/{severity=~"critical|warning"}:{alertname="DispatchFleetStalled"}',
        "truncatedAlerts": 0,
        **more,
    }


class Ops(World):
    """A world with an Alertmanager in it."""

    def settings(self, **more: Any):
        return super().settings(**({"alerts": {"repository": self.stage.repo}} | more))

    async def start(self, **more: Any):
        keys = dataclasses.replace(self.stage.secrets(), alerts_token=Secret(TOKEN))
        return await super().start(**({"keys": keys} | more))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.service.metrics_port}/alerts"

    async def post(self, body: Any, *, token: str = TOKEN, headers: dict[str, str] | None = None) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Authorization": f"Bearer {token}"} if headers is None else headers
        async with aiohttp.ClientSession() as session, session.post(self.url, data=io.BytesIO(data), headers=sent) as reply:
            return reply.status, (await reply.text()).strip()

    async def say(self, *found: dict[str, Any], **more: Any) -> None:
        """Posts, and waits until what it changed is shown."""
        assert await self.post(notice(*found, **more)) == (200, "stored")
        await self.quiet()

    async def quiet(self) -> None:
        async def all_shown():
            return all(group.projected_rev >= group.rev and group.plan is None for group in await self.store.read(alerts.every))

        await until(all_shown)

    async def issues(self) -> list[dict[str, Any]]:
        return [each for each in await self.alice.forge.issues_since(self.stage.repo) if replies.mirrors_alerts(each["body"])]

    async def states(self) -> list[tuple[str, int]]:
        """(state, number of comments) of every issue that mirrors alerts, newest first."""
        return [(each["state"], each["comments"]) for each in await self.issues()]

    async def counted(self, status: str, result: str) -> float:
        return self.service.metrics.registry.get_sample_value(
            "dispatch_alertmanager_notifications_total", {"status": status, "result": result}
        )


@pytest.fixture
async def ops(base: Path) -> AsyncIterator[Ops]:
    async with make_world(base, kind=Ops) as made:
        yield made


async def test_one_issue_opens_is_updated_and_closes(ops: Ops):
    await ops.say(alert())
    [issue] = await ops.issues()
    assert (issue["state"], issue["title"], issue["comments"]) == ("open", "Alert: DispatchFleetStalled", 0)
    assert issue["user"]["id"] == ops.timmy.id
    assert not issue["labels"]
    assert "**1 alert firing.**" in issue["body"]
    assert "since 2026-11-25 00:00:00 UTC" in issue["body"]
    assert "<https://git.example/runbooks/x.md>" in issue["body"]

    await ops.say(alert(annotations={"description": "Nothing moves at all."}))
    assert await ops.states() == [("open", 0)], "other words are no new alert"
    assert "Nothing moves at all." in (await ops.issues())[0]["body"]

    await ops.say(alert(), alert("f2", start=5, labels={"worker": "n1-0"}))
    [issue] = await ops.issues()
    assert (issue["state"], issue["comments"]) == ("open", 1)
    assert "`worker=n1-0`" in issue["body"]

    await ops.say(alert(firing=False), alert("f2", start=5, firing=False))
    assert await ops.states() == [("closed", 2)]
    assert "**Resolved.**" in (await ops.issues())[0]["body"]
    assert (await ops.counted("firing", "ok"), await ops.counted("resolved", "ok")) == (3, 1)


async def test_repeats_change_nothing(ops: Ops):
    for _ in range(4):
        await ops.say(alert())
    requests = len(ops.requests)
    before = (await ops.issues())[0]["updated_at"]
    await asyncio.gather(*(ops.post(notice(alert())) for _ in range(10)))
    await ops.quiet()
    assert await ops.states() == [("open", 0)]
    assert (await ops.issues())[0]["updated_at"] == before
    assert len(ops.requests) == requests
    for _ in range(3):
        await ops.say(alert(firing=False))
    assert await ops.states() == [("closed", 1)]


async def test_firing_again_within_a_day_reopens_and_later_opens_another(ops: Ops):
    await ops.say(alert())
    await ops.say(alert(firing=False))
    await ops.say(alert(start=10))
    assert await ops.states() == [("open", 2)]
    [issue] = await ops.issues()
    assert "It fires again." in (await ops.by_bot(issue["number"]))[-1]
    await ops.say(alert(start=10, firing=False))
    day = REOPEN_MS + 1000
    await ops.store.write(lambda conn: conn.execute(alerts.table.update().values(closed_ms=alerts.c.closed_ms - day)))
    await ops.say(alert(start=20))
    assert [state for state, _ in await ops.states()] == ["open", "closed"]


async def test_resolved_before_firing_opens_nothing(ops: Ops):
    await ops.say(alert(firing=False))
    await ops.say(alert())
    assert await ops.states() == [], "the word that it fires came late"
    await ops.say(alert(start=1))
    assert await ops.states() == [("open", 0)]
    await ops.say(alert(start=1, firing=False))
    await ops.say(alert(start=1))
    assert await ops.states() == [("closed", 1)]


async def test_groups_are_told_apart_by_their_labels_not_by_the_routing(ops: Ops):
    await ops.say(alert())
    await ops.say(alert(), groupKey="{}/{another route}:{}", receiver="other")
    assert len(await ops.issues()) == 1
    other = {"service": "timmy-dispatch", "alertname": "DispatchModelDrift"}
    await ops.say(alert("f9", labels=other), group=other)
    assert sorted(each["title"] for each in await ops.issues()) == ["Alert: DispatchFleetStalled", "Alert: DispatchModelDrift"]


async def test_a_restart_in_between_leaves_one_issue_in_the_right_state(ops: Ops):
    await ops.say(alert())
    await ops.stop()
    await ops.start()
    await ops.say(alert())
    assert await ops.states() == [("open", 0)]
    # Nothing is shown while the next words come: they wait over another restart.
    ops.service.mirror._held = lambda: False
    await asyncio.sleep(0.3)
    assert (await ops.post(notice(alert(), alert("f2"))))[0] == 200
    assert (await ops.post(notice(alert(firing=False), alert("f2", firing=False))))[0] == 200
    await ops.stop()
    await ops.start()
    await ops.quiet()
    assert await ops.states() == [("closed", 1)]
    await ops.say(alert(start=30))
    assert await ops.states() == [("open", 2)]


async def test_an_issue_that_somebody_deleted_or_closed(ops: Ops):
    await ops.say(alert())
    [issue] = await ops.issues()
    await ops.alice.forge.edit_issue(ops.stage.repo, issue["number"], state="closed")
    await ops.say(alert(), alert("f2"))
    assert await ops.states() == [("closed", 1)], "who closed it had a reason; the words are there to read"
    owner, _, repo = ops.stage.repo.partition("/")
    await ops.stage.admin.delete("/repos/{owner}/{repo}/issues/{index}", owner=owner, repo=repo, index=issue["number"])
    await ops.say(alert(), alert("f2"), alert("f3"))
    assert await ops.states() == [("open", 0)]
    assert "**3 alerts firing.**" in (await ops.issues())[0]["body"]


async def test_only_who_has_the_token_gets_in(ops: Ops):
    body = notice(alert())
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer "},
    ):
        status, _ = await ops.post(body, headers=headers)
        assert status == 401
    assert (await ops.post(body, headers={"Authorization": "Bearer \xfc\xe9"}))[0] == 401
    assert await ops.store.read(alerts.every) == []
    assert (await ops.post(body, headers={"Authorization": f"bearer  {TOKEN}"}))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 50_000,
        {"version": "3"},
        notice(),
        notice(alert(), group=[]),
        notice(alert(), groupLabels={"a": 1}),
        notice({**alert(), "status": "unknown"}),
        notice({**alert(), "fingerprint": ""}),
        notice({**alert(), "startsAt": "yesterday"}),
        notice({**alert(), "labels": None}),
    ],
    ids=str,
)
async def test_what_is_no_notification_is_refused(body: Any):
    with pytest.raises(UserError):
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())


async def test_bodies_are_bounded_and_faults_have_their_codes(ops: Ops):
    assert (await ops.post(b"{"))[0] == 400
    assert (await ops.post(b"x" * (BODY_CAP + 1)))[0] == 413

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 65_536

    async with aiohttp.ClientSession() as session:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            async with session.post(ops.url, data=endless(), headers={"Authorization": f"Bearer {TOKEN}"}) as reply:
                assert reply.status == 413
    most = notice(alert(annotations={"description": "x" * (BODY_CAP - 2000)}))
    assert (await ops.post(most))[0] == 200
    await ops.quiet()
    assert len((await ops.issues())[0]["body"]) < 70_000


async def test_a_store_that_fails_is_a_503(ops: Ops):
    # What is asked of the store beside a failing write may fail with it: nothing else asks meanwhile.
    mirror = ops.service.mirror
    held, mirror._held = mirror._held, lambda: False
    await asyncio.sleep(0.3)
    await ops.store.write(lambda conn: conn.exec_driver_sql("alter table alerts rename to away"))
    assert (await ops.post(notice(alert())))[0] == 503
    assert await ops.counted("firing", "error") == 1
    await ops.store.write(lambda conn: conn.exec_driver_sql("alter table away rename to alerts"))
    mirror._held = held
    await ops.say(alert())
    assert await ops.states() == [("open", 0)]


async def test_without_a_token_there_is_no_receiver(world: World):
    url = f"http://127.0.0.1:{world.service.metrics_port}/alerts"
    async with aiohttp.ClientSession() as session, session.post(url, json=notice(alert())) as reply:
        assert reply.status == 404


async def test_the_text_of_an_alert_acts_on_nobody(ops: Ops):
    evil = "@alice @bob\n/dispatch run\n\n<!-- timmy-dispatch:v1 key=sprint:1 -->![x](https://evil.example/x.png) closes #1 [a](javascript:1)\x00\ud800"
    group = {"alertname": f"/dispatch {evil}", "x": evil}
    await ops.say(
        alert(annotations=dict.fromkeys(("summary", "description", "runbook_url"), evil), labels={**group, evil: evil}), group=group
    )
    [issue] = await ops.issues()
    text = issue["title"] + "\n" + issue["body"]
    assert "@alice" not in text
    assert "/dispatch run" not in text
    assert "![x]" not in text
    assert "closes #1" not in text
    assert issue["body"].count("<!-- timmy-dispatch:v1") == 1
    assert "[a](" not in re.sub(r"`[^`]*`", "", issue["body"]).replace("\\[a\\](", "")
    assert await ops.store.read(lambda conn: conn.exec_driver_sql("select count(*) from sprints").scalar()) == 0


async def test_nothing_is_ever_worked_on_there(ops: Ops):
    await ops.say(alert())
    number = (await ops.issues())[0]["number"]
    await ops.alice.label(number, "dispatch")
    await ops.alice.comment(number, "/dispatch run")
    await until(lambda: ops.by_bot(number))
    [said] = await ops.by_bot(number)
    assert "never work on it" in said
    await ops.say(alert(annotations={"summary": "still"}))
    assert await ops.sprint(number) is None
    assert ops.model.requests == []
    assert "dispatch/queued" not in await ops.labels(number)


class Torn:
    """A forge whose answer never comes back: what was asked for is done, and then the process dies."""

    def __init__(self, forge: Any, method: str) -> None:
        self._forge = forge
        self._method = method

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._forge, name)
        if name != self._method:
            return real

        async def torn(*args: Any, **kwargs: Any) -> Any:
            await real(*args, **kwargs)
            raise asyncio.CancelledError

        return torn


@pytest.mark.parametrize("method", ["create_issue", "comment", "edit_issue"])
async def test_a_crash_after_any_request_doubles_nothing(ops: Ops, method: str):
    await ops.say(alert())
    await ops.say(alert(firing=False))
    day = REOPEN_MS + 1000
    if method == "create_issue":
        await ops.store.write(lambda conn: conn.execute(alerts.table.update().values(closed_ms=alerts.c.closed_ms - day)))
    await ops.service.forge.me()
    mirror = ops.service.mirror
    mirror._held = lambda: False
    await asyncio.sleep(0.3)
    await mirror.take(json.dumps(notice(alert(start=9))).encode())
    made: dict[str, Any] = {
        "repository": ops.stage.repo,
        "scrub": str,
        "held": lambda: True,
        "failed": lambda _kind: None,
        "count": lambda _status, _result: None,
        "tick_seconds": 0.1,
        "now_ms": mirror._now_ms,
    }
    with pytest.raises(asyncio.CancelledError):
        await Mirror(ops.store, Torn(ops.service.forge, method), **made).show_one()
    await ops.store.write(lambda conn: conn.execute(alerts.table.update().values(due_ms=0)))
    assert await Mirror(ops.store, ops.service.forge, **made).show_one()
    if method == "create_issue":
        assert await ops.states() == [("open", 0), ("closed", 1)]
    else:
        assert await ops.states() == [("open", 2)]


async def test_a_forge_that_fails_is_asked_again(ops: Ops):
    mirror = ops.service.mirror

    class Failing(Torn):
        def __getattr__(self, name: str) -> Any:
            async def refuse(*_args: Any, **_kwargs: Any) -> Any:
                raise Unavailable("away", status=503)

            return refuse

    mirror._forge, real = Failing(None, ""), mirror._forge
    assert (await ops.post(notice(alert())))[0] == 200

    async def failed():
        return ops.service.metrics.registry.get_sample_value("dispatch_outbox_failures_total", {"kind": "alert"})

    await until(failed)
    mirror._forge = real
    await ops.quiet()
    assert await ops.states() == [("open", 0)]


def told(store: Store, now: int, *found: dict[str, Any], **more: Any) -> bool:
    return store.write_sync(lambda conn: alerts.heard(conn, parse(json.dumps(notice(*found, **more)).encode()), now))


@pytest.fixture
def store(database: str):
    made = Store(database)
    made.open()
    yield made
    made.close()


def only(store: Store) -> alerts.Group:
    [group] = store.read_sync(alerts.every)
    return group


def test_an_alert_that_fires_again_with_its_old_start_long_after_counts(store: Store):
    now = 1_800_000_000_000
    assert told(store, now, alert())
    assert told(store, now + 1000, alert(firing=False))
    assert not told(store, now + 2000, alert()), "a word that came late"
    assert told(store, now + alerts.LATE_MS + 2000, alert()), "Prometheus was away, and is back"
    assert only(store).firing == ("f1",)


def test_an_alert_that_is_named_no_more_has_ended(store: Store):
    now = 1_800_000_000_000
    told(store, now, alert(), alert("f2"))
    assert not told(store, now + 1000, alert()), "an older word, perhaps"
    assert not told(store, now + alerts.LATE_MS * 2, alert(), truncatedAlerts=3)
    assert told(store, now + alerts.LATE_MS * 3, alert())
    assert only(store).firing == ("f1",)


def test_what_is_begun_and_done_is_kept(store: Store):
    now = 1_800_000_000_000
    told(store, now, alert())
    group = store.write_sync(lambda conn: alerts.take(conn, now_ms=now, lease_ms=1000))
    assert store.write_sync(lambda conn: alerts.take(conn, now_ms=now, lease_ms=1000)) is None, "it is leased"
    step = next_step(group, now)
    assert (group.tries, step["kind"], step["n"]) == (1, "open", 1)
    store.write_sync(lambda conn: alerts.begun(conn, group.key, step))
    assert next_step(only(store), now + 5) == step, "what was begun is finished first"
    store.write_sync(lambda conn: alerts.done(conn, group.key, issue=7, mark=1, opened=True, told=["f1"], projected_rev=1))
    group = only(store)
    assert (group.plan, group.issue, group.opened, next_step(group, now)) == (None, 7, True, None)
    told(store, now + 1000, alert(firing=False))
    assert next_step(only(store), now)["kind"] == "resolved"
    store.write_sync(lambda conn: alerts.failed(conn, group.key, error="away", due_ms=now + 60_000))
    assert store.write_sync(lambda conn: alerts.take(conn, now_ms=now + 2000, lease_ms=1000)) is None


def test_a_group_that_nobody_speaks_of_ends_after_a_day_and_is_forgotten_after_a_month(store: Store):
    now = 1_800_000_000_000
    told(store, now, alert())
    assert store.write_sync(lambda conn: alerts.sweep(conn, now + alerts.QUIET_MS)) == 0
    assert store.write_sync(lambda conn: alerts.sweep(conn, now + alerts.QUIET_MS + 1)) == 1
    group = only(store)
    assert (group.firing, next_step(group, now)) == ((), None), "it was never shown"
    store.write_sync(lambda conn: alerts.shown(conn, group.key, group.rev))
    store.write_sync(lambda conn: alerts.sweep(conn, now + alerts.FORGET_MS + 1))
    assert store.read_sync(alerts.every) == []


@pytest.mark.prometheus
async def test_the_real_alertmanager_opens_and_closes_one_issue(ops: Ops, tmp_path: Path):
    alertmanager, amtool = binary("prometheus-alertmanager", "alertmanager"), binary("amtool")
    config = yaml.safe_load((GRAFANA / "alertmanager.yml").read_text())
    (tmp_path / "token").write_text(TOKEN + "\n")
    for receiver in config["receivers"]:
        for hook in receiver.get("webhook_configs", ()):
            if receiver["name"] == "ops-issue":
                hook["url"] = ops.url
                hook["http_config"]["authorization"]["credentials_file"] = str(tmp_path / "token")
            else:
                hook["url"] = "http://127.0.0.1:9/nobody"
    for route in (config["route"], *config["route"]["routes"]):
        route |= {"group_wait": "100ms", "group_interval": "1s", "repeat_interval": "2s"}
    (tmp_path / "am.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", f"--storage.path={tmp_path / 'am'}"]
    log = tmp_path / "am.log"
    with process(log, alertmanager, f"--config.file={tmp_path / 'am.yml'}", "--log.level=debug", *options):
        labels = ["alertname=DispatchFleetStalled", "service=timmy-dispatch", "severity=critical"]

        async def add(*more: str) -> bool:
            words = [amtool, f"--alertmanager.url={url}", "alert", "add", *labels, "--annotation=summary=stalled", *more]
            done = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
            return await done.wait() == 0

        await until(add)
        await until(ops.issues, 20)
        # It repeats itself, and the bot is restarted in between.
        await until(lambda: _more(ops, 3), 30)
        listen = ops.url.split("/")[2]
        await ops.stop()
        await asyncio.sleep(2)
        await ops.start(metrics={"listen": listen})
        await until(lambda: _more(ops, 2), 30)
        assert await ops.states() == [("open", 0)]
        assert await add(f"--end={datetime.now(UTC) + timedelta(seconds=2):%Y-%m-%dT%H:%M:%SZ}")

        async def closed():
            return await ops.states() == [("closed", 1)]

        await until(closed, 30)


async def _more(ops: Ops, count: int) -> bool:
    return await ops.counted("firing", "ok") >= count
