"""`/dispatch prompt`: the task of this issue for another agent, under the same rules about whose text counts as for our own."""

from __future__ import annotations

import hashlib

from bot.chatops import Command, Context, Fact
from bot.models import Permission, Reaction, Reply, Verdict
from bot.prompt import manual_prompt, task_prompt
from commands._start import reason, text_refusal

BOT = "timmy-dispatch"


def prompt(context: Context) -> Verdict:
    """Writes the self-contained prompt that another agent can work from; it holds no token."""
    ask, facts, settings = context.ask, context.facts, context.settings
    if facts is None:
        return Verdict("error", "the forge could not be asked about the issue", Reply("not_yet", reaction=Reaction.CONFUSED))
    refusal = text_refusal(context, facts)
    if refusal:
        return refusal
    # Whatever looks like the delimiter is taken out of what others wrote, so it need not be secret.
    delimiter = hashlib.sha256(f"{ask.key}:{context.now_ms}".encode()).hexdigest()[:16]
    task = task_prompt(
        ref=ask.issue,
        title=facts.title,
        body=facts.body,
        author=facts.author_login,
        delimiter=delimiter,
        comments=facts.comments,
        instructions=reason(context),
        asker=ask.actor.login,
    )
    text = manual_prompt(
        ref=ask.issue,
        clone_url=f"{settings.forge.public_url or settings.forge.url}/{ask.issue.full_name}.git",
        base_branch=context.repository.base_branch,
        checks=context.repository.checks,
        delimiter=delimiter,
        task=task,
        bot=BOT,
    )
    return Verdict("ok", "the prompt was written", Reply("prompt_text", {"text": text, "comments": len(facts.comments)}, Reaction.ROCKET))


plugin = Command(
    prompt,
    usage="/dispatch prompt [instructions]",
    needs=Permission.WRITE,
    examples=("/dispatch prompt", "/dispatch prompt keep the public API as it is"),
    pulls=False,
    wants=frozenset({Fact.ISSUE, Fact.AUTHOR, Fact.COMMENTS}),
)
