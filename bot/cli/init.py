"""`init`: asks what it must know, tries every answer at once, and leaves labels, webhook, configuration and state ready; a second run does no harm."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from bot.cli.doctor import IMPATIENT, plain
from bot.models import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

    from bot.cli._install import Answers
    from bot.config import Loaded
    from bot.doctor import Probe
    from bot.gitea.forge import Forge
    from bot.redaction import Secret

OLLAMA = "http://127.0.0.1:11434/v1"


@dataclass(frozen=True, slots=True)
class Flags:
    """The command line as given; None and () are what may be asked."""

    config: Path
    url: str | None
    token_file: str | None
    admin_token_file: str | None
    bot: str
    repository: tuple[str, ...]
    public_url: str | None
    listen: str
    model_url: str | None
    model: str | None
    model_key_file: Path | None
    state_dir: Path | None
    ca_file: Path | None
    wait: float


@click.command()
@click.option("--url", help="Address of the Gitea or Forgejo server.")
@click.option(
    "--token-file", metavar="FILE", help="File with the bot account's access token, `-` for standard input; else it is asked for."
)
@click.option(
    "--admin-token-file",
    metavar="FILE",
    help="Instead: file with an administrator's token, `-` for standard input. Makes the bot's account and token; is not kept.",
)
@click.option("--bot", default="timmy", show_default=True, metavar="LOGIN", help="Name of the account that --admin-token-file makes.")
@click.option("-r", "--repository", multiple=True, metavar="OWNER/NAME", help="Repository to serve; may be repeated.")
@click.option("--public-url", help="Address at which Gitea reaches the bot.")
@click.option("--listen", default="127.0.0.1:8080", show_default=True, help="Address the bot listens on for deliveries.")
@click.option("--model-url", help="OpenAI-compatible endpoint. Default: the Hermes login of this machine, where there is one.")
@click.option("--model", help="Model to ask for there.")
@click.option("--model-key-file", type=click.Path(path_type=Path), help="File with that endpoint's API key (mode 0600).")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Folder for database and work. Default: by user.")
@click.option("--ca-file", type=click.Path(path_type=Path, exists=True), help="Certificate of a private authority (PEM).")
@click.option("--wait", type=click.FloatRange(min=0.1, max=300), default=10.0, show_default=True, help="Seconds a test delivery may take.")
@click.pass_obj
def command(config: Path, /, **options: Any) -> None:
    """Set up labels, webhook and configuration, and prove that deliveries arrive."""
    flags = Flags(config=config, **options)
    asyncio.run(_renew(flags) if config.exists() else _begin(flags))


async def _begin(flags: Flags) -> None:
    from bot.cli import _install

    async with _Server(flags.ca_file) as server:
        url = await _settled("address of the Gitea server", flags.url, server.reach)
        token = await _hired(flags, flags.admin_token_file, url) if flags.admin_token_file else await _token(flags, server)
        if flags.admin_token_file and not await server.enter(token):
            raise UserError("the token that was made will not do")
        repositories = await _repositories(flags, server)
        public_url = flags.public_url or _ask("address at which Gitea reaches the bot", "--public-url", default=_guess(url, flags.listen))
        answers = _install.Answers(
            url=url,
            repositories=repositories,
            listen=flags.listen,
            public_url=public_url,
            provider=_provider(flags),
            state_dir=flags.state_dir,
            ca_file=flags.ca_file,
        )
        loaded, is_new = _write(flags.config, answers, token)
        await _equip(server.forge, loaded, replace=is_new, wait=flags.wait)
    _farewell(flags.config)


async def _renew(flags: Flags) -> None:
    """The file is there: it rules. New repositories are put in, a new token is stored, and everything else is looked after."""
    from bot.cli import _install
    from bot.cli._load import load

    if flags.admin_token_file:
        raise UserError(f"{flags.config} is there already and names the bot's token. Remedy: run this without --admin-token-file")
    if flags.token_file:
        target = _token_target(flags.config)
        _install.write_private(target, _read_token(flags.token_file).reveal() + "\n")
        _say("ok", f"the token is stored anew in {target}")
    loaded = load(flags.config, serves=True)
    if flags.url and flags.url.rstrip("/") != loaded.settings.forge.url:
        raise UserError(f"{flags.config} is for {loaded.settings.forge.url}. Remedy: change it there, or name another file with --config")
    if flags.public_url and flags.public_url.rstrip("/") != loaded.settings.webhook.public_url:
        raise UserError(f"{flags.config} has public_url {loaded.settings.webhook.public_url}. Remedy: change it there and run this again")
    async with _Server(loaded.settings.forge.ca_file) as server:
        if not await server.reach(loaded.settings.forge.url) or not await server.enter(loaded.secrets.forge_token):
            raise UserError("nothing was changed")
        fresh = [name for name in flags.repository if loaded.settings.repository(name) is None]
        for name in [*fresh, *(repository.name for repository in loaded.settings.repositories)]:
            if not await server.check(name):
                raise UserError(f"{name} is not ready, and nothing was changed")
        if fresh:
            _install.write_private(flags.config, _install.with_repositories(flags.config, fresh), keep_mode=True)
            _say("ok", f"{flags.config}: added {', '.join(fresh)}")
            loaded = load(flags.config, quiet=True, serves=True)
        await _equip(server.forge, loaded, replace=False, wait=flags.wait)
    _farewell(flags.config)


class _Server:
    """The forge while it is asked about; every question prints what it found and answers whether that will do."""

    def __init__(self, ca_file: Path | None) -> None:
        from bot.redaction import Secret

        self._ca_file = ca_file
        self._url = ""
        self._open("http://localhost", Secret(""))

    def _open(self, url: str, token: Secret) -> None:
        from bot.gitea.aiohttp import GiteaClient
        from bot.gitea.forge import Forge

        self._client = GiteaClient(url, token, ca_file=self._ca_file, jitter=lambda: IMPATIENT)
        self.forge = Forge(self._client)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.close()

    async def reach(self, url: str) -> bool:
        """Whether a server of a known version answers there; one that tells nothing without a token is asked again later."""
        from pydantic import ValidationError

        from bot.gitea.errors import Forbidden, Unauthorized
        from bot.redaction import Secret
        from bot.settings import ForgeSettings

        try:
            self._url = ForgeSettings(url=url).url
        except ValidationError as error:
            _say("fail", f"{url}: {_first(error)}")
            return False
        await self._client.close()
        self._open(self._url, Secret(""))
        try:
            await self.forge.version()
        except (Forbidden, Unauthorized):
            return True
        except Exception:  # noqa: S110 - told by the probe below, in its own words
            pass
        from bot.doctor import account

        return await _told(_single(account.version(self.forge)))

    async def enter(self, token: Secret) -> bool:
        """Whether the token opens the server, and whose it is."""
        from bot.doctor import account

        await self._client.close()
        self._open(self._url, token)
        return await _told(account.identity(self.forge))

    async def check(self, full_name: str) -> bool:
        """Whether the account may do in that repository what the bot needs."""
        from pydantic import ValidationError

        from bot.doctor import rights
        from bot.settings import RepositorySettings

        try:
            RepositorySettings(name=full_name)
        except ValidationError as error:
            _say("fail", _first(error))
            return False
        return await _told(rights.repository(self.forge, full_name))


async def _hired(flags: Flags, source: str, url: str) -> Secret:
    from bot.cli import _account, _install

    if flags.token_file:
        raise UserError("--token-file and --admin-token-file exclude each other: the one is the bot's own, the other makes it")
    if not flags.repository:
        raise UserError("the repositories are missing. Remedy: give them with --repository")
    return await _account.hire(
        url,
        _read_token(source),
        login=flags.bot,
        repositories=flags.repository,
        kept=_install.beside(flags.config, "gitea.token"),
        ca_file=flags.ca_file,
        write=_install.write_private,
        say=_say,
    )


async def _token(flags: Flags, server: _Server) -> Secret:
    if flags.token_file:
        token = _read_token(flags.token_file)
        if not await server.enter(token):
            raise UserError("this token will not do")
        return token
    from bot.redaction import Secret

    while True:
        token = Secret(_ask("access token of the bot's account (not shown)", "--token-file", hidden=True).strip())
        if await server.enter(token):
            return token


async def _repositories(flags: Flags, server: _Server) -> tuple[str, ...]:
    names = flags.repository
    while True:
        names = names or tuple(_ask("repositories (OWNER/NAME, with spaces between)", "--repository").replace(",", " ").split())
        names = tuple({name.casefold(): name for name in names}.values())
        fit = [await server.check(name) for name in names]
        if names and all(fit):
            return names
        if flags.repository:
            raise UserError("nothing was changed; mend what failed above and run this again")
        names = ()


def _provider(flags: Flags) -> dict[str, Any]:
    hermes = Path(os.environ.get("HERMES_HOME") or Path.home() / ".hermes") / "config.yaml"
    if flags.model_url is None and flags.model is None and hermes.is_file():
        _say("ok", f"the model comes from the Hermes login in {hermes.parent}")
        return {"from_hermes": True}
    entry: dict[str, Any] = {
        "base_url": flags.model_url or _ask("OpenAI-compatible endpoint of the model", "--model-url", default=OLLAMA),
        "model": flags.model or _ask("model", "--model"),
    }
    if flags.model_key_file:
        entry["key_file"] = str(flags.model_key_file.absolute())
    return entry


def _write(path: Path, answers: Answers, token: Secret) -> tuple[Loaded, bool]:
    """Secrets first, then the file that names them; returns the loaded configuration and whether the webhook secret is new."""
    from pydantic import ValidationError

    from bot.cli import _install
    from bot.cli._load import load
    from bot.settings import Settings

    token_file, secret_file = _install.beside(path, "gitea.token"), _install.beside(path, "webhook.secret")
    content = _install.document(answers, token_file=token_file, secret_file=secret_file)
    try:
        Settings.model_validate({"state_dir": "/", **content})
    except ValidationError as error:
        raise UserError("; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())) from None
    _install.write_private(token_file, token.reveal() + "\n")
    _, is_new = _install.stored_secret(secret_file)
    _install.write_private(path, _install.text(content))
    _say("ok", f"wrote {path}, {token_file.name} and {secret_file.name}, readable by you alone")
    return load(path, serves=True), is_new


async def _equip(forge: Forge, loaded: Loaded, *, replace: bool, wait: float) -> None:
    """State folder, labels, hooks, proof."""
    from bot.cli import _install
    from bot.doctor import explain, hook, labels
    from bot.fleet.hooks import ensure_hook
    from bot.gitea.errors import ForgeError

    settings, secret = loaded.settings, loaded.secrets.webhook_secrets[0]
    _install.prepare_state(settings.state_dir, time.time_ns() // 1_000_000)
    _say("ok", f"state folder {settings.state_dir}")
    ids: dict[str, int] = {}
    for repository in settings.repositories:
        try:
            await labels.make(forge, repository.name, settings.trigger_label)
            ids[repository.name], done = await ensure_hook(forge, repository.name, settings, secret=secret, replace=replace)
        except ForgeError as error:
            detail, remedy = explain(error)
            raise UserError(f"{repository.name}: {detail}. Remedy: {remedy}; then run this again") from None
        _say("ok", f"{repository.name}: labels are there, webhook {done}")
    _say("", f"asking Gitea for a test delivery to {settings.webhook.hook_url()} (up to {wait:.0f} s) ...")
    for name, proof in (await _install.prove_hooks(forge, settings, secret=secret, hook_ids=ids, seconds=wait)).items():
        _print(hook.told(name, proof, settings, wait))


def _token_target(config: Path) -> Path:
    """Where the existing configuration keeps the token; it is read raw, because a file that is missing now is what may be mended here."""
    import yaml

    from bot.cli import _install

    try:
        forge = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("forge") or {}
        named = forge.get("token_file")
    except (yaml.YAMLError, OSError, AttributeError):
        named = None
    return config.absolute().parent / Path(str(named)).expanduser() if named else _install.beside(config, "gitea.token")


def _read_token(source: str) -> Secret:
    from bot.config import read_secret
    from bot.redaction import Secret
    from bot.settings import UnfitError

    if source == "-":
        return Secret(sys.stdin.readline().strip())
    try:
        return read_secret(Path(source))
    except UnfitError as unfit:
        raise UserError(f"{unfit}. Remedy: {unfit.remedy}") from None


async def _settled(what: str, given: str | None, fits: Callable[[str], Awaitable[bool]]) -> str:
    """An answer that was tried: the flag's, which must do, or one that is asked for until it does."""
    if given is not None:
        if not await fits(given):
            raise UserError(f"this {what} will not do")
        return given.rstrip("/")
    while not await fits(answer := _ask(what, "--url")):
        pass
    return answer.rstrip("/")


def _ask(what: str, flag: str, *, default: str | None = None, hidden: bool = False) -> str:
    if not sys.stdin.isatty():
        if default is not None:
            return default
        raise UserError(f"the {what} is missing. Remedy: give it with {flag}")
    return str(click.prompt(what, default=default, hide_input=hidden, err=True))


def _guess(url: str, listen: str) -> str:
    from bot.config import is_loopback
    from bot.settings import split_listen

    _, port = split_listen(listen)
    return f"http://{'127.0.0.1' if is_loopback(url) else socket.getfqdn()}:{port}"


async def _single(probe: Awaitable[Probe]) -> AsyncIterator[Probe]:
    yield await probe


async def _told(probes: AsyncIterator[Probe]) -> bool:
    from bot.doctor import Mark

    fit = True
    async for probe in probes:
        _print(probe)
        fit = fit and probe.mark is not Mark.FAIL
    return fit


def _print(probe: Probe) -> None:
    remedy = f"\n      remedy: {probe.remedy}" if probe.remedy else ""
    _say(probe.mark, f"{plain(probe.name)}: {plain(probe.detail)}{remedy}")


def _say(mark: str, text: str) -> None:
    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    click.echo(click.style(f"{mark:<5}", fg=colors.get(mark)) + text)


def _first(error: ValidationError) -> str:
    cause = error.errors()[0].get("ctx", {}).get("error")
    remedy = getattr(cause, "remedy", "")
    return f"{cause}\n      remedy: {remedy}" if remedy else error.errors()[0]["msg"]


def _farewell(config: Path) -> None:
    click.echo(f"\nnext: timmy-dispatch --config {config} doctor, then: timmy-dispatch --config {config} serve")
