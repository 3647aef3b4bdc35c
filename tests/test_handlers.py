"""Every handler, fed through the router with what running servers sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import handlers
from bot.chatops import Finding, LabelAdded, PullFate, PullNews, RepositoryFact, Reverted, TextEdited, parse
from bot.discovery import discover
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from bot.models import Actor, Ask, IssueRef, RepoId, Source, text_hash
from bot.settings import ForgeSettings, ProviderSettings, RepositorySettings, Settings

DATA = Path(__file__).parent / "data" / "gitea"
SECRET = b"fixture-secret"
TIMMY = 5
ROUTERS = dict(discover(handlers, Router))
ROUTER = Router.merge(*ROUTERS.values())
SETTINGS = Settings(
    forge=ForgeSettings(url="https://git.example"),
    repositories=(RepositorySettings(name="acme/rocket"),),
    state_dir=Path("/var/lib/x"),
    providers=(ProviderSettings(name="p", base_url="https://llm.example/v1", model="m"),),
)
BOB, ALICE, MALLORY = Actor(3, "bob"), Actor(2, "alice"), Actor(4, "mallory")


class Desk:
    """What a test says the forge and the store know."""

    settings = SETTINGS
    verbs = ("cancel", "help", "queue", "retry", "run", "status")
    me_id = TIMMY
    me_login = "timmy"

    def __init__(self, added: LabelAdded | None = None, sprint: str | None = None) -> None:
        self.added, self.sprint = added, sprint
        self.asked: list[tuple[str, int, str]] = []

    async def label_adder(self, repo: str, number: int, label: str) -> LabelAdded | None:
        self.asked.append((repo, number, label))
        return self.added

    async def assigner(self, repo: str, number: int) -> LabelAdded | None:
        self.asked.append((repo, number, "assigned"))
        return self.added

    async def active_trigger(self, repo_id: RepoId, number: int) -> str:
        return self.sprint or ""


def recorded(name: str, version: str = "1.26") -> Event:
    """The one delivery of that name, verified."""
    (body,) = (DATA / f"recorded-{version}" / "deliveries").glob(f"{name}.*.body")
    return read(body)


def read(body: Path) -> Event:
    headers = json.loads(body.with_suffix("").with_suffix(body.with_suffix("").suffix + ".headers.json").read_text())
    return Event.from_http(headers, body.read_bytes(), [SECRET])


async def findings(event: Event, desk: Desk | None = None) -> list[Finding]:
    found: list[Finding] = []
    for handler in ROUTER.fetch(event):
        found += await handler(event, desk or Desk())
    return found


def changed(event: Event, **changes: object) -> Event:
    """The same delivery with other values at paths such as `issue__labels`."""
    data = json.loads(event.body)
    for path, value in changes.items():
        *way, last = path.split("__")
        place = data
        for key in way:
            place = place[key]
        place[last] = value
    fields = {name: getattr(event, name) for name in Event.__dataclass_fields__}
    return Event(**fields | {"data": data})


def all_recorded() -> Iterator[Path]:
    return iter(sorted(DATA.glob("recorded-*/deliveries/*.body")))


ADDED = LabelAdded(131, BOB, 1_795_554_000_000)


def test_what_is_discovered() -> None:
    assert list(ROUTERS) == ["checks", "comments", "issues", "pulls", "repository", "reviews", "unread"]


@pytest.mark.parametrize(
    "name", ["label-added", "label-added-again-no-change", "label-unknown-name", "issue-opened-with-label-by-writer.1"]
)
async def test_the_trigger_label_is_credited_to_whom_the_timeline_names(name: str) -> None:
    event, desk = recorded(name), Desk(ADDED)
    (ask,) = await findings(event, desk)
    issue = event.data["issue"]
    assert ask == Ask(
        key="label:131",
        repo_id=RepoId(5),
        issue=IssueRef("acme", "rocket", issue["number"]),
        actor=BOB,
        source=Source.LABEL,
        verb="run",
        asked_ms=1_795_554_000_000,
        delivered_hash=text_hash(issue["title"], issue["body"]),
    )
    assert desk.asked == [("acme/rocket", issue["number"], "dispatch")]


async def test_a_maintainers_other_label_does_not_credit_the_maintainer_with_a_strangers_trigger() -> None:
    event = recorded("label-added")
    assert event.sender_login == "bob"
    (ask,) = await findings(event, Desk(LabelAdded(131, MALLORY, 1)))
    assert (ask.actor, ask.key) == (MALLORY, "label:131")


async def test_one_label_in_several_deliveries_is_one_wish() -> None:
    asks = []
    for part in ("1", "2"):
        asks += await findings(recorded(f"issue-opened-with-label-by-stranger-web.{part}"), Desk(LabelAdded(131, MALLORY, 1)))
    asks += await findings(recorded("replayed"), Desk(LabelAdded(131, MALLORY, 1)))
    assert {(ask.key, ask.actor) for ask in asks} == {("label:131", MALLORY)}


async def test_a_label_that_nobody_added_or_that_is_off_again_starts_nothing() -> None:
    assert await findings(recorded("label-added"), Desk(None)) == []


@pytest.mark.parametrize("actor", [Actor(TIMMY, "timmy"), Actor(0, "")])
async def test_the_bots_own_label_and_one_without_a_person_start_nothing(actor: Actor) -> None:
    assert await findings(recorded("label-added"), Desk(LabelAdded(1, actor, 1))) == []


@pytest.mark.parametrize("name", ["issue-opened", "issue-opened-with-label-by-stranger-api", "issue-reopened"])
async def test_an_issue_without_the_label_asks_nothing_of_the_forge(name: str) -> None:
    desk = Desk(ADDED)
    assert await findings(recorded(name), desk) == []
    assert desk.asked == []


@pytest.mark.parametrize("name", ["label-removed", "labels-cleared"])
async def test_the_label_taken_off_cancels_the_sprint_it_started(name: str) -> None:
    (ask,) = await findings(recorded(name), Desk(None, "label:131"))
    assert (ask.key, ask.verb, ask.options, ask.actor) == ("unlabel:131", "cancel", {"only_trigger": "label:131"}, BOB)
    assert ask.asked_ms > 0


async def test_the_label_taken_off_cancels_no_sprint_that_it_did_not_start() -> None:
    assert await findings(recorded("label-removed"), Desk(None, None)) == []


async def test_a_late_delivery_without_the_label_does_not_cancel_while_the_label_is_on() -> None:
    assert await findings(recorded("label-removed"), Desk(LabelAdded(140, BOB, 2), "label:131")) == []


async def test_a_closed_issue_with_the_label_starts_nothing() -> None:
    assert await findings(changed(recorded("label-added"), issue__state="closed"), Desk(ADDED)) == []


@pytest.mark.parametrize("name", ["issue-closed", "pr-merged-closes-issue.2"])
async def test_a_closed_issue_cancels(name: str) -> None:
    event = recorded(name)
    (ask,) = await findings(event)
    assert (ask.verb, ask.actor, ask.issue.number) == ("cancel", BOB, event.data["issue"]["number"])
    assert ask.key == f"closed:5:{ask.issue.number}:{ask.asked_ms}"
    assert ask.asked_ms > 1_700_000_000_000


async def test_a_deleted_issue_cancels() -> None:
    event = recorded("issue-closed")
    fields = {name: getattr(event, name) for name in Event.__dataclass_fields__}
    (ask,) = await findings(Event(**fields | {"action": "deleted"}))
    assert (ask.verb, ask.key) == ("cancel", f"closed:5:{ask.issue.number}:0")


async def test_a_new_comment_asks_everything_in_it() -> None:
    event = recorded("comment-created")
    (ask,) = await findings(event)
    comment, issue = event.data["comment"], event.data["issue"]
    assert (ask.verb, ask.options, ask.actor, ask.comment_id, ask.instructions) == ("run", {"budget": "$2"}, BOB, comment["id"], "")
    assert ask.key.startswith(f"command:{comment['id']}:")
    assert ask.delivered_hash == text_hash(issue["title"], issue["body"])
    assert ask.source is Source.COMMAND


async def test_an_edit_by_the_author_asks_only_what_is_new() -> None:
    created = {ask.key for ask in await findings(recorded("comment-created"))}
    (ask,) = await findings(recorded("comment-edited-by-author"))
    assert (ask.verb, ask.actor) == ("status", BOB)
    assert ask.key not in created


async def test_an_edit_by_another_is_asked_by_the_other() -> None:
    event = recorded("comment-edited-by-maintainer")
    assert event.data["comment"]["user"]["login"] == "bob"
    (ask,) = await findings(event)
    assert (ask.verb, ask.actor) == ("cancel", ALICE)


async def test_an_edit_that_changed_nothing_asks_nothing() -> None:
    assert await findings(recorded("comment-edited-unchanged", "1.22")) == []


async def test_an_edit_without_its_old_text_asks_nothing() -> None:
    assert await findings(changed(recorded("comment-edited-by-author"), changes=None)) == []
    assert await findings(changed(recorded("comment-edited-by-author"), changes={"body": {"from": None}})) == []


@pytest.mark.parametrize("name", ["comment-deleted", "status-comment-by-bot", "status-comment-edited-by-bot"])
async def test_a_deleted_comment_and_our_own_ask_nothing(name: str) -> None:
    assert await findings(recorded(name)) == []


async def test_a_comment_on_a_pull_request_is_asked_there() -> None:
    event = recorded("fork-pr-comment")
    (ask,) = await findings(event)
    assert (ask.verb, ask.actor, ask.issue.number) == ("run", MALLORY, event.data["issue"]["number"])


async def test_a_verb_that_is_not_there_yet_is_answered() -> None:
    (ask,) = await findings(recorded("pr-comment"))
    assert (ask.verb, ask.error) == ("", "There is no verb `revise`.")


async def test_a_hundred_commands_are_capped() -> None:
    event = changed(recorded("comment-created"), comment__body="\r\n\r\n".join(["/dispatch status"] * 100))
    asks = await findings(event)
    assert len(asks) == SETTINGS.commands_per_comment + 1
    assert len({ask.key for ask in asks}) == len(asks)
    assert "95 more" in asks[-1].error


async def test_a_comment_of_the_bot_is_never_obeyed_even_without_its_marker() -> None:
    event = recorded("comment-created")
    fields = {name: getattr(event, name) for name in Event.__dataclass_fields__}
    assert await findings(Event(**fields | {"sender_id": TIMMY})) == []


@pytest.mark.parametrize(
    ("name", "state", "branch"),
    [
        ("pr-merged-closes-issue.1", "merged", "dispatch/issue-1"),
        ("pr-closed-unmerged", "closed", "dispatch/issue-1"),
        ("pr-reopened.2", "open", "dispatch/issue-1"),
    ],
)
async def test_what_becomes_of_a_pull_request(name: str, state: str, branch: str) -> None:
    event = recorded(name)
    (fate,) = await findings(event)
    assert isinstance(fate, PullFate)
    assert (fate.repo_id, fate.number, fate.state, fate.head_branch) == (5, event.data["pull_request"]["number"], state, branch)
    assert fate.at_ms > 1_700_000_000_000
    assert bool(fate.merged_sha) == (state == "merged")


async def test_a_forks_branch_of_our_name_is_not_ours() -> None:
    event = changed(recorded("pr-closed-unmerged"), pull_request__head__repo_id=99)
    assert await findings(event) == []
    assert await findings(changed(recorded("pr-closed-unmerged"), pull_request__head={"repo": None, "repo_id": -1})) == []


def repository_event(action: str) -> Event:
    fields = {name: getattr(recorded("issue-closed"), name) for name in Event.__dataclass_fields__}
    return Event(**fields | {"event_type": "repository", "event": "repository", "action": action})


async def test_a_repository_made_or_gone() -> None:
    assert await findings(repository_event("deleted")) == [RepositoryFact(RepoId(5), "acme/rocket", deleted=True)]
    assert await findings(repository_event("created")) == [RepositoryFact(RepoId(5), "acme/rocket")]


@pytest.mark.parametrize("body", list(all_recorded()), ids=lambda body: f"{body.parts[-3]}/{body.name}")
async def test_no_recorded_delivery_breaks_a_handler(body: Path) -> None:
    for finding in await findings(read(body), Desk(ADDED, "label:131")):
        assert isinstance(finding, Ask | PullFate | PullNews | RepositoryFact | Reverted | TextEdited)


@pytest.mark.parametrize(
    "name",
    [
        "label-added",
        "label-removed",
        "comment-created",
        "comment-edited-by-author",
        "issue-closed",
        "pr-closed-unmerged",
        "fork-pr-comment",
    ],
)
@pytest.mark.parametrize("value", [None, [], {}, "x", 7], ids=repr)
async def test_a_payload_of_another_shape_breaks_no_handler(name: str, value: object) -> None:
    event = recorded(name)
    for key in ("issue", "comment", "changes", "pull_request"):
        if key in event.data:
            await findings(changed(event, **{key: value}), Desk(ADDED, "label:131"))
            inner = event.data[key]
            for field in inner if isinstance(inner, dict) else ():
                await findings(changed(event, **{f"{key}__{field}": value}), Desk(ADDED, "label:131"))


def test_the_recorded_comment_holds_what_it_shows() -> None:
    assert [item.text for item in parse(recorded("comment-created").data["comment"]["body"], Desk.verbs)] == ["/dispatch run budget=$2"]
