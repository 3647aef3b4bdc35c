"""What `run` and `retry` share: the checks before a sprint is queued, in the order a person would want to hear of them, and the options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from types import MappingProxyType

from bot import guard
from bot.chatops import Context, denied, invalid, trigger_of
from bot.models import (
    FOLLOWS_PLAN,
    FOLLOWS_PULL,
    MODE,
    MODE_PLAN,
    REVISES_PLAN,
    IssueFacts,
    Obstacle,
    ObstacleKind,
    Permission,
    Plan,
    PlanState,
    Reaction,
    Reply,
    Source,
    SprintView,
    UserError,
    Verdict,
    text_hash,
)
from bot.replies import mirrors_alerts, sprint_data
from bot.snapshot import WorkerState

PRIORITIES = {Source.REVIEW: 7, Source.CHECKS: 7, Source.SCHEDULE: 9}
HUMAN_PRIORITY = 5
LEAST_URGENT = 9
DAY_MS = 86_400_000
REFUSALS = {
    "archived": "the repository is archived",
    "closed issue": "the issue is closed",
    "mirrors an alert": "the issue mirrors an alert, and those are never worked on",
}
OPTIONS = ("base", "budget", "model", "priority", "steps")
# Words that stand first and are no instructions.
PLAN_FLAG = "plan"
FLAGS = frozenset({guard.FORCE, PLAN_FLAG})
PLAN_ONLY: Mapping[str, str] = MappingProxyType({MODE: MODE_PLAN})
NOTHING: Mapping[str, str] = MappingProxyType({})


def start(
    context: Context,
    *,
    source: Source,
    instructions: str,
    pull: int = 0,
    own: Mapping[str, str] | None = None,
    carried: Mapping[str, str] = NOTHING,
    plan: Plan | None = None,
) -> Verdict:
    """Queues a sprint for the issue, or says what stands against it. Where one is active already, that one is the answer.

    With `pull` it goes on with that pull request of ours. `own` are options that no person wrote, in the place of those of the Ask; `carried` are
    options of an earlier sprint or plan, which those of the Ask override. `plan` is the one that is approved by this.
    """
    ask, facts, queue = context.ask, context.facts, context.queue
    if facts is None:
        return Verdict("error", "the forge could not be asked about the issue", Reply("not_yet", reaction=Reaction.CONFUSED))
    refusal = _refusal(facts) or _not_by_comment(context)
    if refusal:
        return refusal
    active = queue.active()
    if active:
        return already(context, active)
    if not pull and _plan_waits_already(context, source):
        return Verdict("ok", "its plan waits for approval", Reply())
    found = _obstacles(context, facts, source)
    if pull:
        found = tuple(obstacle for obstacle in found if obstacle.kind is not ObstacleKind.OWN_PULL)
    forced = forces(context) or guard.FORCE in carried
    if found and not forced:
        return _in_the_way(found, {"plan": "plan", "revise": "plan", "approve": "approve"}.get(ask.verb, "run"))
    refusal = None if pull and ran_before(context, facts) else _text_refusal(context, facts, plan)
    if refusal:
        return refusal
    options = options_of(context) if own is None else dict(own)
    if isinstance(options, Verdict):
        return options
    options = {**carried, **options, **(PLAN_ONLY if not pull and _plans_first(context, source) else NOTHING)}
    if pull:
        options[FOLLOWS_PULL] = str(pull)
    if forced:
        options[guard.FORCE] = ", ".join(obstacle.kind for obstacle in found) or "nothing"
    what = "queued for a plan" if MODE in options else "queued"
    why = f"{what} by force, although {_listed(found)}" if found else what
    sprint = queue.enqueue(
        source=source,
        priority=int(options.pop("priority", PRIORITIES.get(source, HUMAN_PRIORITY))),
        instructions=instructions,
        options=options,
        text_hash=text_hash(facts.title, facts.body),
        title=facts.title,
    )
    if sprint is None:
        active = queue.active()
        return already(context, active) if active else Verdict("error", "the queue took no sprint and shows none", Reply("not_yet"))
    if ask.actor.is_terminal:
        return Verdict("ok", why, Reply("queued", {"sprint": sprint_data(sprint, queue.position(sprint.id))}), sprint.id)
    # The status comment says the rest; a second comment would only repeat it.
    return Verdict("ok", why, Reply(reaction=Reaction.ROCKET), sprint.id)


def already(context: Context, active: SprintView) -> Verdict:
    """The answer where a sprint is active; silent where no person wrote a comment, because its status comment is there to read."""
    ask = context.ask
    if not ask.comment_id and not ask.actor.is_terminal:
        return Verdict("ok", "already active", Reply(), active.id)
    data = {"sprint": sprint_data(active, context.queue.position(active.id))}
    return Verdict("ok", "already active", Reply("already_active", data, Reaction.ROCKET), active.id)


def reason(context: Context) -> str:
    """Everything after the verb as one line, for a verb that takes a reason and no options."""
    ask = context.ask
    return " ".join(" ".join([*ask.args, *(f"{key}={value}" for key, value in ask.options.items()), ask.instructions]).split())


def flags(context: Context) -> tuple[str, ...]:
    """The words in front that are no instructions."""
    return tuple(takewhile(FLAGS.__contains__, (word.casefold() for word in context.ask.args)))


def forces(context: Context) -> bool:
    """Whether `force` stands in front: start in spite of the guard."""
    return guard.FORCE in flags(context)


def words(context: Context, *, whole: bool = False) -> str:
    """The free text of the command: its bare words but for the flags in front, then what follows the options and stands on the lines below.

    With `whole` there are no flags.
    """
    args = context.ask.args if whole else context.ask.args[len(flags(context)) :]
    return "\n".join(part for part in (" ".join(args), context.ask.instructions) if part)


def as_before(last: SprintView) -> Mapping[str, str]:
    """What a sprint keeps of the one it repeats: whether it only plans, and by which plan it works."""
    return {name: value for name, value in last.options.items() if name in (MODE, REVISES_PLAN, FOLLOWS_PLAN)}


def _plans_first(context: Context, source: Source) -> bool:
    return context.ask.verb == "run" and (PLAN_FLAG in flags(context) or _nobody_wrote(context, source))


def _nobody_wrote(context: Context, source: Source) -> bool:
    """Whether a plan comes first because this repository wants one where nobody wrote a command."""
    ask = context.ask
    return context.repository.plan_first and not ask.comment_id and not ask.actor.is_terminal and source not in guard.ON_OUR_PULL


def _plan_waits_already(context: Context, source: Source) -> bool:
    """A label put on again, or the backlog, makes no second plan while people think about the first one."""
    if context.ask.verb != "run" or not _nobody_wrote(context, source):
        return False
    plan = context.queue.plan()
    return plan is not None and plan.state is PlanState.WAITING


def _obstacles(context: Context, facts: IssueFacts, source: Source) -> tuple[Obstacle, ...]:
    return guard.obstacles(
        labels=facts.labels,
        pulls=facts.pulls,
        blockers=facts.blockers,
        skip=context.queue.skipped(),
        skip_labels=context.settings.skip_labels,
        source=source,
    )


def in_the_way_now(context: Context) -> list[str]:
    """What would refuse a start of this issue at this moment, or make it wait, as plain sentences without a full stop; pauses are told elsewhere."""
    facts, queue, settings, repository = context.facts, context.queue, context.settings, context.repository
    found = []
    if facts is not None:
        refusal = _refusal(facts)
        found += [REFUSALS.get(refusal.reason, refusal.reason)] if refusal else []
        found += [guard.in_words(obstacle) for obstacle in _obstacles(context, facts, Source.COMMAND)]
    elif (skip := queue.skipped()) is not None:
        found.append(guard.in_words(Obstacle(ObstacleKind.SKIPPED, who=skip.by, note=skip.reason)))
    if not any(worker.state in (WorkerState.IDLE, WorkerState.BUSY) for worker in queue.snapshot().workers):
        found.append("no worker is alive, so what is asked for waits")
    opened, most = queue.open_pulls(), repository.max_open_prs
    if most and opened >= most:
        found.append(f"{opened} of at most {most} pull requests of the bot are open here, so the next sprint waits until one is closed")
    budget = settings.queue.usd_per_day
    if budget and queue.spent_usd(context.now_ms - DAY_MS) >= budget:
        found.append(f"the budget of the day (${budget:g}) is used up, so the next sprint waits")
    return found


def _in_the_way(found: tuple[Obstacle, ...], verb: str) -> Verdict:
    skipped = any(obstacle.kind is ObstacleKind.SKIPPED for obstacle in found)
    return denied(_listed(found), "in_the_way", obstacles=[guard.in_words(obstacle) for obstacle in found], skipped=skipped, verb=verb)


def _listed(found: tuple[Obstacle, ...]) -> str:
    return "; ".join(guard.in_words(obstacle) for obstacle in found)


def _refusal(facts: IssueFacts) -> Verdict | None:
    if facts.archived:
        return denied("archived", "archived")
    if facts.is_pull:
        return denied("a person's pull request", "not_our_pull")
    if facts.state != "open":
        return invalid("closed issue", "issue_closed")
    if mirrors_alerts(facts.body):
        return denied("mirrors an alert", "ops_issue")
    return None


def _not_by_comment(context: Context) -> Verdict | None:
    """Where the settings leave comments out of the triggers, no verb of a comment starts anything."""
    ways = context.settings.triggers_of(context.repository)
    if "command" in ways or trigger_of(context.ask) != "command":
        return None
    return denied("comments start nothing here", "commands_off", ways=list(ways))


def ran_before(context: Context, facts: IssueFacts) -> bool:
    """Whether the issue's text is the one that was approved for its last sprint."""
    last = context.queue.last()
    return last is not None and last.text_hash == text_hash(facts.title, facts.body)


def _text_refusal(context: Context, facts: IssueFacts, plan: Plan | None) -> Verdict | None:
    """A plan is approved for the text it was made of. Another text is told of first, and may be approved once somebody has read it."""
    digest = text_hash(facts.title, facts.body)
    if plan is None or digest == plan.told_hash:
        return text_refusal(context, facts)
    if digest == plan.text_hash:
        return None
    context.queue.told_of_text(plan, digest)
    return invalid("the text changed since the plan was made", "plan_edited", author=facts.author_login)


def text_refusal(context: Context, facts: IssueFacts) -> Verdict | None:
    """A stranger's text counts only as the very text that a permitted person asked for; a permitted author's text is frozen anew."""
    ask = context.ask
    trusted = ask.actor.is_terminal or facts.author_id == ask.actor.id or context.author_permission >= Permission.WRITE
    if trusted or ask.delivered_hash == text_hash(facts.title, facts.body):
        return None
    if ask.delivered_hash:
        return denied("text changed since it was asked for", "text_changed", author=facts.author_login)
    return denied("no delivery shows the text that was asked for", "text_unverified", author=facts.author_login)


def options_of(context: Context) -> dict[str, str] | Verdict:
    """The options in plain figures, or the verdict on the first that cannot be."""
    given, limits = context.ask.options, context.settings.limits
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        known = ", ".join(f"`{name}=`" for name in OPTIONS)
        raise UserError(f"There is no option `{unknown[0]}=`; I know {known}. Instructions with a `=` go on the lines below the command.")
    options: dict[str, str] = {}
    if "budget" in given:
        usd = _money(given["budget"])
        if limits.usd and usd > limits.usd:
            return denied("budget", "over_limit", option="budget", asked=given["budget"], most=f"${limits.usd:g}")
        options["budget"] = f"{usd:g}"
    if "steps" in given:
        steps = _number(given["steps"], "steps")
        if steps > limits.steps:
            return denied("steps", "over_limit", option="steps", asked=given["steps"], most=str(limits.steps))
        options["steps"] = str(steps)
    if "priority" in given:
        if context.permission < Permission.ADMIN:
            return denied("priority", "option_needs", option="priority", needs=Permission.ADMIN.name)
        options["priority"] = str(_number(given["priority"], "priority", most=LEAST_URGENT))
    if "base" in given:
        options["base"] = _branch(given["base"])
    if "model" in given:
        options["model"] = _model(context, given["model"])
    return options


def _money(text: str) -> float:
    if not re.fullmatch(r"\$?[0-9]{1,6}(?:\.[0-9]{1,4})?", text) or not float(text.lstrip("$")):
        raise UserError(f"`budget={_plain(text)}` is no amount: write dollars, for example `budget=$2` or `budget=0.50`.")
    return float(text.lstrip("$"))


def _number(text: str, option: str, most: int | None = None) -> int:
    upper = f" from 1 to {most}" if most else ""
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text) or (most and int(text) > most):
        raise UserError(f"`{option}={_plain(text)}` is no number{upper}: write for example `{option}={most or 20}`.")
    return int(text)


def _branch(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}", text) or ".." in text or "//" in text or text.endswith(("/", ".", ".lock")):
        raise UserError(f"`base={_plain(text)}` is no branch name: write for example `base=main`.")
    if text.startswith("dispatch/"):
        raise UserError("A branch of mine cannot be the base: name the branch that the pull request should go into.")
    return text


def _model(context: Context, text: str) -> str:
    providers = context.settings.providers
    known = sorted({name for provider in providers for name in (provider.model, provider.name) if name})
    if text in known or (any(provider.from_hermes for provider in providers) and re.fullmatch(r"[A-Za-z0-9][\w./:@+-]{0,99}", text)):
        return text
    offer = ", ".join(f"`{name}`" for name in known[:8]) or "none"
    raise UserError(f"The model `{_plain(text)}` is not configured; I can use {offer}.")


def _plain(text: str) -> str:
    return text.replace("`", "'")[:60]
