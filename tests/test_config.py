"""dispatch.yml: every fault at once with line and remedy, secrets from the right place, and documents that cannot be wrong."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest

from bot import handbook
from bot.config import ForgeSettings, Settings, WebhookSettings, default_state_dir, is_loopback, load, read_secret, split_listen
from bot.models import ConfigError
from bot.settings import UnfitError, record

ROOT = Path(__file__).parent.parent
GOOD = """\
forge:
  url: https://git.example.org/
  token_file: gitea.token
webhook:
  public_url: https://bot.example.org
  secret_files: [webhook.secret]
repositories:
  - name: acme/rocket
providers:
  - base_url: http://127.0.0.1:11434/v1
    model: qwen3-coder:30b
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    private(tmp_path / "gitea.token", "forge-token-value\n")
    private(tmp_path / "webhook.secret", "webhook-secret-value\n")
    return tmp_path


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def write(folder: Path, text: str) -> Path:
    return private(folder / "dispatch.yml", text)


def faults(folder: Path, text: str, **environ: str) -> list[str]:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load(path, environ=environ)
    return [fault.removeprefix(f"{path}:") for fault in caught.value.faults]


def one(folder: Path, text: str, **environ: str) -> str:
    found = faults(folder, text, **environ)
    assert len(found) == 1, found
    return found[0]


def test_a_good_file_loads(folder):
    loaded = load(write(folder, GOOD), environ={})
    assert loaded.warnings == ()
    assert loaded.settings.forge.url == "https://git.example.org"
    assert loaded.settings.webhook.hook_url() == "https://bot.example.org/webhook"
    assert loaded.settings.forge.token_file == folder / "gitea.token"
    assert loaded.secrets.forge_token.reveal() == "forge-token-value"
    assert [secret.reveal() for secret in loaded.secrets.webhook_secrets] == ["webhook-secret-value"]
    assert loaded.secrets.provider_keys == (None,)
    assert "value" not in repr(loaded.secrets)
    with pytest.raises(TypeError):
        pickle.dumps(loaded.secrets)


def test_every_fault_is_told_at_once_with_line_key_and_remedy(folder):
    private(folder / "open.token", "long-enough-token", mode=0o644)
    private(folder / "empty.secret", "")
    private(folder / "short.secret", "short")
    (folder / "link.secret").symlink_to(folder / "webhook.secret")
    text = """\
forge:
  url: git.example.org
  tokenfile: x
  token_file: open.token
webhook:
  listen: "8080"
  max_body_bytes: lots
  read_timeout_seconds: 500
  secret_files:
    - empty.secret
    - short.secret
    - link.secret
    - missing.secret
repositories:
  - name: acme/rocket
  - name: Acme/Rocket
    max_runing: 2
  - name: nope
sandbox:
  user: 0
  kind: docker
providers:
  - model: x
databse: x
database: mysql://x
"""
    found = faults(folder, text)
    said = [(int(fault.split(":")[0]), fault.split(": ")[1]) for fault in found]
    assert said == [
        (2, "forge.url"),
        (3, "forge.tokenfile"),
        (4, "forge.token_file"),
        (6, "webhook.listen"),
        (7, "webhook.max_body_bytes"),
        (8, "webhook.read_timeout_seconds"),
        (10, "webhook.secret_files[0]"),
        (11, "webhook.secret_files[1]"),
        (12, "webhook.secret_files[2]"),
        (13, "webhook.secret_files[3]"),
        (16, "repositories[1].name"),
        (17, "repositories[1].max_runing"),
        (18, "repositories[2].name"),
        (20, "sandbox.user"),
        (21, "sandbox.kind"),
        (23, "providers[0].base_url"),
        (24, "databse"),
        (25, "database"),
    ]
    assert all(re.search(r"\. Remedy: .+\.$", fault) for fault in found)
    text = "\n".join(found)
    assert "did you mean `token_file`" in text
    assert "did you mean `max_running`" in text
    assert "did you mean `database`" in text
    assert f"chmod 600 {folder}/open.token" in text
    assert "symbolic link" in text
    assert "shorter than 8" in text
    assert "first in line 15" in text


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (("https://git.example.org/", "git.example.org"), 2, "not a web address"),
        (("https://git.example.org/", "ftp://git.example.org"), 2, "not a web address"),
        (("https://git.example.org/", "https://a:hunter2@git.example.org"), 2, "a user name or a password"),
        (("https://git.example.org/", "https://git.example.org/?x=1"), 2, "a query"),
        (("acme/rocket", "acme"), 8, "OWNER/NAME"),
        (("acme/rocket", "acme/rocket/x"), 8, "OWNER/NAME"),
        (("  - name: acme/rocket\n", "  []\n"), 7, "should have at least one entry"),
        (("    model: qwen3-coder:30b\n", ""), 10, "providers[0].model: is missing"),
        (("webhook:\n", "webhook:\n  listen: localhost\n"), 5, "not an address to listen on"),
        (("webhook:\n", "webhook:\n  listen: '::1:80'\n"), 5, "not an address to listen on"),
        (("webhook:\n", "webhook:\n  listen: 'h:70000'\n"), 5, "not an address to listen on"),
        (("webhook:\n", "sandbox:\n  user: 65534\nwebhook:\n"), 5, "nobody"),
        (("webhook:\n", "trigger_label: dispatch/queued\nwebhook:\n"), 4, "cannot be the trigger label"),
        (("webhook:\n", "webhook:\n  max_body_bytes: 1\n"), 5, "greater than or equal to 65536"),
        (("webhook:\n", "limits: 3\nwebhook:\n"), 4, "should be a mapping"),
        (("webhook:\n", "operators: alice\nwebhook:\n"), 4, "should be a list"),
        (("webhook:\n", "commit_trailer: 3\nwebhook:\n"), 4, "numbers in quotes"),
        (("repositories:\n", "repositories:\n  - nope\n"), 8, "should be a mapping"),
        (("  token_file", "  url: https://x.example\n  token_file"), 3, "forge.url: stands twice"),
        (("forge:\n", "forge:\n  ca_file: nowhere.pem\n"), 2, "nowhere.pem does not exist"),
        (("    model:", "    key_env: NOT_SET\n    model:"), 11, "the environment has no NOT_SET"),
        (("    model:", "    key_file: none.key\n    model:"), 11, "none.key does not exist"),
    ],
)
def test_one_fault(folder, change, line, says):
    found = one(folder, GOOD.replace(*change))
    assert found.startswith(f"{line}: ")
    assert says in found
    assert "hunter2" not in found


@pytest.mark.parametrize(
    ("text", "line"),
    [("forge: [1\nb: 2\n", 2), ("forge:\n\turl: x\n", 2), ("a: b: c\n", 1), ("a: &a [*a]\n", 1), ("- 1\n", 1), ("", 1), ("a: \x01", 1)],
)
def test_what_is_no_yaml_is_one_fault(folder, text, line):
    assert one(folder, text).startswith(f"{line}: ")


def test_a_missing_file_names_init(tmp_path):
    with pytest.raises(ConfigError, match="timmy-dispatch init"):
        load(tmp_path / "dispatch.yml", environ={})


def test_a_value_that_may_be_secret_is_not_shown(folder):
    text = GOOD + "    headers: {x-api-key: [hunter2hunter2]}\n    key_env: 77001122\ndatabase: mysql://u:hunter2@h/x\n"
    shown = "\n".join(faults(folder, text))
    assert "hunter2" not in shown
    assert "77001122" not in shown


def test_no_secret_at_all(folder):
    text = GOOD.replace("  token_file: gitea.token\n", "").replace("  secret_files: [webhook.secret]\n", "")
    found = faults(folder, text)
    assert [fault.split(": ")[1] for fault in found] == ["forge.token_file", "webhook.secret_files"]
    assert all("init" in fault for fault in found)


def test_the_environment_is_the_last_resort_and_warned_of(folder):
    text = (
        GOOD.replace("  token_file: gitea.token\n", "")
        .replace("  secret_files: [webhook.secret]\n", "")
        .replace("    model:", "    key_env: K\n    model:")
    )
    loaded = load(
        write(folder, text),
        environ={"TIMMY_GITEA_TOKEN": "token-of-environment", "TIMMY_WEBHOOK_SECRET": "secret-of-environment", "K": "key-of-environment"},
    )
    assert loaded.secrets.forge_token.reveal() == "token-of-environment"
    assert loaded.secrets.webhook_secrets[0].reveal() == "secret-of-environment"
    assert loaded.secrets.provider_keys[0].reveal() == "key-of-environment"
    assert sum("environment" in warning for warning in loaded.warnings) == 3
    assert "of-environment" not in "\n".join(loaded.warnings)


def test_an_empty_secret_in_the_environment_is_a_fault(folder):
    text = GOOD.replace("  secret_files: [webhook.secret]\n", "")
    assert any("TIMMY_WEBHOOK_SECRET is empty" in fault for fault in faults(folder, text, TIMMY_WEBHOOK_SECRET=""))


def test_credentials_come_before_files(folder):
    credentials = folder / "credentials"
    credentials.mkdir()
    private(credentials / "forge-token", "credential-token", mode=0o440)
    private(credentials / "webhook-secret", "credential-secret", mode=0o440)
    private(credentials / "webhook-secret-old", "credential-former", mode=0o440)
    private(credentials / "provider-local", "credential-key", mode=0o440)
    text = GOOD.replace("  - base_url", "  - name: local\n    base_url")
    secrets = load(write(folder, text), environ={"CREDENTIALS_DIRECTORY": str(credentials)}).secrets
    assert secrets.forge_token.reveal() == "credential-token"
    assert [secret.reveal() for secret in secrets.webhook_secrets] == ["credential-secret", "credential-former"]
    assert secrets.provider_keys[0].reveal() == "credential-key"


def test_warnings(folder):
    text = (
        GOOD.replace("https://git", "http://git").replace("https://bot.example.org", "http://localhost:8080") + "sandbox:\n  kind: none\n"
    )
    path = write(folder, text + "database: postgresql://u:pw@h/x\n")
    path.chmod(0o666)
    warnings = "\n".join(load(path, environ={}).warnings)
    for words in ("plain http", "this machine alone", "without a sandbox", "others may change this file", "holds a password"):
        assert words in warnings


def test_a_forge_on_this_machine_needs_no_warning(folder):
    text = GOOD.replace("https://git.example.org/", "http://127.0.0.1:3000").replace("https://bot.example.org", "http://127.0.0.1:8080")
    assert load(write(folder, text), environ={}).warnings == ()


def test_secret_files_that_cannot_be_trusted(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff\xfe" * 8)
    (tmp_path / "binary").chmod(0o600)
    for name in ("folder", "pipe", "binary", "none"):
        with pytest.raises(UnfitError):
            read_secret(tmp_path / name)


def test_hermes_home_is_resolved_here(folder):
    text = GOOD.replace("  - base_url: http://127.0.0.1:11434/v1\n    model: qwen3-coder:30b\n", "  - from_hermes: true\n")
    path = write(folder, text)
    assert load(path, environ={"HERMES_HOME": "/h"}).settings.providers[0].hermes_home == Path("/h")
    assert load(path, environ={"HOME": "/home/x"}).settings.providers[0].hermes_home == Path("/home/x/.hermes")


def test_state_folder_by_user():
    assert default_state_dir({}, uid=0) == Path("/var/lib/timmy-dispatch")
    assert default_state_dir({"HOME": "/home/x"}, uid=1000) == Path("/home/x/.local/state/timmy-dispatch")
    assert default_state_dir({"HOME": "/home/x", "XDG_STATE_HOME": "/s"}, uid=1000) == Path("/s/timmy-dispatch")
    assert default_state_dir({"HOME": "/home/x", "XDG_STATE_HOME": "relative"}, uid=1000) == Path("/home/x/.local/state/timmy-dispatch")


@pytest.mark.parametrize(
    ("listen", "parts"), [("127.0.0.1:8080", ("127.0.0.1", 8080)), ("[::1]:0", ("::1", 0)), ("bot.lan:9", ("bot.lan", 9))]
)
def test_listen(listen, parts):
    assert split_listen(listen) == parts


@pytest.mark.parametrize(
    ("url", "so"), [("http://127.0.0.1", True), ("http://[::1]:3", True), ("http://localhost", True), ("http://10.0.0.1", False)]
)
def test_loopback(url, so):
    assert is_loopback(url) is so


def test_hook_address_is_written_once():
    assert WebhookSettings(public_url="https://b.example/webhook").hook_url() == "https://b.example/webhook"
    assert WebhookSettings(public_url="https://b.example/").hook_url() == "https://b.example/webhook"


def test_settings_can_be_built_in_code():
    settings = Settings(
        forge=ForgeSettings(url="http://x.example"),
        repositories=({"name": "Acme/Rocket"},),
        state_dir=Path("/s"),
        providers=({"base_url": "http://y.example", "model": "m"},),
    )
    assert settings.repository("acme/ROCKET") is not None
    assert settings.database_url() == "sqlite:////s/timmy.db"


def test_the_example_loads_and_shows_every_setting(folder):
    text = (ROOT / "dispatch.example.yml").read_text()
    assert text == handbook.example(), "write it anew: timmy-dispatch check-config --example > dispatch.example.yml"
    loaded = load(write(folder, text), environ={})
    assert loaded.settings.repositories[0].name == "acme/rocket"
    shown = set(re.findall(r"^[ #-]*([a-z_]+):", text, re.MULTILINE))
    assert fields(Settings) <= shown


def test_the_table_is_that_of_the_records():
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == handbook.table(), "write it anew: timmy-dispatch check-config --table > docs/configuration.md"
    assert all(f"`{name}`" in text for name in fields(Settings))


def test_every_setting_says_what_it_means():
    def silent(model):
        for name, info in model.model_fields.items():
            if not info.description or not info.description.endswith("."):
                yield f"{model.__name__}.{name}"
            if inner := record(info.annotation):
                yield from silent(inner)

    assert list(silent(Settings)) == []


def fields(model) -> set[str]:
    found = set()
    for name, info in model.model_fields.items():
        found.add(name)
        if inner := record(info.annotation):
            found |= fields(inner)
    return found
