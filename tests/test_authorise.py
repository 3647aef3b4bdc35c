"""The gate: a definite no is refused with its reason, what the forge cannot say is not yet, and lists stand in only where it may not be asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from bot import replies
from bot.authorise import Allowed, Denied, Gate, NotYet
from bot.gitea.errors import BadReply, Forbidden, Invalid, Moved, NotFound, RateLimited, Unauthorized, Unavailable
from bot.models import Actor, Ask, IssueRef, Permission, Reaction, Reply, RepoId, Source
from bot.settings import ForgeSettings, ProviderSettings, RepositorySettings, Settings

SETTINGS = Settings(
    forge=ForgeSettings(url="https://git.example"),
    repositories=(RepositorySettings(name="acme/rocket", allow_users=("carol",)),),
    state_dir=Path("/var/lib/x"),
    operators=("Root1",),
    allow_users=("bob",),
    allow_bots=("renovate[bot]",),
    providers=(ProviderSettings(name="p", base_url="https://llm.example/v1", model="m"),),
)


def ask(login: str, user_id: int = 3, **changes: object) -> Ask:
    first = {
        "key": "command:1:ab:0",
        "repo_id": RepoId(5),
        "issue": IssueRef("acme", "rocket", 1),
        "actor": Actor(user_id, login),
        "source": Source.COMMAND,
        "verb": "run",
        "asked_ms": 1,
    }
    return Ask(**(first | changes))


class Forge:
    """Answers with one level, or raises one error; counts how often it was asked."""

    def __init__(self, answer: Permission | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[int, str, str]] = []

    async def __call__(self, repo_id: RepoId, repo: str, actor: Actor) -> Permission:
        self.asked.append((repo_id, repo, actor.login))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def judge(answer: Permission | Exception, wish: Ask, needs: Permission = Permission.WRITE) -> object:
    return await Gate(SETTINGS, Forge(answer)).judge(wish, needs)


@pytest.mark.parametrize("level", [Permission.WRITE, Permission.ADMIN, Permission.OWNER])
async def test_enough_is_allowed(level: Permission) -> None:
    forge = Forge(level)
    assert await Gate(SETTINGS, forge).judge(ask("bob"), Permission.WRITE) == Allowed(level)
    assert forge.asked == [(5, "acme/rocket", "bob")]


async def test_a_stranger_is_refused_with_the_reason() -> None:
    judgement = await judge(Permission.READ, ask("mallory", 4))
    assert judgement == Denied(
        "read where write is needed",
        Reply("not_permitted", {"login": "mallory", "verb": "run", "needs": "WRITE", "has": "READ"}, Reaction.CONFUSED),
    )


async def test_a_strangers_label_is_refused_with_the_way_out() -> None:
    judgement = await judge(Permission.READ, ask("mallory", 4, source=Source.LABEL, key="label:131"))
    assert judgement.reply == Reply("not_permitted_label", {"login": "mallory", "label": "dispatch"}, Reaction.CONFUSED)


async def test_a_stranger_may_ask_for_what_needs_reading() -> None:
    assert await judge(Permission.READ, ask("mallory", 4, verb="status"), Permission.READ) == Allowed(Permission.READ)


async def test_an_unknown_user_is_a_definite_no() -> None:
    assert isinstance(await judge(NotFound(status=404), ask("nobody")), Denied)
    refused = await judge(Invalid("odd", status=422), ask("nobody"))
    assert isinstance(refused, Denied)
    assert refused.operator_error


@pytest.mark.parametrize(
    "error",
    [
        Unavailable(status=503),
        RateLimited(status=429),
        TimeoutError(),
        ConnectionError(),
        Unauthorized(status=401),
        Moved(status=301),
        BadReply(status=200),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_the_forge_cannot_say_is_not_yet(error: Exception) -> None:
    judgement = await judge(error, ask("bob"))
    assert isinstance(judgement, NotYet)
    assert judgement.reason


async def test_a_programming_error_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        await judge(ZeroDivisionError(), ask("bob"))


@pytest.mark.parametrize(("login", "level"), [("bob", Permission.WRITE), ("CAROL", Permission.WRITE), ("root1", Permission.OPERATOR)])
async def test_where_the_bot_may_not_ask_the_lists_decide_and_the_operator_is_told(login: str, level: Permission) -> None:
    judgement = await judge(Forbidden("Must be admin", status=403), ask(login))
    assert isinstance(judgement, Allowed)
    assert judgement.permission is level
    assert "acme/rocket" in judgement.operator_error


async def test_where_the_bot_may_not_ask_an_unlisted_person_is_refused() -> None:
    judgement = await judge(Forbidden(status=403), ask("mallory", 4))
    assert isinstance(judgement, Denied)
    assert judgement.reply.name == "not_on_list"
    assert judgement.operator_error
    reading = await judge(Forbidden(status=403), ask("mallory", 4, verb="status"), Permission.READ)
    assert isinstance(reading, Allowed)


async def test_a_listed_person_is_no_administrator() -> None:
    judgement = await judge(Forbidden(status=403), ask("bob"), Permission.ADMIN)
    assert isinstance(judgement, Denied)
    assert judgement.reply.name == "not_permitted"


async def test_a_list_never_overrules_the_forge() -> None:
    assert isinstance(await judge(Permission.READ, ask("bob")), Denied)
    assert isinstance(await judge(Permission.NONE, ask("root1")), Denied)


async def test_an_operator_of_the_configuration() -> None:
    assert await judge(Permission.READ, ask("root1")) == Allowed(Permission.OPERATOR)


@pytest.mark.parametrize(("login", "user_id"), [("gitea-actions", -2), ("Ghost", -1), ("evil[bot]", 9), ("Evil[Bot]", 9)])
async def test_bots_get_a_reaction_and_no_word_and_the_forge_is_not_asked(login: str, user_id: int) -> None:
    forge = Forge(Permission.OWNER)
    judgement = await Gate(SETTINGS, forge).judge(ask(login, user_id), Permission.READ)
    assert isinstance(judgement, Denied)
    assert judgement.reply == Reply(reaction=Reaction.CONFUSED)
    assert forge.asked == []


async def test_a_listed_bot_still_needs_the_right() -> None:
    assert await judge(Permission.WRITE, ask("renovate[bot]", 9)) == Allowed(Permission.WRITE)
    assert isinstance(await judge(Permission.READ, ask("renovate[bot]", 9)), Denied)


async def test_the_terminal_is_the_operator_even_while_the_forge_is_down() -> None:
    forge = Forge(Unavailable())
    wish = ask("operator", 0, key="terminal:1")
    assert await Gate(SETTINGS, forge).judge(wish, Permission.OPERATOR) == Allowed(Permission.OPERATOR)
    assert forge.asked == []


async def test_what_the_forge_let_somebody_do_needs_no_right_of_ours() -> None:
    assert isinstance(await judge(Permission.READ, ask("mallory", 4, verb="cancel", key="closed:5:1:9")), Allowed)
    assert isinstance(await judge(Permission.READ, ask("mallory", 4, verb="cancel", options={"only_trigger": "label:1"})), Denied)


async def test_every_refusal_can_be_said() -> None:
    for error in (Permission.NONE, Permission.READ, Forbidden(status=403), NotFound(status=404)):
        judgement = await judge(error, ask("mallory", 4))
        assert "`mallory`" in replies.render(judgement.reply, key="reply:x")
