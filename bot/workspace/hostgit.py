"""The only code that runs git on the host: an environment made from nothing, a host-owned bare repository, and the token in memory for the time of one call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from bot.redaction import Secret
from bot.sandbox.process import Child, Output, PipeReader, PipeWriter, memory_file, pipe
from bot.workspace.errors import GitFailed, GitKilled, GitRefused, GitUnavailable, Refusal

_PATH = "/usr/local/bin:/usr/bin:/bin"
LOCAL_SECONDS = 60.0
NETWORK_SECONDS = 600.0
MAX_OUTPUT = 8 * 1024**2
BIG_BLOB = 5 * 1024**2
_STDERR_KEPT = 8192

_CONFIG: Mapping[str, str] = {
    "core.hooksPath": "/dev/null",
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    "core.fsmonitor": "false",
    "core.askPass": "",
    "core.sshCommand": "/bin/false",
    "core.editor": "/bin/false",
    "core.pager": "cat",
    "core.protectHFS": "true",
    "core.protectNTFS": "true",
    "core.quotePath": "false",
    "core.bigFileThreshold": str(BIG_BLOB),
    "credential.helper": "",
    "diff.external": "",
    "remote.pushDefault": "",
    "http.followRedirects": "false",
    "http.proxy": "",
    "http.lowSpeedLimit": "100",
    "http.lowSpeedTime": "60",
    "protocol.allow": "never",
    "protocol.https.allow": "always",
    "protocol.http.allow": "always",
    "protocol.file.allow": "never",
    "protocol.ext.allow": "never",
    "submodule.recurse": "false",
    "fetch.recurseSubmodules": "false",
    "push.recurseSubmodules": "no",
    "push.followTags": "false",
    "fetch.fsckObjects": "true",
    "transfer.fsckObjects": "true",
    "receive.fsckObjects": "true",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "commit.gpgSign": "false",
    "tag.gpgSign": "false",
    "push.gpgSign": "false",
    "safe.bareRepository": "explicit",
}
_ASKPASS = """#!/bin/sh
case "$1" in
"$DISPATCH_USERNAME_PROMPT") printf '%s\\n' "$DISPATCH_LOGIN" ;;
"$DISPATCH_PASSWORD_PROMPT") IFS= read -r token < "/proc/self/fd/$DISPATCH_TOKEN_FD"; printf '%s\\n' "$token" ;;
*) exit 1 ;;
esac
"""
_PERMANENT = (
    (Refusal.PROTECTED, r"Not allowed to push to protected branch|is protected from|is not allowed to push to branch"),
    (Refusal.PERMISSION, r"User permission denied for writing"),
    (Refusal.ARCHIVED, r"(?m)^remote: .*\barchived\b"),
    (Refusal.AUTH, r"Authentication failed|could not read (Username|Password)|returned error: 401"),
    (Refusal.MOVED, r"returned error: 30[0-9]|unable to update url base from redirection"),
    (Refusal.NOT_FOUND, r"returned error: 404|repository '.*' not found|Repository not found"),
    (Refusal.PERMISSION, r"returned error: 403"),
)
_PASSING = re.compile(
    r"returned error: (5\d\d|408|429)|Could not resolve|Failed to connect|Couldn't connect|Connection (refused|reset|timed out)|timed out|too slow|RPC failed"
    r"|died of signal|No space left on device"
    r"|hung up|early EOF|unexpected disconnect|Empty reply|transfer closed|Recv failure|Send failure|SSL|certificate|GnuTLS|gnutls|HTTP/2|curl \d+",
)
_REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
_BRANCH_FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)|^[-./]|[./]$|^$|^@$")
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class GitOutput:
    """How git ended: exit code, stdout (cut at the bound asked for; then `cut` is true and git was killed), stderr as text."""

    code: int
    out: bytes
    err: str
    cut: bool = False


def sha(text: str) -> str:
    """`text` if it is an object id in full; raises ValueError, so that nothing option-like or abbreviated reaches git."""
    if _SHA.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not an object id")
    return text


def branch_ref(branch: str) -> str:
    """`refs/heads/BRANCH`; raises GitRefused for a name git would not take."""
    if _BRANCH_FORBIDDEN.search(branch) or len(branch) > 200:  # noqa: PLR2004  longer names do not fit a file name
        raise GitRefused(Refusal.OTHER, f"`{branch}` is not a branch name")
    return f"refs/heads/{branch}"


def classify(stderr: str) -> GitRefused | GitUnavailable:
    """What git's words mean: a refusal for good, or something that may pass."""
    text = _tidy(stderr)
    # an address may hold any word, so it is no evidence
    evidence = re.sub(r"'?https?://[^\s']*'?", "'URL'", stderr)
    for kind, pattern in _PERMANENT:
        if re.search(pattern, evidence):
            return GitRefused(kind, text)
    if _PASSING.search(evidence):
        return GitUnavailable(text)
    return GitRefused(Refusal.OTHER, text)


def _tidy(stderr: str) -> str:
    lines = [line.strip() for line in stderr.replace("\r", "\n").splitlines()]
    return "\n".join(line for line in lines if line)[-2000:] or "git failed without a word"


class HostGit:
    """Runs host git. The token is handed to git's askpass in a memory file, for the configured address only."""

    def __init__(self, *, forge_url: str, login: str, token: Secret, ca_file: Path | None, askpass: Path) -> None:
        """`askpass` is where the script (mode 0500, no secret in it) is written."""
        parts = urlsplit(forge_url.rstrip("/"))
        self._base = forge_url.rstrip("/")
        self._token = token
        host = parts.netloc.rpartition("@")[2]
        self._prompts = {
            "DISPATCH_USERNAME_PROMPT": f"Username for '{parts.scheme}://{host}': ",
            "DISPATCH_PASSWORD_PROMPT": f"Password for '{parts.scheme}://{quote(login, safe='')}@{host}': ",
            "DISPATCH_LOGIN": login,
        }
        self._askpass = askpass
        self._git = shutil.which("git", path=_PATH) or "/usr/bin/git"
        config = dict(_CONFIG)
        if ca_file is not None:
            config["http.sslCAInfo"] = str(ca_file)
        self._environment = {
            "PATH": _PATH,
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_SYSTEM": "/dev/null",
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_LITERAL_PATHSPECS": "1",
            "GIT_LFS_SKIP_SMUDGE": "1",
            "GIT_TRACE_REDACT": "1",
            "GIT_ALLOW_PROTOCOL": "https:http" if parts.scheme == "http" else "https",
            "GIT_CONFIG_COUNT": str(len(config)),
        }
        for index, (key, value) in enumerate(config.items()):
            self._environment[f"GIT_CONFIG_KEY_{index}"] = key
            self._environment[f"GIT_CONFIG_VALUE_{index}"] = value

    def url(self, repo: str) -> str:
        """The literal address of `owner/repo`, from the configuration alone."""
        if _REPOSITORY.fullmatch(repo) is None or {".", ".."} & set(repo.split("/")):
            raise GitRefused(Refusal.NOT_FOUND, f"`{repo}` is not OWNER/REPO")
        return f"{self._base}/{repo}.git"

    async def run(
        self,
        git_dir: Path,
        *arguments: str,
        stdin: bytes | int | None = None,
        extra: Mapping[str, str] | None = None,
        max_output: int = MAX_OUTPUT,
        timeout: float = LOCAL_SECONDS,
        prefix: tuple[str, ...] = (),
    ) -> GitOutput:
        """Local git on `git_dir`; never touches the network. `stdin` is data or a descriptor. Raises GitFailed when it takes too long or is killed."""
        environment = {**self._environment, "GIT_DIR": str(git_dir), "GIT_ALLOW_PROTOCOL": "none", **(extra or {})}
        try:
            return await _run([*prefix, self._git, *arguments], environment, stdin, max_output, timeout, ())
        except TimeoutError:
            raise GitFailed(f"git {arguments[0]} took longer than {timeout:.0f} s") from None

    async def ok(self, git_dir: Path, *arguments: str, stdin: bytes | None = None, extra: Mapping[str, str] | None = None) -> str:
        """Local git that must succeed; stdout without the last newline. Raises GitFailed with git's words."""
        result = await self.run(git_dir, *arguments, stdin=stdin, extra=extra)
        if result.code or result.cut:
            raise GitFailed(f"git {arguments[0]}: {_tidy(result.err)}")
        return result.out.decode("utf-8", "surrogateescape").rstrip("\n")

    async def network(self, git_dir: Path, *arguments: str, timeout: float = NETWORK_SECONDS) -> GitOutput:
        """Git that speaks to the forge, with the token within reach of askpass. Raises GitUnavailable when it takes too long, GitKilled when it is killed."""
        self._write_askpass()
        token = memory_file("token", self._token.reveal().encode() + b"\n")
        try:
            environment = {
                **self._environment,
                **self._prompts,
                "GIT_DIR": str(git_dir),
                "GIT_ASKPASS": str(self._askpass),
                "DISPATCH_TOKEN_FD": str(token),
            }
            return await _run([self._git, *arguments], environment, None, MAX_OUTPUT, timeout, (token,))
        except TimeoutError:
            raise GitUnavailable(f"git {arguments[0]} took longer than {timeout:.0f} s") from None
        finally:
            os.close(token)

    def _write_askpass(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._askpass.stat().st_mode & 0o777 == 0o500 and self._askpass.read_text() == _ASKPASS:  # noqa: PLR2004
                return
        temporary = self._askpass.with_name(f"{self._askpass.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o500)
        with os.fdopen(fd, "w") as file:
            file.write(_ASKPASS)
        temporary.replace(self._askpass)


async def _run(
    argv: list[str], environment: Mapping[str, str], stdin: bytes | int | None, max_output: int, timeout: float, pass_fds: tuple[int, ...]
) -> GitOutput:
    """One process of ours; dead with its group on every way out."""
    too_much = asyncio.Event()
    out = bytearray()

    def take(data: bytes) -> None:
        if len(out) <= max_output:
            out.extend(data[: max_output + 1 - len(out)])
        if len(out) > max_output:
            too_much.set()

    err = Output(keep=_STDERR_KEPT, limit=1 << 62, on_limit=lambda: None)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    out_read, out_write = pipe()
    err_read, err_write = pipe()
    in_read, in_write = pipe() if isinstance(stdin, bytes) else (stdin if stdin is not None else null, -1)
    try:
        child = Child(argv, env=environment, stdin=in_read, stdout=out_write, stderr=err_write, pass_fds=pass_fds)
    except OSError as error:
        for fd in (out_read, err_read, in_write):
            if fd >= 0:
                os.close(fd)
        raise GitFailed(f"{argv[0]} cannot be started: {error}") from error
    finally:
        for fd in {null, out_write, err_write, *((in_read,) if in_write >= 0 else ())}:
            os.close(fd)
    readers = (PipeReader(out_read, take), PipeReader(err_read, err.feed))
    writer = PipeWriter(in_write, stdin) if isinstance(stdin, bytes) else None
    waits = [asyncio.ensure_future(event.wait()) for event in (child.ended, too_much)]
    try:
        async with asyncio.timeout(timeout):
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        child.kill()
        code = child.reap()
        if writer is not None:
            writer.close()
        for reader in readers:
            reader.close(drain=max_output)
    cut = len(out) > max_output
    if code < 0 and not cut:
        raise GitKilled(f"git was ended by signal {-code}")
    return GitOutput(code, bytes(out[:max_output]), err.text(), cut=cut)
