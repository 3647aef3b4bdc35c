"""The one gate: the live permission of the person decides, a definite no is refused with its reason, and a forge that cannot answer is not yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from bot.chatops import is_forge_act, trigger_of
from bot.gitea.errors import Forbidden, ForgeError, NotFound, may_recover
from bot.models import Actor, Ask, Permission, Reaction, Reply, RepoId
from bot.settings import Settings


@dataclass(frozen=True, slots=True)
class Allowed:
    """The person has what the command needs; `permission` is the level to judge options by."""

    permission: Permission
    operator_error: str = ""


@dataclass(frozen=True, slots=True)
class Denied:
    """A definite no. `reason` is for `explain`; `operator_error`, where not empty, is a fault of the set-up: for the metric, the log and the doctor."""

    reason: str
    reply: Reply
    operator_error: str = ""


@dataclass(frozen=True, slots=True)
class NotYet:
    """The forge cannot say at the moment: ask again, start nothing."""

    reason: str


Judgement: TypeAlias = Allowed | Denied | NotYet


class Permissions(Protocol):
    """Asks the forge for the live level of a person on a repository; the caller caches for at most 60 s."""

    async def __call__(self, repo_id: RepoId, repo: str, actor: Actor) -> Permission:
        """Raises ForgeError: Forbidden where the bot itself may not ask, NotFound where there is no such person."""


class Gate:
    """Who may do what, for every trigger alike."""

    def __init__(self, settings: Settings, permission_of: Permissions) -> None:
        self._settings = settings
        self._permission_of = permission_of

    async def judge(self, ask: Ask, needs: Permission) -> Judgement:
        """Whether the person behind `ask` has the level `needs` now."""
        actor = ask.actor
        if actor.is_terminal:
            return Allowed(Permission.OPERATOR)
        if is_forge_act(ask):
            # The forge has let this person close the issue or take the label off; stopping our work on it follows from that.
            return Allowed(Permission.WRITE)
        if _is_bot(actor) and not _listed(actor.login, self._settings.allow_bots):
            # A reaction and no comment: two bots that answer each other never end.
            return Denied("a bot that is not listed in allow_bots", Reply(reaction=Reaction.CONFUSED))
        try:
            level = await self._permission_of(ask.repo_id, ask.issue.full_name, actor)
        except Forbidden as error:
            return self._by_list(ask, needs, error)
        except NotFound:
            level = Permission.NONE
        except (ForgeError, TimeoutError, ConnectionError) as error:
            if may_recover(error):
                return NotYet(str(error) or type(error).__name__)
            refusal = _not_permitted(self._settings, ask, needs, Permission.NONE)
            return Denied(f"the forge's answer is no level: {error}", refusal, str(error))
        if _listed(actor.login, self._settings.operators) and level >= Permission.READ:
            level = Permission.OPERATOR
        return self._compared(ask, needs, level)

    def _by_list(self, ask: Ask, needs: Permission, error: Forbidden) -> Judgement:
        """The bot is only a writer here: the operator's lists say who may write, and whoever could ask here can read."""
        fault = f"the bot may not ask for permissions on {ask.issue.full_name}: {error}"
        repository = self._settings.repository(ask.issue.full_name)
        allowed = (*self._settings.allow_users, *(repository.allow_users if repository else ()))
        level = Permission.WRITE if _listed(ask.actor.login, allowed) else Permission.READ
        if _listed(ask.actor.login, self._settings.operators):
            level = Permission.OPERATOR
        if level >= needs:
            return Allowed(level, fault)
        if level is Permission.READ:
            return Denied("not on the list", _refusal("not_on_list", login=ask.actor.login), fault)
        return Denied("permission", _not_permitted(self._settings, ask, needs, level), fault)

    def _compared(self, ask: Ask, needs: Permission, level: Permission) -> Judgement:
        if level >= needs:
            return Allowed(level)
        return Denied(f"{level.name.lower()} where {needs.name.lower()} is needed", _not_permitted(self._settings, ask, needs, level))


def _is_bot(actor: Actor) -> bool:
    return actor.id < 0 or actor.login.casefold().endswith("[bot]")


def _listed(login: str, names: Iterable[str]) -> bool:
    return login.casefold() in {name.casefold() for name in names}


def _not_permitted(settings: Settings, ask: Ask, needs: Permission, level: Permission) -> Reply:
    if ask.key.startswith("review:"):
        return _refusal("not_permitted_review", login=ask.actor.login)
    # Told by the key, because what reconciliation found has another source.
    match trigger_of(ask):
        case "label":
            return _refusal("not_permitted_label", login=ask.actor.login, label=settings.trigger_label)
        case "assignment":
            return _refusal("not_permitted_assignment", login=ask.actor.login)
        case "mention":
            return _refusal("not_permitted_mention", login=ask.actor.login)
    return _refusal("not_permitted", login=ask.actor.login, verb=ask.verb, needs=needs.name, has=level.name)


def _refusal(name: str, **data: str) -> Reply:
    return Reply(name, dict(data), Reaction.CONFUSED)
