"""What a Hermes home offers as model endpoints, read by Hermes' own rules and never written; what we do not understand is a finding, not a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from bot.redaction import Secret

NOUS_HOST: Final = "inference-api.nousresearch.com"
NOUS_URL: Final = f"https://{NOUS_HOST}/v1"

# name: base URL, environment variable of its key
BUILT_IN: Final[Mapping[str, tuple[str, str]]] = {
    "openrouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "openai-api": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "deepseek": ("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "lmstudio": ("http://127.0.0.1:1234/v1", ""),
    "ollama-cloud": ("https://ollama.com/v1", "OLLAMA_API_KEY"),
}
CUSTOM: Final = frozenset({"custom", "ollama", "vllm", "llamacpp"})
# These keys go to their owner's exact host only, whatever a configuration says.
OWNERS: Final[Mapping[str, str]] = {
    "OPENAI_API_KEY": "api.openai.com",
    "OPENROUTER_API_KEY": "openrouter.ai",
    "OLLAMA_API_KEY": "ollama.com",
}
_CHAT: Final = "chat_completions"
_FILE_BYTES: Final = 1_048_576


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One model that Hermes would use. `key` is None for keyless servers; `login` is `nous` where Hermes owns a short-lived key."""

    provider: str
    model: str
    base_url: str
    key: Secret | None = None
    headers: Mapping[str, Secret] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict, repr=False)
    login: str = ""
    key_expires_ms: int = 0
    hint_until_ms: int = 0


@dataclass(frozen=True, slots=True)
class NousKey:
    """The key of auth.json, its end (Unix milliseconds, 0: unknown) and the address Hermes uses it at."""

    key: Secret
    expires_ms: int
    base_url: str


@dataclass(frozen=True, slots=True)
class Reading:
    """Endpoints in Hermes' order; `files` are those it depends on; `broken` says that a file could not be understood."""

    endpoints: tuple[Endpoint, ...]
    findings: tuple[str, ...]
    files: tuple[Path, ...]
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a home's `model` block names, "" for what it does not. `fault` says why nothing could be read; `broken`: the file is there, and unusable."""

    provider: str = ""
    model: str = ""
    fault: str = ""
    broken: bool = False


class _BrokenError(Exception):
    """A file that exists and cannot be used; the text names it and the reason, never its content."""


def read(home: Path, environ: Mapping[str, str], *, nous_base_url: str = "") -> Reading:
    """Reads config.yaml, .env and auth.json of one home (the root or a profile). `nous_base_url` is another host that the operator allows on purpose."""
    reader = _Reader(home, environ, nous_base_url)
    files = (home / "config.yaml", home / ".env", *_auth_files(home), home / "rate_limits" / "nous.json")
    try:
        endpoints = tuple(reader.endpoints())
    except _BrokenError as error:
        return Reading((), (*reader.findings, str(error)), files, broken=True)
    return Reading(endpoints, tuple(reader.findings), files)


def chosen(home: Path, environ: Mapping[str, str]) -> Chosen:
    """Provider and model of one home (the root or a profile), without asking whether they could be called."""
    reader = _Reader(home, environ, "")
    try:
        config = reader.config()
    except _BrokenError as error:
        return Chosen(fault=str(error), broken=True)
    if config is None:
        return Chosen(fault="it has no config.yaml")
    block = config.get("model")
    if isinstance(block, str):
        return Chosen(model=block.strip())
    if not isinstance(block, dict):
        return Chosen(fault="it names no model")
    return Chosen(_string(block.get("provider")), _string(block.get("default")) or _string(block.get("model")))


def endpoint_of(home: Path, environ: Mapping[str, str], *, provider: str, model: str) -> Endpoint | None:
    """How this home would call a model it does not name now; None where it knows no address, no key or no such provider."""
    reader = _Reader(home, environ, "")
    try:
        config = reader.config() or {}
        return reader.endpoint_of(config, provider, model)
    except _BrokenError:
        return None


def read_nous_key(home: Path) -> NousKey | None:
    """The Nous key of this home, or of the root where a profile has no login of its own; None without a login or with a broken file."""
    try:
        return _nous_key(home)
    except _BrokenError:
        return None


class _Reader:
    def __init__(self, home: Path, environ: Mapping[str, str], nous_base_url: str) -> None:
        self.home = home
        self.findings: list[str] = []
        self._nous_base_url = nous_base_url
        self._environ = dict(_dotenv(home / ".env")) | dict(environ)
        self._providers: dict[str, dict[str, Any]] = {}

    def endpoints(self) -> Iterator[Endpoint]:
        config = self.config()
        if config is None:
            self.findings.append(f"{self.home / 'config.yaml'} does not exist: Hermes has no model configured")
            return
        self._collect(config)
        first = self._model_block(config.get("model"))
        if first:
            yield first
        for fallback in _fallbacks(config):
            if found := self._fallback(fallback):
                yield found

    def endpoint_of(self, config: Mapping[str, Any], provider: str, model: str) -> Endpoint | None:
        self._collect(config)
        block = config.get("model")
        same = isinstance(block, dict) and _string(block.get("provider")) == provider
        return self._endpoint(provider, model, block if isinstance(block, dict) and same else {})

    def config(self) -> dict[str, Any] | None:
        """The whole of config.yaml with its variables put in; None where there is none."""
        path = self.home / "config.yaml"
        text = _text(path)
        if text is None:
            return None
        try:
            config = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise _BrokenError(f"{path} is not valid YAML ({type(error).__name__})") from None
        if config is None:
            config = {}
        if not isinstance(config, dict):
            raise _BrokenError(f"{path} is not a mapping")
        expanded: dict[str, Any] = self._expand(config)
        return expanded

    def _collect(self, config: Mapping[str, Any]) -> None:
        providers = config.get("providers") or {}
        if isinstance(providers, dict):
            self._providers = {str(name): entry for name, entry in providers.items() if isinstance(entry, dict)}
        else:
            self.findings.append("hermes `providers` is not a mapping: ignored")
        legacy = config.get("custom_providers") or []
        if not isinstance(legacy, list):
            self.findings.append("hermes `custom_providers` must be a list: ignored, as Hermes does")
            return
        for entry in legacy:
            if isinstance(entry, dict) and entry.get("name"):
                self._providers.setdefault(str(entry["name"]), {**entry, "default_model": entry.get("model")})

    def _model_block(self, block: Any) -> Endpoint | None:
        if isinstance(block, str):
            block = {"default": block}
        if not isinstance(block, dict):
            self.findings.append("hermes `model` is not set")
            return None
        provider = _string(block.get("provider"))
        if not provider:
            self.findings.append("hermes `model.provider` is not set: Hermes would guess, we do not")
            return None
        return self._endpoint(provider, _string(block.get("default")) or _string(block.get("model")), block)

    def _fallback(self, entry: Any) -> Endpoint | None:
        if not isinstance(entry, dict) or not entry.get("provider") or not entry.get("model"):
            return None
        return self._endpoint(_string(entry["provider"]), _string(entry["model"]), entry)

    def _endpoint(self, provider: str, model: str, block: Mapping[str, Any]) -> Endpoint | None:
        """`block` is the model block or a fallback entry: it may carry base_url, api_key and key_env, inline key first."""
        if provider == "nous":
            return self._nous(model)
        base_url = _string(block.get("base_url"))
        key: Secret | None = Secret(_string(block.get("api_key")))
        kind: Mapping[str, Any] = block
        name = provider.removeprefix("custom:")
        if provider not in CUSTOM:
            known = self._named(name)
            if known is not None:
                kind = known
                base_url = _string(known.get("api")) or _string(known.get("url")) or _string(known.get("base_url")) or base_url
                model = model or _string(known.get("default_model"))
                key = key or self._env_key(known) or Secret(_string(known.get("api_key")))
            elif provider in BUILT_IN:
                address, variable = BUILT_IN[provider]
                base_url = base_url or address
                key = key or Secret(self._environ.get(variable, "")) if self._may_go(variable, base_url) else key
            elif not (provider.startswith("custom:") and base_url):
                self.findings.append(f"hermes provider `{provider}` is not known here: left out")
                return None
        key = key or self._env_key(block, base_url) or self._owned(base_url)
        return self._checked(name, model, base_url, key, kind)

    def _checked(self, name: str, model: str, base_url: str, key: Secret | None, kind: Mapping[str, Any]) -> Endpoint | None:
        mode = _string(kind.get("transport")) or _string(kind.get("api_mode")) or _CHAT
        parts = urlsplit(base_url)
        fault = ""
        if kind.get("enabled") is False:
            fault = "is disabled"
        elif mode != _CHAT:
            fault = f"speaks {mode}, not {_CHAT}"
        elif not model:
            fault = "has no model"
        elif parts.scheme not in {"http", "https"} or not parts.hostname or parts.username:
            fault = "has no usable base_url"
        for variable in ("key_env", "api_key_env"):
            owner = OWNERS.get(_string(kind.get(variable)))
            if owner and parts.hostname != owner:
                fault = f"would send {kind[variable]} to another host than {owner}"
        if fault:
            self.findings.append(f"hermes provider `{name}` {fault}: left out")
            return None
        headers, body = kind.get("extra_headers"), kind.get("extra_body")
        return Endpoint(
            provider=name,
            model=model,
            base_url=base_url.rstrip("/"),
            key=key or None,
            headers={str(k): Secret(str(v)) for k, v in headers.items()} if isinstance(headers, dict) else {},
            extra_body=body if isinstance(body, dict) else {},
        )

    def _named(self, name: str) -> Mapping[str, Any] | None:
        if name in self._providers:
            return self._providers[name]
        return next((entry for entry in self._providers.values() if entry.get("name") == name), None)

    def _owned(self, base_url: str) -> Secret | None:
        host = urlsplit(base_url).hostname
        return next((Secret(self._environ.get(variable, "")) for variable, owner in OWNERS.items() if owner == host), None)

    def _env_key(self, block: Mapping[str, Any], base_url: str = "") -> Secret | None:
        for field_name in ("key_env", "api_key_env"):
            variable = _string(block.get(field_name))
            if variable and self._environ.get(variable) and (not base_url or self._may_go(variable, base_url)):
                return Secret(self._environ[variable])
        return None

    @staticmethod
    def _may_go(variable: str, base_url: str) -> bool:
        return variable not in OWNERS or urlsplit(base_url).hostname == OWNERS[variable]

    def _nous(self, model: str) -> Endpoint | None:
        login = _nous_key(self.home)
        if login is None:
            self.findings.append("Hermes is not logged in to Nous: run `hermes auth add nous`")
            return None
        base_url = self._nous_base_url or login.base_url
        if urlsplit(base_url).hostname != NOUS_HOST and not self._nous_base_url:
            self.findings.append(f"auth.json names another host than {NOUS_HOST}: left out (set base_url beside from_hermes to allow it)")
            return None
        if not model:
            self.findings.append("hermes provider `nous` has no model: left out")
            return None
        return Endpoint(
            "nous",
            model,
            base_url.rstrip("/"),
            login.key,
            login="nous",
            key_expires_ms=login.expires_ms,
            hint_until_ms=_rate_limit_hint(self.home),
        )

    def _expand(self, value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", lambda match: self._environ.get(match[1], match[0]), value)
        if isinstance(value, dict):
            return {key: self._expand(entry) for key, entry in value.items()}
        return [self._expand(entry) for entry in value] if isinstance(value, list) else value


def _fallbacks(config: Mapping[str, Any]) -> Iterator[Any]:
    for name in ("fallback_providers", "fallback_model"):
        found = config.get(name)
        yield from found if isinstance(found, list) else [found] if isinstance(found, dict) else []


def _string(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _text(path: Path) -> str | None:
    """The content, or None where there is no such file."""
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _BrokenError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _FILE_BYTES:
        raise _BrokenError(f"{path} is larger than {_FILE_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _BrokenError(f"{path} is not UTF-8") from None


def _dotenv(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = _text(path) or ""
    except _BrokenError:
        return
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*", line)
        if match is None:
            continue
        name, value = match[1], match[2]
        quoted = re.fullmatch(r"""(["'])(.*)\1(?:\s+#.*)?""", value)
        yield name, quoted[2] if quoted else re.sub(r"\s+#.*$", "", value)


def _auth_files(home: Path) -> tuple[Path, ...]:
    own = home / "auth.json"
    return (own, home.parent.parent / "auth.json") if home.parent.name == "profiles" else (own,)


def _nous_key(home: Path) -> NousKey | None:
    for path in _auth_files(home):
        text = _text(path)
        if text is None:
            continue
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise _BrokenError(f"{path} is not valid JSON") from None
        providers = data.get("providers") if isinstance(data, dict) else None
        login = providers.get("nous") if isinstance(providers, dict) else None
        if isinstance(login, dict):
            base_url = _string(login.get("inference_base_url")) or NOUS_URL
            return NousKey(Secret(_string(login.get("agent_key"))), _moment_ms(login.get("agent_key_expires_at")), base_url)
    return None


def _moment_ms(value: Any) -> int:
    try:
        moment = datetime.fromisoformat(_string(value))
    except ValueError:
        return 0
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _rate_limit_hint(home: Path) -> int:
    """The moment (Unix milliseconds) until which Hermes itself leaves Nous alone, 0 for none."""
    try:
        data = json.loads(_text(home / "rate_limits" / "nous.json") or "{}")
        return int(float(data.get("reset_at") or 0) * 1000)
    except (_BrokenError, ValueError, TypeError, AttributeError, OverflowError):
        return 0
