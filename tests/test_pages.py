"""The pages over real HTTP: what they tell, that nothing in them acts, who may read them, and how much one of them can be."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from browser_support import CHROMIUM, DESKTOP, TELEPHONE, browser
from fleet_support import now_ms
from world import World, make_world, until

from bot import replies
from bot.config import Secrets, load
from bot.gitea.errors import NotFound, Unauthorized, Unavailable
from bot.models import ConfigError, Decision, IssueRef, Limits, OutcomeKind, RepoId, Source, SprintId, SprintState, SprintView
from bot.redaction import Secret
from bot.store import Store, aged, intents, sprints, steps
from bot.store import pages as rows
from bot.web.pages import Openness, sight
from bot.web.pages.fresh import Fresh
from bot.web.pages.routes import HEADERS, STEPS

TOKEN = "the-access-token-of-the-pages"
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> [bold]rich[/bold] \x1b[31mred\x1b[0m \u202eback & 'quoted' \"twice\""
BODY = "script: {script}\n\nPlease mend `lib/slug.sh`."
numbers = itertools.count(100)


class Reader:
    """A browser without cookies of its own beyond what it was given; follows no redirect."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def __call__(self, path: str, **headers: str) -> tuple[int, str]:
        async with self.session.get(path, headers=headers, allow_redirects=False) as reply:
            return reply.status, await reply.text()


@pytest.fixture
async def read(world: World) -> AsyncIterator[Reader]:
    async with reader(world) as made:
        yield made


class reader:  # noqa: N801 - a context manager that reads like a function
    def __init__(self, world: World) -> None:
        self._session = aiohttp.ClientSession(f"http://127.0.0.1:{world.port}", cookie_jar=aiohttp.CookieJar(unsafe=True))

    async def __aenter__(self) -> Reader:
        return Reader(await self._session.__aenter__())

    async def __aexit__(self, *exc: object) -> None:
        await self._session.__aexit__(*exc)


def put_sprint(conn: sa.Connection, *, repo_id: int, repo: str = "alice/slug", title: str = "a title", **values: Any) -> str:
    """A row as it would be in that state; nobody takes a queued one before its time."""
    number, now = next(numbers), now_ms()
    sprint_id = f"seed{number:08d}"
    made = sprints.new(
        conn,
        sprint_id=sprint_id,
        repo_id=repo_id,
        issue=IssueRef.of(repo, number),
        title=title,
        source=Source.COMMAND,
        priority=5,
        trigger=f"terminal:{sprint_id}",
        requester_id=1,
        requester="alice",
        instructions="",
        options={},
        limits=Limits(steps=60, seconds=600, tokens=100_000, usd=2.0),
        text_hash="",
        base_branch="main",
        now_ms=now - 60_000,
    )
    assert made
    state = values.get("state", SprintState.SETTLED)
    fill = {"state": state, "not_before_ms": now + 3_600_000, "projected_rev": 10, "updated_ms": now}
    if state != SprintState.QUEUED:
        fill |= {"started_ms": now - 30_000, "admitted_ms": now - 30_000}
    if state == SprintState.SETTLED:
        fill |= {"settled_ms": now, "outcome": OutcomeKind.PULL_REQUEST, "pr": number, "pr_state": "open"}
    conn.execute(sprints.table.update().where(sprints.c.id == sprint_id).values(**{**fill, **values}))
    return sprint_id


def put_steps(
    conn: sa.Connection, sprint_id: str, count: int, *, calls: int = 1, text: str = "I look.", result: str = "exit 0\nfine"
) -> None:
    """`count` steps, each with `calls` tool calls that answered `result`."""
    now = now_ms()
    message = {"role": "assistant", "content": text}
    conn.execute(
        steps.table.insert(),
        [
            {"sprint_id": sprint_id, "attempt": 1, "n": n, "reserved_usd": 0.0, "reserved_tokens": 0, "reply": message, "input": 10, "output": 5,
             "cost_usd": 0.01, "provider": "p", "model": "m", "started_ms": now, "done_ms": now + 1500}
            for n in range(1, count + 1)
        ],
    )  # fmt: skip
    conn.execute(
        steps.tool_calls.insert(),
        [
            {"sprint_id": sprint_id, "attempt": 1, "n": n, "i": i, "call_id": f"c{n}-{i}", "tool": "run_command",
             "arguments": json.dumps({"command": f"echo {text} {n}"}), "result": result, "started_ms": now, "done_ms": now + 200}
            for n in range(1, count + 1)
            for i in range(calls)
        ],
    )  # fmt: skip


async def put(world: World, **values: Any) -> str:
    values.setdefault("repo_id", world.stage.repo_id)
    return await world.store.write(lambda conn: put_sprint(conn, **values))


async def private_repository(world: World) -> int:
    """Another repository of alice's, which strangers cannot see; returns its id."""
    return int((await world.alice.client.post("/user/repos", {"name": "vault", "private": True}))["id"])


def key(world: World, sprint_id: str) -> str:
    assert world.service is not None
    return world.service.projector._links.key(sprint_id)


async def run(world: World, script: str = "fix", title: str = "slug keeps capitals", words: str = "") -> int:
    issue = await world.alice.open_issue(title, BODY.format(script=script))
    await world.alice.comment(issue, f"/dispatch run\n{words}")
    return issue


# what they tell


async def test_the_status_comment_leads_to_the_transcript_and_the_fleet_to_the_pull_request(world: World, read: Reader):
    issue = await run(world, words="keep it POSIX")
    sprint = await world.settled(issue)
    link = re.search(r"\[(?:live )?transcript\]\((\S+)\)", await world.status_comment(issue))
    assert link, await world.status_comment(issue)
    assert link[1] == f"http://127.0.0.1:{world.port}/sprints/{sprint.id}?key={key(world, sprint.id)}"
    status, page = await read(link[1].partition(str(world.port))[2])
    assert status == 200
    for told in ("slug keeps capitals", f"alice/slug#{issue}", "by alice", "dispatch/issue-1", "scripted-1", "6 of 60", "keep it POSIX"):
        assert told in page, told
    for told in (
        "alice asked to run: queued.",
        "It ended: a pull request stands (slug now folds case",
        "I look at the repository first.",
        "sh test.sh",
    ):
        assert told in page, told
    assert "<b>edit_file</b> <code>lib/slug.sh</code>" in page
    assert "slug now folds case and punctuation" in page
    assert page.count('class="step"') == 6
    assert page.count('<details class="call bad"') == 1, "the test that failed at first"
    status, page = await read("/")
    assert status == 200
    assert "<strong>Idle</strong>" in page
    assert f"/alice/slug/pulls/{sprint.pr}" in page
    assert f'href="./sprints/{sprint.id}"' in page
    assert "idle</b>" in page, "the worker"


async def test_the_fleet_page_shows_what_runs_and_why_the_rest_waits(base: Path):
    async with make_world(base, queue={"slots": 1}) as world, reader(world) as read:
        first = await run(world, "slow(30)", "the first")

        async def working():
            view = await world.sprint(first)
            return view is not None and view.state == "working"

        await until(working)
        second, third = await run(world, title="the second"), await run(world, title="the third")

        async def queued():
            return "the third" in (await read("/"))[1]

        await until(queued)
        _, page = await read("/")
        running, _, rest = page.partition('id="queue"')
        assert "the first" in running
        queue = rest.partition('id="recent"')[0]
        assert queue.index("the second") < queue.index("the third")
        assert [int(place) for place in re.findall(r'class="number"[^>]*>(\d+)<', queue)] == [1, 2]
        assert f"alice/slug#{second}" in queue
        assert f"alice/slug#{third}" in queue
        assert "Waits because as many sprints as allowed are running already" in queue
        assert re.search(r"<b>1</b> running</span>\s*<span><b>2</b> waiting", page)


async def test_checks_and_the_kept_patch_are_there(base: Path):
    async with make_world(base, start=False) as world:
        await world.start(repositories=[{"name": world.stage.repo, "checks": ["sh test.sh"]}])
        async with reader(world) as read:
            issue = await run(world, 'write({"lib/slug.sh": "slug() { echo no; }\\n"})')
            sprint = await world.settled(issue)
            _, page = await read(f"/sprints/{sprint.id}")
            assert "exit code 1" in page
            assert "FAIL" in page
            assert "/dispatch retry" in page, "what to do next"
            issue = await run(world, "touch_workflow")
            sprint = await world.settled(issue)
            assert sprint.outcome == "refused"
            _, page = await read(f"/sprints/{sprint.id}")
            assert "The patch that was not published" in page
            assert "+on: push" in page


async def test_the_help_page_comes_from_the_declarations(world: World, read: Reader):
    status, page = await read("/help")
    assert status == 200
    assert world.service is not None
    for name, command in world.service.commands.items():
        assert (f'id="{name}"' in page) is not command.hidden
    assert "/dispatch cancel" in page
    assert "<code>dispatch</code>" in page, "the trigger label"
    assert "timmy" in page


async def test_an_attempt_that_was_lost_and_a_call_that_was_cut_off_are_told(world: World, read: Reader):
    sprint_id = await put(world)

    def more(conn: sa.Connection) -> None:
        put_steps(conn, sprint_id, 2)
        steps.reserve(conn, sprint_id, 2, 1, usd=0.1, tokens=10, now_ms=now_ms())
        steps.tool_started(conn, sprint_id, 2, 1, 0, call_id="c", tool="run_command", arguments='{"command": "make', now_ms=now_ms())
        steps.reserve(conn, sprint_id, 2, 2, usd=0.1, tokens=10, now_ms=now_ms())
        steps.failed(conn, sprint_id, 2, 2, error="HTTP 500 from the provider", billed=True, now_ms=now_ms())

    await world.store.write(more)
    _, page = await read(f"/sprints/{sprint_id}")
    assert page.count("Attempt 2: begun anew") == 1
    assert "the work was interrupted here" in page
    assert "{&#34;command&#34;: &#34;make" in page, "arguments that are no JSON are shown as they are"
    assert "No usable answer: HTTP 500 from the provider" in page
    assert "not kept any more" not in page
    await world.store.write(
        lambda conn: conn.execute(steps.table.update().where(steps.table.c.n == 1, steps.table.c.attempt == 1).values(reply=sa.null()))
    )
    _, page = await read(f"/sprints/{sprint_id}")
    assert page.count("What was said here is not kept any more.") == 1
    # A sprint of long ago: its steps have gone as well.
    over = {"state": "settled", "outcome": "no_change", "settled_ms": now_ms(), "steps": 4}
    await world.store.write(lambda conn: conn.execute(sprints.table.update().where(sprints.c.id == sprint_id).values(**over)))
    await world.store.write(lambda conn: aged.thin(conn, [sprint_id]))
    status, page = await read(f"/sprints/{sprint_id}")
    assert (status, page.count("What was done is not kept any more.")) == (200, 1)
    assert "No model was called yet" not in page


# nothing in them acts


async def test_nothing_untrusted_acts_and_no_secret_shows(world: World, read: Reader):
    token, webhook = world.timmy.token.reveal(), world.stage.webhook_secret.reveal()
    words = f"{HOSTILE} {token} {webhook}"
    sprint_id = await put(
        world,
        title=words[:255],
        outcome=OutcomeKind.FAILED,
        reason="checks",
        detail=f"`code` {words}",
        doing=words,
        summary=words,
        instructions=words,
        branch="dispatch/<b>",
        model=words[:90],
        requester=words[:90],
        checks=[{"command": words, "exit_code": 1, "seconds": 2.0, "output": words}],
        flagged=[words],
    )
    waiting = await put(world, title=words[:255], state=SprintState.QUEUED, waiting_reason="requeued", waiting_note=words[:400])

    def more(conn: sa.Connection) -> None:
        put_steps(conn, sprint_id, 1, text=words, result=f"exit 1\n{words}")
        intents.decide(
            conn, repo_id=world.stage.repo_id, issue=1, kind=words, result="ok", reason=words, actor=words, sprint_id=sprint_id, now_ms=1
        )
        conn.execute(intents.decisions.update().values(issue=sprints.get(conn, sprint_id).issue.number))

    await world.store.write(more)
    for path in ("/", "/live", f"/sprints/{sprint_id}", f"/sprints/{sprint_id}/live", f"/sprints/{waiting}"):
        status, page = await read(path)
        assert status == 200
        assert "alert(1)" in page, path
        assert "[bold]rich[/bold]" in page or path != f"/sprints/{sprint_id}"
        assert "<script>alert" not in page
        assert "<img" not in page
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)
        assert not re.search(r"<[^>]+\son\w+=", page), "no handler in an attribute"
        assert not re.search(r"<[^>]+\sstyle=", page), "the policy allows no inline style"
        assert token not in page
        assert webhook not in page
        assert "[redacted]" in page


async def test_every_answer_carries_the_headers(world: World, read: Reader):
    sprint_id = await put(world)
    for path in (
        "/",
        "/live",
        "/help",
        f"/sprints/{sprint_id}",
        f"/sprints/{sprint_id}/live",
        "/sprints/unknown",
        "/login",
        "/static/none",
    ):
        async with read.session.get(path) as reply:
            for name, value in HEADERS.items():
                assert reply.headers[name] == value, (path, name)
    policy = HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for name, kind in (("pages.css", "text/css"), ("pages.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
        async with read.session.get(f"/static/{name}") as reply:
            assert reply.status == 200
            assert reply.content_type == kind
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert "max-age" in reply.headers["Cache-Control"]
            size = len(await reply.read())
            assert size < 16_384


async def test_the_webhook_is_as_it_was(world: World, read: Reader):
    async with read.session.post("/webhook", data=b"{}", headers={"Content-Type": "application/json"}) as reply:
        assert reply.status == 401
        assert "Content-Security-Policy" not in reply.headers


def test_a_line_that_looks_like_a_credential_is_told_and_not_shown():
    token = "ghp_" + "a1" * 18
    key_lines = ["+-----BEGIN RSA PRIVATE KEY-----", "+MIIEpAIBAAKCAQEA", "+-----END RSA PRIVATE KEY-----"]
    patch = "\n".join(
        ["diff --git a/x b/x", "--- a/x", "+++ b/x", "@@ -0,0 +1,5 @@", f"+token = {token}", *key_lines, "+harmless", "-gone", " same"]
    )
    shown = sight.patch_lines(patch)
    text = "\n".join(line for _, line in shown)
    assert token not in text
    assert "MIIE" not in text
    assert "looks like a GitHub token" in text
    assert [tone for tone, _ in shown] == ["place"] * 4 + ["hidden"] * 4 + ["added", "removed", ""]


@pytest.mark.parametrize(
    ("decision", "words"),
    [
        (("admit", "ok", "admitted, time 1", ""), "A slot was free: it was let in."),
        (("admit", "ok", "admitted, time 3", ""), "A slot was free: it was let in, for the 3rd time."),
        (("wait", "budget", "$5 of $5", ""), "It waits because the budget of the day is used up ($5 of $5)."),
        (("requeue", "provider", "", ""), "It went back into the queue because no model provider answers at the moment."),
        (("settle", "failed", "the disk is full.", ""), "It ended: failed (the disk is full)."),
        (("cancel", "denied", "permission", "mallory"), "mallory asked to cancel: refused (permission)."),
        (("run", "rate_limited", "", ""), "Somebody asked to run: too many commands."),
        (("new kind", "new result", "why", "x"), "x asked to new kind: new result (why)."),
    ],
)
def test_decisions_in_words(decision: tuple[str, str, str, str], words: str):
    kind, result, reason, actor = decision
    assert sight.decision_in_words(Decision(1, kind, result, reason, actor, None, "")) == words


# who may read them


async def test_a_private_repository_needs_its_key(world: World, read: Reader):
    vault = await private_repository(world)
    hidden = [
        await put(world, repo_id=vault, repo="alice/vault", title="a secret plan", state=state)
        for state in (SprintState.SETTLED, SprintState.WORKING, SprintState.QUEUED)
    ]
    unknown = await read("/sprints/0123456789ab")
    assert unknown[0] == 404
    for sprint_id in hidden:
        right, other = key(world, sprint_id), key(world, "another")
        for tail in ("", "/live"):
            assert await read(f"/sprints/{sprint_id}{tail}") == unknown, "nobody learns that it exists"
            for wrong in (other, right[:-1], right.upper() if right != right.upper() else right + "0", "", "%FF%00"):
                assert await read(f"/sprints/{sprint_id}{tail}?key={wrong}") == unknown
            status, page = await read(f"/sprints/{sprint_id}{tail}?key={right}")
            assert status == 200
            assert "a secret plan" in page
        assert (await read(f"/sprints/{sprint_id}/events"))[0] == 404
    _, page = await read(f"/sprints/{hidden[1]}?key={key(world, hidden[1])}")
    assert f'data-events="{hidden[1]}/events?key={key(world, hidden[1])}"' in page, "the page goes on with its key"
    status, page = await read("/")
    assert status == 200
    assert "secret plan" not in page
    assert "vault" not in page
    assert page.count("1 more sprint") == 3, "private ones are a number, in each list"
    assert (await read("/login"))[0] == 404, "there is no token to log in with"


async def test_a_repository_that_becomes_private_closes(world: World, read: Reader):
    sprint_id = await put(world)
    assert (await read(f"/sprints/{sprint_id}"))[0] == 200
    await world.edit_repo(private=True)
    assert world.service is not None
    assert world.service.pages is not None
    world.service.pages._gate._is_open._fresh._known.clear()
    assert (await read(f"/sprints/{sprint_id}"))[0] == 404


async def test_the_token_opens_everything(base: Path):
    async with make_world(base, start=False) as world:
        await world.start(keys=Secrets(world.timmy.token, (world.stage.webhook_secret,), (), Secret(TOKEN)))
        vault = await private_repository(world)
        sprint_id = await put(world, repo_id=vault, repo="alice/vault", title=f"a plan with {TOKEN}")
        path = f"/sprints/{sprint_id}"
        async with reader(world) as read:
            assert "log in</a>" in (await read(path))[1]
            assert (await read(path, Authorization="Bearer wrong"))[0] == 404
            status, page = await read(path, Authorization=f"Bearer {TOKEN}")
            assert status == 200
            assert TOKEN not in page, "and it is a secret like any other"
            assert (await read(path, Cookie=f"timmy_pages={TOKEN}"))[0] == 404, "the cookie is not the token"
            status, page = await read("/login")
            assert status == 200
            async with read.session.post("/login", data={"token": "wrong"}, allow_redirects=False) as reply:
                assert reply.status == 403
            async with read.session.post("/login", data={"token": TOKEN}, allow_redirects=False) as reply:
                assert reply.status == 303
                cookie = reply.headers["Set-Cookie"]
                assert TOKEN not in cookie
                assert "HttpOnly" in cookie
                assert "SameSite=Lax" in cookie
                assert reply.headers["Cache-Control"] == "no-store"
            assert (await read(path))[0] == 200
            assert "a plan" in (await read("/"))[1]
            async with read.session.post("/logout", allow_redirects=False) as reply:
                assert reply.status == 303
            assert (await read(path))[0] == 404
            for _ in range(9):
                async with read.session.post("/login", data={"token": "wrong"}, allow_redirects=False) as reply:
                    assert reply.status == 403
            async with read.session.post("/login", data={"token": TOKEN}, allow_redirects=False) as reply:
                assert reply.status == 429, "guessing is slow"
            async with read.session.post("/login", data=b"token=" + b"x" * 10_000, allow_redirects=False) as reply:
                assert reply.status == 413


@pytest.mark.parametrize(("visibility", "opened"), [("repository", True), ("token", False), ("public", True)])
async def test_visibility(base: Path, visibility: str, opened: bool):
    async with make_world(base, pages={"visibility": visibility}) as world, reader(world) as read:
        sprint_id = await put(world)
        vault = await put(world, repo_id=await private_repository(world), repo="alice/vault", title="a secret plan")
        assert (await read(f"/sprints/{sprint_id}"))[0] == (200 if opened else 404)
        assert (await read(f"/sprints/{vault}"))[0] == (200 if visibility == "public" else 404)
        assert world.service is not None
        links = world.service.projector._links
        assert ("?key=" in links.sprint(vault)) is (visibility != "public")
        if visibility == "token":
            assert (await read(f"/sprints/{sprint_id}?key={key(world, sprint_id)}"))[0] == 200
            _, page = await read("/")
            assert page.count("more sprint") == 1
            assert "<strong>" in page, "the verdict is no secret"


async def test_without_pages_there_is_no_link(base: Path):
    async with make_world(base, pages={"enabled": False}) as world, reader(world) as read:
        assert (await read("/"))[1].startswith("timmy-dispatch ")
        assert (await read("/help"))[0] == 404
        issue = await run(world)
        await world.settled(issue)
        assert "transcript" not in await world.status_comment(issue)


async def test_keys_outlive_a_restart(world: World):
    before = key(world, "abc")
    await world.stop()
    await world.start()
    assert key(world, "abc") == before
    assert len(before) == 32


class Stranger:
    """A forge as somebody without an account meets it."""

    def __init__(self) -> None:
        self.answer: Any = {}
        self.asked = 0

    async def repo_by_id(self, _repo_id: int) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


PUBLIC = {"private": False, "internal": False, "owner": {"visibility": "public"}}
DETAILS = {"status": 0, "method": "GET", "route": "/repositories/{id}"}


@pytest.mark.parametrize(
    ("answer", "opened"),
    [
        (PUBLIC, True),
        ({"private": False}, True),
        (PUBLIC | {"private": True}, False),
        (PUBLIC | {"internal": True}, False),
        (PUBLIC | {"owner": {"visibility": "limited"}}, False),
        (PUBLIC | {"owner": {"visibility": "private"}}, False),
        ({}, False),
        (NotFound("not found", **DETAILS), False),
        (Unauthorized("only signed in users", **DETAILS), False),
        (Unavailable("down", **DETAILS), False),
    ],
)
async def test_openness(answer: Any, opened: bool):
    stranger = Stranger()
    stranger.answer = answer
    assert await Openness(stranger)(1) is opened


async def test_a_silent_forge_is_taken_at_its_last_word_for_an_hour():
    stranger, now = Stranger(), [0.0]
    is_open = Openness(stranger, clock=lambda: now[0])
    stranger.answer = PUBLIC
    assert await asyncio.gather(*(is_open(1) for _ in range(20))) == [True] * 20
    assert stranger.asked == 1, "many who look ask once"
    stranger.answer = Unavailable("down", **DETAILS)
    now[0] = 3_000
    assert await is_open(1)
    assert not await is_open(2), "what was never known is private"
    now[0] = 3_700
    assert not await is_open(1)


def test_visibility_by_token_needs_one(tmp_path: Path):
    (tmp_path / "token").write_text("x" * 20)
    (tmp_path / "token").chmod(0o600)
    config = {
        "forge": {"url": "http://127.0.0.1:3000", "token_file": "token"},
        "repositories": [{"name": "a/b"}],
        "webhook": {"secret_files": ["token"]},
        "providers": [{"base_url": "http://127.0.0.1:1/v1", "model": "m"}],
        "state_dir": str(tmp_path),
        "pages": {"visibility": "token"},
    }
    file = tmp_path / "dispatch.yml"
    file.write_text(json.dumps(config))
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=r"pages\.token_file: there is no access token .* Remedy: "):
        load(file, environ={})
    config["pages"]["token_file"] = "token"
    file.write_text(json.dumps(config))
    assert load(file, environ={}).secrets.pages_token == Secret("x" * 20)


# how much


async def test_a_huge_transcript_is_cut_and_can_be_paged(world: World, read: Reader):
    sprint_id = await put(world)
    await world.store.write(
        lambda conn: put_steps(conn, sprint_id, 300, calls=12, text="word " * 2_000, result="exit 0\n" + "<x>&" * 1_000)
    )
    status, page = await read(f"/sprints/{sprint_id}")
    assert status == 200
    assert len(page) < 3_000_000
    assert page.count('class="step"') == STEPS
    assert "Step 300<" in page
    assert "characters left out" in page
    assert "80 tool calls of these steps are too many to be shown." in page
    seen = set(re.findall(r">Step (\d+)<", page))
    while link := re.search(r'href="\?from=(\d+)">Earlier steps', page):
        _, page = await read(f"/sprints/{sprint_id}?from={link[1]}")
        seen |= set(re.findall(r">Step (\d+)<", page))
    assert seen == {str(n) for n in range(1, 301)}
    assert "Later steps" in page
    for odd in ("999999", "9999999", "-1", "x", "", "%00", "\u0663"):
        assert (await read(f"/sprints/{sprint_id}?from={odd}"))[0] == 200


class Counter:
    """Statements that one connection to a store executes, whatever runs beside it."""

    def __init__(self, conn: sa.Connection) -> None:
        self.count = 0
        sa.event.listen(conn, "before_cursor_execute", self._note)

    def _note(self, *_: Any) -> None:
        self.count += 1


async def test_the_number_of_queries_does_not_grow_with_the_rows(world: World):
    def look(conn: sa.Connection, sprint_id: str) -> int:
        counter = Counter(conn)
        rows.board(conn, limit=50, recent=20, now_ms=now_ms())
        rows.transcript(conn, sprint_id, start=None, limit=STEPS)
        view = sprints.get(conn, sprint_id)
        assert view is not None
        rows.trail(conn, view)
        rows.siblings(conn, view)
        rows.revision(conn, sprint_id)
        return counter.count

    async def cost(sprint_id: str) -> int:
        return await asyncio.to_thread(world.store.read_sync, lambda conn: look(conn, sprint_id))

    sprint_id = await put(world)
    await world.store.write(lambda conn: put_steps(conn, sprint_id, 1))
    small = await cost(sprint_id)
    for state in (SprintState.SETTLED, SprintState.QUEUED, SprintState.SETTLED):
        for _ in range(25):
            await put(world, state=state)
    big = await put(world)
    await world.store.write(lambda conn: put_steps(conn, big, 60, calls=5))
    assert await cost(big) <= small
    assert small < 30


def test_the_queries_on_both_back_ends(store: Store):
    def fill(conn: sa.Connection) -> str:
        for state in (SprintState.WORKING, SprintState.QUEUED, SprintState.SETTLED):
            put_sprint(conn, repo_id=7, state=state)
        sprint_id = put_sprint(conn, repo_id=7)
        put_steps(conn, sprint_id, 50, calls=2, result="exit 0\n" + "ä" * 50_000 + "end")
        return sprint_id

    sprint_id = store.write_sync(fill)
    board = store.read_sync(lambda conn: rows.board(conn, limit=10, recent=10, now_ms=now_ms()))
    assert ([len(part) for part in (board.running, board.queued, board.recent)], board.in_flight, board.waiting) == ([1, 1, 2], 1, 1)
    assert board.queued[0][0] == 1
    found = store.read_sync(lambda conn: rows.transcript(conn, sprint_id, start=None, limit=40))
    assert (found.start, found.total, len(found.steps), len(found.calls), found.calls_left_out) == (10, 50, 40, 80, 0)
    call = found.calls[0]
    assert call.result_size == 50_010
    assert len(call.result or "") + len(call.tail) == rows.ROOM // 80
    assert call.tail.endswith("äend")
    assert (call.n, found.steps[0].n) == (11, 11)
    before = store.read_sync(lambda conn: rows.revision(conn, sprint_id))
    store.write_sync(lambda conn: steps.tool_started(conn, sprint_id, 1, 50, 9, call_id="c", tool="t", arguments="", now_ms=1))
    assert store.read_sync(lambda conn: rows.revision(conn, sprint_id)) != before
    assert store.read_sync(lambda conn: rows.revision(conn, "unknown")) is None
    assert store.read_sync(lambda conn: rows.transcript(conn, "unknown", start=5, limit=40)).total == 0


async def test_what_many_ask_for_is_made_once():
    made, now = [0], [0.0]

    async def make(_key: str) -> int:
        made[0] += 1
        await asyncio.sleep(0.01)
        if made[0] == 2:
            raise ValueError("once")
        return made[0]

    fresh = Fresh(make, seconds=1.0, clock=lambda: now[0])
    assert await asyncio.gather(*(fresh.get("a") for _ in range(5))) == [1] * 5
    now[0] = 1.5
    hasty = asyncio.create_task(fresh.get("a"))
    await asyncio.sleep(0)
    hasty.cancel()
    with pytest.raises(ValueError, match="once"):
        await fresh.get("a")
    now[0] = 3.0
    assert await fresh.get("a") == 3


def test_limits_as_bars():
    view = SprintView(
        SprintId("a"), RepoId(1), IssueRef("a", "b", 1), SprintState.WORKING, steps=54, tokens=10, usd=3.0, limits=Limits(60, 600, 1000, 0)
    )
    by_name = {bar.name: bar for bar in sight.bars(view, 700_000)}
    assert (by_name["Steps"].tone, by_name["Steps"].used, by_name["Steps"].limit) == ("near", "54", "60")
    assert (by_name["Working time"].tone, by_name["Working time"].share) == ("full", 1.0)
    assert (by_name["Money"].share, by_name["Money"].limit) == (None, ""), "0 USD means no limit"


# live


async def test_events_tell_of_changes_and_of_the_end(world: World, read: Reader):
    issue = await run(world, "slow(0.3)")
    sprint = await until(lambda: world.sprint(issue))
    told: list[str] = []
    async with read.session.get(f"/sprints/{sprint.id}/events", timeout=aiohttp.ClientTimeout(total=60)) as reply:
        assert reply.status == 200
        assert reply.content_type == "text/event-stream"
        assert reply.headers["Content-Security-Policy"]
        async for line in reply.content:
            if line.startswith(b"event: "):
                told.append(line.decode().strip())
    assert told[-1] == "event: over"
    assert told.count("event: changed") >= 2
    assert (await world.sprint(issue)).state == "settled"
    assert world.service is not None
    assert world.service.pages is not None
    assert world.service.pages._listeners == 0


async def test_listeners_are_bounded_and_hold_up_no_shutdown(world: World, read: Reader):
    sprint_id = await put(world, state=SprintState.WORKING)
    pages = world.service.pages
    pages._most_listeners = 3
    listening = [await read.session.get(f"/sprints/{sprint_id}/events") for _ in range(3)]
    await until(lambda: pages._listeners == 3)
    async with read.session.get(f"/sprints/{sprint_id}/events") as reply:
        assert reply.status == 503
        assert reply.headers["Retry-After"]
    assert (await read(f"/sprints/{sprint_id}"))[0] == 200
    listening[0].close()
    await until(lambda: pages._listeners == 2, 25)
    began = asyncio.get_running_loop().time()
    await pages._end(None)
    await until(lambda: pages._listeners == 0, 5)
    assert asyncio.get_running_loop().time() - began < 2
    for reply in listening[1:]:
        reply.close()


async def test_the_fragment_begins_where_the_page_ended(world: World, read: Reader):
    sprint_id = await put(world, state=SprintState.WORKING)
    await world.store.write(lambda conn: put_steps(conn, sprint_id, 5))
    _, page = await read(f"/sprints/{sprint_id}")
    found = re.search(r'data-from="(\d+)"', page)
    assert found
    assert found[1] == "4", "the last step may still grow"
    await world.store.write(lambda conn: steps.reserve(conn, sprint_id, 1, 6, usd=0, tokens=0, now_ms=now_ms()))
    _, part = await read(f"/sprints/{sprint_id}/live?from=4")
    assert re.findall(r">Step (\d+)<", part) == ["5", "6"]
    assert "the model is thinking" in part
    assert "<html" not in part


# a real browser


needs_chromium = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on PATH"), pytest.mark.timeout(180)]


@pytest.fixture
async def busy(base: Path) -> AsyncIterator[tuple[World, dict[str, str]]]:
    """A fleet with something in every state, and the path of each page."""
    async with make_world(base, start=False, queue={"slots": 1}) as world:
        await world.start(repositories=[{"name": world.stage.repo, "checks": ["sh test.sh"]}])
        issues = {}
        for name, script, title in (
            ("done", "fix", "slug keeps capitals and punctuation"),
            ("refused", "touch_workflow", "Run the tests in CI <script>document.title = 'owned'</script>"),
            (
                "failed",
                'write({"lib/slug.sh": "slug() { echo no; }\\n"})',
                "A rather long title for an issue, so long that it has to be " * 3,
            ),
        ):
            issues[name] = await run(world, script, title, "keep it POSIX, and `averyveryveryverylongword" + "g" * 120 + "`")
            await world.settled(issues[name])
        issues["running"] = await run(world, "slow(20)", "Umlauts become question marks")
        issues["queued"] = await run(world, title="Empty titles give an empty slug")

        async def working():
            view = await world.sprint(issues["running"])
            return view is not None and view.state == "working"

        await until(working)
        await until(lambda: world.sprint(issues["queued"]))
        paths = {"fleet": "/", "help": "/help", "missing": "/sprints/unknown"}
        for name, issue in issues.items():
            paths[name] = f"/sprints/{(await world.sprint(issue)).id}"
        yield world, paths


@pytest.mark.parametrize("size", [DESKTOP, TELEPHONE], ids=["desktop", "telephone"])
class TestBrowser:
    pytestmark = needs_chromium

    async def test_pages_fit_and_nothing_is_refused_by_the_policy(self, busy: Any, base: Path, size: Any):
        world, paths = busy
        async with browser(base) as tab:
            await tab.size(size)
            for name, path in paths.items():
                await tab.open(f"http://127.0.0.1:{world.port}{path}")
                await tab.ask("document.querySelectorAll('details').forEach(one => { one.open = true })")
                wide, inner, title, styled = await tab.ask(
                    "[document.documentElement.scrollWidth, innerWidth, document.title, getComputedStyle(document.body).maxWidth]"
                )
                assert wide <= inner, f"{name} is wider than the screen: {wide} > {inner}"
                assert title != "owned"
                assert styled != "none", "the style sheet was taken"
                await tab.picture(base / f"{name}.png")
                assert (base / f"{name}.png").stat().st_size > 5_000
            assert [line for line in tab.console if "404" not in line] == []

    async def test_pages_are_complete_without_javascript(self, busy: Any, base: Path, size: Any):
        world, paths = busy
        async with browser(base) as tab:
            await tab.size(size)
            await tab.open(f"http://127.0.0.1:{world.port}{paths['fleet']}", script=False)
            text = await tab.text()
            for told in ("Working", "Umlauts become question marks", "Empty titles give an empty slug", "pull request #2", "Workers"):
                assert told in text, told
            await tab.open(f"http://127.0.0.1:{world.port}{paths['done']}", script=False)
            text = await tab.text()
            for told in ("slug keeps capitals", "I look at the repository first.", "The function must fold case.", "passed"):
                assert told in text, told
            assert await tab.ask("getComputedStyle(document.querySelector('details.call pre')).display") == "block"
            await tab.open(f"http://127.0.0.1:{world.port}{paths['running']}", script=False)
            assert "Reload" in await tab.text()


class TestLive:
    pytestmark = needs_chromium

    async def test_a_page_follows_its_sprint_to_the_end_without_a_reload(self, world: World, base: Path):
        issue = await run(world, "slow(1)")
        sprint = await until(lambda: world.sprint(issue))
        async with browser(base) as tab:
            await tab.size(TELEPHONE)
            await tab.open(f"http://127.0.0.1:{world.port}/sprints/{sprint.id}")
            await tab.ask("window.mark = 'the same document'")

            async def first_call():
                return await tab.ask("!!document.querySelector('details.call')")

            await until(first_call)
            assert await tab.ask("document.documentElement.dataset.live") == "on"
            await tab.ask("document.querySelector('details.call').open = true")

            async def over():
                return await tab.ask("document.documentElement.dataset.live") == "over"

            await until(over)
            text = await tab.text()
            assert "Done: pull request #2." in text
            assert "slug now folds case and punctuation" in text
            assert await tab.ask("[...document.querySelectorAll('.step h3 a')].map(one => one.innerText)") == [
                f"Step {n}" for n in range(1, 7)
            ]
            assert await tab.ask("document.querySelector('details.call').open"), "what was unfolded stays so"
            assert await tab.ask("window.mark") == "the same document"
            assert "Reload" not in text
            assert tab.console == []

    async def test_the_fleet_page_moves_by_itself(self, world: World, base: Path):
        async with browser(base) as tab:
            await tab.open(f"http://127.0.0.1:{world.port}/")
            assert "Nothing has ended yet" in await tab.text()
            await world.settled(await run(world))

            async def shown():
                return "pull request #2" in await tab.text()

            await until(shown, 20)


def test_the_link_of_a_sprint():
    assert replies.Links("https://git.example").sprint("a") == ""
    assert replies.Links("https://git.example", "https://bot.example").sprint("a") == "https://bot.example/sprints/a"
    with_key = replies.Links("https://git.example", "https://bot.example", Secret("s" * 32))
    assert re.fullmatch(r"https://bot\.example/sprints/a\?key=[0-9a-f]{32}", with_key.sprint("a"))
    assert with_key.key("a") != with_key.key("b")
