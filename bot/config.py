"""dispatch.yml and the environment become frozen settings; every fault is reported at once, and nothing below this file reads the environment."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bot.document import At, Document, parse
from bot.models import ConfigError
from bot.redaction import MINIMUM_LENGTH, Secret
from bot.settings import (
    AlertSettings,
    EngineSettings,
    ForgeSettings,
    LimitSettings,
    MetricsSettings,
    PagesSettings,
    PriceSettings,
    ProviderSettings,
    QueueSettings,
    ReconcileSettings,
    RepositorySettings,
    SandboxSettings,
    Settings,
    TracingSettings,
    UnfitError,
    WebhookSettings,
    record,
    split_listen,
)

__all__ = [
    "AlertSettings",
    "EngineSettings",
    "ForgeSettings",
    "LimitSettings",
    "Loaded",
    "MetricsSettings",
    "PagesSettings",
    "PriceSettings",
    "ProviderSettings",
    "QueueSettings",
    "ReconcileSettings",
    "RepositorySettings",
    "SandboxSettings",
    "Secrets",
    "Settings",
    "TracingSettings",
    "WebhookSettings",
    "default_state_dir",
    "is_loopback",
    "load",
    "read_secret",
    "split_listen",
]

FORGE_TOKEN = "forge-token"  # noqa: S105 - the name of a credential, not its value
WEBHOOK_SECRET = "webhook-secret"  # noqa: S105
PAGES_TOKEN = "pages-token"  # noqa: S105
ALERTS_TOKEN = "alerts-token"  # noqa: S105
FORGE_TOKEN_VARIABLE = "TIMMY_GITEA_TOKEN"  # noqa: S105
WEBHOOK_SECRET_VARIABLE = "TIMMY_WEBHOOK_SECRET"  # noqa: S105
SECRET_CAP = 16_384
SHOWN = 60
SECRETIVE = ("token", "secret", "key", "password", "headers", "extra_body", "database")

WANTED = {
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "string_type": "should be text (numbers in quotes)",
    "string_too_short": "should not be empty",
    "path_type": "should be a path",
    "tuple_type": "should be a list",
    "too_short": "should have at least one entry",
    "dict_type": "should be a mapping of keys",
    "model_type": "should be a mapping of keys",
}


@dataclass(frozen=True, slots=True)
class Secrets:
    """What the service must not show. `webhook_secrets` are all accepted; `provider_keys` stand in the order of `settings.providers`, None for no key."""

    forge_token: Secret
    webhook_secrets: tuple[Secret, ...]
    provider_keys: tuple[Secret | None, ...] = ()
    pages_token: Secret | None = None
    alerts_token: Secret | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that can be used, its secrets, and what the operator should know all the same (one line each, in the form of the faults)."""

    settings: Settings
    secrets: Secrets
    warnings: tuple[str, ...] = ()


def load(path: Path, *, environ: Mapping[str, str], serves: bool = True) -> Loaded:
    """Reads `path` and the secrets it names. Raises ConfigError with every fault found, as `FILE:LINE: KEY: what is wrong. Remedy: what to do.`

    Relative paths in the file are taken from its folder. Each secret is looked for in $CREDENTIALS_DIRECTORY (`forge-token`, `webhook-secret` and
    `webhook-secret-*`, `pages-token`, `alerts-token`, `provider-NAME`), then in the file that the settings name, then in the environment, which is warned of.
    A process that hears nothing (`serves` is false: a worker, a look at the database) needs none of the first four: it takes along those it can read, only to
    keep them out of texts, and misses no other.
    """
    document = parse(path)
    if document.faults:
        raise ConfigError(document.told(document.faults))
    _complete(document, environ)
    settings = _settings(document)
    _cross_checks(document)
    secrets = _secrets(document, environ, serves=serves)
    if document.faults or settings is None:
        raise ConfigError(document.told(document.faults))
    return Loaded(settings, secrets, tuple(document.told(document.warnings)))


def default_state_dir(environ: Mapping[str, str], *, uid: int | None = None) -> Path:
    """For this user unless `uid` names another: `/var/lib/timmy-dispatch` for root, else `$XDG_STATE_HOME/timmy-dispatch` or `~/.local/state/timmy-dispatch`."""
    if (os.geteuid() if uid is None else uid) == 0:
        return Path("/var/lib/timmy-dispatch")
    base = environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else _home(environ) / ".local" / "state") / "timmy-dispatch"


def read_secret(path: Path, *, strict: bool = True) -> Secret:
    """The secret in that file, without surrounding white space. Raises UnfitError where the file cannot be trusted or holds no secret.

    The file is opened without following a symbolic link; with `strict` it must be closed to group and others (systemd's credentials carry group bits
    of an access list and are checked by systemd).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if strict else 0))
    except FileNotFoundError:
        raise UnfitError(f"the file {path} does not exist", "create it with mode 0600, or run `timmy-dispatch init`") from None
    except OSError as error:
        if path.is_symlink():
            raise UnfitError(f"{path} is a symbolic link, which is not followed", "name the file itself") from None
        raise UnfitError(f"{path} cannot be read ({error.strerror})", "let the service's own user own it, with mode 0600") from None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise UnfitError(f"{path} is not a file", "name a regular file with mode 0600")
        if strict and info.st_mode & 0o077:
            raise UnfitError(f"{path} is open to others (mode {stat.S_IMODE(info.st_mode):04o})", f"chmod 600 {path}")
        content = os.read(descriptor, SECRET_CAP)
    finally:
        os.close(descriptor)
    try:
        value = content.decode().strip()
    except UnicodeDecodeError:
        raise UnfitError(f"{path} does not hold text", "write the secret into it as one line") from None
    return _long_enough(value, str(path))


def is_loopback(url: str) -> bool:
    """True where the address means the machine itself, as far as its text shows."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback or ip_address(host).is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _long_enough(value: str, where: str) -> Secret:
    if not value:
        raise UnfitError(f"{where} is empty", "write the secret into it")
    if len(value) < MINIMUM_LENGTH:
        raise UnfitError(
            f"the secret in {where} is shorter than {MINIMUM_LENGTH} characters",
            "make a longer one, for example with `openssl rand -hex 32`",
        )
    if any(not character.isprintable() for character in value):
        raise UnfitError(f"the secret in {where} holds a line break or another control character", "write it as one line")
    return Secret(value)


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or Path.home())


def _complete(document: Document, environ: Mapping[str, str]) -> None:
    """Puts in what depends on the machine: the default folders, and absolute paths for relative ones."""
    document.data = {key: value for key, value in document.data.items() if value is not None}
    document.data.setdefault("state_dir", str(default_state_dir(environ)))
    for holder, key in _path_keys(document):
        holder[key] = _absolute(document.path, holder[key], environ)
    for entry in document.data["providers"] if isinstance(document.data.get("providers"), list) else ():
        if isinstance(entry, dict) and entry.get("from_hermes") is True and not entry.get("hermes_home"):
            entry["hermes_home"] = environ.get("HERMES_HOME") or str(_home(environ) / ".hermes")


def _path_keys(document: Document) -> Iterator[tuple[Any, Any]]:
    singles: list[tuple[Any, str]] = [
        (document.data, "state_dir"),
        (document.get("forge"), "token_file"),
        (document.get("forge"), "ca_file"),
        (document.get("pages"), "token_file"),
        (document.get("alerts"), "token_file"),
        (document.get("collector"), "folder"),
        (document.get("watchdog"), "hermes_home"),
    ]
    for index in range(document.count("providers")):
        entry = document.get("providers", index)
        singles += [(entry, "key_file"), (entry, "hermes_home")]
    yield from ((holder, key) for holder, key in singles if isinstance(holder, dict) and isinstance(holder.get(key), str))
    for files in (document.get("webhook", "secret_files"), document.get("sandbox", "read_only_paths")):
        if isinstance(files, list):
            yield from ((files, index) for index, value in enumerate(files) if isinstance(value, str))


def _absolute(path: Path, value: str, environ: Mapping[str, str]) -> str:
    if value == "~" or value.startswith("~/"):
        return str(_home(environ) / value[2:])
    return os.path.normpath(path.absolute().parent / value)


def _settings(document: Document) -> Settings | None:
    try:
        return Settings.model_validate(document.data)
    except ValidationError as error:
        for detail in error.errors():
            _translate(document, detail)
        return None


def _translate(document: Document, detail: ErrorDetails) -> None:
    at = tuple(part for part in detail["loc"] if part != "[key]")
    if detail["type"] == "too_short" and detail["input"]:
        return  # its items are at fault, and they are told one by one
    meaning = _meaning(at)
    match detail["type"]:
        case "missing":
            document.fault(at, "is missing", f"add it: {meaning}" if meaning else "add it")
        case "extra_forbidden":
            known = _fields(at[:-1])
            near = difflib.get_close_matches(str(at[-1]), known, n=1, cutoff=0.6)
            document.fault(at, "unknown key" + (f", did you mean `{near[0]}`" if near else ""), f"the keys here are {', '.join(known)}")
        case "value_error":
            cause = detail.get("ctx", {}).get("error")
            remedy = cause.remedy if isinstance(cause, UnfitError) else meaning or "mend the value"
            document.fault(at, str(cause) if cause else detail["msg"], remedy)
        case _:
            document.fault(at, _complaint(detail, at), f"see dispatch.example.yml: {meaning}" if meaning else "see dispatch.example.yml")


def _complaint(detail: ErrorDetails, at: At) -> str:
    """What was expected, with the value that stands there unless the place may hold a secret."""
    text = WANTED.get(detail["type"]) or detail["msg"].replace("Input should", "should")
    value = detail["input"]
    if isinstance(value, dict | list) or any(word in str(part) for part in at for word in SECRETIVE):
        return text
    shown = repr(value)
    return f"{text}, not {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'}"


def _model(at: At) -> type[BaseModel] | None:
    """The record that stands at that place of the settings."""
    model: type[BaseModel] = Settings
    for part in at:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(part)
        found = record(info.annotation) if info else None
        if found is None:
            return None
        model = found
    return model


def _fields(at: At) -> list[str]:
    model = _model(at)
    return list(model.model_fields) if model else []


def _meaning(at: At) -> str:
    names = [part for part in at if isinstance(part, str)]
    while names:
        model = _model(tuple(names[:-1]))
        info = model.model_fields.get(names[-1]) if model else None
        if info and info.description:
            return info.description.rstrip(".")
        names.pop()
    return ""


def _cross_checks(document: Document) -> None:
    """What no single value shows. It looks at the raw values, so that these faults are told beside those of the types."""
    _no_doubles(document, "repositories")
    _no_doubles(document, "providers")
    for index in range(document.count("providers")):
        _check_provider(document, index)
    forge, public = document.get("forge", "url"), document.get("webhook", "public_url") or WebhookSettings().public_url
    if isinstance(forge, str) and isinstance(public, str):
        _check_addresses(document, forge, public)
    authority = document.get("forge", "ca_file")
    if isinstance(authority, str) and not Path(authority).is_file():
        document.fault(
            ("forge", "ca_file"), f"the file {authority} does not exist", "name the authority's certificate, or leave the key out"
        )
    for index, folder in enumerate(document.get("sandbox", "read_only_paths") or ()):
        if isinstance(folder, str) and not Path(folder).exists():
            document.fault(
                ("sandbox", "read_only_paths", index), f"{folder} does not exist", "name a folder of this machine, or take it out"
            )
    issue, served = (
        document.get("report", "issue"),
        [document.get("repositories", n, "name") for n in range(document.count("repositories"))],
    )
    if isinstance(issue, str) and issue and issue.partition("#")[0].casefold() not in [str(name).casefold() for name in served]:
        document.fault(
            ("report", "issue"), f"{issue.partition('#')[0]} is not among the repositories", "name an issue of one that the bot serves"
        )
    if document.get("sandbox", "kind") == "none":
        document.warn(("sandbox", "kind"), "the model's commands run without a sandbox", "install bubblewrap and take this line out")
    if stat.S_IMODE(document.path.stat().st_mode) & 0o022:
        document.warn((), "others may change this file", f"chmod 600 {document.path}")
    database = document.get("database")
    if isinstance(database, str) and urlsplit(database).password:
        document.warn(
            ("database",), "the address holds a password", "use a peer login or a ~/.pgpass file, or keep dispatch.yml at mode 0600"
        )


def _no_doubles(document: Document, key: str) -> None:
    first: dict[str, int] = {}
    for index in range(document.count(key)):
        name = document.get(key, index, "name")
        if not isinstance(name, str) or not name:
            continue
        if name.casefold() in first:
            line = document.line((key, first[name.casefold()], "name"))
            document.fault(
                (key, index, "name"), f"'{name}' stands twice (first in line {line})", "keep one entry and put the settings of both there"
            )
        first.setdefault(name.casefold(), index)


def _check_provider(document: Document, index: int) -> None:
    entry = document.get("providers", index)
    if not isinstance(entry, dict) or entry.get("from_hermes") is True:
        return
    for key in ("base_url", "model"):
        if not entry.get(key):
            document.fault(
                ("providers", index, key), "is missing", f"add it ({_meaning(('providers', index, key))}), or write from_hermes: true"
            )


def _check_addresses(document: Document, forge: str, public: str) -> None:
    at: At = ("webhook", "public_url")
    if is_loopback(public) and not is_loopback(forge):
        document.warn(
            at,
            f"{public} means this machine alone, and Gitea at {forge} cannot post there",
            "write the address at which Gitea reaches the bot",
        )
    if forge.startswith("http://") and not is_loopback(forge):
        document.warn(
            ("forge", "url"), "plain http sends the token readable over the network", "use https, with `ca_file` for a private authority"
        )


def _secrets(document: Document, environ: Mapping[str, str], *, serves: bool) -> Secrets:
    """What could be read; what could not is a fault of the document, and then the record is never handed out."""
    credentials = environ.get("CREDENTIALS_DIRECTORY", "")
    folder = Path(credentials) if credentials else None
    token = _one(document, environ, folder, name=FORGE_TOKEN, at=("forge", "token_file"), variable=FORGE_TOKEN_VARIABLE)
    if token is None:
        document.fault(
            ("forge", "token_file"),
            "there is no token for the forge",
            f"name a file with it, give systemd the credential `{FORGE_TOKEN}`, or run `timmy-dispatch init`",
        )
    keys = [_provider_key(document, environ, folder, index) for index in range(document.count("providers"))]
    faults, warnings = len(document.faults), len(document.warnings)
    webhook = _webhook_secrets(document, environ, folder)
    pages = _one(document, environ, folder, name=PAGES_TOKEN, at=("pages", "token_file"), variable="")
    if pages is None and document.get("pages", "visibility") == "token":
        document.fault(
            ("pages", "token_file"),
            "there is no access token for the pages, and `visibility: token` needs one",
            f"name a file with it (`openssl rand -hex 32`), or give systemd the credential `{PAGES_TOKEN}`",
        )
    alerts = _alerts_token(document, environ, folder)
    if not serves:
        del document.faults[faults:], document.warnings[warnings:]
    return Secrets(token or Secret(""), tuple(webhook), tuple(keys), pages or None, alerts or None)


def _alerts_token(document: Document, environ: Mapping[str, str], folder: Path | None) -> Secret | None:
    """The bearer token of the receiver; one key of `alerts` without the other is a fault."""
    at: At = ("alerts", "token_file")
    token = _one(document, environ, folder, name=ALERTS_TOKEN, at=at, variable="")
    repository = document.get("alerts", "repository")
    if token is None and repository:
        remedy = f"name a file with it (`openssl rand -hex 32`), or give systemd the credential `{ALERTS_TOKEN}`"
        document.fault(at, "there is no token, and alerts without one are refused", remedy)
    if token is not None and not repository:
        document.fault(
            ("alerts", "repository"), "is missing, and alerts are mirrored into issues there", "write OWNER/NAME, or take out the token"
        )
    return token


def _webhook_secrets(document: Document, environ: Mapping[str, str], folder: Path | None) -> list[Secret]:
    at: At = ("webhook", "secret_files")
    files = sorted(path for path in folder.glob(WEBHOOK_SECRET + "*")) if folder else []
    found = [_read(document, path, at, strict=False) for path in files]
    named = document.get(*at)
    entries = list(enumerate(named)) if isinstance(named, list) else []
    if not files:
        found += [_read(document, Path(value), (*at, index), strict=True) for index, value in entries if isinstance(value, str)]
    if not found and (value := environ.get(WEBHOOK_SECRET_VARIABLE)) is not None:
        found = [_from_environment(document, at, WEBHOOK_SECRET_VARIABLE, value)]
    if not found and not entries:
        document.fault(
            at,
            "there is no webhook secret, and unsigned deliveries are refused",
            "run `timmy-dispatch init`, which makes one; a machine that only runs `worker` needs none (`check-config --worker`)",
        )
    return [secret for secret in found if secret is not None]


def _provider_key(document: Document, environ: Mapping[str, str], folder: Path | None, index: int) -> Secret | None:
    entry = document.get("providers", index)
    if not isinstance(entry, dict):
        return None
    name, variable = entry.get("name"), entry.get("key_env")
    if isinstance(variable, str) and variable and variable not in environ and not entry.get("key_file"):
        document.fault(("providers", index, "key_env"), f"the environment has no {variable}", "set it, or name a `key_file` instead")
        return None
    return _one(
        document,
        environ,
        folder,
        name=f"provider-{name}" if isinstance(name, str) and name else "",
        at=("providers", index, "key_file"),
        variable=variable if isinstance(variable, str) else "",
    )


def _one(document: Document, environ: Mapping[str, str], folder: Path | None, *, name: str, at: At, variable: str) -> Secret | None:
    """A secret from the first place that has it; None where none has, or where it was there and bad (then that is a fault already)."""
    if folder and name and "/" not in name and (folder / name).is_file():
        return _read(document, folder / name, at, strict=False)
    path = document.get(*at)
    if isinstance(path, str) and path:
        return _read(document, Path(path), at, strict=True) or Secret("")
    if variable and (value := environ.get(variable)) is not None:
        return _from_environment(document, at, variable, value) or Secret("")
    return None


def _read(document: Document, path: Path, at: At, *, strict: bool) -> Secret | None:
    try:
        return read_secret(path, strict=strict)
    except UnfitError as unfit:
        document.fault(at, str(unfit), unfit.remedy)
        return None


def _from_environment(document: Document, at: At, variable: str, value: str) -> Secret | None:
    try:
        secret = _long_enough(value.strip(), f"the variable {variable}")
    except UnfitError as unfit:
        document.fault(at, str(unfit), unfit.remedy)
        return None
    document.warn(
        at, f"the secret comes from the environment ({variable}), which the machine's tools can show", "put it into a file with mode 0600"
    )
    return secret
