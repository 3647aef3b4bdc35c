"""The embedded forge against what real Gitea servers were recorded saying, against two OpenAPI files, and against git itself."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
import yarl
from aiohttp import web

from bot.demo.forge import ForgeServer, RefusedError
from bot.demo.forge.api import PREFIX
from bot.demo.forge.hooks import host_allowed
from bot.demo.forge.server import ROUTES

DATA = Path(__file__).parent / "data" / "gitea"
PERSONALITIES = ["1.26", "1.22"]
SCOPES = ["read:organization", "write:issue", "write:repository", "read:user"]
SECRET = "fixture-secret"


# helpers


@dataclass
class Answer:
    status: int
    body: Any
    headers: dict[str, str]
    method: str = ""
    route: str = ""


class Web:
    """A client with one token per login, and a receiver that keeps what it is sent."""

    def __init__(self, forge: ForgeServer):
        self.forge = forge
        self.tokens: dict[str, str] = {}
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answer = 200

    async def __aenter__(self):
        self.session = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/webhook", self._receive)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.hook_url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/webhook"
        return self

    async def __aexit__(self, *_):
        await self.session.close()
        await self.runner.cleanup()

    async def _receive(self, request):
        self.got.append((dict(request.headers), await request.read()))
        return web.Response(status=self.answer)

    async def ask(self, method, path, login="", data=None, *, token=None, headers=None) -> Answer:
        token = self.tokens.get(login, "") if token is None else token
        sent = {"Authorization": f"token {token}"} if token else {}
        url = self.forge.url + (path if path.startswith("/api/") else PREFIX + path)
        async with self.session.request(method, url, json=data, headers=sent | (headers or {}), allow_redirects=False) as reply:
            raw = await reply.read()
            kind = reply.headers.get("Content-Type", "")
            body = json.loads(raw) if "json" in kind and raw else (raw.decode() or None)
            return Answer(reply.status, body, dict(reply.headers), method, self.forge.requests[-1].route)

    async def deliveries(self) -> list[tuple[dict[str, str], bytes]]:
        """What has arrived since the last call."""
        await self.forge.drain()
        found, self.got = self.got, []
        return found

    async def kinds(self) -> list[str]:
        return [f"{h['X-Gitea-Event-Type']}:{json.loads(b).get('action', '')}" for h, b in await self.deliveries()]


async def cast(forge: ForgeServer, client: Web) -> None:
    """The people of the recordings: root1, alice (admin), bob (writer), mallory (stranger), timmy (the bot), and acme/rocket."""
    for login in ("root1", "alice", "bob", "mallory", "timmy"):
        await forge.create_user(login, admin=login == "root1")
        client.tokens[login] = await forge.create_token(login, SCOPES if login == "timmy" else ["all"])
    await forge.create_org("acme")
    await forge.create_repo("acme", "rocket", files={"README.md": "# rocket\n"})
    for login, level in (("timmy", "admin"), ("alice", "admin"), ("bob", "write")):
        await forge.add_collaborator("acme/rocket", login, level)
    for name, color, exclusive in (
        ("dispatch", "0e8a16", False),
        ("bug", "ee0000", False),
        ("dispatch/queued", "cccccc", True),
        ("dispatch/running", "fbca04", True),
    ):
        await forge.create_label("acme/rocket", name, color, exclusive=exclusive)


def git(cwd: Path, *args: str, token: str = "", check: bool = True) -> subprocess.CompletedProcess:
    basic = base64.b64encode(f"any:{token}".encode()).decode()
    config = ["-c", f"http.extraHeader=Authorization: Basic {basic}"] if token else []
    who = {
        f"GIT_{kind}_{what}": value
        for kind in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "timmy"), ("EMAIL", "timmy@example.org"))
    }
    env = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        **who,
    }
    done = subprocess.run(["git", *config, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(done.stderr)
    return done


async def agit(*args, **kwargs):
    return await asyncio.to_thread(git, *args, **kwargs)


def recorded(personality: str) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in sorted((DATA / f"recorded-{personality}" / "replies").glob("*.json"))}


def recorded_deliveries(personality: str) -> dict[str, tuple[dict[str, str], Any]]:
    folder = DATA / f"recorded-{personality}" / "deliveries"
    return {
        p.name.removesuffix(".body"): (json.loads(p.with_suffix(".headers.json").read_text()), json.loads(p.read_bytes()))
        for p in sorted(folder.glob("*.body"))
    }


def differences(want: Any, got: Any, at: str = "$") -> list[str]:
    """Where two values differ in keys or JSON types; null goes with everything, and lists compare the shapes of their elements."""
    if want is None or got is None:
        return []
    if type(want) is not type(got):
        return [f"{at}: {type(want).__name__} recorded, {type(got).__name__} here"]
    if isinstance(want, dict):
        lost = [f"{at}.{key}: missing" for key in want.keys() - got.keys()] + [f"{at}.{key}: too much" for key in got.keys() - want.keys()]
        return lost + [line for key in want.keys() & got.keys() for line in differences(want[key], got[key], f"{at}.{key}")]
    if isinstance(want, list) and want:
        found = []
        for i, item in enumerate(got):
            options = [differences(model, item, f"{at}[{i}]") for model in want]
            found += min(options, key=len)
        return found
    return []


# the recorded story, told once per personality


@dataclass
class Story:
    answers: dict[str, Answer] = field(default_factory=dict)
    everything: list[Answer] = field(default_factory=list)
    deliveries: dict[str, list[tuple[dict[str, str], bytes]]] = field(default_factory=dict)


async def tell(personality: str, root: Path) -> Story:
    """All that was done to the real servers, in the same order, through the same requests; ids are those of this server."""
    story, tapes = Story(), recorded(personality)
    # ROOT_URL differs from the address on purpose, as in the recordings.
    async with ForgeServer(root, personality=personality, root_url="http://localhost:3003/") as forge, Web(forge) as client:
        await cast(forge, client)
        labels = {label.name: label.id for label in forge.repo("acme/rocket").labels}
        swaps: dict[str, str] = {r"labels/\d+$": f"labels/{labels['dispatch']}"}

        async def do(method, path, login, data=None):
            answer = await client.ask(method, path, login, data)
            story.everything.append(answer)
            return answer

        async def play(name, login, **change):
            request = tapes[name]["request"]
            path = request["path"]
            for old, new in swaps.items():
                path = re.sub(old, new, path)
            data = {**request["json"], **change} if request["json"] is not None else None
            story.answers[name] = await do(request["method"], path, login, data)
            return story.answers[name]

        async def told(name):
            story.deliveries[name] = await client.deliveries()

        for name in ("settings-api", "settings-ui", "version", "user", "repo"):
            await play(name, "timmy")
        await play("token-missing", "")
        story.answers["token-wrong"] = await client.ask("GET", "/user", token="0" * 40)
        await play("token-scope", "timmy")
        for name in ("collaborator-yes", "collaborator-no", "collaborator-unknown"):
            await play(name, "timmy")
        for name in ("permission-admin-asks-writer", "permission-admin-asks-stranger", "permission-admin-asks-unknown"):
            await play(name, "timmy")
        await play("permission-writer-asks-other", "bob")

        url = client.hook_url
        hook = await play("hook-create", "timmy", config={"url": url, "content_type": "json", "secret": SECRET})
        assert hook.status == 201, hook
        swaps[r"hooks/\d+"] = f"hooks/{hook.body['id']}"
        await play("hook-list", "timmy")
        await play("hook-test", "timmy")
        await told("hook-test")

        await play("issue-create", "bob")
        await told("issue-opened")
        await play("labels-add", "bob")
        await told("label-added")
        await do("POST", "/repos/acme/rocket/issues/1/labels", "bob", {"labels": ["dispatch"]})
        await told("label-added-again-no-change")
        await play("labels-add-unknown", "bob")
        await told("label-unknown-name")
        await do("POST", "/repos/acme/rocket/issues/1/labels", "timmy", {"labels": ["dispatch/queued"]})
        await told("state-label-queued-by-bot")
        await play("labels-add-exclusive", "timmy")
        await told("state-label-running-by-bot")

        first = (await play("comment-create", "bob")).body["id"]
        await told("comment-created")
        swaps[r"comments/\d+"] = f"comments/{first}"
        await play("reaction-add", "timmy")
        await play("reaction-add-again", "timmy")
        await play("reaction-list", "timmy")
        await play("reaction-not-allowed", "timmy")
        await play("reaction-delete", "timmy")
        status = await do(
            "POST", "/repos/acme/rocket/issues/1/comments", "timmy", {"body": "Queued.\n\n<!-- timmy-dispatch:v1 sprint=01J -->"}
        )
        await told("status-comment-by-bot")
        swaps[r"comments/\d+"] = f"comments/{status.body['id']}"
        await play("comment-edit", "timmy")
        await told("status-comment-edited-by-bot")
        swaps[r"comments/\d+"] = f"comments/{first}"
        path = f"/repos/acme/rocket/issues/comments/{first}"
        await do("PATCH", path, "bob", {"body": "/dispatch run budget=$2\n\n/dispatch status"})
        await told("comment-edited-by-author")
        await do("PATCH", path, "alice", {"body": tapes["comment-edit-unchanged"]["request"]["json"]["body"]})
        await told("comment-edited-by-maintainer")
        await play("comment-edit-unchanged", "bob")
        await told("comment-edited-unchanged")
        await play("comment-edit-stranger", "mallory")
        await do("POST", "/repos/acme/rocket/issues/1/comments", "mallory", {"body": "/dispatch run"})
        await told("comment-by-stranger")
        gone = await do("POST", "/repos/acme/rocket/issues/1/comments", "bob", {"body": "oops"})
        await client.deliveries()
        await do("DELETE", f"/repos/acme/rocket/issues/comments/{gone.body['id']}", "bob")
        await told("comment-deleted")
        await play("comments-of-issue", "timmy")
        await play("comments-of-repo", "timmy")
        await play("issue-assign", "bob")
        await told("assigned-to-bot")
        await do("PATCH", "/repos/acme/rocket/issues/1", "bob", {"assignees": []})
        await told("unassigned")
        await do("PATCH", "/repos/acme/rocket/issues/1", "bob", {"title": "parse() drops the last row (CRLF)"})
        await told("title-edited")
        await do("PATCH", "/repos/acme/rocket/issues/1", "bob", {"body": "New text"})
        await told("body-edited")
        await play("label-remove", "bob")
        await told("label-removed")
        replay = forge.deliveries[-1]
        await do("PATCH", "/repos/acme/rocket/issues/1", "bob", {"state": "closed"})
        await told("issue-closed")
        await do("PATCH", "/repos/acme/rocket/issues/1", "bob", {"state": "open"})
        await told("issue-reopened")
        await do("DELETE", "/repos/acme/rocket/issues/1/labels", "bob")
        await told("labels-cleared")
        for name in ("issue", "timeline", "timeline-empty-page", "issue-missing", "comment-create-missing-issue", "issue-dependencies"):
            await play(name, "timmy")
        await forge.replay(replay)
        await told("replayed")

        await do("POST", "/repos/acme/rocket/issues", "bob", {"title": "by a writer", "body": "b", "labels": [labels["dispatch"]]})
        await told("issue-opened-with-label-by-writer")
        await play("issue-create-stranger-label-dropped", "mallory", labels=[labels["dispatch"]])
        await told("issue-opened-with-label-by-stranger-api")
        form = aiohttp.FormData({"user_name": "mallory", "password": forge.state.user("mallory").password})
        async with client.session.post(f"{forge.url}/user/login", data=form) as reply:
            assert reply.status == 200
        form = aiohttp.FormData({"title": "stranger by web", "content": "b\r\n", "label_ids": str(labels["dispatch"])})
        async with client.session.post(f"{forge.url}/acme/rocket/issues/new", data=form, allow_redirects=False) as reply:
            assert (reply.status, reply.headers["Location"]) == (303, "/acme/rocket/issues/4")
        await told("issue-opened-with-label-by-stranger-web")
        for name in ("timeline-label-by-stranger", "issues-list", "issues-list-unknown-label-is-unfiltered"):
            await play(name, "timmy")

        work = root / "work"
        await agit(root, "clone", "--quiet", f"{forge.url}/acme/rocket.git", str(work))
        await agit(work, "checkout", "--quiet", "-b", "dispatch/issue-1")

        async def push(message, text, branch="dispatch/issue-1", file="calc.py"):
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            (work / file).write_text(text)
            await agit(work, "add", ".")
            await agit(work, "commit", "--quiet", "-m", message)
            await agit(work, "push", "--quiet", "origin", branch, token=client.tokens["timmy"])
            return (await agit(work, "rev-parse", "HEAD")).stdout.strip()

        await push("fix: keep the last row", "def add(a, b):\n    return a + b\n")
        await told("branch-pushed")
        await play("pr-create-missing-head", "timmy")
        await play("pr-create-head-is-base", "timmy")
        await play("pr-create", "timmy")
        await told("pr-opened")
        await play("pr-create-exists", "timmy")
        await play("pulls-list", "timmy")
        sha = await push("fix: more", "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n")
        await told("pr-synchronized")
        swaps[r"(?!0{40})[0-9a-f]{40}"] = sha
        await play("combined-status-none", "timmy")
        await play("status-create", "timmy")
        await told("status-pending")
        await do(
            "POST", f"/repos/acme/rocket/statuses/{sha}", "timmy", {"state": "failure", "context": "ci/test", "description": "1 failed"}
        )
        await told("status-failure")
        await play("combined-status-failure", "timmy")
        await play("status-create-unknown-sha", "timmy")
        await do("POST", "/repos/acme/rocket/issues/5/comments", "bob", {"body": "/dispatch revise handle None too"})
        await told("pr-comment")
        await do("POST", "/repos/acme/rocket/issues/5/labels", "bob", {"labels": ["bug"]})
        await told("pr-label")
        await do("POST", "/repos/acme/rocket/pulls/5/requested_reviewers", "timmy", {"reviewers": ["bob"]})
        await told("pr-review-requested")
        review = await play("review-create", "bob")
        await told("pr-review-rejected")
        await do("POST", "/repos/acme/rocket/pulls/5/reviews", "bob", {"event": "COMMENT", "body": "Hmm."})
        await told("pr-review-comment")
        await do("POST", "/repos/acme/rocket/pulls/5/reviews", "bob", {"event": "APPROVED", "body": "Good."})
        await told("pr-review-approved")
        swaps[r"reviews/\d+"] = f"reviews/{review.body['id']}"
        await play("reviews", "timmy")
        await play("review-comments", "timmy")
        await do("GET", "/repos/acme/rocket/pulls/5/files", "timmy")
        await do("PATCH", "/repos/acme/rocket/pulls/5", "timmy", {"title": "WIP: Keep the last row"})
        await told("pr-retitled-wip")
        await do("PATCH", "/repos/acme/rocket/pulls/5", "timmy", {"state": "closed"})
        await told("pr-closed-unmerged")
        await do("PATCH", "/repos/acme/rocket/pulls/5", "timmy", {"title": "Keep the last row", "state": "open"})
        await told("pr-reopened")
        await play("pr-merge", "bob")
        await told("pr-merged-closes-issue")
        await play("pr-merged", "timmy")

        await do("POST", "/repos/acme/rocket/forks", "mallory", {})
        await forge.push_file("mallory/rocket", "mallory", "evil", "evil.txt", "x\n", "evil")
        await play("pr-create-from-fork", "mallory")
        await told("fork-pr-opened-by-stranger")
        await do("POST", "/repos/acme/rocket/issues/6/comments", "mallory", {"body": "/dispatch run"})
        await told("fork-pr-comment")
        await agit(work, "checkout", "--quiet", "main")
        await agit(work, "pull", "--quiet")
        await push("ci", "on: push\n", branch="main", file=".gitea/workflows/ci.yml")
        await told("push-with-workflow")
        await play("actions-runs", "timmy")

        for method, path, login, data in (
            ("GET", "/repos/acme/rocket/branches", "timmy", None),
            ("GET", "/repos/acme/rocket/branches/dispatch%2Fissue-1", "timmy", None),
            ("GET", "/repos/acme/rocket/git/refs/heads%2Fdispatch%2F", "timmy", None),
            ("DELETE", "/repos/acme/rocket/branches/dispatch%2Fissue-1", "timmy", None),
            ("POST", "/repos/acme/rocket/branches", "bob", {"new_branch_name": "b2"}),
            ("GET", "/repos/acme/rocket/contents/README.md", "timmy", None),
            ("GET", "/repos/acme/rocket/git/trees/main", "timmy", None),
            ("POST", "/repos/acme/rocket/contents/new.txt", "bob", {"content": base64.b64encode(b"n\n").decode()}),
            ("GET", "/repos/acme/rocket/labels", "timmy", None),
            ("POST", "/repos/acme/rocket/labels", "bob", {"name": "x", "color": "#00aabb"}),
            ("GET", "/repos/acme/rocket/issues/1/labels", "timmy", None),
            ("GET", "/repos/acme/rocket/assignees", "timmy", None),
            ("GET", "/repos/acme/rocket/collaborators", "timmy", None),
            ("GET", "/repos/acme/rocket/commits/main/statuses", "timmy", None),
            ("GET", "/repos/acme/rocket/branch_protections", "alice", None),
            ("POST", "/repos/acme/rocket/branch_protections", "alice", {"rule_name": "release"}),
            ("GET", "/repositories/1", "timmy", None),
            ("GET", "/users/bob", "timmy", None),
            ("GET", "/user/repos", "alice", None),
            ("GET", "/repos/search?q=rock", "timmy", None),
            ("GET", "/repos/issues/search?labels=bug", "timmy", None),
            ("GET", "/orgs/acme", "timmy", None),
            ("GET", "/orgs/acme/labels", "timmy", None),
            ("GET", "/notifications", "bob", None),
            ("POST", "/admin/users", "root1", {"username": "eve", "email": "eve@example.org", "password": "pw"}),
            ("GET", "/admin/users", "root1", None),
            ("POST", "/user/repos", "bob", {"name": "own", "auto_init": True}),
            ("DELETE", "/repos/bob/own", "bob", None),
            ("DELETE", "/admin/users/eve", "root1", None),
        ):
            answer = await do(method, path, login, data)
            assert answer.status < 300, (method, path, answer)
        tokens = {"Authorization": "Basic " + base64.b64encode(f"bob:{forge.state.user('bob').password}".encode()).decode()}
        story.everything.append(await client.ask("POST", "/users/bob/tokens", "", {"name": "t", "scopes": ["write:issue"]}, headers=tokens))
        await forge.archive_repo("acme/rocket")
        await play("comment-create-archived", "timmy")
        await forge.archive_repo("acme/rocket", archived=False)
        await forge.rename_repo("acme/rocket", "rocket2")
        await play("renamed-get", "timmy")
        await play("renamed-post", "timmy")
    return story


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> dict[str, Story]:
    return {p: asyncio.run(tell(p, tmp_path_factory.mktemp(f"forge-{p}"))) for p in PERSONALITIES}


HEADERS = ("X-Total-Count", "Location", "Content-Type", "Access-Control-Expose-Headers", "X-Frame-Options")


@pytest.mark.parametrize(("personality", "name"), [(p, n) for p in PERSONALITIES for n in recorded(p)])
def test_replies_are_as_recorded(stories, personality, name):
    want, got = recorded(personality)[name], stories[personality].answers[name]
    assert got.status == want["status"]
    assert differences(want["body"], got.body) == []
    for header in HEADERS:
        if header == "X-Total-Count":
            assert (header in got.headers) == (header in want["headers"])
        elif header in want["headers"]:
            assert got.headers[header] == want["headers"][header]
    if want["status"] >= 400 and isinstance(want["body"], dict) and not re.search(r"\d", want["body"]["message"]):
        assert got.body["message"] == want["body"]["message"]


# What was recorded and is not made here, each with its reason.
NOT_MADE = {
    "push-with-workflow.2.status": "the status of a CI runner, and no runner lives here",
    "push-with-workflow.3.workflow_run": "the run of a CI runner, and no runner lives here",
    "fork-pr-opened-by-stranger.2.pull_request_sync": "a race inside 1.22: its push queue ran after the pull request was made",
}


def act_of(name: str) -> str:
    return re.sub(r"\.\d+$", "", name.rpartition(".")[0])


@pytest.mark.parametrize(("personality", "name"), [(p, n) for p in PERSONALITIES for n in recorded_deliveries(p) if n not in NOT_MADE])
def test_deliveries_are_as_recorded(stories, personality, name):
    headers, body = recorded_deliveries(personality)[name]
    kind = headers["X-Gitea-Event-Type"]
    options = [
        (h, b)
        for h, b in stories[personality].deliveries[act_of(name)]
        if h["X-Gitea-Event-Type"] == kind and json.loads(b).get("action") == body.get("action")
    ]
    assert options, [h["X-Gitea-Event-Type"] for h, _ in stories[personality].deliveries[act_of(name)]]
    got_headers, raw = options[0]
    assert differences(body, json.loads(raw)) == []
    assert got_headers.keys() - {"Host", "Accept-Encoding", "Accept"} == headers.keys()
    for key, value in headers.items():
        if not key.endswith(("Delivery", "Signature", "Signature-256", "Content-Length")):
            assert got_headers[key] == value
    assert got_headers["X-Gitea-Signature"] == hmac.new(SECRET.encode(), raw, hashlib.sha256).hexdigest()
    assert got_headers["X-Hub-Signature"] == "sha1=" + hmac.new(SECRET.encode(), raw, hashlib.sha1).hexdigest()


@pytest.mark.parametrize("personality", PERSONALITIES)
def test_no_act_sends_more_than_was_recorded(stories, personality):
    names = [n for n in recorded_deliveries(personality) if n not in NOT_MADE]
    for act, found in stories[personality].deliveries.items():
        assert len(found) == sum(act_of(n) == act for n in names), act


def test_a_delivery_is_written_as_go_writes_json(stories):
    want = (DATA / "recorded-1.26" / "deliveries" / "status-comment-by-bot.issue_comment.body").read_bytes()
    got = stories["1.26"].deliveries["status-comment-by-bot"][0][1]
    assert b"\\u003c!-- timmy-dispatch" in want
    assert b"\\u003c!-- timmy-dispatch" in got
    assert [line[: len(line) - len(line.lstrip())] for line in want.splitlines()[:40]] == [
        line[: len(line) - len(line.lstrip())] for line in got.splitlines()[:40]
    ]


@pytest.mark.parametrize("personality", PERSONALITIES)
def test_who_set_a_label_is_told_by_the_timeline_only(stories, personality):
    answers = stories[personality].answers
    assert answers["issue-create-stranger-label-dropped"].body["labels"] == []
    item = answers["timeline-label-by-stranger"].body[0]
    assert (item["type"], item["body"], item["user"]["login"], item["label"]["name"]) == ("label", "1", "mallory", "dispatch")
    assert {issue["number"] for issue in answers["issues-list"].body} == {2, 4}
    assert {issue["number"] for issue in answers["issues-list-unknown-label-is-unfiltered"].body} == {1, 2, 3, 4}
    changes = [(e["label"]["name"], e["body"]) for e in answers["timeline"].body if e["type"] == "label"]
    assert changes == [
        ("dispatch", "1"),
        ("dispatch/queued", "1"),
        ("dispatch/queued", ""),
        ("dispatch/running", "1"),
        ("dispatch", ""),
        ("dispatch/running", ""),
    ]


def test_addresses_disagree_as_recorded(stories):
    issue = stories["1.26"].answers["issue"].body
    assert issue["url"].startswith("http://localhost:3003/api/v1/")
    assert issue["html_url"].startswith("http://127.0.0.1:")
    assert stories["1.22"].answers["issue"].body["html_url"].startswith("http://localhost:3003/")


# OpenAPI


SWAGGERS = {name: json.loads((DATA / name).read_text()) for name in ("swagger-gitea-1.27.json", "swagger-forgejo-15.json")}
# Differences that the reference page documents: the status of an ended reaction, and creations that one side does not list.
STATUS_DIFFERS = {("DELETE", "/repos/{owner}/{repo}/issues/comments/{id}/reactions")}
# Strings that are pointers in Go, null in recordings or for a plain file.
POINTERS = {("PullRequest", "merge_commit_sha"), ("ContentsResponse", "target"), ("ContentsResponse", "submodule_git_url")}
DATE_TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)$"


def loosened(node: Any, *, where: str = "") -> Any:
    """A Swagger 2.0 schema as JSON schema in which objects, arrays and times may be null, as in Go they may."""
    if isinstance(node, list):
        return [loosened(item, where=where) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return {"anyOf": [{"type": "null"}, {"$ref": node["$ref"]}]}
    out = {key: loosened(value, where=where) for key, value in node.items() if key not in {"example", "x-go-name", "discriminator"}}
    for name in POINTERS & {(where, key) for key in out.get("properties", {})}:
        out["properties"][name[1]]["type"] = ["string", "null"]
    if out.get("format") == "date-time":
        out["pattern"] = DATE_TIME
    if out.get("type") in ("object", "array") or out.get("format") == "date-time":
        out["type"] = [out["type"], "null"]
    return out


def validator(name: str, schema: dict[str, Any]) -> jsonschema.protocols.Validator:
    definitions = {key: loosened(value, where=key) for key, value in SWAGGERS[name]["definitions"].items()}
    return jsonschema.Draft4Validator({**loosened(schema), "definitions": definitions})


def described(swagger: dict[str, Any], answer: Answer) -> dict[str, Any] | None:
    """The operation of an answer; Forgejo calls the `{id}` of a label `{identifier}`, and an index is sometimes an id."""

    def plain(path: str) -> str:
        return re.sub(r"\{\w+\}", "{}", path)

    for path, operations in swagger["paths"].items():
        if plain(path) == plain(answer.route):
            return operations.get(answer.method.lower())
    return None


@pytest.mark.parametrize("name", SWAGGERS)
@pytest.mark.parametrize("personality", PERSONALITIES)
def test_replies_validate_against_the_openapi_files(stories, personality, name):
    swagger, seen, checked = SWAGGERS[name], {}, set()
    for answer in [*stories[personality].everything, *stories[personality].answers.values()]:
        operation = described(swagger, answer)
        if operation is None:
            continue
        listed = operation["responses"].get(str(answer.status))
        if listed is None:
            # Errors and redirects are not all listed; successes are.
            assert answer.status >= 300 or (answer.method, answer.route) in STATUS_DIFFERS, answer
            continue
        response = swagger["responses"][listed["$ref"].rpartition("/")[2]] if "$ref" in listed else listed
        schema = response.get("schema")
        checked.add((answer.method, answer.route))
        if personality == "1.22" and answer.route.endswith("/status") and answer.body.get("state") == "":
            continue  # documented: without any status the state is blank before 1.26
        if schema is None or answer.body is None:
            continue
        key = json.dumps(schema, sort_keys=True)
        seen.setdefault(key, validator(name, schema))
        worst = jsonschema.exceptions.best_match(seen[key].iter_errors(answer.body))
        assert worst is None, (answer.method, answer.route, list(worst.absolute_path), worst.message[:300])
    assert len(checked) > 50


@pytest.mark.parametrize("route", [r for r in ROUTES if r.path.count("/") > 1], ids=lambda r: f"{r.method} {r.path}")
def test_every_route_is_one_of_gitea(route):
    answer = Answer(200, None, {}, route.method, route.path)
    assert described(SWAGGERS["swagger-gitea-1.27.json"], answer) is not None


# traps


@pytest.fixture
async def forge(tmp_path):
    async with ForgeServer(tmp_path) as server:
        yield server


@pytest.fixture
async def old_forge(tmp_path):
    async with ForgeServer(tmp_path / "old", personality="1.22") as server:
        yield server


@pytest.fixture
async def client(forge):
    async with Web(forge) as web_client:
        await cast(forge, web_client)
        yield web_client


@pytest.fixture
async def old_client(old_forge):
    async with Web(old_forge) as web_client:
        await cast(old_forge, web_client)
        yield web_client


ROCKET = "/repos/acme/rocket"


async def test_lists_are_capped_silently_and_linked_by_root_url(tmp_path):
    async with ForgeServer(tmp_path, root_url="https://forge.example/sub/") as forge, Web(forge) as client:
        await cast(forge, client)
        for i in range(75):
            await forge.open_issue("acme/rocket", "bob", f"issue {i}")
        first = await client.ask("GET", f"{ROCKET}/issues?limit=100&type=issues", "timmy")
        second = await client.ask("GET", f"{ROCKET}/issues?limit=100&type=issues&page=2", "timmy")
        assert (len(first.body), len(second.body), first.headers["X-Total-Count"]) == (50, 25, "75")
        assert [i["number"] for i in first.body] == list(range(75, 25, -1))
        assert first.headers["Link"].startswith("<https://forge.example/sub/api/v1/repos/acme/rocket/issues?")
        assert len((await client.ask("GET", f"{ROCKET}/issues", "timmy")).body) == 30
        for i in range(60):
            await forge.comment("acme/rocket", 1, "bob", f"comment {i}")
        every = await client.ask("GET", f"{ROCKET}/issues/1/comments?limit=10&page=2", "timmy")
        assert (len(every.body), every.headers["X-Total-Count"]) == (60, "60")
        assert (await client.ask("GET", f"{ROCKET}/issues?page=9", "timmy")).body == []


async def test_timeline_totals_and_null_pages(client, old_client):
    for c, without_page in ((client, 30), (old_client, 45)):
        await c.forge.open_issue("acme/rocket", "bob", "one")
        for i in range(45):
            await c.forge.comment("acme/rocket", 1, "bob", str(i))
        page = await c.ask("GET", f"{ROCKET}/issues/1/timeline?page=1&limit=40", "timmy")
        assert (len(page.body), page.headers["X-Total-Count"]) == (40, "40")
        empty = await c.ask("GET", f"{ROCKET}/issues/1/timeline?page=3&limit=40", "timmy")
        assert (empty.status, empty.body, empty.headers["X-Total-Count"]) == (200, None, "0")
        assert len((await c.ask("GET", f"{ROCKET}/issues/1/timeline", "timmy")).body) == without_page
        assert (await c.ask("GET", f"{ROCKET}/issues/99/timeline", "timmy")).status == 500


async def test_labels(client, old_client):
    forge = client.forge
    await forge.open_issue("acme/rocket", "bob", "one")
    path = f"{ROCKET}/issues/1/labels"
    for c, names in ((client, ["shared"]), (old_client, [])):
        if c is old_client:
            await old_client.forge.open_issue("acme/rocket", "bob", "one")
        await c.forge.create_org_label("acme", "shared", "112233")
        assert [x["name"] for x in (await c.ask("POST", path, "timmy", {"labels": ["shared"]})).body] == names
    # An organisation's label counts as unknown in the filter, so everything comes back.
    assert len((await client.ask("GET", f"{ROCKET}/issues?labels=shared", "timmy")).body) == 1
    assert (await client.ask("GET", f"{ROCKET}/issues?labels=bug", "timmy")).body == []
    assert (await client.ask("POST", path, "timmy", {"labels": ["bug", 1]})).status == 400
    assert (await client.ask("DELETE", f"{path}/999", "timmy")).status == 422
    ids = {label.name: label.id for label in forge.repo("acme/rocket").labels}
    assert (await client.ask("DELETE", f"{path}/{ids['bug']}", "timmy")).status == 204
    refused = await client.ask("DELETE", f"{path}/{ids['bug']}", "mallory")
    assert (refused.status, refused.body) == (403, None)
    for name in ("dispatch", "dispatch/queued", "dispatch/running", "dispatch/queued"):
        await forge.add_label("acme/rocket", 1, "bob", name)
    names = [x["name"] for x in (await client.ask("GET", path, "timmy")).body]
    assert names == ["dispatch", "dispatch/queued", "shared"]
    await forge.archive_repo("acme/rocket")
    assert (await client.ask("POST", path, "timmy", {"labels": ["bug"]})).status == 200
    assert (await client.ask("POST", f"{ROCKET}/issues", "timmy", {"title": "x"})).status == 423


async def test_callers_and_scopes(client, old_client):
    forge = client.forge
    await forge.create_user("fresh", must_change_password=True)
    token = await forge.create_token("fresh", ["all"])
    answer = await client.ask("GET", "/user", token=token)
    assert answer.status == 403
    assert answer.body["message"].startswith("You must change your password. Change it at: ")
    weak = await forge.create_token("alice", ["read:issue"])
    assert (await client.ask("GET", f"{ROCKET}/issues", token=weak)).status == 200
    assert (await client.ask("POST", f"{ROCKET}/issues", token=weak, data={"title": "x"})).status == 403
    await forge.revoke_token(weak)
    assert (await client.ask("GET", f"{ROCKET}/issues", token=weak)).status == 401
    assert (await client.ask("GET", ROCKET)).status == 200
    assert (await client.ask("POST", f"{ROCKET}/issues", data={"title": "x"})).status == 401
    for user, password in ((client.tokens["bob"], ""), ("any", client.tokens["bob"]), (client.tokens["bob"], "x-oauth-basic")):
        basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        assert (await client.ask("GET", "/user", headers={"Authorization": basic})).body["login"] == "bob"
    bearer = {"Authorization": f"Bearer {client.tokens['bob']}"}
    assert (await client.ask("GET", "/user", headers=bearer)).body["login"] == "bob"
    own = f"{ROCKET}/collaborators/bob/permission"
    assert (await client.ask("GET", own, "bob")).body["permission"] == "write"
    assert (await old_client.ask("GET", own, "bob")).status == 403
    for login, level in (("root1", "owner"), ("alice", "admin"), ("mallory", "read")):
        assert (await client.ask("GET", f"{ROCKET}/collaborators/{login}/permission", "timmy")).body["role_name"] == level
    await forge.remove_collaborator("acme/rocket", "bob")
    assert (await client.ask("GET", own, "timmy")).body["permission"] == "read"
    await forge.create_repo("alice", "secret", private=True)
    assert (await client.ask("GET", "/repos/alice/secret", "bob")).status == 404
    assert (await client.ask("GET", "/repos/alice/secret/collaborators/bob/permission", "alice")).body["permission"] == "none"
    public = await forge.create_token("alice", ["public-only", "read:repository"])
    assert (await client.ask("GET", "/repos/alice/secret", token=public)).status == 404
    seen = forge.requests[-2]
    assert seen.headers["Authorization"] == "token"
    assert (seen.login, seen.status, seen.route) == ("alice", 200, "/repos/{owner}/{repo}/collaborators/{collaborator}/permission")


async def test_updated_at_and_since(tmp_path):
    now = [1_800_000_000.9]
    async with ForgeServer(tmp_path, clock=lambda: now[0]) as forge, Web(forge) as client:
        await cast(forge, client)
        for title in ("one", "two"):
            await forge.open_issue("acme/rocket", "bob", title)
        now[0] += 10
        await forge.add_label("acme/rocket", 1, "bob", "bug")
        found = await client.ask("GET", f"{ROCKET}/issues?state=all&since=2027-01-15T08:00:10Z", "timmy")
        assert [i["number"] for i in found.body] == [1]
        now[0] += 10
        entry = await forge.comment("acme/rocket", 2, "bob", "hello")
        now[0] += 10
        await forge.edit_comment("acme/rocket", entry.id, "bob", "hello again")
        found = await client.ask("GET", f"{ROCKET}/issues/comments?since=2027-01-15T08:00:30Z", "timmy")
        assert [c["body"] for c in found.body] == ["hello again"]
        found = await client.ask("GET", f"{ROCKET}/issues?since=2027-01-15T08:00:20Z", "timmy")
        assert [i["number"] for i in found.body] == [2]
        for since, status in (
            ("yesterday", 422),
            ("2027-01-15T08:00:20+00:00", 422),
            ("2027-01-15T08:00:20%2B00:00", 200),
        ):  # a raw + is a blank
            url = yarl.URL(f"{forge.url}{PREFIX}{ROCKET}/issues?since={since}", encoded=True)
            async with client.session.get(url) as reply:
                assert reply.status == status


async def test_renaming_redirects_every_method_and_git(client, tmp_path):
    forge = client.forge
    await forge.open_issue("acme/rocket", "bob", "one")
    await forge.rename_repo("acme/rocket", "engine")
    answer = await client.ask("PATCH", f"{ROCKET}/issues/1", "bob", {"title": "x"})
    assert (answer.status, answer.headers["Location"]) == (301, "/api/v1/repos/acme/engine/issues/1")
    assert (await client.ask("GET", "/repositories/1", "timmy")).body["full_name"] == "acme/engine"
    await agit(tmp_path, "clone", "--quiet", f"{forge.url}/acme/rocket.git", "old-name")
    assert (tmp_path / "old-name" / "README.md").exists()


async def test_hooks_have_gitea_defaults(client, old_client):
    config = {"url": client.hook_url, "content_type": "json", "secret": SECRET}
    path = f"{ROCKET}/hooks"
    made = await client.ask("POST", path, "timmy", {"type": "gitea", "events": ["nonsense"], "config": config})
    assert (made.body["active"], made.body["events"]) == (False, ["push"])
    assert "secret" not in made.body["config"]
    for broken, text in (
        ({"type": "gitea", "config": {"url": "http://x"}}, "content_type"),
        ({"type": "nope", "config": config}, "hook type"),
    ):
        answer = await client.ask("POST", path, "timmy", broken)
        assert answer.status == 422
        assert text in answer.body["message"]
    assert (await client.ask("POST", path, "bob", {"type": "gitea", "config": config})).status == 403
    full = {
        "type": "gitea",
        "active": True,
        "events": ["pull_request", "issues"],
        "branch_filter": "main",
        "authorization_header": "Bearer x",
    }
    made = await client.ask("POST", path, "timmy", {**full, "config": config})
    assert "pull_request_review" in made.body["events"]
    assert made.body["authorization_header"] == "Bearer x"
    patched = await client.ask("PATCH", f"{path}/{made.body['id']}", "timmy", {"config": {"secret": "other"}})
    assert patched.body["events"] == ["push"]
    assert (patched.body["branch_filter"], patched.body["authorization_header"], patched.body["active"]) == ("", "", True)
    await client.ask("POST", f"{path}/{made.body['id']}/tests", "alice")
    headers, raw = (await client.deliveries())[0]
    assert headers["X-Gitea-Signature"] == hmac.new(SECRET.encode(), raw, hashlib.sha256).hexdigest()
    payload = json.loads(raw)
    assert payload["before"] == payload["after"]
    assert payload["sender"]["login"] == "alice"
    made = await old_client.ask("POST", path, "timmy", {**full, "config": config})
    assert {"pull_request_review_approved", "pull_request_review_rejected"} <= set(made.body["events"])


async def test_deliveries_go_once_and_only_where_allowed(client):
    forge = client.forge
    plain = await forge.create_hook("acme/rocket", client.hook_url)
    client.answer = 500
    await forge.open_issue("acme/rocket", "bob", "one")
    headers, _ = (await client.deliveries())[0]
    assert (headers["X-Gitea-Signature"], headers["X-Hub-Signature-256"], headers["X-Hub-Signature"]) == ("", "sha256=", "sha1=")
    assert [(d.outcome, d.status) for d in forge.deliveries] == [("failed", 500)]
    client.answer = 200
    await forge.replay(forge.deliveries[0])
    again, _ = (await client.deliveries())[0]
    assert again["X-Gitea-Delivery"] != headers["X-Gitea-Delivery"]
    assert [d.outcome for d in forge.deliveries] == ["failed", "delivered"]

    forge.drop_deliveries = True
    await forge.comment("acme/rocket", 1, "bob", "lost")
    forge.drop_deliveries = False
    assert await client.kinds() == []
    assert forge.deliveries[-1].outcome == "dropped"
    forge.hooks.copies = 5
    await forge.comment("acme/rocket", 1, "bob", "five times")
    found = await client.deliveries()
    assert len({h["X-Gitea-Delivery"] for h, _ in found}) == 5
    assert len({b for _, b in found}) == 1
    forge.hooks.copies, forge.hooks.order = 1, "reverse"
    await forge.comment("acme/rocket", 1, "bob", "a")
    await forge.close_issue("acme/rocket", 1, "bob")
    assert await client.kinds() == ["issues:closed", "issue_comment:created"]
    forge.hooks.order = "fifo"

    forge.hooks.allowed_hosts = "external"
    await forge.reopen_issue("acme/rocket", 1, "bob")
    assert await client.kinds() == []
    assert "webhook can only call allowed HTTP servers" in forge.deliveries[-1].error
    forge.hooks.allowed_hosts = "loopback"

    await forge.stop()
    await forge.comment("acme/rocket", 1, "bob", "while it is down")
    assert client.got == []
    await forge.start()
    assert await client.kinds() == ["issue_comment:created"]
    plain.active = False
    await forge.comment("acme/rocket", 1, "bob", "nobody listens")
    assert await client.kinds() == []


async def test_a_slow_receiver_is_given_up(tmp_path):
    forge = ForgeServer(tmp_path)
    forge.hooks.timeout = 0.2
    async with forge, Web(forge) as client:
        await cast(forge, client)

        async def hang(request):
            await asyncio.sleep(3)

        app = web.Application()
        app.router.add_post("/", hang)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await forge.create_hook("acme/rocket", f"http://127.0.0.1:{runner.addresses[0][1]}/")
        await forge.open_issue("acme/rocket", "bob", "one")
        await forge.drain()
        assert [d.outcome for d in forge.deliveries] == ["failed"]
        assert "Timeout" in forge.deliveries[0].error
        await runner.cleanup()


async def test_form_hooks_and_owner_hooks(client):
    forge = client.forge
    await forge.create_hook("acme/rocket", client.hook_url, secret=SECRET, content_type="form")
    await forge.create_hook("acme/rocket", client.hook_url, secret=SECRET, level="organization", authorization="Bearer zzz")
    await forge.open_issue("acme/rocket", "bob", "one")
    (form, raw), (org, plain) = await client.deliveries()
    assert form["Content-Type"] == "application/x-www-form-urlencoded"
    assert raw.startswith(b"payload=%7B")
    assert form["X-Gitea-Signature"] == hmac.new(SECRET.encode(), plain, hashlib.sha256).hexdigest()
    assert (org["X-Gitea-Hook-Installation-Target-Type"], org["Authorization"]) == ("organization", "Bearer zzz")


@pytest.mark.parametrize(
    ("host", "addresses", "rules", "allowed"),
    [
        ("127.0.0.1", ["127.0.0.1"], "external", False),
        ("127.0.0.1", ["127.0.0.1"], "external, loopback", True),
        ("bot.lan", ["10.0.0.7"], "private", True),
        ("bot.lan", ["10.0.0.7"], "external", False),
        ("bot.lan", ["100.64.0.9"], "private", True),
        ("bot.lan", ["10.0.0.7"], "10.0.0.0/8", True),
        ("bot.example.org", ["93.184.216.34"], "external", True),
        ("bot.example.org", ["93.184.216.34"], "*.example.org", True),
        ("bot.example.org", ["93.184.216.34"], "loopback", False),
        ("x", ["::1"], "*", True),
        ("x", ["127.0.0.1"], "", False),
    ],
)
def test_allowed_host_list(host, addresses, rules, allowed):
    assert host_allowed(host, addresses, rules) is allowed


async def test_faults(client):
    forge = client.forge
    await forge.open_issue("acme/rocket", "bob", "one")
    path = f"{ROCKET}/issues/1/comments"
    forge.fail_next(1, status=503, html=True, headers={"Retry-After": "1"})
    answer = await client.ask("GET", path, "timmy")
    assert (answer.status, answer.headers["Retry-After"], answer.headers["Content-Type"].split(";")[0]) == (503, "1", "text/html")
    forge.fail_next(1, status=502, match=r"^POST .*/comments$", after_effect=True)
    assert (await client.ask("GET", path, "timmy")).status == 200
    assert (await client.ask("POST", path, "timmy", {"body": "made, but who knows"})).status == 502
    forge.fail_next(1, reset=True, match=lambda request: request.method == "POST", after_effect=True)
    with pytest.raises(aiohttp.ClientError):
        await client.ask("POST", path, "timmy", {"body": "made as well"})
    forge.fail_next(1, reset=True)
    with pytest.raises(aiohttp.ClientError):
        await client.ask("POST", path, "timmy", {"body": "never made"})
    forge.fail_next(1, truncate=True)
    with pytest.raises(aiohttp.ClientPayloadError):
        await client.ask("GET", path, "timmy")
    began = time.monotonic()
    forge.fail_next(1, status=200, delay=0.1)
    assert [c["body"] for c in (await client.ask("GET", path, "timmy")).body] == ["made, but who knows", "made as well"]
    assert time.monotonic() - began >= 0.1
    assert sum(r.fault for r in forge.requests) == 6
    assert next(r.json for r in forge.requests if r.method == "POST") == {"body": "made, but who knows"}


async def test_an_outage_keeps_the_port_and_the_state(client):
    forge, url = client.forge, client.forge.url
    await forge.open_issue("acme/rocket", "bob", "one")
    await forge.stop()
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.ask("GET", ROCKET, "timmy")
    await forge.start()
    assert forge.url == url
    assert (await client.ask("GET", f"{ROCKET}/issues/1", "timmy")).body["title"] == "one"


async def test_git_rules(client, tmp_path):
    forge = client.forge
    url = f"{forge.url}/acme/rocket.git"
    await agit(tmp_path, "clone", "--quiet", url, "w")
    work = tmp_path / "w"
    timmy, mallory = client.tokens["timmy"], client.tokens["mallory"]

    async def commit(name, text="x\n"):
        (work / name).write_text(text)
        await agit(work, "add", ".")
        await agit(work, "commit", "--quiet", "-m", name)

    async def push(*args, token=timmy):
        return (await agit(work, "push", "origin", *args, token=token, check=False)).stderr

    await commit("a")
    assert "remote: error: User permission denied for writing." in await push("HEAD:refs/heads/x", token=mallory)
    assert "could not read Username" in await push("HEAD:refs/heads/x", token="0" * 40)
    weak = await forge.create_token("timmy", ["read:repository"])
    assert "403" in await push("HEAD:refs/heads/x", token=weak)
    await forge.protect_branch("acme/rocket", "main")
    assert "remote: error: Not allowed to push to protected branch main" in await push("HEAD:main")
    await agit(work, "commit", "--quiet", "--amend", "-m", "rewritten", "--allow-empty")
    await agit(work, "push", "--quiet", "origin", "HEAD:refs/heads/guarded", token=timmy)
    await forge.protect_branch("acme/rocket", "guarded")
    await agit(work, "reset", "--quiet", "--hard", "HEAD~1")
    await commit("b")
    assert "remote: error: branch guarded is protected from force push" in await push("+HEAD:guarded")
    assert "branch guarded is protected from deletion" in await push(":guarded")
    assert "cannot be deleted" in await push(":main")

    assert "hidden ref" in await push("HEAD:refs/pull/1/head")

    # A branch named like the folder of ours stands in the way, and git says so.
    await agit(work, "push", "--quiet", "origin", "HEAD:refs/heads/dispatch", token=timmy)
    assert "remote rejected" in await push("HEAD:refs/heads/dispatch/issue-1")
    await agit(work, "push", "--quiet", "origin", ":dispatch", token=timmy)
    big = os.urandom(3_000_000).hex()
    await commit("big.txt", big)
    assert "new branch" in await push("HEAD:refs/heads/dispatch/issue-1")
    assert await asyncio.to_thread((tmp_path / "w" / "big.txt").read_text) == big
    await agit(tmp_path, "clone", "--quiet", "-b", "dispatch/issue-1", url, "again")
    assert (tmp_path / "again" / "big.txt").stat().st_size == 6_000_000
    assert "stale info" in await push("--force-with-lease=refs/heads/dispatch/issue-1:" + "1" * 40, "HEAD~1:refs/heads/dispatch/issue-1")

    await forge.archive_repo("acme/rocket")
    assert "403" in await push("HEAD:refs/heads/y")
    await forge.create_repo("alice", "secret", private=True)
    secret = f"{forge.url}/alice/secret.git"
    for token, text in (("", "could not read Username"), (mallory, "not found"), (client.tokens["alice"], "")):
        done = await agit(tmp_path, "ls-remote", secret, token=token, check=False)
        assert text in done.stderr
        assert bool(done.returncode) is bool(text)
    assert forge.requests[-1].route.startswith("/{owner}/{repo}.git/")


async def test_many_git_clients_at_once(client, tmp_path):
    url = f"{client.forge.url}/acme/rocket.git"

    async def one(i):
        await agit(tmp_path, "clone", "--quiet", url, f"w{i}")
        work = tmp_path / f"w{i}"
        (work / f"f{i}").write_text("x")
        await agit(work, "add", ".")
        await agit(work, "commit", "--quiet", "-m", "f")
        await agit(work, "push", "--quiet", "origin", f"HEAD:refs/heads/dispatch/issue-{i}", token=client.tokens["timmy"])

    await client.forge.create_hook("acme/rocket", client.hook_url)
    await asyncio.gather(*(one(i) for i in range(12)))
    found = [json.loads(b) for h, b in await client.deliveries() if h["X-Gitea-Event-Type"] == "push"]
    assert {p["ref"] for p in found} == {f"refs/heads/dispatch/issue-{i}" for i in range(12)}
    assert all(p["total_commits"] == 1 and p["commits"][0]["added"] for p in found)


async def test_pull_requests(client):
    forge = client.forge
    await forge.create_hook("acme/rocket", client.hook_url)
    await forge.open_issue("acme/rocket", "bob", "a bug")
    path = f"{ROCKET}/pulls"
    await client.ask("POST", f"{ROCKET}/branches", "timmy", {"new_branch_name": "same", "old_ref_name": "main"})
    empty = await client.ask("POST", path, "timmy", {"head": "same", "base": "main", "title": "WIP: nothing"})
    assert (empty.status, empty.body["changed_files"], empty.body["draft"]) == (201, 0, True)
    await client.deliveries()
    assert (await client.ask("DELETE", f"{ROCKET}/branches/same", "alice")).status == 204
    gone, closed = (json.loads(raw) for _, raw in (await client.deliveries())[:2])
    assert (gone["ref"], gone["ref_type"], gone["pusher_type"]) == ("same", "branch", "user")
    assert (closed["action"], closed["pull_request"]["merged"], closed["sender"]["login"]) == ("closed", False, "alice")
    assert closed["pull_request"]["head"]["ref"] == "refs/pull/2/head"
    assert closed["pull_request"]["head"]["label"] == "same"
    assert (await client.ask("PATCH", f"{path}/2", "timmy", {"state": "open"})).status == 412

    await forge.push_file("acme/rocket", "timmy", "dispatch/issue-1", "README.md", "# rocket 2\n", "fix")
    made = await client.ask("POST", path, "timmy", {"head": "dispatch/issue-1", "base": "main", "title": "fix", "body": "Closes #1"})
    assert (made.body["mergeable"], made.body["additions"], made.body["deletions"]) == (True, 1, 1)
    refs = [e["type"] for e in (await client.ask("GET", f"{ROCKET}/issues/1/timeline", "timmy")).body]
    assert refs == ["pull_ref"]
    await forge.push_file("acme/rocket", "bob", "main", "README.md", "# another\n", "clash")
    assert (await client.ask("GET", f"{path}/3", "timmy")).body["mergeable"] is False
    assert (await client.ask("POST", f"{path}/3/merge", "bob", {"Do": "merge"})).status == 409
    assert (await client.ask("POST", f"{path}/3/merge", "mallory", {"Do": "merge"})).status == 405
    await forge.push_file("acme/rocket", "bob", "main", "README.md", "# rocket\n", "calm again")
    assert "+# rocket 2" in (await client.ask("GET", f"{path}/3.diff", "timmy")).body
    assert (await client.ask("GET", f"{path}/main/dispatch%2Fissue-1", "timmy")).body["number"] == 3
    files = await client.ask("GET", f"{path}/3/files", "timmy")
    assert [(f["filename"], f["status"]) for f in files.body] == [("README.md", "changed")]
    await client.deliveries()
    await forge.merge_pull("acme/rocket", 3, "bob", style="merge")
    assert await client.kinds() == ["pull_request:closed", "issues:closed", "push:"]
    assert (await client.ask("GET", f"{ROCKET}/raw/README.md", "timmy")).body == "# rocket 2\n"
    assert (await client.ask("PATCH", f"{path}/3", "timmy", {"state": "open"})).status == 412
    await forge.open_issue("acme/rocket", "bob", "another")
    await forge.push_file("acme/rocket", "bob", "main", "x", "x\n", "does it\n\nFixes #4")
    assert forge.find_issue("acme/rocket", 4).state == "closed"
    await forge.create_repo("alice", "void", empty=True)
    assert (await client.ask("POST", "/repos/alice/void/pulls", "alice", {"head": "a", "base": "main", "title": "x"})).status == 404


async def test_only_refs_that_moved_make_events(client):
    forge = client.forge
    await forge.create_hook("acme/rocket", client.hook_url, events=("create", "delete", "push"))
    await forge.push_file("acme/rocket", "bob", "topic", "t", "t\n", "t")
    await forge.delete_branch("acme/rocket", "bob", "topic")
    assert sorted(await client.kinds()) == ["create:", "delete:", "push:"]


async def test_refusals_of_issues(client, old_client):
    forge = client.forge
    for title in ("one", "two"):
        await forge.open_issue("acme/rocket", "bob", title)
    path = f"{ROCKET}/issues/1"
    refused = await client.ask("PATCH", path, "mallory", {"title": "mine"})
    assert (refused.status, refused.body) == (403, None)
    assert (await client.ask("PATCH", path, "timmy", {"title": "x", "content_version": 7})).status == 409
    await old_client.forge.open_issue("acme/rocket", "bob", "one")
    assert (await old_client.ask("PATCH", path, "timmy", {"title": "x", "content_version": 7})).status == 201
    await client.ask("POST", f"{path}/dependencies", "bob", {"index": 2})
    assert [i["number"] for i in (await client.ask("GET", f"{path}/dependencies", "timmy")).body] == [2]
    assert (await client.ask("PATCH", path, "bob", {"state": "closed"})).status == 412
    await forge.lock("acme/rocket", 1, "bob")
    assert (await client.ask("POST", f"{path}/comments", "mallory", {"body": "x"})).status == 403
    assert (await client.ask("POST", f"{path}/comments", "bob", {"body": "x"})).status == 201
    assert (await client.ask("POST", f"{path}/comments", "bob", {"body": ""})).status == 422
    assert (await client.ask("POST", f"{ROCKET}/issues", "bob", {"title": "x", "labels": ["bug"]})).status == 422
    assert (await client.ask("PUT", f"{path}/lock", "bob", {})).status == 204
    assert (await old_client.ask("PUT", f"{path}/lock", "bob", {})).status in {404, 405}
    with pytest.raises(RefusedError):
        await forge.delete_issue("acme/rocket", 1, "bob")
    await forge.delete_issue("acme/rocket", 1, "alice")
    assert (await client.ask("GET", path, "timmy")).status == 404
    assert (await client.ask("GET", f"{path}/comments", "timmy")).status == 500
    assert (await client.ask("GET", f"{ROCKET}/issues?created_by=nobody", "timmy")).status == 404


async def test_the_demo_story_needs_only_an_admin_token(tmp_path):
    async with ForgeServer(tmp_path) as forge, Web(forge) as client:
        await forge.create_user("root1", admin=True)
        client.tokens["root1"] = await forge.create_token("root1", ["all"])
        for login in ("timmy", "alice"):
            data = {"username": login, "email": f"{login}@example.org", "password": f"pw-{login}", "must_change_password": False}
            assert (await client.ask("POST", "/admin/users", "root1", data)).status == 201
            basic = {"Authorization": "Basic " + base64.b64encode(f"{login}:pw-{login}".encode()).decode()}
            made = await client.ask("POST", f"/users/{login}/tokens", data={"name": "t", "scopes": SCOPES}, headers=basic)
            assert made.status == 201
            client.tokens[login] = made.body["sha1"]
        assert (await client.ask("POST", "/users/alice/tokens", "alice", {"name": "u", "scopes": ["all"]})).status == 403
        made = await client.ask("POST", "/admin/users/alice/repos", "root1", {"name": "toy", "auto_init": True})
        assert made.body["full_name"] == "alice/toy"
        assert (await client.ask("PUT", "/repos/alice/toy/collaborators/timmy", "root1", {"permission": "admin"})).status == 204
        content = {"content": base64.b64encode(b"print('hi')\n").decode(), "message": "add app"}
        assert (await client.ask("POST", "/repos/alice/toy/contents/src/app.py", "alice", content)).status == 201
        assert (await client.ask("GET", "/repos/alice/toy/raw/src/app.py", "timmy")).body == "print('hi')\n"
        got = await client.ask("GET", "/repos/alice/toy/contents/src/app.py", "timmy")
        assert base64.b64decode(got.body["content"]) == b"print('hi')\n"
        assert [e["name"] for e in (await client.ask("GET", "/repos/alice/toy/contents/src", "timmy")).body] == ["app.py"]
        for path in ("/repos/alice/toy", "/admin/users/timmy", "/admin/users/alice"):
            assert (await client.ask("DELETE", path, "root1")).status == 204
        assert (await client.ask("GET", "/repos/alice/toy", "root1")).status == 404
        async with client.session.get(f"{forge.url}/api/healthz") as reply:
            assert reply.status == 200


async def test_pages_show_text_as_text(client):
    forge = client.forge
    body = "<script>alert(1)</script>\n\nsee https://example.org/x?a=1&b=2\n\n<!-- timmy-dispatch:v1 sprint=01J -->"
    await forge.open_issue("acme/rocket", "mallory", "<b>bold</b>", body, labels=("dispatch",))
    await forge.comment("acme/rocket", 1, "bob", "*hello*")
    await forge.push_file("acme/rocket", "bob", "topic", "x.html", "<i>\n", "x")
    await forge.open_pull("acme/rocket", "bob", head="topic", title="x")

    async def page(path):
        async with client.session.get(forge.url + path) as reply:
            return reply.status, await reply.text()

    status, text = await page("/acme/rocket/issues/1")
    assert status == 200
    assert "<script>" not in text
    assert "&lt;b&gt;bold" in text
    assert "timmy-dispatch:v1" not in text
    assert '<a href="https://example.org/x?a=1&amp;b=2"' in text
    assert "mallory added" in text
    assert "&lt;i&gt;" in (await page("/acme/rocket/pulls/2"))[1]
    assert "+<i>" in (await page("/acme/rocket/pulls/2.diff"))[1]
    for path in ("/", "/acme/rocket", "/acme/rocket/issues?state=all", "/acme/rocket/pulls", "/user/login", "/acme/rocket/issues/new"):
        assert (await page(path))[0] == 200
    assert (await page("/acme/nothing"))[0] == 404
    await forge.create_repo("alice", "secret", private=True)
    assert (await page("/alice/secret"))[0] == 404
    assert "alice/secret" not in (await page("/"))[1]
    form = aiohttp.FormData({"user_name": "alice", "password": "wrong"})
    async with client.session.post(f"{forge.url}/user/login", data=form) as reply:
        assert reply.status == 403
