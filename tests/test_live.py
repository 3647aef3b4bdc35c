"""What people, renames and outages do to a running bot: the same on the embedded forge and, marked `live`, on a real Gitea."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from world import FORGES, LIVE, World, make_world, until

from bot.cli import run
from bot.config import Secrets
from bot.demo.stage import EVENTS
from bot.doctor import Mark
from bot.doctor.account import identity
from bot.gitea.forge import Forge
from bot.store import deliveries, sprints

BODY = "script: {script}\n\nPlease mend `lib/slug.sh`."
LATE = {"reconcile": {"every_seconds": 3600, "leave_to_webhook_seconds": 0}}


@pytest.fixture(params=FORGES)
def live(request: pytest.FixtureRequest) -> bool:
    """Whether this conversation is held on a real Gitea."""
    return request.param == "live"


@pytest.fixture
async def world(live: bool, base: Path) -> AsyncIterator[World]:
    """The bot beside the forge of this run."""
    async with make_world(base, live=live) as made:
        yield made


async def issue_with(world: World, script: str = "fix", title: str = "slug keeps capitals") -> int:
    return await world.alice.open_issue(title, BODY.format(script=script))


async def sprint_count(world: World, issue: int) -> int:
    table = sprints.table
    statement = sa.select(sa.func.count()).where(table.c.repo_id == world.stage.repo_id, table.c.issue == issue)
    return await world.store.read(lambda conn: conn.execute(statement).scalar())


async def has(world: World, comment: int, reaction: str) -> bool:
    return reaction in await world.reactions(comment)


async def branch_head(world: World, name: str) -> str:
    found = await world.alice.forge.branch(world.stage.repo, name)
    return found["commit"]["id"] if found else ""


async def answered(world: World, asker: Any, issue: int, text: str = "/dispatch status") -> int:
    """One more command and its answer: what was sent before it has arrived by then."""
    comment = await asker.comment(issue, text)
    await until(lambda: has(world, comment, "rocket"))
    return comment


async def test_the_pull_request_says_what_it_is_and_can_be_merged(world: World):
    issue = await issue_with(world)
    base_sha = await branch_head(world, "main")
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    [pull] = await world.pulls()
    assert pull["title"].startswith("slug keeps capitals")
    assert f"Closes #{issue}" in pull["body"].splitlines()
    assert (pull["head"]["label"], pull["base"]["ref"]) == (f"dispatch/issue-{issue}", "main")
    assert pull["head"]["repo_id"] == pull["base"]["repo_id"] == world.stage.repo_id
    assert pull["user"]["id"] == world.timmy.id
    assert pull["base"]["sha"] == pull["merge_base"] == base_sha == await branch_head(world, "main")
    assert (pull["draft"], pull["merged"]) == (False, False)

    async def mergeable():
        return (await world.alice.forge.pull(world.stage.repo, pull["number"]))["mergeable"]

    await until(mergeable)
    files = await world.alice.client.getitem(f"/repos/{world.stage.repo}/pulls/{pull['number']}/files")
    assert [item["filename"] for item in files] == ["lib/slug.sh"]
    await world.alice.merge(pull["number"])

    async def closed():
        return (await world.alice.forge.issue(world.stage.repo, issue))["state"] == "closed"

    await until(closed)


async def test_branches_are_found_by_the_beginning_of_their_name(world: World):
    forge, repo = world.alice.forge, world.stage.repo
    assert await forge.heads(repo, "dispatch/issue-9") == {}
    await world.alice.put_file("main", "notes.md", "x\n")
    head = await branch_head(world, "main")
    owner, _, name = repo.partition("/")
    for branch in ("dispatch/issue-9", "dispatch/issue-9-2", "dispatch/issue-90", "dispatch/issue-8"):
        data = {"new_branch_name": branch, "old_branch_name": "main"}
        await world.alice.client.post("/repos/{owner}/{repo}/branches", data, owner=owner, repo=name)
    assert await forge.heads(repo, "dispatch/issue-9") == dict.fromkeys(
        ("dispatch/issue-9", "dispatch/issue-9-2", "dispatch/issue-90"), head
    )
    assert await forge.heads(repo, "dispatch/issue-8") == {"dispatch/issue-8": head}


async def test_replayed_deliveries_start_nothing(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    await answered(world, world.alice, issue)
    before, comments = await world.stored(), len(await world.by_bot(issue))
    for event_type, body in before:
        assert await world.send(event_type, body) == (200, "received before")
        assert (await world.send(event_type, body, secret="no secret of ours"))[0] == 401
    await world.store.write(lambda conn: conn.execute(deliveries.table.delete()))
    for event_type, body in before:
        assert await world.send(event_type, body) == (202, "stored")

    async def handled():
        statement = sa.select(sa.func.count()).where(deliveries.table.c.done_ms.is_(None))
        return await world.store.read(lambda conn: conn.execute(statement).scalar() == 0)

    await until(handled)
    await answered(world, world.alice, issue)
    assert await sprint_count(world, issue) == 1
    assert len(await world.pulls()) == 1
    assert len(await world.by_bot(issue)) == comments + 1


async def test_label_and_comment_at_the_same_instant_are_one_sprint(world: World):
    issue = await issue_with(world, "slow(0.5)")
    _, comment, _ = await asyncio.gather(
        world.alice.label(issue, "dispatch"), world.bob.comment(issue, "/dispatch"), world.alice.comment(issue, "/dispatch run")
    )
    await world.settled(issue)
    await until(lambda: has(world, comment, "rocket"))
    assert await sprint_count(world, issue) == 1
    assert len(await world.pulls()) == 1


async def test_strangers_label_by_web_form_is_refused_once(world: World):
    issue = await world.web_issue(world.mallory, "let me in", BODY.format(script="fix"), "dispatch")
    assert await world.labels(issue) == {"dispatch"}
    [reply] = await until(lambda: world.by_bot(issue))
    assert world.mallory.login in reply
    assert "no write access" in reply
    await world.alice.forge.ensure_label(world.stage.repo, "bug", color="#ff0000")
    await world.alice.label(issue, "bug")
    await world.alice.label(issue, "dispatch")
    await answered(world, world.alice, issue)
    assert await world.sprint(issue) is None

    async def two() -> bool:
        return len(await world.by_bot(issue)) == 2

    await until(two)
    assert world.model.requests == []
    await world.alice.unlabel(issue, "dispatch")
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    assert (sprint.outcome, sprint.requester) == ("pull_request", world.alice.login)


async def test_strangers_label_stays_refused_when_its_delivery_was_lost(base: Path, live: bool):
    async with make_world(base, live=live, start=False) as world:
        issue = await world.web_issue(world.mallory, "let me in", BODY.format(script="fix"), "dispatch")
        await asyncio.sleep(1.5 if live else 0.2)
        await world.start()
        await world.alice.forge.ensure_label(world.stage.repo, "bug", color="#ff0000")
        await world.alice.label(issue, "bug")
        [reply] = await until(lambda: world.by_bot(issue))
        assert world.mallory.login in reply
        await answered(world, world.alice, issue)
        assert await world.sprint(issue) is None


async def test_a_comment_from_a_browser_is_read_like_any_other(world: World):
    issue = await issue_with(world)
    await world.web_comment(world.bob, issue, "Ok so.\r\n\r\n/dispatch run steps=9\r\nkeep it POSIX\r\n\r\n> /dispatch cancel\r\n")
    sprint = await world.settled(issue)
    assert (sprint.outcome, sprint.requester, sprint.limits.steps) == ("pull_request", world.bob.login, 9)
    assert sprint.instructions == "keep it POSIX"


async def test_what_happened_while_the_bot_was_down_is_found_once(base: Path, live: bool):
    async with make_world(base, live=live, start=False, **LATE) as world:
        old = await issue_with(world, title="from before the beginning")
        await world.alice.label(old, "dispatch")
        said = await world.alice.comment(old, "/dispatch status")
        await asyncio.sleep(2.5)
        await world.start()
        await answered(world, world.alice, await issue_with(world, title="proof of life"))
        await world.stop()
        labelled, told, edited = [await issue_with(world, title=title) for title in ("labelled", "told", "edited")]
        await world.alice.label(labelled, "dispatch")
        comment = await world.bob.comment(told, "/dispatch")
        stranger = await world.mallory.comment(told, "/dispatch cancel")
        words = await world.alice.comment(edited, "only words")
        await asyncio.sleep(1.2)
        await world.alice.edit_comment(words, "/dispatch run")
        await asyncio.sleep(1.5)
        await world.start()
        for issue in (labelled, told):
            sprint = await world.settled(issue)
            assert (sprint.outcome, sprint.source) == ("pull_request", "reconcile")
        await until(lambda: has(world, stranger, "confused"))
        assert await world.reactions(comment) == {"eyes", "rocket"}
        await world.service.reconciler.round()
        await world.service.reconciler.round()
        await world.stop()
        await world.start()
        await world.service.reconciler.round()
        for issue in (labelled, told):
            assert await sprint_count(world, issue) == 1
        assert len(await world.pulls()) == 2
        assert len(await world.by_bot(labelled)) == 1
        assert await world.sprint(edited) is None
        assert await world.by_bot(edited) == []
        assert await world.sprint(old) is None
        assert await world.reactions(said) == set()


async def test_a_renamed_repository_keeps_working(world: World):
    issue = await issue_with(world, "slow(1)")
    await world.alice.label(issue, "dispatch")
    await until(lambda: world.model.requests)
    await world.rename("other-name")
    sprint = await world.settled(issue)
    assert sprint.outcome == "pull_request", sprint
    [pull] = await world.pulls()
    assert await world.labels(issue) == {"dispatch", "dispatch/review"}
    assert f"#{pull['number']}" in (await world.by_bot(issue))[0]
    assert len(await world.by_bot(issue)) == 1


async def test_a_command_after_a_rename_is_obeyed(world: World):
    issue = await issue_with(world)
    await answered(world, world.alice, issue)
    await world.rename("other-name")
    comment = await world.alice.comment(issue, "/dispatch run")
    sprint = await world.settled(issue)
    assert sprint.outcome == "pull_request"
    assert await world.reactions(comment) == {"eyes", "rocket"}
    assert world.service.repositories.names() == {world.stage.repo_id: world.stage.repo}
    await world.stop()
    await world.start()
    await answered(world, world.alice, issue)


async def test_a_rename_while_the_bot_is_down_is_met_at_the_start(world: World):
    issue = await issue_with(world)
    await answered(world, world.alice, issue)
    await world.stop()
    await world.rename("other-name")
    await world.start()
    await world.alice.label(issue, "dispatch")
    assert (await world.settled(issue)).outcome == "pull_request"


@pytest.mark.parametrize("live", [pytest.param(True, marks=LIVE, id="live")])
async def test_a_transferred_repository_keeps_working(world: World, live: bool):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    admin, org = world.stage.admin, f"{world.alice.login}-org"
    await admin.post("/admin/users/{login}/orgs", {"username": org}, login=world.alice.login)
    try:
        await admin.post(f"/repos/{world.stage.repo}/transfer", {"new_owner": org})
        world.moved(f"{org}/{world.stage.repo.rpartition('/')[2]}")
        comment = await world.alice.comment(issue, "/dispatch retry")
        await until(lambda: has(world, comment, "rocket"))
        sprint = await world.settled(issue)
        assert sprint.outcome == "updated", sprint
        assert len(await world.pulls()) == 1
        await world.stop()
        await world.start()
        await answered(world, world.alice, issue)
    finally:
        await admin.delete(f"/repos/{world.stage.repo}")
        await admin.delete("/orgs/{org}", org=org)


async def test_an_archived_repository_is_refused(world: World):
    issue = await issue_with(world)
    await world.edit_repo(archived=True)
    await world.alice.label(issue, "dispatch")

    async def refused():
        return [entry for entry in await world.trail(issue) if entry.result == "denied"]

    [entry] = await until(refused)
    assert entry.reason == "archived"
    await world.shown(issue)
    found = await world.alice.client.getitem(f"/repos/{world.stage.repo}/issues/{issue}/reactions")
    assert {item["content"] for item in found or ()} == {"confused"}
    assert await world.sprint(issue) is None
    await world.edit_repo(archived=False)
    await world.alice.unlabel(issue, "dispatch")
    await world.alice.label(issue, "dispatch")

    async def runs():
        return await world.sprint(issue) is not None

    await until(runs)
    assert (await world.settled(issue)).outcome == "pull_request"


async def test_a_repository_archived_while_the_agent_works_ends_in_a_refusal(world: World):
    issue = await issue_with(world, "slow(1)")
    await world.alice.label(issue, "dispatch")
    await until(lambda: world.model.requests)
    await world.edit_repo(archived=True)
    sprint = await world.settled(issue)
    assert sprint.outcome == "refused", sprint
    assert "archived" in sprint.detail
    assert await world.labels(issue) == {"dispatch", "dispatch/blocked"}
    await world.edit_repo(archived=False)


async def test_a_protected_default_branch_stays_untouched(world: World):
    await world.protect("main")
    before = await branch_head(world, "main")
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    assert (await world.settled(issue)).outcome == "pull_request"
    assert await branch_head(world, "main") == before
    assert await branch_head(world, f"dispatch/issue-{issue}")


async def test_a_branch_rule_against_us_is_a_clear_failure(world: World):
    issue = await issue_with(world)
    await world.protect(f"dispatch/issue-{issue}")
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    assert (sprint.outcome, sprint.reason) == ("failed", "push"), sprint
    assert "protected branch" in sprint.detail
    assert await world.labels(issue) == {"dispatch", "dispatch/failed"}
    assert await world.pulls() == []


async def test_a_commit_pushed_to_our_branch_while_we_were_down_is_not_overwritten(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    branch = f"dispatch/issue-{issue}"
    await world.stop()
    await world.alice.put_file(branch, "NOTES.md", "mine\n")
    theirs = await branch_head(world, branch)
    await world.start()
    comment = await world.alice.comment(issue, "/dispatch retry")
    await until(lambda: has(world, comment, "rocket"))
    assert (await world.settled(issue)).outcome == "pull_request"
    assert await branch_head(world, branch) == theirs
    assert {pull["head"]["label"] for pull in await world.pulls()} == {branch, f"{branch}-2"}


async def test_a_commit_pushed_to_our_branch_while_the_agent_works_is_not_overwritten(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    branch, asked = f"dispatch/issue-{issue}", len(world.model.requests)
    await world.alice.edit_issue(issue, body=BODY.format(script="slow(1)"))
    comment = await world.alice.comment(issue, "/dispatch retry")
    await until(lambda: has(world, comment, "rocket"))
    await until(lambda: len(world.model.requests) > asked)
    await world.alice.put_file(branch, "NOTES.md", "mine\n")
    theirs = await branch_head(world, branch)
    assert (await world.settled(issue)).outcome == "pull_request"
    assert await branch_head(world, branch) == theirs
    assert {pull["head"]["label"] for pull in await world.pulls()} == {branch, f"{branch}-2"}


async def test_a_merge_while_the_bot_was_down_is_noted(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    [pull] = await world.pulls()
    await world.stop()
    await world.alice.merge(pull["number"])
    await world.start()

    async def merged():
        return (await world.sprint(issue)).pr_state == "merged"

    await until(merged)
    await world.shown(issue)
    assert await world.labels(issue) == {"dispatch"}


async def test_the_fate_of_a_pull_request_is_followed(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    [pull] = await world.pulls()
    route = f"/repos/{world.stage.repo}/pulls/{pull['number']}"

    def state(wanted: str, labels: set[str]):
        async def reached():
            return (await world.sprint(issue)).pr_state == wanted and await world.labels(issue) == labels

        return reached

    await world.alice.client.patch(route, {"state": "closed"})
    await until(state("closed", {"dispatch"}))
    await world.alice.client.patch(route, {"state": "open"})
    await until(state("open", {"dispatch", "dispatch/review"}))
    await world.alice.client.delete(f"/repos/{world.stage.repo}/branches/dispatch%2Fissue-{issue}")
    await until(state("closed", {"dispatch"}))


async def test_an_issue_deleted_while_the_agent_works_ends_the_sprint(world: World):
    issue = await issue_with(world, "slow(30)")
    await world.alice.label(issue, "dispatch")
    await until(lambda: world.model.requests)
    await world.alice.client.delete(f"/repos/{world.stage.repo}/issues/{issue}")
    assert (await world.settled(issue)).outcome == "cancelled"


async def test_a_bot_that_is_only_a_writer_goes_by_its_list(base: Path, live: bool):
    async with make_world(base, live=live, start=False, hook=False) as world:
        await world.stage._collaborator("timmy", "write")
        hook = f"http://127.0.0.1:{world.port}/webhook"
        await world.alice.forge.create_hook(world.stage.repo, hook, world.stage.webhook_secret, EVENTS)
        await world.start(allow_users=[world.bob.login])
        issue = await issue_with(world)
        refused = await world.alice.comment(issue, "/dispatch")
        await until(lambda: has(world, refused, "confused"))
        [reply] = await until(lambda: world.by_bot(issue))
        assert "allow_users" in reply
        await world.bob.comment(issue, "/dispatch run")
        sprint = await world.settled(issue)
        assert (sprint.outcome, sprint.requester) == ("pull_request", world.bob.login), sprint
        assert await world.labels(issue) == {"dispatch/review"}


async def test_doctor_knows_an_account_that_must_change_its_password(world: World):
    await world.stop()
    fields = {"login_name": world.timmy.login, "source_id": 0, "must_change_password": True}
    if world.forge:
        world.forge.state.user(world.timmy.login).must_change_password = True
    else:
        await world.stage.admin.patch("/admin/users/{login}", fields, login=world.timmy.login)
    [probe] = [found async for found in identity(Forge(world.timmy.client))]
    assert probe.mark is Mark.FAIL
    assert "must-change-password --unset" in probe.remedy


async def test_a_revoked_token_waits_and_goes_on_with_the_new_one(world: World):
    issue = await issue_with(world, "slow(0.7)")
    await world.alice.label(issue, "dispatch")
    await until(lambda: world.model.requests)
    token = await world.new_token(world.timmy, "second")
    await world.revoke(world.timmy)

    async def waits():
        view = await world.sprint(issue)
        return view.state in ("queued", "waiting") and view.admitted_n

    await until(waits)
    await world.stop()
    await world.start(keys=Secrets(forge_token=token, webhook_secrets=(world.stage.webhook_secret,)))
    sprint = await world.settled(issue)
    assert sprint.outcome == "pull_request", sprint
    assert len(await world.by_bot(issue)) == 1


async def test_a_private_repository_works_alike(world: World):
    await world.edit_repo(private=True)
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    assert (await world.settled(issue)).outcome == "pull_request"


async def test_an_issue_born_with_the_label_is_one_sprint(world: World):
    trigger = next(label["id"] for label in await world.alice.forge.labels(world.stage.repo) if label["name"] == "dispatch")
    made = await world.alice.forge.create_issue(world.stage.repo, "born ready", BODY.format(script="fix"), label_ids=[trigger])
    issue = int(made["number"])
    assert (await world.settled(issue)).outcome == "pull_request"
    await answered(world, world.alice, issue)
    assert await sprint_count(world, issue) == 1


async def test_an_empty_repository_is_told_so(base: Path, live: bool):
    async with make_world(base, live=live, files={}) as world:
        issue = await issue_with(world)
        await world.alice.label(issue, "dispatch")
        sprint = await world.settled(issue)
        assert (sprint.outcome, sprint.reason) == ("failed", "clone"), sprint
        assert "empty" in await world.status_comment(issue)


async def test_pull_requests_switched_off_are_told_before_the_work(world: World):
    await world.edit_repo(has_pull_requests=False)
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    assert (sprint.outcome, sprint.reason) == ("failed", "pr"), sprint
    assert "switched off" in await world.status_comment(issue)
    assert world.model.requests == []


async def test_a_right_taken_away_while_the_agent_works_stops_the_push(world: World):
    issue = await issue_with(world, "slow(1)")
    await world.bob.comment(issue, "/dispatch")
    await until(lambda: world.model.requests)
    await world.alice.client.delete(f"/repos/{world.stage.repo}/collaborators/{world.bob.login}")
    sprint = await world.settled(issue)
    assert (sprint.outcome, await world.pulls()) == ("refused", []), sprint
    assert await branch_head(world, f"dispatch/issue-{issue}") == ""


async def test_a_comment_deleted_at_once_leaves_nothing_stuck(world: World):
    issue = await issue_with(world)
    comment = await world.alice.comment(issue, "/dispatch help")
    await world.alice.client.delete(f"/repos/{world.stage.repo}/issues/comments/{comment}")
    await until(lambda: world.by_bot(issue))
    await world.shown(issue)
    await answered(world, world.alice, issue)


async def test_our_status_comment_deleted_is_written_anew(world: World):
    issue = await issue_with(world, "slow(1)")
    await world.alice.label(issue, "dispatch")
    await until(lambda: world.model.requests)
    [status] = [comment["id"] for comment in await until(lambda: world.comments(issue))]
    await world.alice.client.delete(f"/repos/{world.stage.repo}/issues/comments/{status}")
    await world.settled(issue)
    [body] = await world.by_bot(issue)
    assert f"#{(await world.pulls())[0]['number']}" in body


async def test_init_and_doctor_are_content_with_this_forge(base: Path, live: bool, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(base / "home"))
    for name in ("HERMES_HOME", "CREDENTIALS_DIRECTORY", "TIMMY_GITEA_TOKEN", "TIMMY_WEBHOOK_SECRET"):
        monkeypatch.delenv(name, raising=False)
    async with make_world(base, live=live, start=False, hook=False) as world:
        token, config = base / "token", base / "etc" / "dispatch.yml"
        token.write_text(world.timmy.token.reveal())
        token.chmod(0o600)
        where = f"127.0.0.1:{world.port}"
        flags = [
            *("--url", world.stage.url, "--token-file", str(token), "-r", world.stage.repo, "--listen", where),
            *(
                "--public-url",
                f"http://{where}",
                "--state-dir",
                str(world.state_dir),
                "--model-url",
                world.model.url,
                "--model",
                "scripted-1",
            ),
        ]

        async def cli(*arguments: str) -> int:
            return await asyncio.to_thread(run, ["--config", str(config), *arguments])

        for arguments in (["init", *flags], ["init"]):
            assert await cli(*arguments) == 0
            assert "a test delivery arrived, signed with our secret" in capsys.readouterr().out
            assert len(await world.alice.forge.hooks(world.stage.repo)) == 1
        await cli("doctor")
        shown = capsys.readouterr().out
        for line in ("active and complete", "a test delivery arrived", f"the token belongs to '{world.timmy.login}'"):
            assert line in shown, shown


async def conversation(world: World) -> None:
    """A bit of everything that the bot asks a forge."""
    alice = world.alice
    first = await issue_with(world)
    await alice.label(first, "dispatch")
    await world.settled(first)
    await alice.edit_issue(first, body=BODY.format(script="write"))
    comment = await alice.comment(first, "/dispatch retry\n\nand a word more")
    await until(lambda: has(world, comment, "rocket"))
    await world.settled(first)
    for text in ("/dispatch help", "/dispatch queue", "/dispatch status"):
        await answered(world, alice, first, text)
    typo = await alice.comment(first, "/dispatch cancle")
    await until(lambda: has(world, typo, "confused"))
    [pull] = await world.pulls()
    elsewhere = await alice.comment(pull["number"], "/dispatch status")
    await until(lambda: has(world, elsewhere, "rocket"))
    await alice.merge(pull["number"])
    await until(lambda: _fate(world, first, "merged"))
    second = await world.web_issue(world.mallory, "mine", BODY.format(script="slow(30)"), "dispatch")
    await until(lambda: world.by_bot(second))
    edited = await world.mallory.comment(second, "please")
    await alice.edit_comment(edited, "please\n\n/dispatch run")
    await until(lambda: len(world.model.requests) and has(world, edited, "rocket"))
    await alice.comment(second, "/dispatch cancel")
    await world.settled(second)
    await world.rename("other-name")
    third = await world.alice.open_issue("third", BODY.format(script="no_change"))
    await world.alice.comment(third, "/dispatch")
    await world.settled(third)
    fourth = await world.alice.open_issue("fourth", BODY.format(script="slow(1)"))
    await world.alice.label(fourth, "dispatch")
    await until(lambda: _state(world, fourth, "working"))
    await world.rename("yet-another")
    await world.settled(fourth)
    await world.stop()
    await world.alice.label(third, "dispatch")
    await world.start()
    await until(lambda: _asked(world, third, 2))
    await world.settled(third)
    fifth = await world.alice.open_issue("fifth", BODY.format(script="slow(30)"))
    await world.alice.comment(fifth, "/dispatch")
    await until(lambda: _state(world, fifth, "working"))
    await world.alice.edit_issue(fifth, title="the fifth", state="closed")
    await world.settled(fifth)
    await world.edit_repo(archived=True)
    await world.alice.label(second, "bug")
    await world.alice.unlabel(second, "dispatch")
    await world.alice.label(second, "dispatch")

    async def refused():
        return any(entry.reason == "archived" for entry in await world.trail(second))

    await until(refused)
    await world.shown(second)
    await world.edit_repo(archived=False)


async def _fate(world: World, issue: int, state: str) -> bool:
    return (await world.sprint(issue)).pr_state == state


async def _state(world: World, issue: int, state: str) -> bool:
    view = await world.sprint(issue)
    return view is not None and view.state == state


async def _asked(world: World, issue: int, sprints_wanted: int) -> bool:
    return await sprint_count(world, issue) == sprints_wanted


def _of_both(found: set[Any], embedded: World, real: World) -> set[Any]:
    """Only of events that both sent: a missing one is told once, not field by field."""
    both = {what for what, _, _ in embedded.heard} & {what for what, _, _ in real.heard}
    return {entry for entry in found if entry[0] in both}


def differences(embedded: set[Any], real: set[Any]) -> dict[str, list[str]]:
    return {"only embedded": _topmost(embedded - real), "only real": _topmost(real - embedded)}


def _topmost(found: set[Any]) -> list[str]:
    """One line each, without what lies inside something listed already."""
    lines = sorted(" ".join(map(str, entry)) for entry in found)
    above = [line.removesuffix(" key") for line in lines if line.endswith(" key")]
    return [line for line in lines if not any(line.startswith((f"{other}.", f"{other}[")) for other in above)]


@pytest.mark.parametrize("live", [pytest.param(True, marks=LIVE, id="live")])
@pytest.mark.timeout(400)
async def test_both_forges_answer_and_deliver_alike(live: bool, base: Path):
    seen: list[World] = []
    for real in (False, live):
        folder = base / ("real" if real else "embedded")
        folder.mkdir(mode=0o711)
        async with make_world(folder, live=real, **LATE) as world:
            await world.alice.forge.ensure_label(world.stage.repo, "bug", color="#ff0000")
            await conversation(world)
            seen.append(world)
    embedded, real = seen
    found = {
        "requests": differences(embedded.requests, real.requests),
        "deliveries": differences(set(embedded.heard), set(real.heard)),
        "headers": differences(embedded.reply_headers, real.reply_headers),
        "replies": differences(embedded.reply_shapes, real.reply_shapes),
        "payloads": differences(*(_of_both(world.payload_shapes, embedded, real) for world in seen)),
    }
    assert len(real.requests) > 25
    assert len(real.reply_shapes) > 500
    assert not any(entry for both in found.values() for entry in both.values()), json.dumps(found, indent=1)
