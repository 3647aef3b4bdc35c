"""Every verb of `commands/` on the command line, straight on the store, so that it works while the forge is down."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bot.chatops import Command, Invocation
    from bot.config import Loaded
    from bot.models import Ask, IssueRef, RepoId, Verdict
    from bot.store import Store

FAILED = 1
ANSWER_SECONDS = 3.0


def verb_command(verb: str) -> click.Command:
    """The click command of one verb; its help is that of the chat command."""
    plugin = _commands()[verb]

    def call(config: Path, words: tuple[str, ...]) -> int:
        return _run(verb, config, words)

    where = "for OWNER/REPO#NUMBER" if plugin.of_issue else "for the fleet, or for OWNER/REPO where that stands first"
    place = "OWNER/REPO#N" if plugin.of_issue else "[OWNER/REPO]"
    usage = f"{place} [OPTIONS AND WORDS]..."
    return click.Command(
        verb,
        params=[click.Argument(["words"], nargs=-1, metavar=usage, required=plugin.of_issue)],
        callback=click.pass_obj(call),
        help=f"{plugin.summary}.\n\nThe same as `{plugin.usage}` in a comment, as an operator, {where}.",
        short_help=plugin.summary,
        context_settings={"ignore_unknown_options": True},
    )


def _commands() -> dict[str, Command]:
    import commands as package
    from bot.chatops import Command as CommandType
    from bot.discovery import discover

    return dict(discover(package, CommandType))


def _run(verb: str, config: Path, words: tuple[str, ...]) -> int:
    from bot import chatops, replies
    from bot.cli._house import opened
    from bot.cli._load import load
    from bot.logs import configure
    from bot.models import UserError
    from bot.redaction import Redactor, terminal

    plugin = _commands()[verb]
    ref, words = _address(words, of_issue=plugin.of_issue)
    found = next(iter(chatops.parse(" ".join([chatops.NAMESPACE, verb, *words]), {verb})), None)
    if found is None or isinstance(found, chatops.ParseError):
        raise UserError(found.problem if found is not None else "this cannot be read as a command")
    loaded = load(config, quiet=True)
    keys = loaded.secrets
    redactor = Redactor([keys.forge_token, *keys.webhook_secrets, *(key for key in keys.provider_keys if key is not None)])
    configure(redactor, level="WARNING")
    with opened(loaded) as store:
        ask = _ask(store, ref, verb, found)
        if plugin.wants:
            import asyncio

            verdict = asyncio.run(_with_forge(store, loaded, ask))
        elif plugin.likes:
            verdict = _at_best(store, loaded, ask)
        else:
            verdict = _on_store(store, loaded, ask)
    if verdict.reply.name:
        click.echo(terminal(redactor.scrub(replies.on_terminal(verdict.reply))))
    elif verdict.reason:
        click.echo(verdict.reason)
    return verdict.exit_code if verdict.result == "ok" else FAILED


def _address(words: tuple[str, ...], *, of_issue: bool) -> tuple[IssueRef, tuple[str, ...]]:
    """What the first word names, and the others: an issue where the verb needs one, else a repository (then the number is 0) or nothing at all."""
    from bot.models import IssueRef

    first = words[0] if words else ""
    if of_issue or "#" in first:
        return IssueRef.parse(first), words[1:]
    if re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", first):
        return IssueRef.of(first, 0), words[1:]
    return IssueRef("", "", 0), words


def _ask(store: Store, ref: IssueRef, verb: str, found: Invocation) -> Ask:
    from bot import chatops
    from bot.models import Actor, Ask, Source

    return Ask(
        key=chatops.terminal_key(secrets.token_hex(8)),
        repo_id=_repo_id(store, ref),
        issue=ref,
        actor=Actor.terminal(),
        source=Source.COMMAND,
        verb=verb,
        asked_ms=time.time_ns() // 1_000_000,
        args=found.args,
        options=found.options,
        instructions=found.instructions,
        text=found.text,
    )


def _repo_id(store: Store, ref: IssueRef) -> RepoId:
    """The number of a repository that the service has seen; 0 where none is named."""
    from bot.models import RepoId, UserError
    from bot.repositories import known_repositories

    if not ref.repo:
        return RepoId(0)
    known = store.read_sync(known_repositories)
    repo_id = next((key for key, names in known.items() if ref.full_name.casefold() in (name.casefold() for name in names)), None)
    if repo_id is None:
        served = ", ".join(sorted({names[1] for names in known.values()})) or "none yet"
        raise UserError(f"{ref.full_name} is not a repository this service has seen; it serves: {served}")
    return RepoId(repo_id)


def _on_store(store: Store, loaded: Loaded, ask: Ask) -> Verdict:
    """One transaction, no forge."""
    from bot.verdict import write_without_forge

    now_ms = time.time_ns() // 1_000_000
    return store.write_sync(lambda conn: write_without_forge(conn, ask, settings=loaded.settings, commands=_commands(), now_ms=now_ms))


def _at_best(store: Store, loaded: Loaded, ask: Ask) -> Verdict:
    """With the forge's word where it answers soon, else without."""
    import asyncio
    from dataclasses import replace

    from bot import chatops
    from bot.models import UserError

    async def soon() -> Verdict:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await _with_forge(store, loaded, ask)

    try:
        return asyncio.run(soon())
    except (TimeoutError, UserError):
        return _on_store(store, loaded, replace(ask, key=chatops.terminal_key(secrets.token_hex(8))))


async def _with_forge(store: Store, loaded: Loaded, ask: Ask) -> Verdict:
    """What needs the issue as it is now: run and retry."""
    from bot.cli._house import house
    from bot.decide import AskAgain
    from bot.models import UserError

    async with house(loaded, store) as rooms:
        try:
            verdict = await rooms.decider.decide(ask)
        except AskAgain as error:
            raise UserError(f"the forge does not answer, nothing was started: {error}") from error
    if verdict is None:
        raise UserError(f"{ask.issue.full_name} is not in the configuration any more")
    return verdict
