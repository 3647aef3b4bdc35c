"""What `run` and `retry` share: the checks before a sprint is queued, in the order a person would want to hear of them, and the options."""

from __future__ import annotations

import re

from bot import guard
from bot.chatops import Context, denied, invalid, issue_of_branch
from bot.models import IssueFacts, Obstacle, ObstacleKind, Permission, Reaction, Reply, Source, SprintView, UserError, Verdict, text_hash
from bot.replies import mirrors_alerts, sprint_data

PRIORITIES = {Source.REVIEW: 7, Source.CHECKS: 7, Source.SCHEDULE: 9}
HUMAN_PRIORITY = 5
LEAST_URGENT = 9
OPTIONS = ("base", "budget", "model", "priority", "steps")


def start(context: Context, *, source: Source, instructions: str) -> Verdict:
    """Queues a sprint for the issue, or says what stands against it. Where one is active already, that one is the answer."""
    ask, facts, queue = context.ask, context.facts, context.queue
    if facts is None:
        return Verdict("error", "the forge could not be asked about the issue", Reply("not_yet", reaction=Reaction.CONFUSED))
    refusal = _refusal(facts)
    if refusal:
        return refusal
    active = queue.active()
    if active:
        return already(context, active)
    found = _obstacles(context, facts, source)
    forced = forces(context)
    if found and not forced:
        return _in_the_way(found)
    refusal = text_refusal(context, facts)
    if refusal:
        return refusal
    options = _options(context)
    if isinstance(options, Verdict):
        return options
    if forced:
        options[guard.FORCE] = ", ".join(obstacle.kind for obstacle in found) or "nothing"
    why = f"queued by force, although {_listed(found)}" if found else "queued"
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


def forces(context: Context) -> bool:
    """Whether the first word is `force`: start in spite of the guard."""
    return bool(context.ask.args) and context.ask.args[0].casefold() == guard.FORCE


def words(context: Context) -> str:
    """The free text of the command: its bare words but for a leading `force`, then what follows the options and stands on the lines below."""
    args = context.ask.args[1:] if forces(context) else context.ask.args
    return "\n".join(part for part in (" ".join(args), context.ask.instructions) if part)


def _obstacles(context: Context, facts: IssueFacts, source: Source) -> tuple[Obstacle, ...]:
    return guard.obstacles(
        labels=facts.labels,
        pulls=facts.pulls,
        blockers=facts.blockers,
        skip=context.queue.skipped(),
        skip_labels=context.settings.skip_labels,
        source=source,
    )


def _in_the_way(found: tuple[Obstacle, ...]) -> Verdict:
    skipped = any(obstacle.kind is ObstacleKind.SKIPPED for obstacle in found)
    return denied(_listed(found), "in_the_way", obstacles=[guard.in_words(obstacle) for obstacle in found], skipped=skipped)


def _listed(found: tuple[Obstacle, ...]) -> str:
    return "; ".join(guard.in_words(obstacle) for obstacle in found)


def _refusal(facts: IssueFacts) -> Verdict | None:
    if facts.archived:
        return denied("archived", "archived")
    if facts.is_pull:
        issue = issue_of_branch(facts.head_branch)
        return invalid("own pull request", "our_pull", issue=issue) if issue else denied("a person's pull request", "not_our_pull")
    if facts.state != "open":
        return invalid("closed issue", "issue_closed")
    if mirrors_alerts(facts.body):
        return denied("mirrors an alert", "ops_issue")
    return None


def text_refusal(context: Context, facts: IssueFacts) -> Verdict | None:
    """A stranger's text counts only as the very text that a permitted person asked for; a permitted author's text is frozen anew."""
    ask = context.ask
    trusted = ask.actor.is_terminal or facts.author_id == ask.actor.id or context.author_permission >= Permission.WRITE
    if trusted or ask.delivered_hash == text_hash(facts.title, facts.body):
        return None
    if ask.delivered_hash:
        return denied("text changed since it was asked for", "text_changed", author=facts.author_login)
    return denied("no delivery shows the text that was asked for", "text_unverified", author=facts.author_login)


def _options(context: Context) -> dict[str, str] | Verdict:
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
