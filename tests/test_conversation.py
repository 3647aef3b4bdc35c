"""Conversations: a label or a comment goes in; reactions, one status comment, labels and a pull request come out."""

from __future__ import annotations

from world import World


async def test_label_becomes_a_pull_request(world: World):
    issue = await world.alice.open_issue("slug keeps capitals", "script: fix\n\nPlease mend `lib/slug.sh`.")
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    assert (sprint.outcome, sprint.reason) == ("pull_request", ""), sprint
    [pull] = await world.pulls()
    assert pull["state"] == "open"
    assert f"Closes #{issue}" in pull["body"]
    assert pull["head"]["label"] == f"dispatch/issue-{issue}"
    assert await world.labels(issue) == {"dispatch", "dispatch/review"}
    [status] = await world.by_bot(issue)
    assert f"#{pull['number']}" in status
