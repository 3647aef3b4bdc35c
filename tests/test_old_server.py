"""The oldest server we promise to serve (1.22): redirects are 307, totals are missing, an unchanged edit fires, label names of orgs do not resolve."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from world import World, make_world, until


@pytest.fixture
async def old(base: Path) -> AsyncIterator[World]:
    async with make_world(base, personality="1.22", reconcile={"every_seconds": 1, "leave_to_webhook_seconds": 0}) as made:
        yield made


async def test_label_to_pull_request_and_a_rename_in_between(old: World):
    issue = await old.alice.open_issue("slug keeps capitals", "script: fix")
    await old.alice.label(issue, "dispatch")
    assert (await old.settled(issue)).outcome == "pull_request"
    assert await old.labels(issue) == {"dispatch", "dispatch/review"}
    await old.forge.rename_repo(old.stage.repo, "slugs")
    again = await dataclasses.replace(old.alice, repo="alice/slugs").comment(issue, "/dispatch status")

    async def answered():
        return "rocket" in await old.reactions(again)

    await until(answered)


async def test_what_no_delivery_announced_is_found_once(old: World):
    old.forge.drop_deliveries = True
    issue = await old.alice.open_issue("slug keeps capitals", "script: fix")
    comment = await old.alice.comment(issue, "/dispatch")
    sprint = await old.settled(issue)
    assert sprint.outcome == "pull_request"
    assert "rocket" in await old.reactions(comment)
    assert len(await old.pulls()) == 1
    assert len(await old.by_bot(issue)) == 1
