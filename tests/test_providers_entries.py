"""What settings, key files and a Hermes home become, and that reading a Hermes home changes nothing in it."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from bot.config import PriceSettings, ProviderSettings
from bot.providers.entries import Entry, Resolver, estimate_tokens, resolve, url_fault
from bot.providers.hermes_config import NousKey
from bot.providers.nous import (
    LoggedOutError,
    NousLogin,
    RefreshPendingError,
    auth_status,
    nous_login,
    parse_status,
)
from bot.redaction import Secret

URL = "http://127.0.0.1:18080/v1"


def plain(**more):
    return ProviderSettings(**{"name": "p", "base_url": URL, "model": "m", **more})


def one(setting, environ=None, home=Path("/nonexistent")):
    entries, findings = resolve([setting], environ=environ or {}, home=home)
    return (entries[0] if entries else None), findings


def secret_file(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_come_from_file_environment_or_nowhere(tmp_path):
    file = secret_file(tmp_path / "key", "sk-from-file-12345\n", 0o400)
    assert one(plain(key_file=file))[0].key.reveal() == "sk-from-file-12345"
    assert one(plain(key_env="K"), {"K": "sk-from-env-12345"})[0].key.reveal() == "sk-from-env-12345"
    assert one(plain())[0].key.reveal() == "no-key-required"
    assert one(plain())[0].secrets() == []


def test_faults_are_findings_without_secrets(tmp_path):
    wide = secret_file(tmp_path / "wide", "sk-from-file-12345", 0o644)
    link = tmp_path / "link"
    link.symlink_to(secret_file(tmp_path / "real", "sk-from-file-12345"))
    faults = {
        "chmod 600": plain(key_file=wide),
        "cannot be read": plain(key_file=link),
        "is empty": plain(key_file=secret_file(tmp_path / "empty", "")),
        "not a regular file": plain(key_file=tmp_path),
        "no MISSING": plain(key_env="MISSING"),
        "shorter than 8": plain(key_env="SHORT"),
        "`model` is missing": plain(model=""),
    }
    for text, setting in faults.items():
        entry, findings = one(setting, {"SHORT": "abc"})
        assert entry is None, text
        assert text in findings[0]
        assert "sk-from" not in str(findings)


def test_urls():
    assert "http or https" in url_fault("ftp://x")
    assert "not hold a login" in url_fault("https://u:p@x/v1")
    assert "not a URL" in url_fault("http://x:y/v1")
    assert url_fault("http://127.0.0.1:1/v1") == ""


def test_duplicates_and_names():
    settings = [
        plain(),
        plain(name="P", base_url=URL + "/"),
        plain(base_url="http://other/v1"),
        plain(name="", base_url="http://host:1/v1"),
    ]
    entries, _ = resolve(settings, environ={}, home=Path("/x"))
    assert [entry.name for entry in entries] == ["p/m", "p-2/m", "host/m"]


def test_an_entry_shows_no_secret():
    entry = Entry("p", "m", URL, Secret("sk-canary-123456"), headers={"X": Secret("header-canary")}, extra_body={"k": "v"})
    assert "canary" not in repr(entry)
    assert entry.fingerprint(with_key=True) != entry.fingerprint(with_key=False)
    assert Entry("p", "m", URL, Secret("other-key-1234")).fingerprint(with_key=False) != entry.fingerprint(with_key=False)


def test_price_and_estimates():
    entry = Entry("p", "m", URL, Secret(""), price=PriceSettings(input=2, output=10))
    assert entry.usage(input_tokens=1_000_000, output_tokens=100_000, cached=500_000).usd == pytest.approx(3.0)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "x" * 300}}]}
    assert estimate_tokens([call]) > 100
    assert estimate_tokens([{"role": "user", "content": "ä" * 300}]) == 204


CONFIG = """
model: {default: some/model, provider: "custom:good"}
providers:
  good: {name: nice, base_url: "http://127.0.0.1:18080/v1/", key_env: GOOD_KEY, api_key: inline-key-000, default_model: dm, extra_headers: {X-A: header-canary}, extra_body: {seed: 1}}
  anthropic: {base_url: "https://a.example/v1", transport: anthropic_messages}
  gone: {base_url: "https://g.example/v1", enabled: false}
  urls: {api: "https://first.example/v1", url: "https://second.example/v1", base_url: "https://third.example/v1"}
  thief: {base_url: "https://thief.example/v1", key_env: OPENAI_API_KEY}
fallback_providers:
  - {provider: "custom:nice", model: other/model, api_key: fallback-key-000, key_env: GOOD_KEY}
  - {provider: custom, model: local, base_url: "http://localhost:11434/v1"}
  - {provider: openrouter, model: or/model}
  - {provider: urls, model: u}
  - {provider: anthropic, model: a}
  - {provider: gone, model: g}
  - {provider: thief, model: t}
  - {provider: mystery, model: x}
  - {provider: nous}
  - "text"
fallback_model: {provider: custom, model: last, base_url: "${LAST_URL}"}
"""
ENVIRON = {"OPENROUTER_API_KEY": "or-key-0000000", "OPENAI_API_KEY": "oa-key-0000000", "LAST_URL": "http://last.example/v1"}


def hermes(home, environ=None, **more):
    return resolve([ProviderSettings(from_hermes=True, hermes_home=home, **more)], environ=environ or {}, home=Path("/nonexistent"))


def test_hermes_chain(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / ".env").write_text("# c\nexport GOOD_KEY='good-key-000'  # c\nOPENROUTER_API_KEY=from-dotenv-00\n")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    for path in before:
        path.chmod(0o400)
    entries, findings = hermes(tmp_path, ENVIRON)
    assert [(e.provider, e.model, e.base_url, e.key.reveal()) for e in entries] == [
        ("good", "some/model", "http://127.0.0.1:18080/v1", "good-key-000"),
        ("nice", "other/model", "http://127.0.0.1:18080/v1", "fallback-key-000"),
        ("custom", "local", "http://localhost:11434/v1", "no-key-required"),
        ("openrouter", "or/model", "https://openrouter.ai/api/v1", "or-key-0000000"),
        ("urls", "u", "https://first.example/v1", "no-key-required"),
        ("custom", "last", "http://last.example/v1", "no-key-required"),
    ]
    assert entries[0].headers["X-A"].reveal() == "header-canary"
    assert entries[0].extra_body == {"seed": 1}
    text = "\n".join(findings)
    for word in ("anthropic_messages", "`gone` is disabled", "another host than api.openai.com", "`mystery` is not known"):
        assert word in text
    assert not any(word in text for word in ("key-000", "canary"))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ('model: {model: m2, provider: custom, base_url: "http://h/v1"}', "m2"),
        ('model: {provider: good}\nproviders: {good: {url: "http://h/v1", default_model: dm}}', "dm"),
        ('model: {default: m, provider: old}\ncustom_providers: [{name: old, base_url: "http://h/v1"}]', "m"),
    ],
)
def test_hermes_forms(tmp_path, text, model):
    (tmp_path / "config.yaml").write_text(text)
    assert [(e.model, e.base_url) for e in hermes(tmp_path)[0]] == [(model, "http://h/v1")]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (None, "does not exist"),
        ("", "`model` is not set"),
        ("model: some/model", "would guess"),
        ("- a list", "is not a mapping"),
        ("model: {a", "not valid YAML"),
        (b"\xff\xfe\xff", "not UTF-8"),
        ("model: {default: m, provider: x}\ncustom_providers: {x: {}}", "must be a list"),
        ("providers: [1]\nmodel: {default: m, provider: custom}", "not a mapping"),
        ("model: {default: m, provider: nous}", "hermes auth add nous"),
    ],
)
def test_hermes_faults(tmp_path, text, finding):
    if text is not None:
        (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    entries, findings = hermes(tmp_path)
    assert entries == []
    assert any(finding in line for line in findings)


def test_last_good_reading_stays_in_force(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text('model: {default: m, provider: custom, base_url: "http://h/v1"}')
    resolver = Resolver([ProviderSettings(from_hermes=True, hermes_home=tmp_path)], environ={}, home=tmp_path)
    assert [e.model for e in resolver()] == ["m"]
    config.write_text("model: {default: [half")
    assert [e.model for e in resolver()] == ["m"]
    assert "stays in force" in "".join(resolver.findings)
    config.write_text('model: {default: m2, provider: custom, base_url: "http://h/v1"}')
    assert [e.model for e in resolver()] == ["m2"]
    assert resolver.findings == []
    assert resolver() is resolver()


def auth(expires="2026-11-22T18:42:08+00:00", key="agent-key-000000", **more):
    return json.dumps({"providers": {"nous": {"agent_key": key, "agent_key_expires_at": expires, "access_token": "access-canary", **more}}})


def test_nous_entry(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {default: n, provider: nous}")
    (tmp_path / "auth.json").write_text(auth())
    (tmp_path / "rate_limits").mkdir()
    (tmp_path / "rate_limits" / "nous.json").write_text('{"reset_at": 1800000000.5}')
    (entry,), _ = hermes(tmp_path)
    assert (entry.base_url, entry.key.reveal(), entry.login) == ("https://inference-api.nousresearch.com/v1", "agent-key-000000", "nous")
    assert (entry.key_expires_ms, entry.hint_until_ms) == (1795372928000, 1800000000500)

    (tmp_path / "auth.json").write_text(auth(inference_base_url="https://evil.example/v1"))
    entries, findings = hermes(tmp_path)
    assert entries == []
    assert "another host" in findings[0]
    assert hermes(tmp_path, base_url="http://127.0.0.1:1/v1")[0][0].base_url == "http://127.0.0.1:1/v1"

    (tmp_path / "auth.json").write_text('{"providers": {"nous"')
    assert "not valid JSON" in hermes(tmp_path)[1][0]


def test_profile_uses_the_login_of_the_root(tmp_path):
    profile = tmp_path / "profiles" / "work"
    profile.mkdir(parents=True)
    (profile / "config.yaml").write_text("model: {default: n, provider: nous}")
    (tmp_path / "auth.json").write_text(auth())
    assert hermes(profile)[0][0].key.reveal() == "agent-key-000000"


@pytest.mark.parametrize(
    ("output", "known", "logged_in", "reason"),
    [
        ("nous: logged in\n", True, True, ""),
        ("note\nnous: logged out\n", True, False, ""),
        ("nous: logged out (session revoked)\n", True, False, "session revoked"),
        ("something else", False, False, "the output of `hermes auth status nous` was not understood"),
    ],
)
def test_status_output(output, known, logged_in, reason):
    status = parse_status(output)
    assert (status.known, status.logged_in, status.reason) == (known, logged_in, reason)


class Portal:
    """A key file and the command that renews it."""

    def __init__(self, *, left_ms=60_000, output="nous: logged in", renews=True):
        self.now = 1_800_000_000_000
        self.key = NousKey(Secret("old-key-000000"), self.now + left_ms, URL)
        self.output, self.renews, self.runs, self.leased = output, renews, 0, False

    async def run(self):
        self.runs += 1
        await asyncio.sleep(0.05)
        if self.renews:
            self.key = NousKey(Secret(f"new-key-{self.runs:06d}"), self.now + 900_000, URL)
        return self.output

    async def lease(self, key, seconds):
        taken, self.leased = self.leased, True
        return not taken

    def login(self):
        return NousLogin(read=lambda: self.key, run=self.run, lease=self.lease, now_ms=lambda: self.now)


async def test_two_workers_refresh_once():
    portal = Portal()
    keys = await asyncio.gather(*(portal.login().fresh() for _ in range(2)), portal.login().fresh())
    assert {key.reveal() for key in keys} == {"new-key-000001"}
    assert portal.runs == 1


async def test_a_key_with_time_left_is_used_as_it_is():
    portal = Portal(left_ms=120_001)
    assert (await portal.login().fresh()).reveal() == "old-key-000000"
    assert portal.runs == 0
    assert (await portal.login().fresh(rejected=Secret("old-key-000000"))).reveal() == "new-key-000001"


async def test_logged_out_is_seen_though_the_exit_is_0():
    with pytest.raises(LoggedOutError, match="revoked; run `hermes auth add nous`"):
        await Portal(output="nous: logged out (revoked)", renews=False).login().fresh()


async def test_no_new_key():
    with pytest.raises(RefreshPendingError):
        await Portal(left_ms=-1, renews=False).login().fresh()
    short = Portal(left_ms=60_000, renews=False)
    assert (await short.login().fresh()).reveal() == "old-key-000000"
    with pytest.raises(RefreshPendingError):
        await Portal(renews=False).login().fresh(rejected=Secret("old-key-000000"))


async def test_the_real_command(tmp_path):
    program = tmp_path / "bin" / "hermes"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$@" >>"$HERMES_HOME/args"\nenv >"$HERMES_HOME/env"\nprintf %s "$NEW" >"$HERMES_HOME/auth.json"\necho "nous: logged in"\n'
    )
    program.chmod(0o755)
    (tmp_path / "auth.json").write_text(auth(expires="2020-01-01T00:00:00+00:00"))
    fresh = auth(expires="2099-01-01T00:00:00+00:00", key="renewed-key-000")
    program.write_text(program.read_text().replace("$NEW", fresh.replace('"', '\\"')))
    environ = {"PATH": f"{program.parent}:{os.environ['PATH']}", "FORGE_TOKEN": "canary"}
    taken = []

    async def lease(key, seconds):
        taken.append(key)
        return len(taken) == 1

    login = nous_login(tmp_path, environ, lease=lease, now_ms=lambda: 1_800_000_000_000)
    assert (await login.fresh()).reveal() == "renewed-key-000"
    assert (tmp_path / "args").read_text() == "auth status nous\n"
    assert "canary" not in (tmp_path / "env").read_text()
    with pytest.raises(RefreshPendingError, match="cannot be run"):
        await auth_status(tmp_path, {"PATH": "/nonexistent"})
