"""sprint-launcher.sh: the next suitable issue is taken by the clock, by the same gate as every trigger, and every issue left out has its reason."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from croniter import croniter
from fleet_support import now_ms, queue_sprint
from hypothesis import given
from hypothesis import strategies as st
from postgres_support import BACKENDS
from talk import BODY, issue_with, pulls_of, reacted, sprint_count, state_is
from world import FORGES, World, make_world, until

from bot import replies
from bot.chatops import gave_up_key, launcher_key
from bot.fleet.launcher import Held, Issue, LeftOut, Look, Round, backoff_ms, hold, quiet, rank
from bot.models import Actor, Pause, PauseScope, Skip
from bot.settings import LauncherSettings, Settings, UnfitError, _cron, split_hours
from bot.store import Store, backlog, intents, pauses, skips, sprints
from bot.store.backlog import Backlog, Past

NOW = 1_800_000_000_000
POLICY = LauncherSettings(priority_labels={"p/high": 1, "p/low": 9})
ME = 1
ALICE = Actor(7, "alice")
MINUTE = 60_000

numbers = st.integers(1, 40)
names = st.sampled_from(["epic", "study", "bug", "wontfix", "kind/Epic", "p/high", "p/low", "later"])
people = st.sampled_from([Actor(ME, "timmy"), ALICE, Actor(8, "mallory"), Actor(9, "nobody-knows")])
issues = st.lists(
    st.builds(
        Issue,
        number=numbers,
        title=st.sampled_from(["mend it", "[EPIC] all of it", "[study] why"]),
        author=people,
        labels=st.lists(names, max_size=3).map(tuple),
        assignees=st.sampled_from([(), (), ("bob",)]),
        created_ms=st.integers(NOW - 10**9, NOW),
        adopted=st.sampled_from([False, False, False, True]),
    ),
    max_size=12,
    unique_by=lambda issue: issue.number,
)
pasts = st.builds(
    Past,
    attempts=st.integers(0, 4),
    tried_ms=st.integers(NOW - 10 * 3_600_000, NOW),
    state=st.sampled_from(["", "settled", "queued", "working"]),
    outcome=st.sampled_from(["", "failed", "no_change", "cancelled", "pull_request"]),
    settled_ms=st.integers(NOW - 10 * 3_600_000, NOW),
    pr=st.sampled_from([0, 5]),
    pr_state=st.sampled_from(["", "open", "merged", "closed"]),
)
looks = st.builds(
    Look,
    me_id=st.just(ME),
    backlog=st.builds(Backlog, past=st.dictionaries(numbers, pasts, max_size=8), skipped=st.frozensets(numbers, max_size=4)),
    may=st.just({ALICE.id: "", 8: "read where write is needed"}),
    skip_labels=st.just(("wontfix",)),
)


@given(issues=issues, look=looks)
def test_every_issue_has_its_place_and_every_one_left_out_its_reason(issues: list[Issue], look: Look):
    places = rank(issues, look, POLICY, NOW)
    assert sorted(place.issue.number for place in places) == sorted(issue.number for issue in issues)
    free = [place for place in places if place.left_out is None]
    assert places[: len(free)] == tuple(free)
    assert [(place.rank, place.issue.created_ms) for place in free] == sorted((place.rank, place.issue.created_ms) for place in free)
    for place in free:
        issue, past = place.issue, look.backlog.past.get(place.issue.number, Past())
        assert issue.author == ALICE
        assert not issue.assignees
        assert not issue.adopted
        assert not {"epic", "study", "wontfix", "kind/Epic"} & set(issue.labels)
        assert not issue.title.startswith("[")
        assert issue.number not in look.backlog.skipped
        assert past.state in ("", "settled")
        assert past.outcome not in ("cancelled", "pull_request")
        assert past.attempts < POLICY.max_attempts
        assert place.attempt == past.attempts + 1
    for place in places[len(free) :]:
        assert place.why


@given(issues=issues, look=looks)
def test_the_order_in_which_the_forge_lists_changes_nothing(issues: list[Issue], look: Look):
    assert rank(issues, look, POLICY, NOW) == rank(issues[::-1], look, POLICY, NOW)


FRESH = Past()


def one(past: Past = FRESH, policy: LauncherSettings = POLICY, now: int = NOW, **changes: Any):
    issue = replace(Issue(3, "mend it", ALICE, created_ms=NOW - 1000), **changes)
    look = Look(me_id=ME, backlog=Backlog(past={3: past}), may={ALICE.id: ""})
    [place] = rank([issue], look, policy, now)
    return place


def test_retries_come_at_a_growing_distance_and_end():
    waits = [backoff_ms(POLICY, attempts) // MINUTE for attempts in range(1, 5)]
    assert waits == [60, 120, 240, 480]
    failed = Past(attempts=1, tried_ms=NOW - 50 * MINUTE, state="settled", outcome="failed", settled_ms=NOW - 30 * MINUTE)
    assert one(failed).left_out is LeftOut.BACKOFF
    assert "attempt 2 of 3 comes in 30 min" in one(failed).why
    assert one(failed, now=NOW + 30 * MINUTE).left_out is None
    assert one(replace(failed, attempts=3), now=NOW + 10**9).left_out is LeftOut.GAVE_UP


@pytest.mark.parametrize(
    ("past", "reason"),
    [
        (Past(state="queued"), LeftOut.ACTIVE),
        (Past(state="settled", outcome="cancelled", stop_by="bob"), LeftOut.CANCELLED),
        (Past(state="settled", outcome="planned"), LeftOut.PLANNED),
        (Past(state="settled", outcome="pull_request", pr=4, pr_state="closed"), LeftOut.DONE),
        (Past(state="settled", outcome="failed", pr=4, pr_state="merged"), LeftOut.DONE),
    ],
)
def test_what_a_person_decided_is_not_undone(past: Past, reason: LeftOut):
    assert one(past, now=NOW + 10**12).left_out is reason


def test_a_label_in_a_scope_counts_and_ranks_by_the_best_label():
    assert one(labels=("kind/EPIC",)).left_out is LeftOut.EPIC
    assert one(labels=("p/low", "P/High")).rank == 1
    assert one().rank == 5


@pytest.mark.parametrize(
    ("hour", "hours", "held"),
    [(23, "22:00-06:00", True), (5, "22:00-06:00", True), (6, "22:00-06:00", False), (12, "22:00-06:00", False), (12, "12:00-13:00", True)],
)
def test_quiet_hours(hour: int, hours: str, held: bool):
    at = int(datetime(2026, 11, 25, hour, 0, tzinfo=UTC).timestamp() * 1000)
    assert bool(quiet(LauncherSettings(quiet_hours=(hours,)), at)) is held
    berlin = LauncherSettings(quiet_hours=(hours,), timezone="Europe/Berlin")
    assert bool(quiet(berlin, at - 3_600_000)) is held


def test_what_holds_a_repository():
    look = Look(me_id=ME, open_prs=2, max_open_prs=3, backlog=Backlog(active=1))
    assert hold(look, POLICY, NOW)[0] is Held.OPEN_PRS
    assert hold(replace(look, max_open_prs=0), POLICY, NOW) is None
    assert hold(replace(look, max_open_prs=4), POLICY, NOW) is None
    pause = Pause(PauseScope.FLEET, 0, "", "alice", NOW)
    assert hold(replace(look, max_open_prs=0, backlog=Backlog(pause=pause)), POLICY, NOW)[0] is Held.PAUSED
    assert hold(replace(look, max_open_prs=0, backlog=Backlog(picks_waiting=1)), POLICY, NOW)[0] is Held.WAITING
    assert hold(replace(look, archived=True), POLICY, NOW)[0] is Held.ARCHIVED


items = st.one_of(
    st.just("*"),
    st.integers(0, 70).map(str),
    st.tuples(st.integers(0, 61), st.integers(0, 61)).map(lambda pair: f"{pair[0]}-{pair[1]}"),
    st.integers(1, 20).map(lambda step: f"*/{step}"),
    st.sampled_from(["mon-fri", "jan", "SUN", "x", "", "5,10"]),
)


@given(st.lists(items, min_size=6, max_size=6))
def test_a_schedule_that_is_accepted_can_be_kept(fields: list[str]):
    line = " ".join(fields)
    try:
        accepted = _cron(line)
    except UnfitError:
        return
    assert croniter.is_valid(accepted, second_at_beginning=True), accepted


@pytest.mark.parametrize("text", ["22:00", "25:00-26:00", "24:30-01:00", "07:00-07:00", "7-8"])
def test_hours_that_are_none(text: str):
    with pytest.raises(UnfitError):
        split_hours(text)


def test_a_repository_says_only_what_differs():
    own = {"name": "acme/rocket", "launcher": {"enabled": True, "max_attempts": 1, "quiet_hours": []}}
    settings = Settings.model_validate(
        {
            "forge": {"url": "https://git.example"},
            "repositories": [own, {"name": "acme/ship"}],
            "state_dir": "/var/lib/x",
            "providers": [{"name": "p", "base_url": "https://llm.example/v1", "model": "m"}],
            "launcher": {"max_attempts": 5, "epic_labels": ["saga"], "quiet_hours": ["22:00-06:00"]},
        }
    )
    here, there = (settings.launcher_of(repository) for repository in settings.repositories)
    assert (here.enabled, here.max_attempts, here.epic_labels, here.quiet_hours) == (True, 1, ("saga",), ())
    assert there == settings.launcher


@pytest.mark.parametrize("database", BACKENDS, indirect=True)
def test_the_past_of_an_issue_is_read_from_the_rows(database: str):
    store = Store(database)
    store.open()
    now = now_ms()

    def write(conn: Any) -> None:
        for attempt in (1, 2):
            key = launcher_key(7, 3, attempt)
            intents.decide(conn, repo_id=7, issue=3, kind="run", result="ok", reason="", intent_key=key, now_ms=now + attempt)
        intents.decide(conn, repo_id=7, issue=3, kind="give_up", result="ok", reason="", intent_key=gave_up_key(7, 3, 2), now_ms=now)
        intents.decide(conn, repo_id=8, issue=3, kind="run", result="ok", reason="", intent_key=launcher_key(8, 3, 1), now_ms=now)
        ended = {"state": "settled", "outcome": "failed", "settled_ms": now, "detail": "no", "stop_by": ""}
        conn.execute(sprints.table.update().where(sprints.c.id == "old").values(**ended))
        skips.put(conn, Skip(7, 9, "bob", now))
        pauses.put(conn, Pause(PauseScope.REPO, 7, "alice/slug", "bob", now))

    queue_sprint(store, 3, sprint_id="old", queued_ms=now - 1000)
    store.write_sync(write)
    queue_sprint(store, 3, sprint_id="new", queued_ms=now)
    queue_sprint(store, 4, sprint_id="other")
    store.write_sync(lambda conn: conn.execute(sprints.table.update().where(sprints.c.id == "other").values(source="schedule")))
    found = store.read_sync(lambda conn: backlog.of_repository(conn, 7, now))
    assert found.past[3] == Past(attempts=2, tried_ms=now + 2, told=2, state="queued")
    assert (found.skipped, found.active, found.picks_waiting) == (frozenset({9}), 2, 1)
    assert found.pause is not None
    store.write_sync(lambda conn: conn.execute(sprints.table.delete().where(sprints.c.id == "new")))
    past = store.read_sync(lambda conn: backlog.of_repository(conn, 7, now)).past[3]
    assert (past.state, past.outcome, past.settled_ms, past.detail) == ("settled", "failed", now, "no")
    store.close()


@pytest.fixture(params=FORGES)
async def anywhere(request: pytest.FixtureRequest, base: Path) -> AsyncIterator[World]:
    """The embedded forge, and a real Gitea where the variables name one."""
    async with make_world(base, live=request.param == "live") as made:
        yield made


async def dry(world: World) -> dict[int, str]:
    """Issue -> why it is left out, "" for those that may be taken."""
    done = await world.service.launcher.round(dry_run=True)
    [ranking] = done.rankings
    assert done.launches == ()
    return {place.issue.number: place.left_out or "" for place in ranking.places}


async def test_every_reason_on_a_forge(anywhere: World):
    world = anywhere
    alice, forge = world.alice, world.alice.forge
    for name in ("epic", "wontfix", "p/high"):
        await forge.ensure_label(world.stage.repo, name, color="#ffffff")
    good = await issue_with(world)
    epic, unwanted = await issue_with(world), await issue_with(world)
    await alice.label(epic, "epic")
    await alice.label(unwanted, "wontfix")
    assigned, mine = await issue_with(world), await issue_with(world)
    await alice.edit_issue(assigned, assignees=[world.bob.login])
    await alice.edit_issue(mine, assignees=[world.timmy.login])
    stranger = await world.mallory.open_issue("please", BODY.format(script="fix"))
    own = await world.timmy.open_issue("ops: something fires", BODY.format(script="fix"))
    mirror = await alice.open_issue("Alert: copied", replies.with_marker("It fires.", replies.alert_key("ab", 1)))
    skipped = await issue_with(world)
    await reacted(world, await alice.comment(skipped, "/dispatch skip not now"), "rocket")
    blocked = await issue_with(world)
    owner, _, repo = world.stage.repo.partition("/")
    await alice.client.post(f"/repos/{world.stage.repo}/issues/{blocked}/dependencies", {"owner": owner, "repo": repo, "index": good})
    done = await issue_with(world)
    await alice.label(done, "dispatch")
    await world.settled(done)
    # That it was given to the bot was a wish already.
    await world.settled(mine)
    assert await dry(world) == {
        good: "",
        epic: LeftOut.EPIC,
        unwanted: LeftOut.LABEL,
        assigned: LeftOut.ASSIGNED,
        mine: LeftOut.PULL,
        stranger: LeftOut.AUTHOR,
        own: LeftOut.MINE,
        mirror: LeftOut.MINE,
        skipped: LeftOut.SKIPPED,
        blocked: LeftOut.DEPENDENCY,
        done: LeftOut.PULL,
    }


async def test_sprint_launcher_sh_takes_the_oldest_of_the_best_once_whoever_asks(world: World):
    first = await issue_with(world)
    await issue_with(world)
    rounds: list[Round] = await asyncio.gather(*(world.service.launcher.round() for _ in range(4)), world.alice.label(first, "dispatch"))
    taken = {launch.issue for done in rounds if isinstance(done, Round) for launch in done.launches if launch.result == "ok"}
    sprint = await world.settled(first)
    assert sprint.outcome == "pull_request"
    assert first in taken or sprint.source == "label"
    assert await sprint_count(world, first) == 1
    assert len(await pulls_of(world, first)) == 1
    assert len(await world.by_bot(first)) == 1


async def test_a_pick_runs_as_its_author_behind_what_people_ask_for(anywhere: World):
    world = anywhere
    issue = await world.bob.open_issue("slug keeps capitals", BODY.format(script="fix"))
    done = await world.service.launcher.round()
    assert [(launch.issue, launch.attempt, launch.result) for launch in done.launches] == [(issue, 1, "ok")]
    sprint = await world.settled(issue)
    assert (sprint.source, sprint.requester, sprint.priority, sprint.outcome) == ("schedule", world.bob.login, 9, "pull_request")
    assert (await world.service.launcher.round()).launches == ()


async def test_three_attempts_then_one_comment(base: Path):
    launcher = {"max_attempts": 2, "backoff_minutes": 0.001}
    async with make_world(base, launcher=launcher) as world:
        issue = await issue_with(world, "no_change")
        for attempt in (1, 2):
            await asyncio.sleep(0.2)
            done = await world.service.launcher.round()
            assert [launch.attempt for launch in done.launches] == [attempt]
            await world.settled(issue)
        before = len(await world.by_bot(issue))
        for _ in range(3):
            assert (await world.service.launcher.round()).launches == ()
        await world.shown(issue)
        after = await world.by_bot(issue)
        assert len(after) == before + 1
        assert "2 times" in after[-1]
        assert [entry.kind for entry in await world.trail(issue)].count("give_up") == 1
        comment = await world.alice.comment(issue, "/dispatch run")
        await reacted(world, comment, "rocket")
        assert await sprint_count(world, issue) == 3


async def test_full_paused_and_cancelled_repositories_are_left_alone(base: Path):
    async with make_world(base, start=False) as world:
        await world.start(repositories=[{"name": world.stage.repo, "max_open_prs": 1}])
        issue = await issue_with(world)
        await world.alice.label(issue, "dispatch")
        await world.settled(issue)
        other = await issue_with(world)
        [ranking] = (await world.service.launcher.round()).rankings
        assert ranking.held is Held.OPEN_PRS
        [pull] = await world.pulls()
        await world.alice.merge(pull["number"])
        await reacted(world, await world.alice.comment(other, "/dispatch pause"), "rocket")
        [ranking] = (await world.service.launcher.round()).rankings
        assert ranking.held is Held.PAUSED
        await reacted(world, await world.alice.comment(other, "/dispatch resume"), "rocket")
        assert [launch.issue for launch in (await world.service.launcher.round()).launches] == [other]
        await state_is(world, other, "queued", "admitted", "preparing", "working", "vetting", "publishing", "settled")


async def test_the_clock_takes_an_issue_and_off_means_off(base: Path):
    async with make_world(base, start=False) as world:
        issue = await issue_with(world)
        await world.start()
        assert world.service.launcher.schedules() == {}
        await world.stop()
        await world.start(launcher={"enabled": True, "schedule": "* * * * * *"})
        assert (await world.settled(issue)).source == "schedule"
        await world.stop()
        # What is switched off again is no longer fired.
        await world.start()
        later = await issue_with(world, title="another")
        await asyncio.sleep(3)
        assert await world.sprint(later) is None


async def test_a_forge_that_does_not_answer_starts_nothing(world: World):
    await issue_with(world)
    await world.forge.stop()
    [ranking] = (await world.service.launcher.round()).rankings
    assert ranking.held is Held.UNREADABLE


def configuration(world: World) -> Path:
    """A dispatch.yml of this world, beside its secrets."""
    folder = world.state_dir.parent
    for name, text in (("token", world.timmy.token.reveal()), ("hook", world.stage.webhook_secret.reveal())):
        path = folder / name
        path.write_text(text)
        path.chmod(0o600)
    path = folder / "dispatch.yml"
    path.write_text(
        json.dumps(
            {
                "forge": {"url": world.stage.url, "token_file": "token"},
                "webhook": {"secret_files": ["hook"], "listen": f"127.0.0.1:{world.port}", "public_url": f"http://127.0.0.1:{world.port}"},
                "repositories": [{"name": world.stage.repo}],
                "state_dir": str(world.state_dir),
                "sandbox": {"kind": "none"},
                "providers": [{"name": "scripted", "base_url": world.model.url, "model": "scripted-1"}],
            }
        )
    )
    path.chmod(0o600)
    return path


async def cli(world: World, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-P", "-m", "bot", "-c", str(configuration(world)), *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


async def test_a_line_in_a_crontab_is_enough(world: World):
    issue, epic = await issue_with(world), await world.alice.open_issue("[EPIC] all of it")
    code, said = await cli(world, "launch", "--dry-run")
    assert code == 0
    assert f"#{issue}" in said
    assert "epic: it is marked [epic]" in said
    assert await world.sprint(issue) is None
    code, said = await cli(world, "launch", "--dry-run", "--json", world.stage.repo)
    seen = {entry["issue"]: entry["left_out"] for entry in json.loads(said)["repositories"][0]["issues"]}
    assert seen == {issue: None, epic: "epic"}
    code, said = await cli(world, "launch")
    assert (code, f"{world.stage.repo}#{issue} (attempt 1): ok" in said) == (0, True), said
    assert "decided" not in said, "what is logged is not part of the answer"
    assert (await world.settled(issue)).outcome == "pull_request"
    code, said = await cli(world, "launch", "nobody/nothing")
    assert (code, "not in the configuration" in said) == (1, True)


async def test_nothing_is_taken_before_the_service_has_run(base: Path):
    async with make_world(base, start=False) as world:
        code, said = await cli(world, "launch")
        assert (code, "start the service once" in said) == (1, True)


async def test_a_launched_issue_is_explained(world: World):
    issue = await issue_with(world)
    await world.service.launcher.round()
    await world.settled(issue)
    first, *_ = await world.trail(issue)
    assert (first.kind, first.result, first.actor) == ("run", "ok", world.alice.login)
    await until(lambda: world.by_bot(issue))
