"""Takes deliveries up again that were given up."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click


@click.command(short_help="List dead letters, or take one up again.")
@click.argument("digest", required=False, default="")
@click.option("--all", "everything", is_flag=True, help="Take all of them up again.")
@click.pass_obj
def command(config: Path, digest: str, everything: bool) -> int:  # noqa: FBT001 - click passes options by name
    """Without an argument, list the deliveries that were given up; with the first letters of one's DIGEST, handle it again.

    Handling again does no harm: what was decided once meets its stored answer.
    """
    from bot.cli._load import load
    from bot.models import UserError
    from bot.redaction import terminal
    from bot.store import Store, deliveries

    store = Store(load(config, quiet=True).settings.database_url())
    store.open()
    try:
        letters = store.read_sync(deliveries.dead_letters)
        chosen = [letter[0] for letter in letters if everything or (digest and letter[0].startswith(digest))]
        if digest and not chosen:
            raise UserError(f"no dead letter begins with {digest}")
        for found in chosen:
            store.write_sync(partial(deliveries.replay, digest=found))
            click.echo(f"{found[:12]} is taken up again")
        if not chosen:
            for name, event, error, received_ms in letters:
                moment = datetime.fromtimestamp(received_ms / 1000, UTC).isoformat(timespec="seconds")
                click.echo(terminal(f"{name[:12]}  {moment}  {event}  {error}"))
            click.echo(f"{len(letters)} dead letters")
    finally:
        store.close()
    return 0
