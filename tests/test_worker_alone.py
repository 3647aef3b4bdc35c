"""A machine that only runs workers hears nothing: it needs no secret of the webhook, the pages or the alerts, and is told what it does need."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from test_launcher import configuration
from world import World, make_world, until

from bot.config import load
from bot.doctor import Mark, company
from bot.models import ConfigError
from bot.settings import Settings
from bot.store import Store, cursors, workers

ROOT = Path(__file__).parents[1]
TEXT = """\
forge: {url: "https://git.example.org", token_file: gitea.token}
webhook: {listen: "127.0.0.1:9", public_url: "https://bot.example.org", secret_files: [webhook.secret]}
repositories: [{name: acme/rocket}]
pages: {visibility: token, token_file: pages.token}
alerts: {repository: acme/rocket, token_file: alerts.token}
providers: [{name: local, base_url: "http://127.0.0.1:1/v1", model: m}]
"""


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_only_who_hears_needs_the_secrets_of_what_listens(tmp_path: Path):
    path = private(tmp_path / "dispatch.yml", TEXT)
    private(tmp_path / "gitea.token", "forge-token-value")
    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    assert {fault.split(": ")[1] for fault in caught.value.faults} == {"webhook.secret_files[0]", "pages.token_file", "alerts.token_file"}
    loaded = load(path, environ={}, serves=False)
    assert loaded.warnings == ()
    assert (loaded.secrets.webhook_secrets, loaded.secrets.pages_token, loaded.secrets.alerts_token) == ((), None, None)
    # What is there is taken along, so that it is kept out of texts; what others may read is nobody's secret and is passed over.
    private(tmp_path / "webhook.secret", "webhook-secret-value")
    (tmp_path / "pages.token").write_text("pages-token-value")
    (tmp_path / "pages.token").chmod(0o644)
    secrets = load(path, environ={"TIMMY_WEBHOOK_SECRET": "of-the-environment"}, serves=False).secrets
    assert [secret.reveal() for secret in secrets.webhook_secrets] == ["webhook-secret-value"]
    assert secrets.pages_token is None


def test_what_it_needs_is_missed_like_everywhere(tmp_path: Path):
    path = private(tmp_path / "dispatch.yml", TEXT.replace("model: m", "model: m, key_file: provider.key"))
    with pytest.raises(ConfigError) as caught:
        load(path, environ={}, serves=False)
    assert {fault.split(": ")[1] for fault in caught.value.faults} == {"forge.token_file", "providers[0].key_file"}


def test_without_a_secret_the_remedy_names_the_worker(tmp_path: Path):
    path = private(tmp_path / "dispatch.yml", TEXT.replace(", secret_files: [webhook.secret]", ""))
    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    assert any("check-config --worker" in fault for fault in caught.value.faults)


async def test_who_lives_on_the_database(tmp_path: Path):
    settings = Settings.model_validate(
        {
            "forge": {"url": "https://git.example.org"},
            "repositories": [{"name": "acme/rocket"}],
            "state_dir": tmp_path,
            "providers": [{"name": "local", "base_url": "http://127.0.0.1:1/v1", "model": "m"}],
        }
    )
    alone = await company.look(settings)
    assert (alone.mark, "database: postgresql://" in alone.remedy) == (Mark.FAIL, True)
    store = Store(settings.database_url())
    store.open()
    try:
        nobody = await company.look(settings)
        assert (nobody.mark, "nothing new comes in" in nobody.detail) == (Mark.WARN, True)
        entry = {"node_id": "n", "host": "h", "pid": 1, "app_version": "v", "capacity": 1}
        store.write_sync(lambda conn: workers.enter(conn, executor_id="n-1", slot=0, **entry))
        assert (await company.look(settings)).mark is Mark.WARN
        (tmp_path / "slot-0.lock").write_bytes(b"serve")
        assert (await company.look(settings)).mark is Mark.OK
    finally:
        store.close()


@pytest.mark.postgres
async def test_who_leads_over_several_machines(tmp_path: Path, postgres_server):
    settings = Settings.model_validate(
        {
            "forge": {"url": "https://git.example.org"},
            "repositories": [{"name": "acme/rocket"}],
            "state_dir": tmp_path,
            "database": postgres_server.database(),
            "providers": [{"name": "local", "base_url": "http://127.0.0.1:1/v1", "model": "m"}],
        }
    )
    store = Store(settings.database_url())
    store.open()
    try:
        entry = {"node_id": "n", "host": "h", "pid": 1, "app_version": "v", "capacity": 1}
        store.write_sync(lambda conn: workers.enter(conn, executor_id="n-1", slot=0, **entry))
        store.write_sync(lambda conn: cursors.put(conn, "leader", {"executor": "n-1", "serves": False}))
        found = await company.look(settings)
        assert (found.mark, "start `timmy-dispatch serve`" in found.remedy) == (Mark.WARN, True)
        store.write_sync(lambda conn: cursors.put(conn, "leader", {"executor": "n-1", "serves": True}))
        assert (await company.look(settings)).mark is Mark.OK
    finally:
        store.close()


async def bot(config: Path, *words: str) -> tuple[int, str]:
    process = await begun(config, *words)
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def begun(config: Path, *words: str) -> asyncio.subprocess.Process:
    environ = {"PATH": os.environ["PATH"], "HOME": str(config.parent), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "bot", "-c", str(config), *words]
    return await asyncio.create_subprocess_exec(
        *command, cwd="/", env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def test_a_worker_runs_beside_a_serve_without_the_webhooks_secret(world: World):
    config = configuration(world)
    (config.parent / "hook").unlink()
    code, said = await bot(config, "check-config")
    assert (code, "hook does not exist" in said) == (2, True), said
    code, said = await bot(config, "check-config", "--worker")
    assert (code, "a worker needs the forge's token" in said) == (0, True), said
    assert "`database: postgresql://...`" in said
    code, said = await bot(config, "doctor", "--worker", "--json", "--only", "beside a serve", "--only", "rights", "--only", "state")
    found = {probe["name"]: probe["mark"] for probe in json.loads(said)["probes"]}
    assert found["beside a serve"] == "ok", said
    code, said = await bot(config, "status")
    assert code == 0, said

    before = len(await world.store.read(workers.every))
    process = await begun(config, "worker")
    try:

        async def entered() -> bool:
            return process.returncode is not None or len(await world.store.read(workers.every)) > before

        await until(entered, 60)
        assert process.returncode is None, (await process.communicate())[0].decode()
        process.send_signal(signal.SIGTERM)
        out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def world(base: Path):
    async with make_world(base) as made:
        yield made
