"""Every alert is provoked on the real bot under the real Prometheus, confirmed with what its page names, mended as the page says, and seen to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_support import Monitoring, load_build, monitoring
from served import ROOT
from talk import issue_with, state_is
from test_alerts import TOKEN
from test_grafana import alerts
from test_lanes import Laned, needs_tmux
from test_panels import PANELS, filled, says, series
from world import make_world, until
from zygote import Forked, zygote

from bot.fleet.health import Thresholds
from bot.store import workers

# What a drill cannot do in seconds on a real bot; their rules are held by promtool's tests alone.
NOT_DRILLED = {
    "DispatchScheduleDrift": "a schedule counts as late only 90 s after its moment, and nothing can hold a real one up for that long without stopping the bot",
}
# Windows and waits of the committed rules, shrunk; the thresholds beside them.
WINDOWS = {"4m": "5s", "5m": "5s", "10m": "10s", "15m": "10s", "30m": "12s", "1h": "20s", "6h": "120s", "1d": "480s", "3d": "1440s"}
HOLD = 1 / 150
LIMITS = {"stall_after": 6.0, "worker_lost": 4.0, "sprint_overrun": 4.0, "no_success": 8.0, "collector_stale": 9.0, "webhook_silent": 12.0}
SECONDS = 120.0


def shrunk(folder: Path) -> None:
    """Writes the rules anew: as committed, but in a drill's time."""
    build = load_build()
    written = build.build(build.Parameters(thresholds=Thresholds(**LIMITS)))
    for name, text in written.items():
        if name.startswith("alerts/"):
            short = re.sub(r"\[(\w+)\]", lambda found: f"[{WINDOWS[found[1]]}]", text)
            held = re.sub(r"(for: )(\d+)m\n", lambda found: f"{found[1]}{round(int(found[2]) * 60_000 * HOLD)}ms\n", short)
            (folder / name).write_text(held)


class Bot(Laned):
    """`serve` as a process, restarted with other settings as an operator does; commands are forked from where its imports were made."""

    def __init__(self, *given: Any, **changes: Any) -> None:
        super().__init__(*given, **changes)
        self.listen = ""
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(self.state_dir.parent), "PYTHONPATH": str(ROOT), "COLUMNS": "240"}
        self.calls = 0

    @property
    def config(self) -> Path:
        return self.state_dir.parent / "config" / "dispatch.yml"

    def write_config(self, **more: Any) -> Path:
        path = super().write_config(**more)
        data = json.loads(path.read_text()) | {"metrics": {"listen": self.listen}}
        if "alerts" in data:
            token = path.with_name("alerts.token")
            token.write_text(TOKEN)
            token.chmod(0o600)
            data["alerts"]["token_file"] = token.name
        path.write_text(json.dumps(data))
        return path

    def fork(self, *words: str, output: str) -> Forked:
        return zygote().fork(["--config", str(self.config), *words], environ=self.environ, output=self.state_dir.parent / output)

    async def serve(self, *, failpoint: str = "", **more: Any) -> Forked:
        self.changes |= more
        self.write_config()
        self.process = self.fork("serve", output="serve.log")
        await self.listening(90)
        return self.process

    async def restart(self, **more: Any) -> None:
        await self.stop_process()
        await self.serve(**more)

    async def cli(self, *words: str) -> tuple[int, str]:
        self.calls += 1
        name = f"said-{self.calls}"
        code = await asyncio.wait_for(self.fork(*words, output=name).wait(), SECONDS)
        return code, (self.state_dir.parent / name).read_text()

    async def get(self, path: str) -> tuple[int, str]:
        """(status, body); 0 and the cause where nobody listens."""

        def ask() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://{self.listen}{path}", timeout=30) as reply:
                    return reply.status, reply.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except OSError as error:
                return 0, str(error)

        return await asyncio.to_thread(ask)

    async def held(self, pid: int) -> Any:
        return [row for row in await self.store.read(workers.every) if row.pid == pid and row.reaped_ms is None]


class Page:
    """One alert with its runbook: what its drill saw, and what of the page it tried."""

    def __init__(self, drills: Drills, name: str) -> None:
        self.bot = drills.bot
        self.watched = drills.watched
        self.drills = drills
        self.name = name
        text = (ROOT / "docs" / "runbooks" / f"{name}.md").read_text()
        self.confirm, _, self.do = text.partition("\n## Confirm\n")[2].partition("\n## Do\n")
        self.tried: set[str] = set()
        self.began = time.monotonic()

    def _firing(self, more: str) -> Callable[[], Awaitable[Any]]:
        expr = f'ALERTS{{alertname="{self.name}",alertstate="firing"{more}}}'
        return lambda: self.watched.query(expr)

    async def fires(self, more: str = "") -> None:
        await self.watched.until(self._firing(more), SECONDS, f"{self.name} fires")
        self.drills.tell(self.name, f"fires after {time.monotonic() - self.began:.1f} s")

    async def resolves(self, more: str = "") -> None:
        """Also holds that everything the page names for a look was looked at."""
        began = time.monotonic()
        firing = self._firing(more)

        async def over() -> bool:
            return await self.drills.answers() and not await firing()

        await self.watched.until(over, SECONDS, f"{self.name} resolves")
        self.drills.tell(self.name, f"resolves after {time.monotonic() - began:.1f} s")
        self.drills.done.add(self.name)

    async def says(self, span: str, *expected: str, code: int | None = None, more: Sequence[str] = (), **names: str) -> str:
        """Runs a command of the page, with its capital letters filled in; it ends with `code` and says what is expected."""
        assert f"`{span}`" in self.confirm + self.do, f"{self.name}: {span} is not on its page"
        self.tried.add(span)
        line = span
        for name, value in names.items():
            line = line.replace(
                {"issue": "OWNER/REPO#N", "repo": "OWNER/REPO", "lane": " N"}[name], f" {value}" if name == "lane" else value
            )
        if found := re.fullmatch(r"curl -\w+ 127\.0\.0\.1:9111(/\w+)", line):
            ended, said = await self.bot.get(found[1])
        else:
            ended, said = await self.bot.cli(*line.removeprefix("timmy-dispatch ").split(), *more)
        assert code is None or ended == code, f"{self.name}: {line} ended with {ended}: {said}"
        for each in expected:
            assert re.search(each, said), f"{self.name}: {line} does not say {each!r}: {said}"
        return said

    async def confirmed(self, *elsewhere: str) -> None:
        """All that the page names under Confirm was tried, but for what is not of this program; panels and metrics are looked at here."""
        for span in re.findall(r"`([^`\n]+)`", self.confirm):
            if re.match(r"timmy-dispatch |curl ", span):
                assert span in self.tried or span in elsewhere, f"{self.name}: {span} was not tried"
            elif span.startswith("dispatch_"):
                assert await self.watched.query(span), f"{self.name}: {span} has no series"
            for _, panel in PANELS:
                if panel["title"] == span:
                    await self.drawn(panel)

    async def drawn(self, panel: dict[str, Any]) -> None:
        """A panel has something to show, now or within some scrapes: its rates need two of them."""
        exprs = [filled(target["expr"]).replace("60s", "10s") for target in panel["targets"]]

        async def shown():
            return says([each for expr in exprs for each in await series(self.watched, expr)])

        await until(shown, 20)


class Drills:
    """The bot, what watches it, and what was seen."""

    def __init__(self, bot: Bot, watched: Monitoring) -> None:
        self.bot = bot
        self.watched = watched
        self.done: set[str] = set()
        self.notified = asyncio.Event()
        self.at_work = asyncio.Event()

    def page(self, name: str) -> Page:
        return Page(self, name)

    def tell(self, name: str, what: str) -> None:
        print(f"{name}: {what}")

    async def answers(self) -> bool:
        """Whether what Prometheus does not show is truly not there."""
        return bool(await self.watched.query("vector(1)"))


# one working fleet, many small faults


async def label_overflow(drills: Drills) -> None:
    page = drills.page("DispatchLabelOverflow")
    await drills.bot.send("a_new_kind_of_event", b"{}")
    await page.fires(',label="event"')
    await page.confirmed()
    await page.resolves()


async def signature_failures(drills: Drills) -> None:
    page = drills.page("DispatchWebhookSignatureFailures")
    for _ in range(12):
        assert (await drills.bot.send("issue_comment", b"{}", secret="not the secret"))[0] in (401, 403)
    await page.fires()
    assert re.search(r"intake\.refused.*127\.0\.0\.1", drills.bot.log()), "the log tells the sender's address"
    await page.confirmed()
    await page.resolves()


async def webhook_missed(drills: Drills) -> None:
    bot, page = drills.bot, drills.page("DispatchWebhookMissed")
    issue = await bot.alice.open_issue("said while nobody heard")
    bot.forge.drop_deliveries = True
    await bot.alice.comment(issue, "/dispatch status")
    await page.fires()
    await page.says("timmy-dispatch doctor", r"fail +\S+ delivery +no delivery came", code=1, more=("--only", "webhook", "--wait", "2"))
    bot.forge.drop_deliveries = False
    await page.says("timmy-dispatch doctor", r"a test delivery arrived", code=0, more=("--only", "webhook", "--wait", "30"))
    await page.confirmed()
    await page.resolves()


async def sprint_overrun(drills: Drills) -> None:
    bot, page = drills.bot, drills.page("DispatchSprintOverrun")
    issue = await issue_with(bot, "sleeper")
    await bot.alice.label(issue, "dispatch")
    await state_is(bot, issue, "working", seconds=SECONDS)
    drills.at_work.set()
    await page.fires()
    ref = f"{bot.stage.repo}#{issue}"
    await page.says("timmy-dispatch queue", re.escape(ref), code=0)
    await page.says("timmy-dispatch status OWNER/REPO#N", r"[Ww]ork", code=0, issue=ref)
    await page.confirmed()
    await page.says("timmy-dispatch cancel OWNER/REPO#N", code=0, issue=ref)
    assert (await bot.settled(issue, SECONDS)).outcome == "cancelled"
    await page.resolves()


async def model_drift(drills: Drills) -> None:
    page, profile = drills.page("DispatchModelDrift"), drills.bot.state_dir.parent / "hermes" / "config.yaml"
    drifted = profile.read_text()
    profile.write_text(drifted.replace("default: planned", "default: another"))
    await page.fires()
    await page.says("timmy-dispatch watchdog --once", r"custom/another", r"custom/planned", code=3)
    await page.confirmed()
    profile.write_text(drifted)
    await page.resolves()


async def worker_lost(drills: Drills) -> None:
    bot, page = drills.bot, drills.page("DispatchWorkerHeartbeatLost")

    # Its worker must be another one than the one to be killed.
    await drills.at_work.wait()

    async def worker() -> Forked:
        process = bot.fork("worker", output="worker.log")
        await until(lambda: bot.held(process.pid), SECONDS)
        return process

    first = await worker()
    first.kill()
    await page.fires()
    await page.confirmed()
    again = await worker()
    await page.resolves()
    again.terminate()
    assert await asyncio.wait_for(again.wait(), SECONDS) == 0


async def agent_down(drills: Drills) -> None:
    bot, page = drills.bot, drills.page("DispatchAgentDown")
    code, said = await bot.lanes("up", "1")
    assert code == 0, said
    [pane] = await bot.panes()
    await drills.watched.until(lambda: drills.watched.query('dispatch_agent_up{agent="lane-0"} == 1'), SECONDS, "a lane that is up")
    os.kill(pane.pid, signal.SIGKILL)
    await page.fires()
    await page.says("timmy-dispatch lanes status", r"0\s+up\s+ended \(signal 9\)", code=1)
    await page.says("timmy-dispatch lanes attach --read-only", "not a terminal", code=1)
    await page.confirmed()
    await page.says("timmy-dispatch lanes up", r"0\s+up\s+running", code=0, more=("1",))
    await page.resolves()
    await page.says("timmy-dispatch lanes down N", "down", code=0, lane="0")


async def rules_failing(drills: Drills) -> None:
    page, path = drills.page("DispatchRulesFailing"), drills.watched.logs / "dispatch.other-version.yml"
    twice = 'label_replace(up, "job", "x", "", "")'
    rule = {"record": "dispatch:other:version", "expr": f"up + on (job) {twice}"}
    path.write_text(json.dumps({"groups": [{"name": "dispatch-other", "rules": [rule]}]}))
    drills.watched.reload(path)
    await page.fires()
    await page.confirmed()
    url = f"{drills.watched.prometheus}/api/v1/rules"
    with urllib.request.urlopen(url, timeout=10) as reply:
        assert re.search(r"many-to-many|duplicate|found duplicate series", reply.read().decode()), "Status, Rules names the error"
    drills.watched.reload()
    await page.resolves()


async def watchdog_and_probe(drills: Drills) -> None:
    """The one that sends the beats is stopped: they cease, and the probe that looks at it fails."""
    beats, probe = drills.page("Watchdog"), drills.page("DispatchProbeFailing")
    await beats.fires()
    await drills.watched.until(lambda: drills.watched.sent("deadman"), SECONDS, "a beat")
    await drills.notified.wait()
    drills.watched.stop_alertmanager()
    stopped = len(drills.watched.sent("deadman"))
    await probe.fires(',probe="alertmanager"')
    await probe.says("timmy-dispatch watchdog --once", r"alertmanager.*failing", code=3)
    await probe.confirmed()
    assert len(drills.watched.sent("deadman")) == stopped, "the switch on the other host pages"
    drills.watched.start_alertmanager()
    await drills.watched.until(lambda: len(drills.watched.sent("deadman")) > stopped, SECONDS, "beats again")
    await beats.confirmed()
    drills.done.add("Watchdog")
    await probe.resolves(',probe="alertmanager"')


async def notifications_failing(drills: Drills) -> None:
    """The mirror is routed to and not switched on; the restart that follows switches it on."""
    page = drills.page("DispatchNotificationsFailing")
    await page.fires()
    assert re.search(r"ops-issue.*404", (drills.watched.logs / "alertmanager.log").read_text())
    await page.confirmed()
    drills.notified.set()


# stopped, and started as it should have been


async def the_restart(drills: Drills) -> None:
    """The bot is stopped, and started with the mirror switched on and with more money: three alerts end with it."""
    bot, repo = drills.bot, drills.bot.stage.repo
    budget, notifications, down = (drills.page(f"Dispatch{name}") for name in ("BudgetNearlySpent", "NotificationsFailing", "BotDown"))
    issue = await issue_with(bot, "fix")
    await bot.alice.label(issue, "dispatch")
    await budget.fires()
    await budget.confirmed()
    await notifications.fires()
    await bot.stop_process()
    await down.fires()
    await down.says("curl -i 127.0.0.1:9111/healthz", "refused", code=0)
    await bot.serve(queue={**bot.changes["queue"], "usd_per_day": 1000.0}, alerts={"repository": repo})
    await down.says("curl -i 127.0.0.1:9111/healthz", code=200)
    await down.says("curl -i 127.0.0.1:9111/metrics", "dispatch_build_info", code=200)
    await down.confirmed()
    await asyncio.gather(down.resolves(), budget.resolves(), notifications.resolves())


# what it depends on is away


async def forge_away(drills: Drills) -> None:
    errors, stale = drills.page("DispatchGiteaErrors"), drills.page("DispatchCollectorStale")
    fault = drills.bot.forge.fail_next(10**9, status=503)
    await asyncio.gather(errors.fires(), stale.fires(',collector="gitea"'))
    await errors.says("timmy-dispatch doctor", "503", code=1, more=("--only", "server and account"))
    await asyncio.gather(errors.confirmed(), stale.confirmed())
    fault.left = 0
    await asyncio.gather(errors.resolves(), stale.resolves(',collector="gitea"'))


async def model_away(drills: Drills) -> None:
    bot = drills.bot
    stall, none, provider = (drills.page(f"Dispatch{name}") for name in ("FleetStalled", "NoThroughput", "LlmProviderErrors"))
    port = int(bot.model.url.rsplit(":", 1)[1].partition("/")[0])
    await bot.model.stop()
    issue = await issue_with(bot, "fix")
    await bot.alice.label(issue, "dispatch")
    await asyncio.gather(stall.fires(), none.fires(), provider.fires())
    ref = f"{bot.stage.repo}#{issue}"
    await stall.says("curl -s 127.0.0.1:9111/readyz", "stalled", "provider_down")
    await stall.says("timmy-dispatch queue", re.escape(ref), code=0)
    await stall.says("timmy-dispatch doctor", "model", code=1, more=("--only", "model"))
    await asyncio.gather(*(page.confirmed() for page in (stall, none, provider)))
    await bot.model.start(port=port)
    assert (await bot.settled(issue, SECONDS)).outcome == "pull_request"
    await asyncio.gather(*(page.resolves() for page in (stall, none, provider)))


async def database_locked(drills: Drills) -> None:
    """Another program holds the lock that every write needs."""
    page = drills.page("DispatchAllWorkersLost")
    path = drills.bot.settings().database_url().removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN IMMEDIATE")
        await page.fires()
        await page.confirmed()
        other.execute("ROLLBACK")
    await page.resolves()


async def intake_busy(drills: Drills) -> None:
    """Somebody sends more than fits."""
    bot, page = drills.bot, drills.page("DispatchWebhookErrorBurn")
    piece = b" " * (1 << 20)
    head = f"POST /webhook HTTP/1.1\r\nHost: bot\r\nX-Gitea-Event: push\r\nContent-Length: {64 << 20}\r\n\r\n".encode()
    writers = []

    async def send(pieces: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", bot.port)
        writers.append(writer)
        writer.write(head)
        for _ in range(pieces):
            writer.write(piece)
            with contextlib.suppress(ConnectionError):
                await writer.drain()

    await asyncio.gather(send(62), send(62))
    for _ in range(3):
        await send(8)
    await page.fires(',window="fast"')
    assert re.search(r"intake\.busy.*127\.0\.0\.1", bot.log())
    await page.confirmed()
    for writer in writers:
        writer.close()
    await page.says("timmy-dispatch doctor", code=0, more=("--only", "state"))
    await page.resolves(',window="fast"')


# a bad morning: the sandbox is broken, and nothing arrives


@contextlib.contextmanager
def few_processes() -> Iterator[None]:
    """What is started meanwhile may have no second process of the sandbox's user: a limit of the unit, say."""
    pid = zygote()._process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NPROC)
    resource.prlimit(pid, resource.RLIMIT_NPROC, (1, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NPROC, before)


async def sandbox_broken(drills: Drills) -> None:
    bot, repo = drills.bot, drills.bot.stage.repo
    unproven, burn, breaker = (drills.page(f"Dispatch{name}") for name in ("SandboxUnproven", "SprintSuccessBurn", "BreakerOpen"))
    bot.forge.drop_deliveries = True
    dropped = time.monotonic()
    with few_processes():
        await bot.restart(sandbox={"kind": "bubblewrap"})
    await unproven.fires()
    issues = [await issue_with(bot, "fix", f"mend it {number}") for number in range(6)]
    for issue in issues:
        await bot.alice.label(issue, "dispatch")
    await asyncio.gather(burn.fires(',window="fast"'), breaker.fires(',scope="repo"'))
    with few_processes():
        await unproven.says("timmy-dispatch doctor", "fail +sandbox", "remedy: ", code=1, more=("--only", "sandbox"))
    await breaker.says("timmy-dispatch health", "breaker")
    await breaker.says("timmy-dispatch status", "sandbox", code=0)
    await breaker.says("timmy-dispatch report 2h", "sandbox", code=0)
    assert "sandbox" in await bot.status_comment(issues[0])
    await asyncio.gather(*(page.confirmed() for page in (unproven, burn, breaker)))
    await asyncio.sleep(max(0.0, dropped + LIMITS["webhook_silent"] - time.monotonic()))
    await bot.restart(sandbox={"kind": "none"})
    silent = drills.page("DispatchWebhookSilent")

    async def deliveries() -> None:
        await silent.fires()
        await silent.says(
            "timmy-dispatch doctor", r"fail +\S+ delivery +no delivery came", code=1, more=("--only", "webhook", "--wait", "1")
        )
        bot.forge.drop_deliveries = False
        await silent.says("timmy-dispatch doctor", "a test delivery arrived", code=0, more=("--only", "webhook", "--wait", "30"))
        await silent.confirmed()
        await silent.resolves()

    async def sprints() -> None:
        await breaker.says("timmy-dispatch resume OWNER/REPO", code=0, repo=repo)
        issue = await issue_with(bot, "fix", "mend it at last")
        await bot.alice.label(issue, "dispatch")
        assert (await bot.settled(issue, SECONDS)).outcome == "pull_request"
        await asyncio.gather(unproven.resolves(), burn.resolves(',window="fast"'), breaker.resolves())

    await asyncio.gather(deliveries(), sprints())


HERMES = """#!/bin/sh
case "$*" in
"auth status nous") cat "$HERMES_HOME/status" ;;
"auth add nous") cp "$HERMES_HOME/fresh.json" "$HERMES_HOME/auth.json" && echo "nous: logged in" >"$HERMES_HOME/status" ;;
esac
"""


def login(left: timedelta) -> str:
    """Hermes' file of a key with so much time left."""
    ends = (datetime.now(UTC) + left).isoformat()
    return json.dumps(
        {"providers": {"nous": {"agent_key": "agent-key-000000", "agent_key_expires_at": ends, "access_token": "access-000000"}}}
    )


async def login_lost(drills: Drills) -> None:
    """The session of the login was revoked; the second provider keeps the fleet at work."""
    bot, home = drills.bot, drills.bot.state_dir.parent / "login"
    expiring, expired = drills.page("DispatchAuthTokenExpiring"), drills.page("DispatchAuthTokenExpired")
    program = home / "bin" / "hermes"
    program.parent.mkdir(parents=True)
    program.write_text(HERMES)
    program.chmod(0o755)
    (home / "config.yaml").write_text("model: {default: n, provider: nous}")
    (home / "status").write_text("nous: logged out (session revoked)\n")
    (home / "fresh.json").write_text(login(timedelta(days=1)))
    (home / "auth.json").write_text(login(timedelta(seconds=60)))
    bot.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    scripted = {"name": "scripted", "base_url": bot.model.url, "model": "scripted-1"}
    await bot.restart(providers=[{"from_hermes": True, "hermes_home": home, "base_url": bot.model.url}, scripted])
    issue = await issue_with(bot, "fix", "mend it with the second provider")
    await bot.alice.label(issue, "dispatch")
    await expiring.fires(',provider="nous"')
    await expiring.confirmed()
    (home / "auth.json").write_text(login(timedelta(seconds=-60)))
    await expired.fires(',provider="nous"')
    await expired.confirmed()
    assert (await bot.settled(issue, SECONDS)).outcome == "pull_request"
    assert "`hermes auth add nous`" in expired.do
    subprocess.run([program, "auth", "add", "nous"], env={"HERMES_HOME": str(home), "PATH": os.environ["PATH"]}, check=True)
    await asyncio.gather(expiring.resolves(), expired.resolves())


# Alert -> the drill that provokes it; drills of one phase go on at the same time.
PHASES: list[dict[str, Callable[[Drills], Awaitable[None]]]] = [
    {
        "DispatchLabelOverflow": label_overflow,
        "DispatchWebhookSignatureFailures": signature_failures,
        "DispatchWebhookMissed": webhook_missed,
        "DispatchSprintOverrun": sprint_overrun,
        "DispatchModelDrift": model_drift,
        "DispatchWorkerHeartbeatLost": worker_lost,
        "DispatchAgentDown": agent_down,
        "DispatchRulesFailing": rules_failing,
        "Watchdog": watchdog_and_probe,
        "DispatchProbeFailing": watchdog_and_probe,
        "DispatchNotificationsFailing": notifications_failing,
        "DispatchWebhookErrorBurn": intake_busy,
    },
    {"DispatchBudgetNearlySpent": the_restart, "DispatchNotificationsFailing": the_restart, "DispatchBotDown": the_restart},
    {"DispatchGiteaErrors": forge_away, "DispatchCollectorStale": forge_away, "DispatchAllWorkersLost": database_locked},
    {"DispatchFleetStalled": model_away, "DispatchNoThroughput": model_away, "DispatchLlmProviderErrors": model_away},
    {
        "DispatchSandboxUnproven": sandbox_broken,
        "DispatchSprintSuccessBurn": sandbox_broken,
        "DispatchBreakerOpen": sandbox_broken,
        "DispatchWebhookSilent": sandbox_broken,
    },
    {"DispatchAuthTokenExpiring": login_lost, "DispatchAuthTokenExpired": login_lost},
]
DRILLED = {name for phase in PHASES for name in phase}


def test_every_alert_is_drilled_or_it_is_said_why_not():
    assert DRILLED | NOT_DRILLED.keys() == set(alerts())
    assert not DRILLED & NOT_DRILLED.keys()
    assert all(NOT_DRILLED.values())


@pytest.fixture
def ports() -> Iterator[tuple[int, ...]]:
    """Three ports that are kept from everybody who asks for any: they are listened on late, and again after a restart."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in held:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", 0))
        yield tuple(each.getsockname()[1] for each in held)


@needs_tmux
@pytest.mark.skipif(
    not os.environ.get("TEST_DRILLS"), reason="two minutes with a machine of its own: TEST_DRILLS=1 ./dev test tests/test_drills.py"
)
@pytest.mark.prometheus
@pytest.mark.sandbox
@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_every_alert_is_provoked_confirmed_and_mended(base: Path, tmp_path: Path, ports: tuple[int, int, int]):
    listen, *others = ports
    home = base / "hermes"
    home.mkdir()
    (home / "config.yaml").write_text("model: {default: planned, provider: custom, base_url: 'http://127.0.0.1:9/v1'}")
    # Only root runs the sandbox as another user, whose processes can be limited apart.
    phases = [phase for phase in PHASES if os.geteuid() == 0 or "DispatchSandboxUnproven" not in phase]
    changes = {
        "timing": {"stall_after_seconds": LIMITS["stall_after"], "lease_seconds": 20.0, "beat_seconds": 0.5, "tick_seconds": 0.2},
        "queue": {"slots": 2, "max_per_repository": 4, "usd_per_day": 0.6},
        "reconcile": {"every_seconds": 1.0, "poll_seconds": 1.0, "leave_to_webhook_seconds": 3.0},
        "collector": {"enabled": True, "every_seconds": 3.0},
        "lanes": {"restart": "never"},
        "limits": {"usd": 0.0},
        "webhook": {"max_body_bytes": 64 << 20},
        "breaker": {"failures": 6},
        "watchdog": {
            "every_seconds": {"model": 1.0, "alertmanager": 1.0},
            "policy": {"model": "watch"},
            "expect": {"default": {"provider": "custom", "model": "planned"}},
            "hermes_home": str(home),
            "alertmanager_url": f"http://127.0.0.1:{others[1]}",
        },
    }
    async with make_world(base, kind=Bot, start=False, **changes) as bot:
        bot.listen = f"127.0.0.1:{listen}"
        bot.changes["providers"] = [
            {
                "name": "scripted",
                "base_url": bot.model.url,
                "model": "scripted-1",
                "max_output_tokens": 64,
                "price": {"input": 100.0, "output": 100.0},
            }
        ]
        await bot.serve()
        watching = monitoring(
            tmp_path,
            bot.listen,
            generated=[],
            ports=(others[0], others[1]),
            change=shrunk,
            mirror=f"http://{bot.listen}/alerts",
            token=TOKEN,
        )
        async with watching as watched:
            drills = Drills(bot, watched)
            faults: list[Exception] = []
            for phase in phases:
                began = time.monotonic()
                ended = await asyncio.gather(*(drill(drills) for drill in dict.fromkeys(phase.values())), return_exceptions=True)
                faults += [fault for fault in ended if isinstance(fault, Exception)]
                drills.tell("phase", f"{', '.join(phase)} {time.monotonic() - began:.1f} s")
            if faults:
                print(bot.log())
                raise ExceptionGroup("drills", faults)
            assert drills.done == {name for phase in phases for name in phase}
