"""The folders of a sprint: a bare repository only the host opens, a clone only the agent opens, and one checked tree on its way between them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bot.redaction import Secret
from bot.sandbox.contract import Bind, CommandResult, Sandbox, SandboxUnavailable
from bot.sandbox.limits import PRLIMIT, measure
from bot.workspace import policy
from bot.workspace.errors import GitFailed, GitKilled, GitRefused, GitUnavailable, Refusal, TreeRefused
from bot.workspace.hostgit import MAX_OUTPUT, GitOutput, HostGit, branch_ref, classify, sha
from bot.workspace.policy import Change, Policy, Violation
from bot.workspace.secrets_scan import scan_known, scan_patch

MAX_PACK = 64 * 1024**2
MAX_PATCH = 64 * 1024**2
MAX_LISTING = 32 * 1024**2
BASE_FILES = 64
FULL_BYTES = 1024**2
FULL_FILES = 16
VANISHED = "couldn't find remote ref"
EXPORT_SECONDS = 60.0
CLONE_SECONDS = 300.0
CLEAR_SECONDS = 300.0
PUSH_SECONDS = 300.0
_INDEX_PACK_LIMITS = (PRLIMIT, "--as=4294967296", "--cpu=60", "--fsize=1073741824", "--")
_SPRINT = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_NO_OBJECTS = ("0" * 40, "0" * 64)

# What `git init` makes without a template: bash does it in no time, and one process less is a tenth of a clone.
_INIT = r"""
init() {
    local version=0 extension=
    [ "$format" = sha1 ] || { version=1; extension="[extensions]
	objectFormat = $format"; }
    mkdir -p "$1/objects/info" "$1/objects/pack" "$1/refs/heads"
    printf 'ref: refs/heads/main\n' > "$1/HEAD"
    printf '[core]\n\trepositoryformatversion = %s\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = true\n%s\n' "$version" "$extension" > "$1/config"
    printf '%s/objects\n' "$repo" > "$1/objects/info/alternates"
}
"""
# What `git clone --shared --no-tags --single-branch` makes, in a fraction of its time: nothing has to be sent where all objects are borrowed.
_CLONE = (
    _INIT
    + r"""
set -eu
quote() { local text=${2//\\/\\\\}; printf -v "$1" '"%s"' "${text//\"/\\\"}"; }
init .git
quote url "$repo"
quote refs "+refs/heads/$branch:refs/remotes/origin/$branch"
quote name "$branch"
quote head "refs/heads/$branch"
{
    printf '[remote "origin"]\n\turl = %s\n\ttagOpt = --no-tags\n\tfetch = %s\n' "$url" "$refs"
    printf '[branch %s]\n\tremote = origin\n\tmerge = %s\n' "$name" "$head"
} >> .git/config
remote=.git/refs/remotes/origin/$branch
mkdir -p "${remote%/*}"
printf '%s\n' "$sha" > "$remote"
git -c advice.detachedHead=false checkout -q -B "$branch" "$sha"
"""
)
# The agent's .git is never read here: own GIT_DIR, own index, objects borrowed from the read-only bare repository.
_EXPORT = (
    _INIT
    + r"""
set -u
umask 022
fail() { printf '%s\n' "$*" > "$out/fault"; exit 3; }
find . -path ./.git -prune -o -type d ! -perm -700 -exec chmod u+rwx {} \; -o -type f ! -perm -400 -exec chmod u+r {} + 2>/dev/null
if [ "$out" = /out ]; then scratch=/tmp/export; else scratch=$(mktemp -d) || fail "no scratch folder"; trap 'rm -rf "$scratch"' EXIT; fi
export GIT_DIR="$scratch/git" GIT_WORK_TREE="$PWD" GIT_INDEX_FILE="$scratch/index"
init "$GIT_DIR" || fail "no room for an index"
find . -mindepth 1 -maxdepth 1 -type d ! -name .git -exec find {} -mindepth 128 -print -quit \; > "$scratch/deep" 2>/dev/null &
git read-tree "$sha^{tree}" 2>"$scratch/log" || fail "$(tail -n 5 "$scratch/log")"
wait
[ ! -s "$scratch/deep" ] || fail "folders are nested deeper than 128 levels"
git -c core.fileMode=true -c core.symlinks=true -c core.autocrlf=false -c core.safecrlf=false -c core.excludesFile=/dev/null -c core.fsmonitor=false \
    -c core.protectNTFS=true -c core.protectHFS=true -c core.looseCompression=1 -c advice.addEmbeddedRepo=false \
    add -A -- . 2>"$scratch/log" || fail "$(grep -E '^(error|fatal)' "$scratch/log" | tail -n 5)"
tree=$(git write-tree 2>"$scratch/log") || fail "$(tail -n 5 "$scratch/log")"
printf '%s\n^%s^{tree}\n' "$tree" "$sha" | git pack-objects -q --revs --stdout --delta-base-offset > "$out/pack" 2>"$scratch/log" \
    || fail "$(tail -n 5 "$scratch/log")"
printf '%s\n' "$tree" > "$out/tree"
"""
)
_CLEAR = r"""
for attempt in 1 2 3; do
    find . -mindepth 1 -type d ! -perm -700 -execdir chmod 700 {} \; 2>/dev/null
    find . -mindepth 1 -maxdepth 1 -exec rm -rf -- {} + 2>/dev/null
    [ -n "$(find . -mindepth 1 -print -quit)" ] || exit 0
done
exit 1
"""


class Workspaces:
    """All sprint folders of this host, each `<root>/<sprint>/{repo.git,work,out}`.

    `root` is made with the rights the sandbox user needs (`sandbox_uid`, None when the service is not root). Every method that runs git raises GitFailed when
    this host fails, those that speak to the forge GitRefused or GitUnavailable, those that use the sandbox SandboxUnavailable.
    """

    def __init__(
        self,
        root: Path,
        *,
        sandbox: Sandbox,
        forge_url: str,
        login: str,
        token: Secret,
        ca_file: Path | None,
        sandbox_uid: int | None,
        user_name: str,
        user_email: str,
        protected: tuple[str, ...],
    ) -> None:
        self._root = root
        self._sandbox = sandbox
        self._uid = sandbox_uid
        self._protected = protected
        self._person = {
            "GIT_AUTHOR_NAME": user_name,
            "GIT_AUTHOR_EMAIL": user_email,
            "GIT_COMMITTER_NAME": user_name,
            "GIT_COMMITTER_EMAIL": user_email,
        }
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        root.chmod(0o700 if sandbox_uid is None else 0o711)
        if sandbox_uid is not None:
            _require_searchable(root, sandbox_uid)
        self._git = HostGit(forge_url=forge_url, login=login, token=token, ca_file=ca_file, askpass=root / ".askpass")
        # A commit's file never changes, and each is asked for several times in a sprint.
        self._base_files: dict[tuple[str, str, int], bytes | None] = {}
        self._base_trees: dict[str, str] = {}

    def tree_path(self, sprint_id: str) -> Path:
        """Where the agent works on the host side; shown inside as `/workspace`."""
        return self._folder(sprint_id) / "work"

    def binds(self, sprint_id: str) -> tuple[Bind, ...]:
        """What every command in this workspace needs besides it: the bare repository the clone borrows its objects from."""
        return (Bind(self._bare(sprint_id), "/repo.git"),)

    def has_tree(self, sprint_id: str) -> bool:
        """True when a clone was finished here and not removed since."""
        return (self._folder(sprint_id) / "cloned").is_file()

    def disk_free(self) -> int:
        """Bytes a service without root rights may still write where sprints live."""
        found = os.statvfs(self._root)
        return found.f_bavail * found.f_frsize

    def lacks(self) -> str:
        """What this disk has nothing left of, or ""."""
        found = os.statvfs(self._root)
        if found.f_bavail * found.f_frsize < FULL_BYTES:
            return "the disk is full"
        return "the disk takes no more files" if found.f_files and found.f_favail < FULL_FILES else ""

    async def sizes(self) -> list[tuple[str, int]]:
        """(sprint, bytes on disk) of every folder here; what hides inside an unreadable one is not counted."""
        folders = sorted(path for path in self._root.iterdir() if _SPRINT.fullmatch(path.name) and path.is_dir())
        return [(path.name, (await asyncio.to_thread(measure, path)).bytes) for path in folders]

    def folders(self) -> dict[str, int]:
        """Sprint id -> when its folder changed last (Unix ms), of every one here."""
        return {path.name: _touched_ms(path) for path in self._root.iterdir() if _SPRINT.fullmatch(path.name) and path.is_dir()}

    def patches(self) -> dict[str, int]:
        """Sprint id -> when its kept patch was written (Unix ms)."""
        return {path.stem: _touched_ms(path) for path in (self._root / ".patches").glob("*.patch") if _SPRINT.fullmatch(path.stem)}

    def forget_patch(self, sprint_id: str) -> None:
        """Deletes a kept patch; one that is gone already is no error."""
        (self._root / ".patches" / f"{self._folder(sprint_id).name}.patch").unlink(missing_ok=True)

    async def fetch(self, sprint_id: str, repo: str, branches: Sequence[str], *, object_format: str = "") -> dict[str, str]:
        """Brings those of `branches` that exist into the bare repository, which is made if missing; returns their commits. An empty repository gives {}.

        Whoever knows the repository's `object_format` ("sha1", "sha256") and has seen the branches says so: then the forge is not asked for
        its branches first, unless one is gone.
        """
        refs = {branch_ref(branch): branch for branch in branches}
        if object_format:
            fetched = await self._fetch(sprint_id, repo, list(refs), object_format)
            if not fetched.code:
                return await self._own_heads(sprint_id, refs)
            if VANISHED not in fetched.err:
                raise classify(fetched.err)
        heads = await self._heads(repo, branches)
        if not heads:
            return {}
        refs = {branch_ref(branch): branch for branch in heads}
        fetched = await self._fetch(sprint_id, repo, list(refs), _format(next(iter(heads.values()))))
        if fetched.code:
            if VANISHED in fetched.err:
                raise GitUnavailable("a branch vanished while it was fetched")
            raise classify(fetched.err)
        return await self._own_heads(sprint_id, refs)

    async def _fetch(self, sprint_id: str, repo: str, refs: Sequence[str], object_format: str) -> GitOutput:
        bare = await self._make_bare(sprint_id, object_format=object_format)
        if not self.tree_path(sprint_id).exists():
            # The clone comes next: its sandbox starts while the objects travel.
            self._sandbox.expect(self._make_owned(sprint_id, "work"), binds=self.binds(sprint_id))
        options = ("-q", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head")
        return await self._git.network(bare, "fetch", *options, self._git.url(repo), *(f"+{ref}:{ref}" for ref in refs))

    async def _own_heads(self, sprint_id: str, refs: Mapping[str, str]) -> dict[str, str]:
        bare = self._bare(sprint_id)
        return {branch: await self._own_head(bare, ref) for ref, branch in refs.items()}

    async def _own_head(self, bare: Path, ref: str) -> str:
        """Where a branch of the bare repository stands; what was fetched a moment ago lies in a file of its own."""
        with contextlib.suppress(OSError, ValueError):
            return sha((bare / ref).read_text().strip())
        return sha(await self._git.ok(bare, "rev-parse", "--verify", ref))

    async def remote_head(self, repo: str, branch: str) -> str | None:
        """The commit a branch of the forge stands at now, or None where there is no such branch."""
        return (await self._heads(repo, [branch])).get(branch)

    async def clone(self, sprint_id: str, branch_sha: str, branch: str) -> Path:
        """A fresh clone at `branch_sha` on a local branch of that name, owned by the agent; an older one is removed first.

        Raises TreeRefused when the checkout does not fit the bounds of a workspace.
        """
        branch_ref(branch)
        work = await self._make_empty(sprint_id, "work")
        result = await self._inside(
            sprint_id,
            _CLONE,
            {"branch": branch, "sha": sha(branch_sha), "format": _format(branch_sha), "repo": self._seen_repo(sprint_id)},
            timeout=CLONE_SECONDS,
        )
        if _was_killed(result):
            raise GitKilled("the sandbox was ended while the repository was checked out")
        if not result.ok:
            raise TreeRefused(f"the repository could not be checked out: {_last_words(result)}")
        (self._folder(sprint_id) / "cloned").write_text(branch_sha + "\n")
        return work

    async def read_base_file(self, sprint_id: str, base_sha: str, path: str, max_bytes: int) -> bytes | None:
        """A regular file of a commit, read on the host; None where it is missing, no regular file, or larger than `max_bytes`."""
        key = (sha(base_sha), path, max_bytes)
        if key not in self._base_files:
            if len(self._base_files) >= BASE_FILES:
                self._base_files.clear()
            self._base_files[key] = await self._read_base_file(self._bare(sprint_id), *key)
        return self._base_files[key]

    async def _base_tree(self, sprint_id: str, base_sha: str) -> str:
        if base_sha not in self._base_trees:
            if len(self._base_trees) >= BASE_FILES:
                self._base_trees.clear()
            self._base_trees[base_sha] = await self._git.ok(self._bare(sprint_id), "rev-parse", "--verify", f"{sha(base_sha)}^{{tree}}")
        return self._base_trees[base_sha]

    async def _read_base_file(self, bare: Path, base_sha: str, path: str, max_bytes: int) -> bytes | None:
        listed = await self._git.ok(bare, "ls-tree", "-z", "-l", "--full-tree", base_sha, "--", path)
        head, _, name = listed.rstrip("\0").partition("\t")
        words = head.split()
        if name != path or len(words) != 4 or words[0] not in {"100644", "100755", "100664"}:  # noqa: PLR2004  mode, type, id, size
            return None
        if int(words[3]) > max_bytes:
            return None
        read = await self._git.run(bare, "cat-file", "blob", sha(words[2]), max_output=max_bytes)
        if read.code:
            raise GitFailed(f"git cat-file: {read.err.strip()[-500:]}")
        return read.out

    async def export(self, sprint_id: str, base_sha: str) -> str:
        """Packs the agent's tree in a fresh sandbox that has no other git than its own, checks the pack, and returns the tree's id in the bare repository.

        Raises TreeRefused when the tree cannot be taken, with a reason for people.
        """
        out = await self._make_empty(sprint_id, "out")
        variables = {
            "sha": sha(base_sha),
            "format": _format(base_sha),
            "repo": self._seen_repo(sprint_id),
            "out": "/out" if self._sandbox.level != "none" else str(out),
        }
        result, _ = await asyncio.gather(
            self._inside(sprint_id, _EXPORT, variables, timeout=EXPORT_SECONDS, binds=(_out(out),)),
            self._base_tree(sprint_id, base_sha),
        )
        if _was_killed(result):
            raise GitKilled("the sandbox was ended while the tree was packed")
        if not result.ok:
            fault = await asyncio.to_thread(_read_regular, out, "fault", 4096)
            words = fault.decode("utf-8", "replace").strip() if fault else _last_words(result)
            raise TreeRefused(f"the tree could not be packed: {words}")
        return await self.receive(sprint_id, base_sha)

    def expect_export(self, sprint_id: str) -> None:
        """Says that `export` comes soon, so that its sandbox starts now."""
        out = self._folder(sprint_id) / "out"
        if self.has_tree(sprint_id) and not out.exists():
            self._sandbox.expect(self.tree_path(sprint_id), binds=(*self.binds(sprint_id), _out(self._make_owned(sprint_id, "out"))))

    async def receive(self, sprint_id: str, base_sha: str) -> str:
        """Takes `out/tree` and `out/pack`, whoever wrote them, into the bare repository; nothing is believed."""
        out = self._folder(sprint_id) / "out"
        bare = self._bare(sprint_id)
        named = await asyncio.to_thread(_read_regular, out, "tree", 128)
        try:
            tree = sha((named or b"").decode("ascii").strip())
        except ValueError:
            raise TreeRefused("the export names no tree") from None
        if len(tree) != len(base_sha):
            raise TreeRefused("the export names a tree of another object format")
        if tree == await self._base_tree(sprint_id, base_sha):
            return tree
        pack = _open_regular(out, "pack", MAX_PACK)
        try:
            arguments = ["index-pack", "--stdin", "--strict", "--fix-thin", f"--max-input-size={MAX_PACK}"]
            try:
                taken = await self._git.run(bare, *arguments, stdin=pack, prefix=_INDEX_PACK_LIMITS)
            except GitFailed as error:
                raise TreeRefused(f"the exported pack is refused: {error}") from error
        finally:
            os.close(pack)
        if taken.code:
            await asyncio.to_thread(_drop_leftovers, bare)
            raise TreeRefused(f"the exported pack is refused: {taken.err.strip()[-500:] or f'git ended with {taken.code}'}")
        # a few kilobytes of pack can name more paths than there is memory: git diff collects them all before it prints the first
        kind, listed = await asyncio.gather(
            self._git.run(bare, "cat-file", "-t", tree),
            self._git.run(bare, "ls-tree", "-r", "-z", "--name-only", tree, max_output=MAX_LISTING),
        )
        if kind.code or kind.out.strip() != b"tree":
            raise TreeRefused("the export does not hold the tree it names")
        if listed.cut or listed.code:
            raise TreeRefused("the exported tree names more files than can be looked at")
        return tree

    async def changes(self, sprint_id: str, base_sha: str, tree: str) -> list[Change]:
        """Every path that differs between the base commit and the tree, in git's order; the list is cut at 8 MiB."""
        bare = self._bare(sprint_id)
        pair = (f"{sha(base_sha)}^{{tree}}", sha(tree))
        options = ("-r", "-z", "--no-renames", "--no-ext-diff", "--no-textconv", "--raw", "--full-index")
        raw = await self._git.run(bare, "diff-tree", *options, *pair)
        if raw.code and not raw.cut:
            raise GitFailed(f"git diff-tree: {raw.err.strip()[-500:]}")
        words = raw.out.split(b"\0")
        if raw.cut:
            words = words[: (len(words) - 1) // 2 * 2]
        records = [
            (*meta.decode("ascii").lstrip(":").split(" "), os.fsdecode(path)) for meta, path in zip(words[::2], words[1::2], strict=False)
        ]
        blobs = {record[3] for record in records if record[1] not in {"000000", "160000"}}
        sizes = await self._sizes(bare, blobs)
        return [Change(path, old, new, status[:1], sizes.get(blob, 0)) for old, new, _, blob, status, path in records]

    async def patch(self, sprint_id: str, base_sha: str, tree: str, max_bytes: int) -> str:
        """The change as a unified diff, cut at `max_bytes` with a last line that says so."""
        found = await self._diff(sprint_id, base_sha, tree, max_bytes=max_bytes)
        text = found.out.decode("utf-8", "replace")
        return f"{text}\n[... cut at {max_bytes} bytes ...]\n" if found.cut else text

    async def vet(
        self,
        sprint_id: str,
        base_sha: str,
        tree: str,
        *,
        extra_protected: Sequence[str],
        allow_protected: bool,
        scrub: Callable[[str], str] | None = None,
        changes: Sequence[Change] | None = None,
    ) -> Policy:
        """The policy on the tree: paths (built-in and configured), modes, links, sizes, number of files, credentials.

        `scrub` takes our own secrets out of a text: what it would change may not leave. `changes` is what the method of that name gave for this tree.
        """
        if changes is None:
            changes = await self.changes(sprint_id, base_sha, tree)
        bare = self._bare(sprint_id)
        links: dict[str, str] = {}
        for change in [change for change in changes if change.new_mode == "120000"][: policy.MAX_FILES]:
            if change.size <= 4096:  # noqa: PLR2004  PATH_MAX; a longer one stays empty and is refused
                target = await self._git.run(bare, "cat-file", "blob", f"{sha(tree)}:{change.path}", max_output=4096)
                links[change.path] = os.fsdecode(target.out) if not target.code else ""
        verdict = policy.judge(changes, links=links, protected=(*self._protected, *extra_protected), allow_protected=allow_protected)
        if len(changes) > policy.MAX_FILES or sum(change.size for change in changes) > MAX_PATCH:
            if not any(violation.rule in {"size", "files"} for violation in verdict.violations):
                verdict.violations.append(Violation("size", "", f"the change is larger than {MAX_PATCH} bytes"))
            return verdict
        diff = await self._diff(sprint_id, base_sha, tree, "-U0", "--text", max_bytes=2 * MAX_PATCH)
        if diff.cut:
            verdict.violations.append(Violation("size", "", "the change is too large to be searched for credentials"))
        hits = await asyncio.to_thread(scan_patch, diff.out)
        if scrub is not None:
            hits += await asyncio.to_thread(scan_known, diff.out, scrub)
            verdict.violations.extend(
                Violation("secret", policy.printable(scrub(change.path)), "the name holds a secret of this service")
                for change in changes
                if scrub(change.path) != change.path
            )
        for hit in hits:
            verdict.violations.append(Violation("secret", policy.printable(hit.path), f"line {hit.line} looks like a {hit.kind}"))
        return verdict

    async def keep_patch(
        self, sprint_id: str, base_sha: str, tree: str, *, max_bytes: int = MAX_OUTPUT, scrub: Callable[[str], str] | None = None
    ) -> Path:
        """Stores the diff of a refused tree beside the sprint (mode 0600), where `remove` does not reach it; returns the file."""
        text = await self.patch(sprint_id, base_sha, tree, max_bytes)
        text = await asyncio.to_thread(scrub, text) if scrub is not None else text
        folder = self._root / ".patches"
        folder.mkdir(mode=0o700, exist_ok=True)
        file = folder / f"{self._folder(sprint_id).name}.patch"
        temporary = file.with_suffix(".tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
        return temporary.replace(file)

    def kept_patch(self, sprint_id: str) -> str | None:
        """The diff kept for a refused sprint, or None."""
        file = self._root / ".patches" / f"{self._folder(sprint_id).name}.patch"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    async def commit(self, sprint_id: str, tree: str, parent: str, message: str, *, at_ms: int) -> str:
        """The commit of that tree, by us; the same inputs give the same id, so that a repeated step finds its own work."""
        date = f"@{at_ms // 1000} +0000"
        identity = {**self._person, "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        text = message.replace("\0", "").rstrip() + "\n"
        made = await self._git.ok(
            self._bare(sprint_id),
            "commit-tree",
            sha(tree),
            "-p",
            sha(parent),
            "-F",
            "-",
            stdin=text.encode("utf-8", "replace"),
            extra=identity,
        )
        return sha(made)

    async def push(self, sprint_id: str, repo: str, commit_sha: str, branch: str, *, lease: str | None) -> None:
        """Puts the commit on the branch if the branch still stands at `lease` (None: does not exist yet). Being there already is success.

        Raises GitRefused (`lease`: somebody else moved the branch) or GitUnavailable (then the push may still have arrived: ask `remote_head`).
        """
        ref = branch_ref(branch)
        pushed = await self._git.network(
            self._bare(sprint_id),
            "push",
            "-q",
            "--no-verify",
            "--no-follow-tags",
            f"--force-with-lease={ref}:{sha(lease) if lease else ''}",
            self._git.url(repo),
            f"{sha(commit_sha)}:{ref}",
            timeout=PUSH_SECONDS,
        )
        if not pushed.code:
            return
        fault = classify(pushed.err)
        if isinstance(fault, GitRefused) and fault.kind is not Refusal.OTHER:
            raise fault
        head = await self.remote_head(repo, branch)
        if head == commit_sha:
            return
        if head != lease:
            raise GitRefused(Refusal.LEASE, f"`{branch}` was moved by somebody else: it stands at {head or 'nothing'}")
        raise fault

    async def remove(self, sprint_id: str) -> None:
        """Removes everything of a sprint but a kept patch; what the agent left is deleted by the sandbox, never by us."""
        folder = self._folder(sprint_id)
        if not folder.exists():
            return
        await asyncio.gather(*(self._clear(sprint_id, name) for name in ("work", "out")))
        await asyncio.to_thread(shutil.rmtree, folder)

    def _folder(self, sprint_id: str) -> Path:
        if _SPRINT.fullmatch(sprint_id) is None:
            raise ValueError(f"{sprint_id!r} is not a sprint id")
        return self._root / sprint_id

    def _bare(self, sprint_id: str) -> Path:
        return self._folder(sprint_id) / "repo.git"

    def _seen_repo(self, sprint_id: str) -> str:
        return "/repo.git" if self._sandbox.level != "none" else str(self._bare(sprint_id))

    def _make_folder(self, sprint_id: str) -> Path:
        folder = self._folder(sprint_id)
        folder.mkdir(exist_ok=True)
        folder.chmod(0o700 if self._uid is None else 0o711)
        return folder

    def _make_owned(self, sprint_id: str, name: str) -> Path:
        path = self._make_folder(sprint_id) / name
        path.mkdir(mode=0o700, exist_ok=True)
        if self._uid is not None:
            os.chown(path, self._uid, self._uid, follow_symlinks=False)
        return path

    async def _make_empty(self, sprint_id: str, name: str) -> Path:
        """An empty folder of the agent, with its first rights."""
        path = self._folder(sprint_id) / name
        if not await asyncio.to_thread(_holds_nothing, path):
            await self._clear(sprint_id, name)
        self._make_owned(sprint_id, name)
        path.chmod(0o700)
        return path

    async def _make_bare(self, sprint_id: str, *, object_format: str) -> Path:
        bare = self._make_folder(sprint_id) / "repo.git"
        if (bare / "HEAD").is_file():
            await asyncio.to_thread(_drop_leftovers, bare)
            return bare
        pattern = self._root / f".bare-{object_format}.git"
        if not (pattern / "HEAD").is_file():
            scratch = Path(tempfile.mkdtemp(prefix=".bare-", dir=self._root))
            share = "0600" if self._uid is None else "0640"
            self._share(scratch)
            await self._git.ok(scratch, "init", "-q", "--bare", "--template=", f"--shared={share}", f"--object-format={object_format}")
            _take_place(scratch, pattern)
        scratch = Path(tempfile.mkdtemp(prefix=".repo-", dir=bare.parent))
        self._share(scratch)
        await asyncio.to_thread(shutil.copytree, pattern, scratch, dirs_exist_ok=True)
        await asyncio.to_thread(shutil.rmtree, bare, ignore_errors=True)
        scratch.rename(bare)
        return bare

    def _share(self, folder: Path) -> None:
        """A folder whose content the sandbox's user may read: what is made in it belongs to his group."""
        if self._uid is not None:
            os.chown(folder, -1, self._uid, follow_symlinks=False)
            folder.chmod(0o2750)

    async def _heads(self, repo: str, branches: Sequence[str]) -> dict[str, str]:
        empty = self._root / ".empty.git"
        if not (empty / "HEAD").is_file():
            scratch = Path(tempfile.mkdtemp(prefix=".empty-", dir=self._root))
            await self._git.ok(scratch, "init", "-q", "--bare", "--template=")
            _take_place(scratch, empty)
        refs = {branch_ref(branch): branch for branch in branches}
        listed = await self._git.network(empty, "ls-remote", "--refs", self._git.url(repo), *refs, timeout=60)
        if listed.code:
            raise classify(listed.err)
        found: dict[str, str] = {}
        for line in listed.out.decode("utf-8", "surrogateescape").splitlines():
            object_id, _, ref = line.partition("\t")
            if ref in refs and object_id not in _NO_OBJECTS:
                found[refs[ref]] = sha(object_id)
        return {branch: found[branch] for branch in branches if branch in found}

    async def _sizes(self, bare: Path, blobs: set[str]) -> dict[str, int]:
        if not blobs:
            return {}
        listed = await self._git.ok(
            bare,
            "cat-file",
            "--batch-check=%(objectname) %(objectsize)",
            stdin="".join(f"{sha(blob)}\n" for blob in sorted(blobs)).encode(),
        )
        pairs = (line.split(" ") for line in listed.splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}  # noqa: PLR2004  id and size; else "missing"

    async def _diff(self, sprint_id: str, base_sha: str, tree: str, *options: str, max_bytes: int) -> GitOutput:
        found = await self._git.run(
            self._bare(sprint_id),
            "diff-tree",
            "-r",
            "-p",
            "--no-renames",
            "--no-color",
            "--no-ext-diff",
            "--no-textconv",
            "--full-index",
            *options,
            f"{sha(base_sha)}^{{tree}}",
            sha(tree),
            max_output=max_bytes,
        )
        if found.code and not found.cut:
            raise GitFailed(f"git diff-tree: {found.err.strip()[-500:]}")
        return found

    async def _inside(
        self, sprint_id: str, script: str, variables: dict[str, str], *, timeout: float, binds: Sequence[Bind] = ()
    ) -> CommandResult:
        head = "\n".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        return await self._sandbox.run(
            f"{head}\n{script}", workspace=self.tree_path(sprint_id), timeout=timeout, binds=(*self.binds(sprint_id), *binds)
        )

    async def _clear(self, sprint_id: str, name: str) -> None:
        """Empties and removes a folder the agent could write to; its own user deletes, whatever modes and depths it left."""
        folder = self._folder(sprint_id)
        path = folder / name
        if name == "work":
            self._sandbox.dismiss(path)
            (folder / "cloned").unlink(missing_ok=True)
        if not path.exists():
            return
        result = await self._sandbox.run(_CLEAR, workspace=path, timeout=CLEAR_SECONDS, watch=False)
        if not result.ok:
            raise GitFailed(f"{path} could not be emptied: {_last_words(result)}")
        path.rmdir()


def _touched_ms(path: Path) -> int:
    return int(path.stat(follow_symlinks=False).st_mtime * 1000)


def _holds_nothing(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _out(folder: Path) -> Bind:
    return Bind(folder, "/out", writable=True)


def _format(object_id: str) -> str:
    return "sha256" if len(object_id) == 64 else "sha1"  # noqa: PLR2004  hex digits


def _drop_leftovers(bare: Path) -> None:
    """What a git killed in the middle leaves: locks would refuse the next fetch for ever. One process works on a sprint at a time, so none is in use."""
    for pattern in ("*.lock", "tmp_*"):
        for leftover in bare.rglob(pattern):
            leftover.unlink(missing_ok=True)


def _take_place(scratch: Path, final: Path) -> None:
    """Renames a finished folder; where another worker was first, its folder is as good and ours goes."""
    try:
        scratch.rename(final)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)


def _was_killed(result: CommandResult) -> bool:
    """Whether somebody else ended it (the kernel for want of memory, an operator): nothing is said about the tree then."""
    return not result.killed and not result.timed_out and result.exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL)


def _last_words(result: CommandResult) -> str:
    if result.timed_out:
        return "it took too long"
    return result.output.strip()[-1000:] or f"it ended with {result.exit_code}"


def _open_regular(folder: Path, name: str, max_bytes: int) -> int:
    """Opens a file a stranger wrote: no link, no pipe, one name, not too large. Raises TreeRefused."""
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise TreeRefused(f"the export is missing: {error.strerror}") from error
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        raise TreeRefused(f"`{name}` of the export cannot be used: {error.strerror}") from error
    finally:
        os.close(directory)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_size > max_bytes:
        os.close(fd)
        raise TreeRefused(f"`{name}` of the export is no regular file, has several names, or is larger than {max_bytes} bytes")
    return fd


def _read_regular(folder: Path, name: str, max_bytes: int) -> bytes | None:
    try:
        fd = _open_regular(folder, name, max_bytes)
    except TreeRefused:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(max_bytes)


def _require_searchable(root: Path, uid: int) -> None:
    """Every folder above a bind source must let the sandbox user through."""
    for folder in (root, *root.resolve().parents):
        found = folder.stat()
        bit = 0o100 if found.st_uid == uid else 0o010 if found.st_gid == uid else 0o001
        if not found.st_mode & bit:
            raise SandboxUnavailable(
                f"the sandbox user {uid} cannot pass through {folder} (mode {stat.S_IMODE(found.st_mode):04o})",
                f"Keep the state folder under /var/lib/timmy-dispatch, or run `chmod o+x {folder}`.",
            )
