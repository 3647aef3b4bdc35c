"""The bot's operations: recorded replies in, and creates that end with exactly one object whatever happens to their answer."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from bot.gitea import errors
from bot.gitea.abc import GiteaAPI
from bot.gitea.forge import Forge
from bot.redaction import Secret

DATA = Path(__file__).parent / "data" / "gitea"
VERSIONS = ["1.22", "1.26"]
JSON = {"Content-Type": "application/json"}
MARK = "<!-- timmy-dispatch:v1 key=sprint:01J -->"
ME = {"id": 5, "login": "timmy"}
REPO = {"id": 9, "full_name": "acme/rocket"}


class Api(GiteaAPI):
    """Asks `answer(method, path, query, data)` for (status, JSON) or an exception; `None` is an empty body, or `null` in a GET."""

    def __init__(self, answer):
        super().__init__("http://git.example", Secret("t0ken-0123456789"), max_items=50, clock=lambda: 0.0, jitter=lambda: 0.0)
        self.answer, self.calls, self.slept = answer, [], []

    async def _request(self, method, url, headers, body):
        parts = urlsplit(url)
        path, query = parts.path.removeprefix("/api/v1"), {key: value[0] for key, value in parse_qs(parts.query).items()}
        data = json.loads(body) if body else None
        self.calls.append((method, path, query, data))
        reply = self.answer(method, path, query, data)
        if isinstance(reply, Exception):
            raise reply
        status, content, *headers = reply
        return (
            status,
            JSON | (headers[0] if headers else {}),
            b"" if content is None and (method, status) != ("GET", 200) else json.dumps(content).encode(),
        )

    async def sleep(self, seconds):
        self.slept.append(seconds)

    def count(self, method):
        return sum(call[0] == method for call in self.calls)


class Server:
    """Issue 1, its comments, labels, hooks and pull requests. `trouble` lists what befalls the next POSTs: "before" answers 502
    and does nothing, "after" does it and answers 502, "lost" does it and hangs up, "cut" does it and answers half, "missing" answers 500.
    """

    def __init__(self, *trouble):
        self.trouble = list(trouble)
        self.lists = {"comments": [], "labels": [], "hooks": [], "pulls": [], "issues": []}
        self.number = 100

    def __call__(self, method, path, query, data):
        kind = path.rpartition("/")[2]
        if path == "/user":
            return 200, ME
        if path == "/repos/acme/rocket":
            return 200, REPO
        if path == "/repos/acme/rocket/issues/1":
            return 200, {"number": 1}
        if kind not in self.lists:
            return 404, {"message": "not found"}
        if method == "GET":
            return (200, self.lists[kind]) if query["page"] == "1" else (200, None)
        fate = self.trouble.pop(0) if self.trouble else "done"
        if fate == "missing":
            return 500, {"message": ""}
        if fate == "before":
            return 502, None
        self.number += 1
        made = {"id": self.number, "number": self.number, "user": ME, "state": "open"} | data
        if kind == "pulls":
            made |= {"head": {"label": data["head"], "repo_id": 9}, "base": {"ref": data["base"]}}
        if kind == "issues":
            made |= {"labels": [{"id": number, "name": f"label {number}"} for number in data["labels"]]}
        self.lists[kind].append(made)
        return {"after": (502, None), "lost": errors.Lost("gone"), "cut": (201, None), "done": (201, made)}[fate]


def forge(answer):
    api = Api(answer)
    return Forge(api), api


def recorded(version, name):
    reply = json.loads((DATA / f"recorded-{version}" / "replies" / f"{name}.json").read_text())
    return (
        reply["status"],
        reply["body"],
        {"X-Total-Count": reply["headers"]["X-Total-Count"]} if "X-Total-Count" in reply["headers"] else {},
    )


def playing(recording, /, **names):
    """Answers by the last word of the path with recorded replies."""

    def answer(method, path, query, data):
        name = names.get(unquote(path.rpartition("/")[2])) or names["rest"]
        return recorded(recording, name) if query.get("page", "1") == "1" else (200, None)

    return answer


# --- creates: exactly one object

CREATES = {
    "comments": lambda it: it.comment("acme/rocket", 1, f"Queued.\n\n{MARK}"),
    "labels": lambda it: it.ensure_label("acme/rocket", "dispatch", color="#0e8a16"),
    "hooks": lambda it: it.create_hook("acme/rocket", "http://bot.example/webhook", Secret("hook-secret"), ["issues"]),
    "pulls": lambda it: it.create_pull("acme/rocket", "dispatch/issue-1", "main", "Fix", f"Closes #1\n\n{MARK}"),
    "issues": lambda it: it.create_issue("acme/rocket", "Fleet stalled", f"Look.\n\n{MARK}", label_ids=[3]),
}


@pytest.mark.parametrize("kind", CREATES)
@pytest.mark.parametrize(
    ("trouble", "posts"),
    [((), 1), (("before",), 2), (("after",), 1), (("lost",), 1), (("cut",), 1), (("before", "after"), 2), (("before", "lost"), 2)],
    ids=lambda value: "+".join(value) or "none" if isinstance(value, tuple) else "",
)
async def test_a_create_ends_with_exactly_one_object(kind, trouble, posts):
    server = Server(*trouble)
    it, api = forge(server)
    made = await CREATES[kind](it)
    assert made["id"] == 101
    assert len(server.lists[kind]) == 1
    assert api.count("POST") == posts


@pytest.mark.parametrize("kind", CREATES)
async def test_a_create_that_fails_twice_is_left_to_the_caller(kind):
    server = Server("before", "before", "before")
    it, api = forge(server)
    with pytest.raises(errors.OutcomeUnknown):
        await CREATES[kind](it)
    assert api.count("POST") == 2
    assert server.lists[kind] == []


@pytest.mark.parametrize("kind", CREATES)
async def test_a_look_up_that_fails_leaves_the_doubt_standing(kind):
    server = Server("after")

    def answer(method, path, query, data):
        return server(method, path, query, data) if server.trouble else (503, None)

    with pytest.raises(errors.OutcomeUnknown):
        await CREATES[kind](forge(answer)[0])
    assert len(server.lists[kind]) == 1


@pytest.mark.parametrize("kind", ["comments", "issues"])
async def test_without_a_marker_a_doubtful_create_is_not_repeated(kind):
    server = Server("before")
    it, api = forge(server)
    with pytest.raises(errors.OutcomeUnknown):
        await (it.comment("acme/rocket", 1, "plain") if kind == "comments" else it.create_issue("acme/rocket", "t", "plain"))
    assert api.count("POST") == 1


async def test_a_comment_on_a_missing_issue_says_so():
    server = Server("missing")
    it, api = forge(lambda method, path, *rest: (404, None) if path.endswith("/issues/1") else server(method, path, *rest))
    with pytest.raises(errors.NotFound):
        await it.comment("acme/rocket", 1, f"x {MARK}")
    assert api.count("POST") == 1


async def test_a_marker_in_another_hand_is_not_ours():
    server = Server("before")
    server.lists["comments"] += [
        {"id": 1, "user": {"id": 66}, "body": MARK},
        {"id": 2, "user": None, "body": MARK},
        {"id": 3, "user": ME, "body": None},
        {"id": 4, "user": ME, "body": MARK.replace("01J", "01JX")},
    ]
    it, _ = forge(server)
    assert (await it.comment("acme/rocket", 1, f"x {MARK}"))["id"] == 101
    assert (await it.find_comment("acme/rocket", 1, MARK, 5))["id"] == 101
    assert await it.find_comment("acme/rocket", 1, "<!-- other -->", 5) is None


async def test_a_label_is_listed_before_it_is_made_and_made_exclusive():
    server = Server()
    server.lists["labels"].append({"id": 7, "name": "dispatch/running", "exclusive": False})

    def answer(method, path, query, data):
        return (200, {"id": 7} | data) if method == "PATCH" else server(method, path, query, data)

    it, api = forge(answer)
    assert await it.ensure_label("acme/rocket", "dispatch/running", color="#cccccc", exclusive=True) == {"id": 7, "exclusive": True}
    assert (await it.ensure_label("acme/rocket", "dispatch/running", color="#cccccc"))["id"] == 7
    assert (api.count("POST"), api.count("PATCH")) == (0, 1)


async def test_rotating_a_hook_makes_a_new_one_beside_the_old():
    server = Server("after")
    server.lists["hooks"].append({"id": 1, "config": {"url": "http://bot.example/webhook"}})
    it, api = forge(server)
    made = await CREATES["hooks"](it)
    assert made["id"] == 101
    sent = next(data for method, _, _, data in api.calls if method == "POST")
    assert sent == {
        "type": "gitea",
        "active": True,
        "events": ["issues"],
        "branch_filter": "*",
        "authorization_header": "",
        "config": {"url": "http://bot.example/webhook", "content_type": "json", "secret": "hook-secret"},
    }


# --- pull requests


def pull(number, state="open", label="dispatch/issue-1", repo_id=9, base="main", body=""):
    return {"number": number, "state": state, "head": {"label": label, "repo_id": repo_id}, "base": {"ref": base}, "body": body}


@pytest.mark.parametrize(
    ("pulls", "found"),
    [
        ([], None),
        ([pull(3), pull(4, "closed")], 3),
        ([pull(4, "closed"), pull(3)], 3),
        ([pull(3, "closed"), pull(7, "closed"), pull(5, "closed")], 7),
        ([pull(3, repo_id=10), pull(4, base="dev"), pull(5, label="other")], None),
        ([pull(3, repo_id=-1, body=f"x {MARK}")], 3),
        ([pull(3, body=None), {"number": 4, "state": "open", "head": None, "base": None, "body": None}], 3),
    ],
)
async def test_finding_a_pull_request_in_any_state(pulls, found):
    server = Server()
    server.lists["pulls"] = pulls
    it, api = forge(server)
    result = await it.find_pull("acme/rocket", 9, "dispatch/issue-1", "main", MARK)
    assert (result and result["number"]) == found
    assert api.calls[0][2]["state"] == "all"


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_409_is_looked_up(version):
    _, listed, _ = recorded(version, "pulls-list")
    mine = listed[0]

    def answer(method, path, query, data):
        if method == "POST":
            return recorded(version, "pr-create-exists")
        if path.endswith("/pulls"):
            return 200, listed
        return 200, {"id": mine["head"]["repo_id"]}

    it, _ = forge(answer)
    assert (await it.create_pull("acme/rocket", "dispatch/issue-1", "main", "t", "b"))["number"] == mine["number"]
    with pytest.raises(errors.Conflict):
        await it.create_pull("acme/rocket", "dispatch/issue-2", "main", "t", "b")


async def test_an_old_closed_pull_request_is_not_taken_for_the_new_one():
    server = Server("before")
    server.lists["pulls"] = [{"id": 1} | pull(1, "closed")]
    it, _ = forge(server)
    assert (await CREATES["pulls"](it))["number"] == 101


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("name", "kind"), [("pr-create-missing-head", errors.NotFound), ("pr-create-head-is-base", errors.Invalid)])
async def test_pull_requests_that_cannot_be(version, name, kind):
    with pytest.raises(kind):
        await forge(lambda *_: recorded(version, name))[0].create_pull("acme/rocket", "a", "b", "t", "")


# --- who added the label


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_stranger_who_added_the_label_in_the_web_form_is_credited(version):
    it, _ = forge(playing(version, timeline="timeline-label-by-stranger"))
    event_id, user, when = await it.label_adder("acme/rocket", 4, "dispatch")
    assert user["login"] == "mallory"
    assert event_id > 0
    assert when.startswith("2026-")
    assert await it.label_adder("acme/rocket", 4, "bug") is None


def labelled(number, body, name="dispatch", user="alice"):
    return {
        "id": number,
        "type": "label",
        "body": body,
        "label": {"name": name},
        "user": user and {"login": user},
        "created_at": f"t{number}",
    }


@pytest.mark.parametrize(
    ("items", "credited"),
    [
        ([], None),
        ([labelled(1, "1")], (1, "alice")),
        ([labelled(1, "1", user="mallory"), labelled(2, "1", "bug")], (1, "mallory")),
        ([labelled(1, "1"), labelled(2, "")], None),
        ([labelled(1, "1"), labelled(2, ""), labelled(3, "1", user="bob")], (3, "bob")),
        ([labelled(1, "1"), labelled(2, "", "dispatch/queued")], (1, "alice")),
        ([labelled(1, "1", user=None)], None),
        ([{"id": 1, "type": "comment", "body": "1", "label": None}, {"id": 2, "type": "label", "body": "1", "label": None}], None),
    ],
)
async def test_the_newest_label_event_that_was_not_taken_back(items, credited):
    it, _ = forge(lambda method, path, query, data: (200, items if query["page"] == "1" else None))
    adder = await it.label_adder("acme/rocket", 1, "dispatch")
    assert (adder and (adder[0], adder[1]["login"])) == credited


@pytest.mark.parametrize("version", VERSIONS)
async def test_permissions(version):
    async def ask(name):
        return await forge(lambda *_: recorded(version, name))[0].permission("acme/rocket", "someone")

    assert await ask("permission-admin-asks-writer") == "write"
    assert await ask("permission-admin-asks-stranger") == "read"
    with pytest.raises(errors.NotFound):
        await ask("permission-admin-asks-unknown")
    with pytest.raises(errors.Forbidden, match="Only admins"):
        await ask("permission-writer-asks-other")
    for odd in ({}, {"permission": None}, []):
        with pytest.raises(errors.BadReply):
            await forge(lambda *_, odd=odd: (200, odd))[0].permission("acme/rocket", "someone")


# --- lists and the rest


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_list_by_an_unknown_label_yields_nothing_to_work_on(version):
    it, api = forge(playing(version, rest="issues-list-unknown-label-is-unfiltered"))
    assert len(await it.issues_since("acme/rocket")) > 1
    assert await it.issues_since("acme/rocket", datetime(2026, 11, 24, tzinfo=UTC), ["no-such-label"]) == []
    assert api.calls[-1][2] | {"page": "1"} == {
        "type": "issues",
        "state": "all",
        "since": "2026-11-24T00:00:00Z",
        "labels": "no-such-label",
        "page": "1",
        "limit": "50",
    }
    found = await forge(playing(version, rest="issues-list"))[0].issues_since("acme/rocket", None, ["dispatch"], state="open")
    assert found
    assert all("dispatch" in {label["name"] for label in issue["labels"]} for issue in found)


async def test_pull_requests_among_issues_are_dropped():
    page = [{"id": 1, "pull_request": None, "labels": None}, {"id": 2, "pull_request": {"merged": False}}, {"id": 3}]
    it, _ = forge(lambda method, path, query, data: (200, page if query["page"] == "1" else []))
    assert [issue["id"] for issue in await it.issues_since("acme/rocket")] == [1, 3]


@pytest.mark.parametrize("version", VERSIONS)
async def test_recorded_replies_read_as_they_are(version):
    def body(name):
        return recorded(version, name)[1]

    it, api = forge(
        playing(
            version,
            user="user",
            version="version",
            api="settings-api",
            ui="settings-ui",
            comments="comments-of-issue",
            timeline="timeline",
            dependencies="issue-dependencies",
            hooks="hook-list",
            pulls="pulls-list",
            reviews="reviews",
            status="combined-status-none",
            rocket="repo",
            rest="issue",
        )
    )
    assert (await it.me())["login"] == "timmy"
    assert (await it.me())["login"] == "timmy"
    assert [path for _, path, _, _ in api.calls] == ["/user"]
    assert (await it.version()).startswith("1.2")
    settings = await it.settings()
    assert (settings["max_response_items"], "eyes" in settings["allowed_reactions"]) == (50, True)
    assert await it.repo("acme", "rocket") == body("repo")
    assert await it.issue("acme/rocket", 1) == body("issue")
    assert await it.comments("acme/rocket", 1) == body("comments-of-issue")
    assert await it.comments_since("acme/rocket", datetime(2026, 1, 1, tzinfo=UTC)) == body("comments-of-issue")
    assert await it.timeline("acme/rocket", 1) == body("timeline")
    assert await it.dependencies("acme/rocket", 1) == []
    assert await it.hooks("acme/rocket") == body("hook-list")
    assert await it.pulls("acme/rocket", "open") == body("pulls-list")
    assert await it.pull("acme/rocket", 5) == body("issue")
    assert await it.reviews("acme/rocket", 5) == body("reviews")
    assert await it.review_comments("acme/rocket", 5, 6) == body("comments-of-issue")
    status = await it.combined_status("acme/rocket", "dispatch/issue-1")
    assert (status["total_count"], status["statuses"]) == (0, [])
    assert api.calls[-1][1].endswith("/commits/dispatch%2Fissue-1/status")


async def test_a_combined_status_has_all_its_statuses():
    everything = [{"id": number, "status": "success"} for number in range(1, 76)]

    def answer(method, path, query, data):
        start = (int(query.get("page", 1)) - 1) * 50
        page = everything[start : start + 50] if "page" in query else everything[:30]
        return 200, {"state": "success", "total_count": 75, "statuses": page}

    assert (await forge(answer)[0].combined_status("acme/rocket", "abc"))["statuses"] == everything


async def test_a_timeline_of_a_missing_issue_is_not_found():
    it, api = forge(lambda method, path, query, data: (404, None) if path.endswith("/9") else (500, {"message": ""}))
    for ask in (it.timeline, it.comments):
        with pytest.raises(errors.NotFound):
            await ask("acme/rocket", 9)
    assert api.slept == []


async def test_absence_that_is_no_error():
    it, _ = forge(lambda *_: (404, None))
    assert await it.branch("acme/rocket", "dispatch/issue-1") is None
    assert await it.dependencies("acme/rocket", 1) == []
    assert await it.delete_hook("acme/rocket", 1) is None
    assert await forge(lambda *_: (204, None))[0].get_comment("acme/rocket", 1) is None


async def test_a_renamed_repository_is_resolved_by_its_number():
    def answer(method, path, query, data):
        if path == "/repositories/5":
            return 200, {"id": 5, "full_name": "acme/rocket2"}
        if path.startswith("/repos/acme/rocket/"):
            return 301, None, {"Location": "/api/v1" + path.replace("rocket", "rocket2", 1)}
        return 200, {"number": 1}

    it, _ = forge(answer)
    assert (await it.issue("acme/rocket", 1))["number"] == 1
    with pytest.raises(errors.Moved):
        await it.comment("acme/rocket", 1, f"x {MARK}")
    assert await it.resolve(5) == "acme/rocket2"
    with pytest.raises(errors.BadReply, match="full_name"):
        await forge(lambda *_: (200, {}))[0].resolve(5)


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_archived_repository_is_a_clear_refusal(version):
    with pytest.raises(errors.Archived, match="is archived"):
        await forge(lambda *_: recorded(version, "comment-create-archived"))[0].comment("acme/rocket", 2, "x")


@pytest.mark.parametrize("version", VERSIONS)
async def test_labels_that_vanish_are_seen_in_the_answer(version):
    async def add(name):
        return await forge(lambda *_: recorded(version, name))[0].add_labels("acme/rocket", 1, ["no-such-label"])

    assert "no-such-label" not in await add("labels-add-unknown")
    assert "dispatch/running" in await add("labels-add-exclusive")
    assert await forge(lambda *_: (200, None))[0].add_labels("acme/rocket", 1, ["a"]) == []


WRITES = {
    "react": lambda it: it.react("acme/rocket", 7, "eyes"),
    "unreact": lambda it: it.unreact("acme/rocket", 7, "eyes"),
    "react_issue": lambda it: it.react_issue("acme/rocket", 1, "rocket"),
    "unreact_issue": lambda it: it.unreact_issue("acme/rocket", 1, "rocket"),
    "add_labels": lambda it: it.add_labels("acme/rocket", 1, ["dispatch"]),
    "remove_label": lambda it: it.remove_label("acme/rocket", 1, 15),
    "edit_comment": lambda it: it.edit_comment("acme/rocket", 7, "new"),
    "edit_issue": lambda it: it.edit_issue("acme/rocket", 1, state="closed"),
    "edit_pull": lambda it: it.edit_pull("acme/rocket", 5, title="WIP: x"),
    "update_hook": lambda it: it.update_hook("acme/rocket", 8, "http://bot.example/webhook", ["issues"]),
    "delete_hook": lambda it: it.delete_hook("acme/rocket", 8),
    "test_hook": lambda it: it.test_hook("acme/rocket", 8),
}
PATHS = {
    "react": "POST /issues/comments/7/reactions",
    "unreact": "DELETE /issues/comments/7/reactions",
    "react_issue": "POST /issues/1/reactions",
    "unreact_issue": "DELETE /issues/1/reactions",
    "add_labels": "POST /issues/1/labels",
    "remove_label": "DELETE /issues/1/labels/15",
    "edit_comment": "PATCH /issues/comments/7",
    "edit_issue": "PATCH /issues/1",
    "edit_pull": "PATCH /pulls/5",
    "update_hook": "PATCH /hooks/8",
    "delete_hook": "DELETE /hooks/8",
    "test_hook": "POST /hooks/8/tests",
}


@pytest.mark.parametrize("name", WRITES)
async def test_writes_that_do_no_harm_twice_are_repeated(name):
    replies = iter([errors.Lost("gone"), (502, None), (201, [] if name == "add_labels" else {"id": 1})])
    it, api = forge(lambda *_: next(replies))
    await WRITES[name](it)
    assert {f"{method} {path.removeprefix('/repos/acme/rocket')}" for method, path, _, _ in api.calls} == {PATHS[name]}
    assert len({json.dumps(data) for _, _, _, data in api.calls}) == 1


async def test_an_updated_hook_keeps_everything_the_server_would_reset():
    it, api = forge(lambda *_: (200, {"id": 8}))
    await it.update_hook("acme/rocket", 8, "http://bot.example/webhook", ["issues", "push"])
    sent = api.calls[0][3]
    assert sent["active"] is True
    assert sent["events"] == ["issues", "push"]
    assert "secret" not in sent["config"]


@pytest.mark.parametrize("repo", ["rocket", "/rocket", "acme/", "a/b/c", ""])
async def test_a_repository_is_owner_and_name(repo):
    it, api = forge(lambda *_: (200, {}))
    with pytest.raises(ValueError, match="owner/name"):
        await it.issue(repo, 1)
    assert api.calls == []


@pytest.mark.parametrize("odd", [[], "x", 3])
async def test_an_object_that_is_none_is_a_bad_reply(odd):
    asks = [
        lambda it: it.me(),
        lambda it: it.issue("a/b", 1),
        lambda it: it.edit_comment("a/b", 1, "x"),
        lambda it: it.get_comment("a/b", 1),
    ]
    for ask in asks:
        with pytest.raises(errors.BadReply):
            await ask(forge(lambda *_: (200, odd))[0])


def ref(name: str, sha: str = "a" * 40) -> dict:
    return {
        "ref": f"refs/heads/{name}",
        "url": "http://git.example/x",
        "object": {"type": "commit", "sha": sha, "url": "http://git.example/y"},
    }


@pytest.mark.parametrize(
    ("answer", "heads"),
    [
        (
            (200, [ref("dispatch/issue-9"), ref("dispatch/issue-90", "b" * 40)]),
            {"dispatch/issue-9": "a" * 40, "dispatch/issue-90": "b" * 40},
        ),
        ((200, ref("dispatch/issue-9")), {"dispatch/issue-9": "a" * 40}),
        ((200, []), {}),
        ((404, {"message": "not found"}), {}),
    ],
    ids=["a list", "one as an object", "an empty list", "none"],
)
async def test_branches_by_the_beginning_of_their_name(answer, heads):
    it, api = forge(lambda *_: answer)
    assert await it.heads("acme/rocket", "dispatch/issue-9") == heads
    assert [call[1] for call in api.calls] == ["/repos/acme/rocket/git/refs/heads%2Fdispatch%2Fissue-9"]


@pytest.mark.parametrize("odd", ["x", 3, [None], [{"ref": "refs/heads/x"}], {"object": {"sha": "a"}}])
async def test_branches_that_are_none_are_a_bad_reply(odd):
    it, _ = forge(lambda *_: (200, odd))
    with pytest.raises(errors.BadReply):
        await it.heads("acme/rocket", "x")
