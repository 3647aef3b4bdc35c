"""Starts and stops the real Prometheus and Alertmanager with the files of this repository at compressed times, and collects what they send."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from aiohttp import web

from bot.snapshot import FleetSnapshot

ROOT = Path(__file__).parent.parent
GRAFANA = ROOT / "grafana"


def binary(*names: str) -> str:
    """The first of these programs that is installed; skips the test by name where none is."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    pytest.skip(f"{' or '.join(names)} is not installed (Debian: apt install prometheus prometheus-alertmanager)")


def load_build() -> ModuleType:
    """`grafana/build.py` as a module; skips where its SDK is missing."""
    pytest.importorskip("grafana_foundation_sdk")
    name = "timmy_grafana_build"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, GRAFANA / "build.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        with warnings.catch_warnings():
            # The SDK warns, when imported, that a newer dashboard model exists.
            warnings.simplefilter("ignore", DeprecationWarning)
            spec.loader.exec_module(module)
    return sys.modules[name]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class ScriptedFleet:
    """A StoreReader whose snapshot the test makes at every read, from the moment of the read in Unix ms."""

    make: Callable[[int], FleetSnapshot]

    def snapshot(self) -> FleetSnapshot:
        return self.make(now_ms())


@dataclass
class Notification:
    """One POST of Alertmanager: when it came (Unix seconds), to which receiver, and its body."""

    at: float
    receiver: str
    body: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return [alert["labels"]["alertname"] for alert in self.body["alerts"]]

    @property
    def status(self) -> str:
        return self.body["status"]


@dataclass
class Monitoring:
    """A running pair with its receiver. Times are seconds."""

    prometheus: str
    alertmanager: str
    logs: Path
    received: list[Notification] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    processes: ExitStack = field(default_factory=ExitStack)
    scraper: subprocess.Popen[bytes] | None = None
    alerting: subprocess.Popen[bytes] | None = None

    def reload(self, *more: Path) -> None:
        """Prometheus reads the rules of this repository, and those in the files `more`."""
        rules = [*self.config["rule_files"], *map(str, more)]
        (self.logs / "prometheus.yml").write_text(yaml.safe_dump(self.config | {"rule_files": rules}))
        assert self.scraper is not None
        self.scraper.send_signal(signal.SIGHUP)

    def start_alertmanager(self) -> None:
        """Starts it, or starts it again."""
        listen = self.alertmanager.removeprefix("http://")
        options = [f"--web.listen-address={listen}", "--cluster.listen-address=", f"--storage.path={self.logs / 'am'}"]
        command = [binary("prometheus-alertmanager", "alertmanager"), f"--config.file={self.logs / 'alertmanager.yml'}", *options]
        self.alerting = self.processes.enter_context(process(self.logs / "alertmanager.log", *command))

    def stop_alertmanager(self) -> None:
        """Ends it, and waits for its end."""
        assert self.alerting is not None
        self.alerting.terminate()
        self.alerting.wait(10)

    def sent(self, receiver: str = "page", status: str = "firing") -> list[Notification]:
        return [each for each in self.received if each.receiver == receiver and each.status == status]

    async def until(self, found: Callable[[], object], seconds: float, what: str) -> None:
        """Returns when `found()`, awaited where it can be, is true; fails with what was received and the logs after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            answer = found()
            if await answer if inspect.isawaitable(answer) else answer:
                return
            if time.monotonic() > deadline:
                told = [(each.receiver, each.status, each.names) for each in self.received if each.receiver != "deadman"]
                logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.logs.glob("*.log")))
                raise AssertionError(f"not within {seconds} s: {what}; received {told}\n{logs}")
            await asyncio.sleep(0.05)

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """The instant vector of an expression, as Prometheus' API answers it; empty while Prometheus does not answer."""
        url = f"{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        try:
            return (await asyncio.to_thread(_get_json, url))["data"]["result"]
        except OSError:
            return []

    async def value(self, expr: str) -> float | None:
        """The only value of an expression, None where it has none."""
        result = await self.query(expr)
        return float(result[0]["value"][1]) if result else None


@asynccontextmanager
async def monitoring(
    folder: Path,
    target: str,
    *,
    generated: list[str],
    every: float = 1.0,
    mirror: str = "",
    token: str = "a token of the tests",
    ports: tuple[int, int] | None = None,
    change: Callable[[Path], None] | None = None,
) -> AsyncIterator[Monitoring]:
    """Prometheus scraping `target` (host:port) and Alertmanager, on rules that `grafana/build.py` writes with the options `generated`.

    Scrape and evaluation run every `every` seconds; routes and inhibitions are those of `grafana/alertmanager.yml` with shorter waits and
    with its receivers led here; with `mirror` its mirror of alerts posts there, with `token`. `ports` are those of the two where somebody must know
    them before; `change` may change the generated files in the folder it is given.
    """
    prometheus = binary("prometheus")
    build = load_build()
    received: list[Notification] = []
    async with _receiver(received) as address:
        ports = ports or (free_port(), free_port())
        running = Monitoring(f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", folder, received)
        build.main(["--out", str(folder / "grafana"), *generated])
        if change is not None:
            change(folder / "grafana")
        config = running.config = _prometheus_config(target, ports, every)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config | {"rule_files": []}))
        (folder / "token").write_text(token)
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(_alertmanager_config(address, mirror, folder / "token")))
        with running.processes as stack:
            running.start_alertmanager()
            running.scraper = stack.enter_context(
                process(
                    folder / "prometheus.log",
                    prometheus,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{ports[0]}",
                    "--rules.alert.resend-delay=1s",
                    "--enable-feature=exemplar-storage",
                )
            )
            await running.until(lambda: running.query("count(up == 1) == 3"), 30, "all three targets are scraped")
            # Targets are found five seconds after the start: rules from the start would page that the bot is down.
            running.reload()
            await running.until(lambda: running.query("ALERTS"), 30, "the rules are loaded")
            yield running
            # Stopping waits for the processes: meanwhile the loop must still answer them.
            await asyncio.to_thread(stack.close)


@contextmanager
def process(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child process, its output in `log`, ended for certain."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as child:
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    """Serves an application on a free port; yields host:port."""
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"{host}:{port}"
    finally:
        await runner.cleanup()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@asynccontextmanager
async def _receiver(received: list[Notification]) -> AsyncIterator[str]:
    async def take(request: web.Request) -> web.Response:
        received.append(Notification(time.time(), request.match_info["receiver"], await request.json()))
        return web.Response()

    app = web.Application()
    app.router.add_post("/{receiver}", take)
    async with served(app) as address:
        yield address


def _prometheus_config(target: str, ports: tuple[int, int], every: float) -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "prometheus.yml").read_text())
    interval = f"{round(every * 1000)}ms"
    config["global"] |= {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    mine = {"timmy-dispatch": target, "prometheus": f"127.0.0.1:{ports[0]}", "alertmanager": f"127.0.0.1:{ports[1]}"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [mine[job["job_name"]]]}]
    config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [mine["alertmanager"]]}]}]
    return config


def _alertmanager_config(address: str, mirror: str, token: Path) -> dict[str, Any]:
    config = yaml.safe_load((GRAFANA / "alertmanager.yml").read_text())
    for route in (config["route"], *config["route"]["routes"]):
        route |= {"group_wait": "100ms", "group_interval": "500ms"}
        if route["receiver"] == "deadman":
            route["repeat_interval"] = "2s"
    for receiver in config["receivers"]:
        for hook in receiver.get("webhook_configs", ()):
            hook["url"] = f"http://{address}/{receiver['name']}"
            if receiver["name"] == "ops-issue":
                hook["url"] = mirror or hook["url"]
                hook["http_config"]["authorization"]["credentials_file"] = str(token)
    return config


def _get_json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=5) as reply:
        return json.load(reply)
