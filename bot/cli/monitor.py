"""Starts Prometheus and Alertmanager of this machine on loopback with the files that come with the service: one command from a running bot to a watched one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from bot.config import Loaded

LOOK_SECONDS = 0.2
END_SECONDS = 10.0
NAMES = {"prometheus": ("prometheus",), "alertmanager": ("prometheus-alertmanager", "alertmanager")}


@click.command("monitor", short_help="Watch the service with Prometheus and Alertmanager.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Folder for configuration, data and logs. [state folder]/monitor"
)
@click.option("--prometheus-port", type=click.IntRange(1, 65535), default=9090, show_default=True)
@click.option("--alertmanager-port", type=click.IntRange(1, 65535), default=9093, show_default=True)
@click.option("--page", metavar="URL", help="Webhook that wakes a person (severity critical).")
@click.option("--ticket", metavar="URL", help="Webhook that is read in the morning (severity warning).")
@click.option("--deadman", metavar="URL", help="Dead man's switch on another machine; it gets a beat a minute.")
@click.option("--write-only", is_flag=True, help="Write the configuration, start nothing.")
@click.pass_obj
def command(
    config: Path,
    *,
    data: Path | None,
    prometheus_port: int,
    alertmanager_port: int,
    page: str | None,
    ticket: str | None,
    deadman: str | None,
    write_only: bool,
) -> int:
    """Start Prometheus and Alertmanager on loopback, with the rules, routes and inhibitions that come with the service.

    They scrape the address of `metrics.listen` in dispatch.yml and end with Ctrl-C. Both must be installed (Debian: apt install prometheus
    prometheus-alertmanager). For a machine of its own see docs/observability.md.
    """
    from bot.cli._load import load

    loaded = load(config)
    folder = data or loaded.settings.state_dir / "monitor"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    urls = {"page": page, "ticket": ticket, "deadman": deadman}
    write(folder, loaded, ports=(prometheus_port, alertmanager_port), urls=urls)
    for line in _said(loaded, urls):
        click.echo(line, err=True)
    if write_only:
        click.echo(f"written: {folder / 'prometheus.yml'} and {folder / 'alertmanager.yml'}")
        return 0
    return _run(folder, ports=(prometheus_port, alertmanager_port))


def pack() -> Path:
    """The folder with prometheus.yml and grafana/: the checkout, else where the installation has put them."""
    import sysconfig

    from bot.models import DispatchError

    schemes = ("", sysconfig.get_preferred_scheme("user"))
    places = [Path(__file__).resolve().parents[2]]
    places += [
        Path(sysconfig.get_path("data", scheme) if scheme else sysconfig.get_path("data")) / "share/timmy-dispatch" for scheme in schemes
    ]
    for place in places:
        if (place / "prometheus.yml").is_file() and (place / "grafana" / "alertmanager.yml").is_file():
            return place
    raise DispatchError(f"the monitoring files are in none of {', '.join(map(str, places))}. Remedy: install timmy-dispatch from its wheel")


def write(folder: Path, loaded: Loaded, *, ports: tuple[int, int], urls: dict[str, str | None]) -> None:
    """Writes both configurations for this machine: real addresses in place of the examples, the mirror of alerts only where it is switched on."""
    import yaml

    place, listen = pack(), loaded.settings.metrics.listen
    config: dict[str, Any] = yaml.safe_load((place / "prometheus.yml").read_text(encoding="utf-8"))
    config["rule_files"] = [str(place / name) for name in config["rule_files"]]
    targets = {"timmy-dispatch": _reachable(listen), "prometheus": f"127.0.0.1:{ports[0]}", "alertmanager": f"127.0.0.1:{ports[1]}"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [targets["alertmanager"]]}]}]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    routing: dict[str, Any] = yaml.safe_load((place / "grafana" / "alertmanager.yml").read_text(encoding="utf-8"))
    token = _token_file(folder, loaded)
    for receiver in routing["receivers"]:
        name = receiver["name"]
        if name in urls:
            if urls[name]:
                receiver["webhook_configs"][0]["url"] = urls[name]
            else:
                # An address that nobody answers would page for its own failure.
                receiver.pop("webhook_configs")
        elif name == "ops-issue" and token is not None:
            hook = receiver["webhook_configs"][0]
            hook["url"] = f"http://{_reachable(listen)}/alerts"
            hook["http_config"]["authorization"]["credentials_file"] = str(token)
    if token is None:
        routing["receivers"] = [each for each in routing["receivers"] if each["name"] != "ops-issue"]
        routing["route"]["routes"] = [each for each in routing["route"]["routes"] if each["receiver"] != "ops-issue"]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routing, sort_keys=False), encoding="utf-8")


def _reachable(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"  # noqa: S104  read, not listened on


def _token_file(folder: Path, loaded: Loaded) -> Path | None:
    token = loaded.secrets.alerts_token
    if token is None:
        return None
    path = folder / "alerts.token"
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(token.reveal(), encoding="utf-8")
    return path


def _said(loaded: Loaded, urls: dict[str, str | None]) -> Iterator[str]:
    from bot.fleet.health import Thresholds

    missing = [f"--{name}" for name, url in urls.items() if not url]
    if missing:
        yield f"Without {', '.join(missing)} those notifications go nowhere; the alerts are shown on Alertmanager's own page."
    if loaded.secrets.alerts_token is None:
        yield "Alerts are not mirrored into issues: `alerts:` in dispatch.yml switches that on."
    if Thresholds.of(loaded.settings).stall_after != Thresholds().stall_after:
        yield "timing.stall_after_seconds is not the one of the shipped rules: write them anew with grafana/build.py --stall-after."


def _run(folder: Path, *, ports: tuple[int, int]) -> int:
    import contextlib
    import shutil
    import signal
    import subprocess
    import time

    from bot.models import DispatchError

    found = {}
    for program, names in NAMES.items():
        found[program] = next((path for name in names if (path := shutil.which(name))), None)
        if found[program] is None:
            raise DispatchError(
                f"{program} is not installed. Remedy: apt install prometheus prometheus-alertmanager, or put it on the PATH"
            )
    commands = {
        "alertmanager": [
            f"--config.file={folder / 'alertmanager.yml'}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{ports[1]}",
            "--cluster.listen-address=",
        ],
        "prometheus": [
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{ports[0]}",
            "--enable-feature=exemplar-storage",
        ],
    }
    children: dict[str, subprocess.Popen[bytes]] = {}

    def ended(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ended)
    with contextlib.ExitStack() as stack:
        for program, options in commands.items():
            log = stack.enter_context((folder / f"{program}.log").open("ab"))
            # Its own group, so that Ctrl-C reaches us first and the order of the end is ours.
            children[program] = subprocess.Popen(
                [str(found[program]), *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        stack.callback(_end, list(children.values()))
        click.echo(f"Prometheus http://127.0.0.1:{ports[0]}  Alertmanager http://127.0.0.1:{ports[1]}  logs in {folder}; Ctrl-C ends both")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                for program, child in children.items():
                    if child.poll() is not None:
                        words = (folder / f"{program}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                        raise DispatchError(f"{program} ended with {child.returncode}: {words[-1] if words else 'it said nothing'}")
                time.sleep(LOOK_SECONDS)
    return 0


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    import subprocess

    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
