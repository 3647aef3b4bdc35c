"""From a branch of the forge to a commit on another one, with the agent's clone never opened by the host's git."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from bot.config import SandboxSettings
from bot.sandbox import build
from bot.workspace import GitRefused, GitUnavailable, TreeRefused
from tests.sandbox_support import TOKEN, GitServer, git, require_sandbox, state_folder, workspaces

REPO = "acme/rocket"
FILES = {"README.md": "# rocket\n", "src/main.sh": "echo 1\n", "AGENTS.md": "be kind\n"}


class House:
    """Everything one flow needs, with the sprint `s1` prepared."""

    def __init__(self, base: Path, sandbox, server: GitServer, ws) -> None:
        self.base, self.sandbox, self.server, self.ws = base, sandbox, server, ws
        self.base_sha = ""

    async def prepare(self, branch: str = "main") -> None:
        self.base_sha = (await self.ws.fetch("s1", REPO, [branch]))[branch]
        await self.ws.clone("s1", self.base_sha, branch)

    async def sh(self, command: str, **more):
        return await self.sandbox.run(command, workspace=self.ws.tree_path("s1"), binds=self.ws.binds("s1"), **more)

    async def vet(self, **more):
        tree = await self.ws.export("s1", self.base_sha)
        return await self.ws.vet("s1", self.base_sha, tree, **{"extra_protected": (), "allow_protected": False, **more})


@pytest.fixture(params=[pytest.param("bubblewrap", marks=pytest.mark.sandbox), "none"])
async def house(request):
    if request.param == "bubblewrap":
        require_sandbox()
    with state_folder() as base:
        server = GitServer(base / "server")
        server.create(REPO, FILES)
        await server.start()
        sandbox = build(SandboxSettings(kind=request.param), state_dir=base)
        found = House(base, sandbox, server, workspaces(base, sandbox, server))
        yield found
        await sandbox.close()
        await server.stop()


async def test_flow(house):
    await house.prepare()
    assert house.ws.has_tree("s1")
    done = await house.sh(
        "git status --short; git log --oneline | wc -l; cat src/main.sh; git rev-parse --abbrev-ref HEAD; git commit -qam x --allow-empty"
    )
    assert done.exit_code == 0, done.output
    assert done.output == "1\necho 1\nmain\n"
    assert (await house.sh("echo two > src/two.sh; chmod +x src/two.sh; rm README.md; mkdir -p empty; sed -i s/1/2/ src/main.sh")).ok
    tree = await house.ws.export("s1", house.base_sha)
    changes = await house.ws.changes("s1", house.base_sha, tree)
    assert [(c.path, c.status, c.new_mode, c.size) for c in changes] == [
        ("README.md", "D", "000000", 0),
        ("src/main.sh", "M", "100644", 7),
        ("src/two.sh", "A", "100755", 4),
    ]
    policy = await house.ws.vet("s1", house.base_sha, tree, extra_protected=(), allow_protected=False)
    assert (policy.violations, policy.flagged) == ([], [])
    assert "+echo 2" in await house.ws.patch("s1", house.base_sha, tree, 10_000)
    assert (await house.ws.patch("s1", house.base_sha, tree, 40)).endswith("[... cut at 40 bytes ...]\n")
    first = await house.ws.commit("s1", tree, house.base_sha, "Change\n\nCloses #1", at_ms=1_700_000_123_456)
    await asyncio.sleep(1.1)
    assert await house.ws.commit("s1", tree, house.base_sha, "Change\n\nCloses #1", at_ms=1_700_000_123_456) == first
    assert await house.ws.remote_head(REPO, "dispatch/issue-1") is None
    await house.ws.push("s1", REPO, first, "dispatch/issue-1", lease=None)
    assert await house.ws.remote_head(REPO, "dispatch/issue-1") == first
    await house.ws.push("s1", REPO, first, "dispatch/issue-1", lease=None)
    shown = git("log", "-1", "--format=%an <%ae> %cn %at %B", first, cwd=house.server.root / f"{REPO}.git")
    assert shown == "timmy <timmy@example.org> timmy 1700000123 Change\n\nCloses #1"
    assert git("fsck", "--strict", "--no-dangling", cwd=house.base / "sprints/s1/repo.git") == ""
    assert await house.ws.read_base_file("s1", house.base_sha, "AGENTS.md", 100) == b"be kind\n"
    assert await house.ws.read_base_file("s1", house.base_sha, "AGENTS.md", 3) is None
    assert await house.ws.read_base_file("s1", house.base_sha, "src", 100) is None
    assert await house.ws.read_base_file("s1", house.base_sha, "nothing", 100) is None
    kept = await house.ws.keep_patch("s1", house.base_sha, tree)
    assert kept.stat().st_mode & 0o777 == 0o600
    assert dict(await house.ws.sizes())["s1"] > 0
    await house.ws.remove("s1")
    assert not (house.base / "sprints/s1").exists()
    assert "+echo 2" in house.ws.kept_patch("s1")
    assert house.ws.kept_patch("s2") is None
    assert not house.ws.has_tree("s1")
    await house.ws.remove("s1")


async def test_follow_up_builds_on_the_branch_head(house):
    head = house.server.commit(REPO, {"more.txt": "by a person\n"}, branch="dispatch/issue-1", start="main")
    found = await house.ws.fetch("s1", REPO, ["main", "dispatch/issue-1", "missing"])
    assert found == {"main": await house.ws.remote_head(REPO, "main"), "dispatch/issue-1": head}
    await house.ws.clone("s1", head, "dispatch/issue-1")
    house.base_sha = head
    assert (await house.sh("cat more.txt && echo agent > agent.txt")).output == "by a person\n"
    tree = await house.ws.export("s1", head)
    commit = await house.ws.commit("s1", tree, head, "more", at_ms=1_700_000_000_000)
    await house.ws.push("s1", REPO, commit, "dispatch/issue-1", lease=head)
    assert await house.ws.remote_head(REPO, "dispatch/issue-1") == commit
    # a second attempt, rebuilt on main, replaces what we recorded; what a person put there is never replaced
    main = found["main"]
    again = await house.ws.commit("s1", tree, main, "again", at_ms=1_700_000_000_000)
    await house.ws.push("s1", REPO, again, "dispatch/issue-1", lease=commit)
    theirs = house.server.commit(REPO, {"x": "y"}, branch="dispatch/issue-1", start="origin/dispatch/issue-1")
    for lease in (commit, again, None):
        with pytest.raises(GitRefused) as refused:
            await house.ws.push("s1", REPO, commit, "dispatch/issue-1", lease=lease)
        assert refused.value.kind == "lease"
    assert await house.ws.remote_head(REPO, "dispatch/issue-1") == theirs


async def test_empty_repository_and_fresh_clone(house):
    house.server.create("acme/void")
    assert await house.ws.fetch("s2", "acme/void", ["main"]) == {}
    await house.prepare()
    # what a git killed in the middle of a fetch leaves
    for name in ("refs/heads/main.lock", "config.lock", "packed-refs.lock", "objects/pack/tmp_pack_x"):
        (house.base / "sprints/s1/repo.git" / name).write_text("")
    assert await house.ws.fetch("s1", REPO, ["main"]) == {"main": house.base_sha}
    await house.sh("echo rubbish > left; mkdir -p d; chmod 000 d")
    await house.ws.clone("s1", house.base_sha, "main")
    assert (await house.sh("ls")).output.split() == ["AGENTS.md", "README.md", "src"]
    assert (await house.ws.changes("s1", house.base_sha, await house.ws.export("s1", house.base_sha))) == []
    assert [v.rule for v in (await house.vet()).violations] == ["empty"]


async def test_sha256_repository(house):
    house.server.create("acme/wide", {"a": "b\n"}, object_format="sha256")
    base = (await house.ws.fetch("s3", "acme/wide", ["main"]))["main"]
    assert len(base) == 64
    await house.ws.clone("s3", base, "main")
    await house.sandbox.run("echo c > a", workspace=house.ws.tree_path("s3"))
    tree = await house.ws.export("s3", base)
    commit = await house.ws.commit("s3", tree, base, "m", at_ms=0)
    await house.ws.push("s3", "acme/wide", commit, "dispatch/issue-1", lease=None)
    assert await house.ws.remote_head("acme/wide", "dispatch/issue-1") == commit


async def test_hostile_trees_have_a_clear_result(house):
    await house.prepare()
    await house.sh(
        "rm -rf .git; mkfifo .git; mkfifo pipe; echo s > src/sealed; chmod 000 src/sealed; mkdir src/shut; echo in > src/shut/f; chmod 000 src/shut;"
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'; mkdir hollow"
    )
    tree = await house.ws.export("s1", house.base_sha)
    assert [c.path for c in await house.ws.changes("s1", house.base_sha, tree)] == ["src/sealed", "src/shut/f"]
    await house.sh("rm -f .git; git init -q nested; cd nested; echo x > x; git add x; git commit -qm x")
    violations = (await house.vet()).violations
    assert [(v.rule, v.path) for v in violations] == [("submodule", "nested")]
    await house.sh("rm -rf nested/.git; git init -q nested")
    with pytest.raises(TreeRefused, match="nested"):
        await house.vet()
    await house.sh("rm -rf nested; mkdir -p nested/.GIT; echo x > nested/.GIT/config")
    with pytest.raises(TreeRefused, match="GIT"):
        await house.vet()
    await house.sh("rm -rf nested; d=; for i in $(seq 150); do mkdir -p dd; cd dd; done; echo deep > deep")
    with pytest.raises(TreeRefused, match="deeper"):
        await house.vet()
    await house.ws.clone("s1", house.base_sha, "main")
    await house.sh(
        'python3 -c \'import os\nfor i in range(1500): os.mkdir("n" * 20); os.chdir("n" * 20)\'; mkdir z; chmod 000 z; chmod 300 n*',
        watch=False,
    )
    with pytest.raises(TreeRefused, match=r"deeper|cannot be measured"):
        await house.vet()
    await house.ws.remove("s1")
    assert not (house.base / "sprints/s1").exists()


@pytest.mark.parametrize("house", [pytest.param("bubblewrap", marks=pytest.mark.sandbox)], indirect=True)
async def test_sparse_file_is_refused_by_size(house):
    await house.prepare()
    file = house.ws.tree_path("s1") / "sparse"
    with file.open("wb") as stream:
        stream.truncate(300 * 1024**2)
    if house.sandbox.owner is not None:
        os.chown(file, house.sandbox.owner, house.sandbox.owner)
    violations = (await house.vet()).violations
    assert [(v.rule, v.path) for v in violations] == [("size", "sparse")]


async def test_protected_paths_come_from_the_settings_alone(house):
    house.server.commit(REPO, {".dispatch.yml": "protected_paths: [other/]\n"})
    await house.prepare()
    # what a tree says of itself is not read: emptying the list releases nothing and is itself refused
    await house.sh(
        "mkdir theirs mine .GitHub; for f in theirs/x mine/x .GitHub/x; do echo x > $f; done; echo 'protected_paths: []' > .dispatch.yml"
    )
    paths = {"theirs/x", "mine/x", ".GitHub/x", ".dispatch.yml"}
    policy = await house.vet(extra_protected=("mine/", "theirs/"))
    assert {(v.rule, v.path) for v in policy.violations} == {("protected", path) for path in paths}
    policy = await house.vet(extra_protected=("mine/", "theirs/"), allow_protected=True)
    assert (policy.violations, set(policy.flagged)) == ([], paths)


async def test_deletion_links_names_and_secrets(house):
    house.server.commit(REPO, {".gitea/workflows/ci.yml": "on: push\n"})
    await house.prepare()
    await house.sh(
        "git rm -rq .gitea; ln -s /etc/passwd absolute; ln -s ../../x src/out; ln -s main.sh src/inside; ln -s ../README.md src/up; ln -s x/../../y cunning;"
        "printf 'ok\\n++ b/other\\nkey = \"AKIAABCDEFGHIJKLMNOP\"\\n' > conf; echo x > $'bad\\nname'; echo >> AGENTS.md; printf '\\0\\0ghp_0123456789012345678901234567890123456789\\n' > bin"
    )
    policy = await house.vet()
    assert sorted((v.rule, v.path) for v in policy.violations) == [
        ("name", "bad\\nname"),
        ("protected", ".gitea/workflows/ci.yml"),
        ("secret", "bin"),
        ("secret", "conf"),
        ("symlink", "absolute"),
        ("symlink", "cunning"),
        ("symlink", "src/out"),
    ]
    assert next(v for v in policy.violations if v.path == "conf").detail == "line 3 looks like a AWS key"
    assert "AKIA" not in repr(policy)
    assert policy.flagged == ["AGENTS.md"]


async def test_too_many_files(house):
    await house.prepare()
    await house.sh("mkdir many; for i in $(seq 501); do echo $i > many/$i; done")
    assert [v.rule for v in (await house.vet()).violations] == ["files"]


async def test_faults_of_the_forge_are_told_apart(house):
    await house.prepare()
    tree = await house.ws.export("s1", house.base_sha)
    commit = await house.ws.commit("s1", tree, house.base_sha, "m", at_ms=1)

    async def refusal(awaitable):
        with pytest.raises((GitRefused, GitUnavailable)) as seen:
            await awaitable
        assert TOKEN not in str(seen.value)
        return getattr(seen.value, "kind", "unavailable")

    assert await refusal(house.ws.fetch("s4", "acme/missing", ["main"])) == "not_found"
    assert await refusal(house.ws.fetch("s4", "acme/../etc", ["main"])) == "not_found"
    assert await refusal(house.ws.fetch("s4", REPO, ["--upload-pack=x"])) == "other"
    wrong = workspaces(house.base, house.sandbox, house.server, token="0" * 40)
    assert await refusal(wrong.fetch("s4", REPO, ["main"])) == "auth"
    from aiohttp import web

    for status, kind in ((403, "permission"), (502, "unavailable"), (429, "unavailable"), (301, "moved")):
        house.server.answer = web.Response(status=status, headers={"Location": house.server.url + "/acme/new.git"} if status == 301 else {})
        assert await refusal(house.ws.fetch("s4", REPO, ["main"])) == kind, status
    house.server.answer = None
    push = lambda: house.ws.push("s1", REPO, commit, "dispatch/issue-9", lease=None)  # noqa: E731
    for text, kind in (
        ("error: Gitea: User permission denied for writing.", "permission"),
        ("error: Gitea: Not allowed to push to protected branch dispatch/issue-9", "protected"),
        ("error: repository is archived", "archived"),
        ("something new", "other"),
    ):
        house.server.hook(REPO, f"echo '{text}' >&2; exit 1")
        assert await refusal(push()) == kind
    house.server.hook(REPO, "exit 0")
    # the push arrives, its answer does not
    house.server.answer, house.server.answer_only = web.Response(status=502), "/git-receive-pack"
    assert await refusal(push()) == "unavailable"
    house.server.answer = None
    git("update-ref", "refs/heads/dispatch/issue-9", house.base_sha, cwd=house.server.root / f"{REPO}.git")
    await house.ws.push("s1", REPO, house.base_sha, "dispatch/issue-9", lease=None)
    await house.server.stop()
    assert await refusal(house.ws.fetch("s4", REPO, ["main"])) == "unavailable"
