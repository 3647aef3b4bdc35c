"""The router: order, isolation, and what matches nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bot.gitea.routing import Router, handler_name
from bot.gitea.sansio import Event

ISSUE = json.dumps({"action": "opened", "number": 1, "issue": {"number": 1}, "repository": {"id": 5}, "sender": {"id": 3}}).encode()
OPENED = Event.from_stored("issues", ISSUE)
PUSH = Event.from_stored("push", b'{"ref":"refs/heads/main","before":"a","after":"b"}')


async def first(event, *args): ...


async def second(event, *args): ...


async def third(event, *args): ...


def test_handlers_come_in_the_order_of_registration_each_once():
    router = Router()
    router.on("issues")(second)
    router.on("issues", "push", action="opened")(first)
    router.on("issues", action="opened")(second)
    router.on("push")(third)
    assert router.fetch(OPENED) == (second, first)
    assert router.fetch(PUSH) == (third,)


def test_an_action_narrows_and_its_absence_takes_all():
    router = Router()
    router.on("issues", action="closed")(first)
    router.on("issues")(second)
    assert router.fetch(OPENED) == (second,)
    assert router.handles("issues", "closed")
    assert router.handles("issues", None)
    assert not router.handles("push", None)
    assert not router.handles("issue_label", "closed")


@pytest.mark.parametrize("action", [5, True, ["opened"], {"a": 1}])
def test_an_action_that_is_no_string_matches_nothing(action):
    router = Router()
    router.on("issues")(first)
    assert router.fetch(dataclasses.replace(OPENED, action=action)) == ()
    assert not router.handles("issues", action)


def test_merge_keeps_the_order_given_and_leaves_its_parts_alone():
    left, right = Router(), Router()
    left.on("issues")(second)
    right.on("issues")(first)
    merged = Router.merge(left, right)
    assert merged.fetch(OPENED) == (second, first)
    merged.on("issues")(third)
    assert left.fetch(OPENED) == (second,)


def test_a_route_needs_an_event_type():
    with pytest.raises(ValueError, match="at least one"):
        Router().on()


async def test_a_failing_handler_does_not_stop_the_others():
    router, seen = Router(), []

    @router.on("issues")
    async def breaks(event, where):
        seen.append(("breaks", event.action, where))
        raise KeyError("gone")

    @router.on("issues")
    async def works(event, where):
        seen.append(("works", event.action, where))

    failures = await router.dispatch(OPENED, "here")
    assert seen == [("breaks", "opened", "here"), ("works", "opened", "here")]
    assert [(name, type(error)) for name, error in failures] == [(handler_name(breaks), KeyError)]
    assert failures[0][0].endswith("breaks")


async def test_nothing_to_do():
    assert await Router().dispatch(OPENED) == []
