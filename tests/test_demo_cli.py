"""`demo` as a person runs it: from any folder to a pull request, on the embedded forge, on a server beside it, and out again without a trace."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bot.demo.forge.server import ForgeServer
from bot.demo.house import knock, state_folder
from bot.gitea.aiohttp import GiteaClient
from bot.models import UserError
from bot.redaction import Secret

ROOT = Path(__file__).parent.parent
READY = "Pull request #2 is open and ready to merge."
COMMAND = [sys.executable, "-P", "-m", "bot", "demo"]


def environment(home: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}


def folder_of(out: str) -> Path:
    return Path(re.search(r"^log: (.+)$", out, re.MULTILINE)[1]).parent


def processes_with(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(line)
    return found


def assert_no_trace(out: str) -> None:
    folder = folder_of(out)
    assert not folder.exists()
    assert processes_with(str(folder)) == []


def assert_told(out: str) -> None:
    """The whole story is there, in its order."""
    at = -1
    for what in (
        "added the label dispatch",
        "queued, asked for by alice",
        "step 3: run_command sh test.sh → exit 1",
        "FAIL Hello, World!",
        "step 4: edit_file lib/slug.sh",
        "step 5: run_command sh test.sh → exit 0",
        "check `sh test.sh`, run by the bot: passed",
        "pull request #2 opened",
        "added the label dispatch/review",
        "+  printf",
        "| `sh test.sh` | ✅",
        "/slug/issues/1",
        "/slug/pulls/2",
        "/metrics",
        READY,
    ):
        found = out.find(what, at + 1)
        assert found > at, (what, out)
        at = found


def test_once_ends_with_a_pull_request_and_leaves_nothing(tmp_path):
    done = subprocess.run([*COMMAND, "--once"], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert_told(done.stdout)
    assert "👀" in done.stdout
    assert_no_trace(done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_stays_until_ctrl_c_and_ends_politely(tmp_path):
    with subprocess.Popen(COMMAND, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as demo:
        out = ""
        for line in demo.stdout:
            out += line
            if "until Ctrl-C" in line:
                break
        assert re.search(r"alice +password [0-9a-f]{24} ", out), out
        asked = time.monotonic()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(20) == 0
        assert time.monotonic() - asked < 15
    assert_no_trace(out)


def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path):
    with subprocess.Popen(COMMAND, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as demo:
        out = ""
        for line in demo.stdout:
            out += line
            if "issue read and frozen" in line:
                break
        demo.send_signal(signal.SIGINT)
        out += demo.stdout.read()
        assert demo.wait(20) == 130, out
    assert "stopping" in out
    assert READY not in out
    assert_no_trace(out)


def test_goes_on_without_a_sandbox_and_says_so_first(tmp_path):
    enter = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-Urm"]
    hide = ["sh", "-c", 'mount --bind /dev/null /usr/bin/bwrap && exec "$@"', "sh"]
    if not Path("/usr/bin/bwrap").exists():
        enter, hide = [], []
    elif not shutil.which("unshare") or subprocess.run([*enter, *hide, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let us hide bubblewrap")
    command = [*enter, *hide, *COMMAND, "--once"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NO SANDBOX" in "".join(done.stdout.splitlines(keepends=True)[:3])
    assert "sandbox: none" in done.stdout
    assert READY in done.stdout


async def run(*arguments: str, home: Path) -> tuple[int, str]:
    demo = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, cwd=home, env=environment(home), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await demo.communicate()
    return demo.returncode, out.decode()


def token_file(folder: Path, token: str) -> Path:
    path = folder / "admin.token"
    path.touch(mode=0o600)
    path.write_text(token)
    return path


async def test_on_a_server_that_cannot_deliver_it_polls_and_removes_its_cast(base, tmp_path):
    async with ForgeServer(base / "forge", allowed_hosts="external") as forge:
        await forge.create_user("boss", admin=True)
        path = token_file(tmp_path, await forge.create_token("boss", ["all"]))
        code, out = await run("--once", "--gitea", forge.url, "--admin-token-file", str(path), home=tmp_path)
        assert code == 0, out
        assert_told(out)
        assert "it asks the forge every second instead" in out
        assert "removed from" in out
        assert "password" not in out
        assert [user.login for user in forge.state.users.values()] == ["boss"]
        assert not forge.state.repos


async def test_a_cast_can_be_kept(base, tmp_path):
    async with ForgeServer(base / "forge") as forge:
        await forge.create_user("boss", admin=True)
        path = token_file(tmp_path, await forge.create_token("boss", ["all"]))
        code, out = await run("--once", "--keep-cast", "--gitea", forge.url, "--admin-token-file", str(path), home=tmp_path)
        assert code == 0, out
        assert "kept on" in out
        assert len(forge.state.users) == 5
        assert len(forge.state.repos) == 1


@pytest.mark.live
async def test_on_a_real_gitea(tmp_path):
    url, token = os.environ.get("GITEA_URL"), os.environ.get("GITEA_ADMIN_TOKEN")
    if not url or not token:
        pytest.skip("needs GITEA_URL and GITEA_ADMIN_TOKEN")
    code, out = await run("--once", "--gitea", url, "--admin-token-file", str(token_file(tmp_path, token)), home=tmp_path)
    assert code == 0, out
    assert_told(out)
    assert "removed from" in out
    assert token not in out


async def test_what_is_wrong_with_a_server_is_a_sentence(base):
    async with ForgeServer(base / "forge") as forge:
        await forge.create_user("boss", admin=True)
        await forge.create_user("carol")
        right, common = await forge.create_token("boss", ["all"]), await forge.create_token("carol", ["all"])
        for url, token, sentence in (
            (forge.url, right, ""),
            (forge.url, "0" * 40, "does not know this token"),
            (forge.url, common, "carol, who is no administrator"),
            (forge.url, await forge.create_token("boss", ["write:issue"]), "needs the scopes"),
            (f"{forge.url}/git", right, "does not answer like a Gitea"),
            ("http://127.0.0.1:9", right, "cannot be reached"),
        ):
            async with GiteaClient(url, Secret(token), jitter=lambda: 0.0) as client:
                try:
                    await knock(client, url)
                except UserError as error:
                    assert sentence, error
                    assert sentence in str(error)
                    assert token not in str(error)
                else:
                    assert not sentence


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gitea", "http://127.0.0.1:9"],
        ["--keep-cast"],
        ["--model-url", "http://127.0.0.1:9/v1"],
        ["--model-key-file", "key"],
    ],
)
def test_options_that_belong_together(arguments, tmp_path):
    done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_kept_folder_stays_and_must_be_empty(base):
    kept = base / "kept"
    with state_folder(kept) as folder:
        assert folder == kept
        (folder / "file").touch()
    assert (kept / "file").exists()
    with pytest.raises(UserError, match="not empty"), state_folder(kept):
        pass


def test_the_folder_goes_whatever_the_agent_left_in_it(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    outside.chmod(0o500)
    with state_folder(None) as folder:
        closed = folder / "state" / "work"
        closed.mkdir(parents=True)
        (closed / "file").touch()
        (closed / "link").symlink_to(outside)
        closed.chmod(0)
    assert not folder.exists()
    assert outside.stat().st_mode & 0o777 == 0o500
