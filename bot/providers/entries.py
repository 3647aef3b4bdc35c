"""Entries of the provider chain: settings, key files and what Hermes has become records; whatever cannot be used is a finding, not an exception."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from bot.config import PriceSettings, ProviderSettings
from bot.models import Usage
from bot.providers import hermes_config
from bot.redaction import MINIMUM_LENGTH, Secret

NO_KEY: Final = "no-key-required"
_MILLION: Final = 1_000_000
_KEY_BYTES: Final = 16_384


@dataclass(frozen=True, slots=True)
class Entry:
    """One model at one endpoint. `login` names the login that owns the key (`nous`) or is empty; times are seconds, moments Unix milliseconds.

    `hint_until_ms` is a cool-down that another program has seen, 0 for none.
    """

    provider: str
    model: str
    base_url: str
    key: Secret
    headers: Mapping[str, Secret] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict, repr=False)
    context_window: int = 131_072
    max_output_tokens: int = 8192
    price: PriceSettings = field(default_factory=PriceSettings)
    idle_seconds: float = 300.0
    call_seconds: float = 900.0
    login: str = ""
    key_expires_ms: int = 0
    hint_until_ms: int = 0

    @property
    def name(self) -> str:
        """`provider/model`: the key of its health."""
        return f"{self.provider}/{self.model}"

    def fingerprint(self, *, with_key: bool) -> str:
        """Changes with the endpoint, and `with_key` also with the key; tells nothing about it."""
        parts = [self.base_url, self.model, json.dumps(self.extra_body, sort_keys=True, default=str)]
        if with_key:
            parts += [self.key.reveal(), *(f"{name}:{value.reveal()}" for name, value in sorted(self.headers.items()))]
        return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def usage(self, *, input_tokens: int, output_tokens: int, cached: int = 0, source: str = "reported") -> Usage:
        """Tokens with their price; `cached` is the part of `input_tokens` that the provider had cached."""
        price = self.price
        cached = min(cached, input_tokens)
        cached_price = price.input if price.cached is None else price.cached
        usd = ((input_tokens - cached) * price.input + cached * cached_price + output_tokens * price.output) / _MILLION
        return Usage(input_tokens, output_tokens, cached, usd, source)

    def secrets(self) -> list[Secret]:
        """Everything of this entry that must never be shown, for the redactor."""
        return [
            secret for secret in (self.key, *self.headers.values()) if len(secret.reveal()) >= MINIMUM_LENGTH and secret.reveal() != NO_KEY
        ]


def estimate_tokens(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, bytes_per_token: float = 3.0) -> int:
    """Tokens of a request by its size: 3 bytes a token is on the safe side for a reserve, 4 is nearer the truth for English and code."""
    size = sum(_message_bytes(message) for message in messages)
    if tools:
        size += len(json.dumps(list(tools)))
    return int(size / bytes_per_token) + 4 * len(messages)


def _message_bytes(message: Mapping[str, Any]) -> int:
    size = _bytes(message.get("content") or "")
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        size += _bytes(str(function.get("arguments") or "")) + len(str(function.get("name") or "")) + 24
    return size


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def resolve(settings: Sequence[ProviderSettings], *, environ: Mapping[str, str], home: Path) -> tuple[list[Entry], list[str]]:
    """The chain in order, and the findings (one line each, without secrets). `home` is the person's home, under which `.hermes` lies."""
    return Resolver(settings, environ=environ, home=home).read()


def hermes_home(setting: ProviderSettings, *, environ: Mapping[str, str], home: Path) -> Path:
    """The Hermes home that a `from_hermes` setting means."""
    return setting.hermes_home or Path(environ.get("HERMES_HOME") or home / ".hermes")


class Resolver:
    """`resolve` for a long life: reads again only when one of the files has changed, and keeps the last good reading of a file that breaks.

    Call it for the entries (it is the `entries` of the chain); `findings` are those of the last reading. `keys`, in the order of the settings, are
    those that came as credentials; they stand in where a setting names no file.
    """

    def __init__(
        self, settings: Sequence[ProviderSettings], *, environ: Mapping[str, str], home: Path, keys: Sequence[Secret | None] = ()
    ) -> None:
        self._settings = tuple(settings)
        self._keys = tuple(keys) or (None,) * len(self._settings)
        self._environ = environ
        self._home = home
        self._good: dict[Path, hermes_config.Reading] = {}
        self._files: tuple[Path, ...] = ()
        self._seen: tuple[object, ...] | None = None
        self._entries: list[Entry] = []
        self.findings: list[str] = []

    def __call__(self) -> Sequence[Entry]:
        """The entries as the files say now."""
        if self._seen is None or self._seen != tuple(map(_stamp, self._files)):
            self.read()
        return self._entries

    def read(self) -> tuple[list[Entry], list[str]]:
        """Reads every file now."""
        findings: list[str] = []
        entries: list[Entry] = []
        files: list[Path] = []
        for setting, given in zip(self._settings, self._keys, strict=True):
            if setting.from_hermes:
                entries += self._hermes(setting, files, findings)
            else:
                if setting.key_file:
                    files.append(setting.key_file)
                entry = _plain(setting, self._environ, findings, given)
                entries += [entry] if entry else []
        self._files = tuple(files)
        self._seen = tuple(map(_stamp, files))
        self._entries, self.findings = _distinct(entries), findings
        return self._entries, findings

    def _hermes(self, setting: ProviderSettings, files: list[Path], findings: list[str]) -> list[Entry]:
        home = hermes_home(setting, environ=self._environ, home=self._home)
        reading = hermes_config.read(home, self._environ, nous_base_url=setting.base_url)
        files += reading.files
        findings += reading.findings
        if reading.broken and home in self._good:
            findings.append(f"{home}: the last good reading stays in force")
            reading = self._good[home]
        elif not reading.broken:
            self._good[home] = reading
        return [_from_hermes(endpoint, setting, findings) for endpoint in reading.endpoints]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """First wins among equals; the same model of one provider at another address gets a name of its own, because health is kept by name."""
    seen: set[tuple[str, str, str]] = set()
    names: set[str] = set()
    kept: list[Entry] = []
    for entry in entries:
        same = (entry.provider.casefold(), entry.model.casefold(), entry.base_url.rstrip("/").casefold())
        if same in seen:
            continue
        seen.add(same)
        number, unique = 1, entry
        while unique.name in names:
            number += 1
            unique = replace(entry, provider=f"{entry.provider}-{number}")
        names.add(unique.name)
        kept.append(unique)
    return kept


def _plain(setting: ProviderSettings, environ: Mapping[str, str], findings: list[str], given: Secret | None) -> Entry | None:
    name = setting.name or urlsplit(setting.base_url).hostname or "provider"
    key = Secret(NO_KEY)
    faults: list[str] = []
    if fault := url_fault(setting.base_url):
        faults.append(fault)
    if not setting.model:
        faults.append("`model` is missing")
    if setting.key_file:
        key = _key_from_file(setting.key_file, faults)
    elif given:
        key = given
    elif setting.key_env:
        key = Secret(environ.get(setting.key_env, "").strip())
        if not key:
            faults.append(f"the environment has no {setting.key_env}")
    if key and len(key.reveal()) < MINIMUM_LENGTH:
        faults.append(
            f"its key is shorter than {MINIMUM_LENGTH} characters and could not be kept out of texts; leave the key away if none is needed"
        )
    if faults:
        findings += [f"provider {name}: {fault}" for fault in faults]
        return None
    return _entry(setting, provider=name, model=setting.model, base_url=setting.base_url, key=key)


def _entry(setting: ProviderSettings, **more: Any) -> Entry:
    headers = {name: Secret(value) for name, value in setting.headers.items()}
    body: dict[str, Any] = dict(setting.extra_body)
    headers.update(more.pop("headers", {}))
    body.update(more.pop("extra_body", {}))
    return Entry(
        headers=headers,
        extra_body=body,
        context_window=setting.context_window,
        max_output_tokens=setting.max_output_tokens,
        price=setting.price,
        idle_seconds=setting.idle_seconds,
        call_seconds=setting.call_seconds,
        **more,
    )


def _from_hermes(endpoint: hermes_config.Endpoint, setting: ProviderSettings, findings: list[str]) -> Entry:
    if endpoint.key and len(endpoint.key.reveal()) < MINIMUM_LENGTH:
        findings.append(
            f"hermes provider {endpoint.provider}: its key is shorter than {MINIMUM_LENGTH} characters and cannot be kept out of texts"
        )
    return _entry(
        setting,
        **_fields(endpoint),
        hint_until_ms=endpoint.hint_until_ms,
    )


def entry_of(endpoint: hermes_config.Endpoint) -> Entry:
    """An endpoint of Hermes as it is, without anything of our settings."""
    return Entry(**_fields(endpoint))


def _fields(endpoint: hermes_config.Endpoint) -> dict[str, Any]:
    return {
        "provider": endpoint.provider,
        "model": endpoint.model,
        "base_url": endpoint.base_url,
        "key": endpoint.key or Secret("" if endpoint.login else NO_KEY),
        "headers": endpoint.headers,
        "extra_body": endpoint.extra_body,
        "login": endpoint.login,
        "key_expires_ms": endpoint.key_expires_ms,
    }


def url_fault(url: str) -> str:
    """What is wrong with a base URL, or an empty text."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "`base_url` is not a URL"
    if parts.scheme not in {"http", "https"} or not host:
        return "`base_url` must be an http or https URL"
    if parts.username or parts.password:
        return "`base_url` must not hold a login; use key_file or key_env"
    return ""


def _key_from_file(path: Path, faults: list[str]) -> Secret:
    """The content of a file that only its owner may read; never through a symbolic link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        faults.append(f"key_file {path} cannot be read: {error.strerror}")
        return Secret("")
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            faults.append(f"key_file {path} is not a regular file")
            return Secret("")
        if found.st_mode & 0o077:
            faults.append(f"key_file {path} may be read by others: chmod 600 it")
            return Secret("")
        text = os.read(descriptor, _KEY_BYTES).decode("utf-8", "replace").strip()
    finally:
        os.close(descriptor)
    if not text:
        faults.append(f"key_file {path} is empty")
    return Secret(text)


Entries = Callable[[], Sequence[Entry]]
