"""Puts forge, cast, model and service of the demo together in one process, and takes them down again, in order and whatever happened."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from bot.config import SandboxSettings, is_loopback
from bot.demo.forge.server import ForgeServer
from bot.demo.model import ScriptedModel
from bot.demo.sample import FILES
from bot.demo.screen import Screen
from bot.demo.stage import Stage
from bot.gitea.aiohttp import GiteaClient
from bot.gitea.errors import BadReply, Forbidden, ForgeError, Moved, NotFound, Unauthorized, Unavailable
from bot.logs import configure
from bot.models import SprintEvent, UserError
from bot.providers.entries import resolve
from bot.redaction import Redactor, Secret
from bot.sandbox import SandboxUnavailable
from bot.sandbox import build as build_sandbox
from bot.service import Service

CHECK = "sh test.sh"
POLL_SECONDS = 1.0
MODEL_MINUTES = 20.0
TIMING = {"beat_seconds": 1.0, "lease_seconds": 10.0, "tick_seconds": 0.2, "progress_seconds": 0.5, "queue_poll_seconds": 0.1}
TEMPORARY = Path("/var/tmp")  # noqa: S108 - mkdtemp makes the folder in it, under a name nobody can guess


@dataclass(frozen=True, slots=True)
class Plan:
    """What to play: without `gitea` on the embedded forge, without `model_url` by the script. `pace` (seconds) slows each reply of the script."""

    gitea: str = ""
    admin_token: Secret | None = None
    model_url: str = ""
    model: str = ""
    model_key_file: Path | None = None
    keep_cast: bool = False
    pace: float = 0.0


@dataclass(frozen=True, slots=True)
class House:
    """All that runs. `deliveries` is False where the forge surely cannot reach us, so that only polling finds things."""

    stage: Stage
    service: Service
    embedded: bool
    deliveries: bool


@contextlib.contextmanager
def state_folder(keep: Path | None) -> Iterator[Path]:
    """A private folder that the sandbox's own user can pass through where we are root; removed at the end unless it is `keep`.

    Raises UserError where `keep` cannot be used.
    """
    if keep is not None:
        yield _kept(keep)
        return
    base = TEMPORARY if os.access(TEMPORARY, os.W_OK | os.X_OK) else None
    path = Path(tempfile.mkdtemp(prefix="timmy-demo-", dir=base))
    path.chmod(_mode())
    try:
        yield path
    finally:
        _remove(path)


def _mode() -> int:
    return 0o711 if os.getuid() == 0 else 0o700


def _kept(keep: Path) -> Path:
    path = keep.expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UserError(f"{path} is not empty: the embedded forge begins anew each time, so name a folder that is empty or not there")
        path.chmod(_mode())
    except OSError as error:
        raise UserError(f"{path} cannot be used: {error.strerror}") from error
    if os.getuid() == 0:
        for folder in path.resolve().parents:
            if not folder.stat().st_mode & 0o001:
                raise UserError(f"the sandbox's user cannot pass through {folder}: name another folder, or run `chmod o+x {folder}`")
    return path


def _remove(path: Path) -> None:
    """Also what the agent closed to us; links are left alone, so that nothing outside is touched."""
    for folder, names, _ in os.walk(path):
        for name in names:
            inner = Path(folder, name)
            if not inner.is_symlink():
                with contextlib.suppress(OSError):
                    inner.chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)


@contextlib.asynccontextmanager
async def open_house(
    plan: Plan, folder: Path, screen: Screen, *, log: TextIO, observe: Callable[[SprintEvent], None]
) -> AsyncIterator[House]:
    """Starts everything below `folder`, logging to `log`. Raises UserError with the remedy."""
    configure(Redactor([plan.admin_token] if plan.admin_token else []), stream=log)
    async with contextlib.AsyncExitStack() as stack:
        wall = _wall(plan, folder, screen)
        model_url = plan.model_url or await _script(stack, plan.pace)
        stage = await (_visit(stack, plan, screen) if plan.gitea else _embed(stack, folder))
        port = _free_port()
        deliveries = is_loopback(stage.url)
        if deliveries:
            await stage.hook(f"http://127.0.0.1:{port}/webhook")
        else:
            screen.say(f"{stage.url} cannot reach a webhook on this machine's loopback address: the bot asks it every second instead")
        changes: dict[str, Any] = {
            "repositories": [{"name": stage.repo, "checks": [CHECK]}],
            "sandbox": {"kind": wall},
            "reconcile": {"poll_seconds": POLL_SECONDS},
            "timing": TIMING,
        }
        if plan.model_url:
            changes |= {"providers": [_provider(plan)], "limits": {"minutes": MODEL_MINUTES}}
        settings = stage.settings(folder / "state", webhook_port=port, model_url=model_url, **changes)
        _, findings = resolve(settings.providers, environ={}, home=folder)
        if findings:
            raise UserError("\n".join(findings))
        service = Service(settings, stage.secrets(), environ={}, home=folder, fast_shutdown=True, observers=[observe])
        configure(service.redactor, stream=log)
        await service.start()
        stack.push_async_callback(service.stop)
        yield House(stage, service, embedded=not plan.gitea, deliveries=deliveries)


def _wall(plan: Plan, folder: Path, screen: Screen) -> str:
    """bubblewrap, or `none` where this machine cannot and nobody but the script says what runs."""
    try:
        build_sandbox(SandboxSettings(), state_dir=folder)
    except SandboxUnavailable as error:
        if plan.model_url:
            raise UserError(f"without a sandbox no real model runs here: {error}") from error
        screen.loud(f"NO SANDBOX: {error}")
        screen.loud("The demo goes on without, because its model is a script; `serve` would refuse. Pull request and comments say so too.")
        return "none"
    return "bubblewrap"


async def _script(stack: contextlib.AsyncExitStack, pace: float) -> str:
    model = await stack.enter_async_context(ScriptedModel(latency=pace))
    return model.url


def _provider(plan: Plan) -> dict[str, Any]:
    provider = {"base_url": plan.model_url, "model": plan.model}
    return provider | ({"key_file": str(plan.model_key_file.absolute())} if plan.model_key_file else {})


async def _embed(stack: contextlib.AsyncExitStack, folder: Path) -> Stage:
    if shutil.which("git") is None:
        raise UserError("git is missing: run `apt install git`")
    forge = await stack.enter_async_context(ForgeServer(folder / "forge"))
    await forge.create_user("boss", admin=True)
    stage = await Stage.build(forge.url, Secret(await forge.create_token("boss", ["all"])), files=FILES)
    stack.push_async_callback(stage.close)
    return stage


async def _visit(stack: contextlib.AsyncExitStack, plan: Plan, screen: Screen) -> Stage:
    """A cast of its own on a running server, removed at the end unless it is to stay."""
    token = plan.admin_token or Secret("")
    async with GiteaClient(plan.gitea, token, jitter=_impatient) as client:
        await knock(client, plan.gitea)
    try:
        stage = await Stage.build(plan.gitea, token, files=FILES, suffix=f"-{secrets.token_hex(3)}")
    except Forbidden as error:
        raise UserError(
            f"the token may not make users and repositories ({error}): give it the scope `all`, or at least `write:admin`"
        ) from error
    except ForgeError as error:
        raise UserError(f"{plan.gitea} did not let the demo make its people and its repository: {error}") from error
    stack.push_async_callback(_leave, stage, screen, keep=plan.keep_cast)
    return stage


def _impatient() -> float:
    return 0.1


async def knock(client: GiteaClient, url: str) -> None:
    """Raises UserError where this is no Gitea, or the token is not an administrator's."""
    try:
        version = await client.getitem("/version")
        me = await client.getitem("/user")
    except Unauthorized as error:
        raise UserError(f"{url} does not know this token: make a new one under Settings, Applications of an administrator") from error
    except Forbidden as error:
        raise UserError(f"{url} refuses this token ({error}): it needs the scopes `write:admin` and `read:user`, or `all`") from error
    except Unavailable as error:
        raise UserError(f"{url} cannot be reached ({error}): check the address, and that Gitea runs") from error
    except (NotFound, BadReply, Moved) as error:
        raise UserError(f"{url} does not answer like a Gitea ({error}): give the address of its front page") from error
    except ForgeError as error:
        raise UserError(f"{url} refused: {error}") from error
    if not isinstance(version, dict) or not isinstance(me, dict):
        raise UserError(f"{url} does not answer like a Gitea: give the address of its front page")
    if not me.get("is_admin"):
        raise UserError(
            f"the token belongs to {me.get('login')}, who is no administrator of {url}: the demo must make its own people there"
        )


async def _leave(stage: Stage, screen: Screen, *, keep: bool) -> None:
    """Removes the cast; what cannot be removed is named, so that a person can."""
    try:
        if keep:
            screen.say(f"kept on {stage.url}: {stage.repo} and {', '.join(person.login for person in stage.people.values())}")
            return
        left = await stage.remove()
        if left:
            screen.loud("\n".join([f"could not be removed from {stage.url}:", *left]))
        else:
            screen.say(f"removed from {stage.url}: {stage.repo} and its people")
    finally:
        await stage.close()


def _free_port() -> int:
    """A port that is free now; the hook must name it before the service listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
