"""What `init` does once it knows the answers: files first, closed to others, then labels and webhook; each step may be repeated."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bot.config import Settings, read_secret
from bot.doctor._delivery import PortBusyError, Receiver, last_test_push_ms, prove
from bot.fleet.hooks import ensure_hook
from bot.fleet.probes._proof import Proof, prove_by_service
from bot.gitea.forge import Forge
from bot.models import UserError
from bot.redaction import Secret
from bot.settings import UnfitError

HEADER = """\
# Written by `timmy-dispatch init`. Every further setting: `timmy-dispatch check-config --example`, or dispatch.example.yml.
# Secrets stand in the files named here (mode 0600), never in this one.
"""
MARK = "initialised"
SECRET_BYTES = 32
QUICK_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What a first run needs to know. `provider` is one entry of `providers` as it will stand in the file."""

    url: str
    repositories: tuple[str, ...]
    listen: str
    public_url: str
    provider: dict[str, Any]
    state_dir: Path | None
    ca_file: Path | None


def beside(config: Path, name: str) -> Path:
    """The secret file of that configuration; another name for another configuration in the same folder."""
    return config.with_name(name if config.stem == "dispatch" else f"{config.stem}.{name}")


def write_private(path: Path, text: str, *, keep_mode: bool = False) -> None:
    """Replaces the file in one step; a crash leaves the old one. Mode 0600, or that of the old file with `keep_mode`.

    Root leaves the file to whoever owned it: the service may be another user.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Remedy: name a folder that is yours with --config") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if path.exists():
                old = path.stat()
                if os.geteuid() == 0:
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
                if keep_mode:
                    os.fchmod(file.fileno(), old.st_mode & 0o777)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def stored_secret(path: Path) -> tuple[Secret, bool]:
    """The webhook secret of an earlier run and False, else a new one, written down before any hook knows it, and True."""
    if path.exists():
        try:
            return read_secret(path), False
        except UnfitError as unfit:
            raise UserError(f"{unfit}. Remedy: {unfit.remedy}") from None
    secret = Secret(secrets.token_hex(SECRET_BYTES))
    write_private(path, secret.reveal() + "\n")
    return secret, True


def document(answers: Answers, *, token_file: Path, secret_file: Path) -> dict[str, Any]:
    """The configuration as it will stand in the file."""
    forge: dict[str, Any] = {"url": answers.url, "token_file": token_file.name}
    if answers.ca_file:
        forge["ca_file"] = str(answers.ca_file.absolute())
    found: dict[str, Any] = {
        "forge": forge,
        "webhook": {"listen": answers.listen, "public_url": answers.public_url, "secret_files": [secret_file.name]},
        "repositories": [{"name": name} for name in answers.repositories],
        "providers": [answers.provider],
    }
    if answers.state_dir:
        found["state_dir"] = str(answers.state_dir.absolute())
    return found


def text(content: dict[str, Any]) -> str:
    """The file's text."""
    return HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def with_repositories(path: Path, names: Sequence[str]) -> str:
    """The text of an existing file with further repositories put in front of the list; comments and order stay.

    Raises UserError where the list is not written as one entry a line.
    """
    content = path.read_text(encoding="utf-8")
    root = yaml.compose(content, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    entries = next((value for key, value in pairs if key.value == "repositories"), None)
    if not isinstance(entries, yaml.SequenceNode) or entries.flow_style or not entries.value:
        raise UserError(f"add these repositories to {path} by hand: {', '.join(names)}")
    line, column = entries.start_mark.line, entries.start_mark.column
    lines = content.splitlines(keepends=True)
    lines[line:line] = [f"{' ' * column}- name: {name}\n" for name in names]
    return "".join(lines)


def prepare_state(folder: Path, now_ms: int) -> int:
    """Makes the state folder and notes when reconciliation begins (`initialised`, Unix ms); a second run keeps the first moment, which it returns.

    For a root service the sandbox's own user must be able to pass through the folder, though not to list it.
    """
    mark = folder / MARK
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
        if mark.exists():
            return int(mark.read_text(encoding="ascii"))
    except ValueError:
        pass  # cut short by a crash of old: this moment is the better answer
    except OSError as error:
        raise UserError(f"the state folder {folder} cannot be made ({error.strerror}). Remedy: name another one with --state-dir") from None
    write_private(mark, f"{now_ms}\n")
    return now_ms


async def prove_hooks(forge: Forge, settings: Settings, *, secret: Secret, hook_ids: dict[str, int], seconds: float) -> dict[str, Proof]:
    """A test delivery for each hook. One that arrives with another secret is replaced, and proven anew."""
    try:
        async with Receiver(settings.webhook.listen, [secret]) as receiver:
            found: dict[str, Proof] = {}
            for name, hook_id in hook_ids.items():
                patience = QUICK_SECONDS if Proof.SILENT in found.values() else seconds
                found[name] = await prove(receiver, forge, name, hook_id=hook_id, seconds=patience)
                if found[name] is Proof.FORGED:
                    fresh, _ = await ensure_hook(forge, name, settings, secret=secret, replace=True)
                    found[name] = await prove(receiver, forge, name, hook_id=fresh, seconds=patience)
            return found
    except PortBusyError as busy:
        if not busy.held:
            return dict.fromkeys(hook_ids, Proof.BUSY)
    return await prove_by_service(forge, hook_ids, seen_ms=lambda: last_test_push_ms(settings), seconds=seconds)
