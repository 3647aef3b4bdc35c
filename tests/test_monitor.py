"""`timmy-dispatch monitor`: one command starts the pack on this machine with real addresses, and only what is configured is sent anywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from prometheus_support import ROOT, binary, free_port

from bot.cli import main, monitor


def configured(folder: Path, **more: object) -> Path:
    for name in ("token", "secret"):
        path = folder / name
        path.touch(mode=0o600)
        path.write_text("0123456789abcdef\n")
    config = {
        "forge": {"url": "http://127.0.0.1:1", "token_file": "token"},
        "webhook": {"secret_files": ["secret"]},
        "repositories": [{"name": "acme/rocket"}],
        "state_dir": str(folder / "state"),
        "providers": [{"name": "a", "base_url": "http://127.0.0.1:1/v1", "model": "m"}],
        "metrics": {"listen": f"0.0.0.0:{free_port()}"},
        **more,
    }
    path = folder / "dispatch.yml"
    path.write_text(yaml.safe_dump(config))
    path.chmod(0o600)
    return path


def written(folder: Path) -> tuple[dict, dict]:
    place = folder / "state" / "monitor"
    return yaml.safe_load((place / "prometheus.yml").read_text()), yaml.safe_load((place / "alertmanager.yml").read_text())


def test_the_configuration_is_that_of_the_pack_with_real_addresses(tmp_path):
    path = configured(tmp_path, alerts={"token_file": "token", "repository": "acme/ops"})
    args = ["-c", str(path), "monitor", "--write-only", "--page", "http://127.0.0.1:7/p", "--prometheus-port", "1234"]
    done = CliRunner().invoke(main, args, standalone_mode=False)
    assert done.exception is None, done.output
    assert "--ticket, --deadman" in done.output
    prometheus, alertmanager = written(tmp_path)
    port = yaml.safe_load(path.read_text())["metrics"]["listen"].split(":")[1]
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in prometheus["scrape_configs"]}
    assert jobs == {"timmy-dispatch": [f"127.0.0.1:{port}"], "prometheus": ["127.0.0.1:1234"], "alertmanager": ["127.0.0.1:9093"]}
    assert [Path(name).parent for name in prometheus["rule_files"]] == [ROOT / "grafana" / "alerts"]
    receivers = {each["name"]: each.get("webhook_configs", [None])[0] for each in alertmanager["receivers"]}
    assert receivers["page"]["url"] == "http://127.0.0.1:7/p"
    assert receivers["ticket"] is None
    mirror = receivers["ops-issue"]
    assert mirror["url"] == f"http://127.0.0.1:{port}/alerts"
    token = Path(mirror["http_config"]["authorization"]["credentials_file"])
    assert (token.read_text(), token.stat().st_mode & 0o777) == ("0123456789abcdef", 0o600)
    subprocess.run([binary("promtool"), "check", "config", tmp_path / "state/monitor/prometheus.yml"], check=True, capture_output=True)
    subprocess.run([binary("amtool"), "check-config", tmp_path / "state/monitor/alertmanager.yml"], check=True, capture_output=True)


def test_without_a_token_nothing_is_sent_to_the_bot(tmp_path):
    path = configured(tmp_path, timing={"stall_after_seconds": 900})
    done = CliRunner().invoke(main, ["-c", str(path), "monitor", "--write-only"], standalone_mode=False)
    assert done.exception is None, done.output
    assert "not mirrored" in done.output
    assert "grafana/build.py --stall-after" in done.output
    _, alertmanager = written(tmp_path)
    assert "ops-issue" not in json.dumps(alertmanager)


def test_the_pack_is_found_where_the_wheel_puts_it(tmp_path, monkeypatch):
    share = tmp_path / "share" / "timmy-dispatch"
    (share / "grafana").mkdir(parents=True)
    for name in ("prometheus.yml", "grafana/alertmanager.yml"):
        (share / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(monitor, "__file__", str(tmp_path / "lib" / "bot" / "cli" / "monitor.py"))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    assert monitor.pack() == share


@pytest.mark.prometheus
def test_both_start_and_end_with_a_signal(tmp_path):
    for names in monitor.NAMES.values():
        binary(*names)
    path = configured(tmp_path)
    ports = free_port(), free_port()
    command = [
        sys.executable,
        "-P",
        "-m",
        "bot",
        "-c",
        str(path),
        "monitor",
        "--prometheus-port",
        str(ports[0]),
        "--alertmanager-port",
        str(ports[1]),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as child:
        try:
            rules = _rules(ports[0])
            assert {"dispatch-fleet", "dispatch-pipeline", "dispatch-recordings"} == rules
        finally:
            child.send_signal(signal.SIGTERM)
            output = child.communicate(timeout=20)[0].decode()
    assert child.returncode == 0, output
    assert f"http://127.0.0.1:{ports[0]}" in output


def _rules(port: int) -> set[str]:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/rules", timeout=2) as reply:
                return {group["name"] for group in json.load(reply)["data"]["groups"]}
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
