"""The inbox: a delivery that cannot be handled becomes one dead letter that replay takes up again; a silent forge is asked again, whatever the tries."""

from __future__ import annotations

from typing import Any

from fleet_support import now_ms

from bot.decide import AskAgain
from bot.failpoints import Failpoints
from bot.gitea.routing import Router
from bot.inbox import Inbox
from bot.store import Store, deliveries


class Room:
    """An inbox with one handler, which raises `error` while there is one; time is ours."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.error: Exception | None = None
        self.now = now_ms()
        self.ran = 0
        self.results: list[tuple[str, int]] = []
        router = Router()

        @router.on("curious")
        async def handler(event: Any, desk: Any) -> list[Any]:
            self.ran += 1
            if self.error is not None:
                raise self.error
            return []

        self.inbox = Inbox(
            store,
            router,
            None,
            None,
            desk=None,
            kick_projector=lambda: None,
            handled=lambda result, tries: self.results.append((result, tries)),
            handler_ran=lambda name, seconds: None,
            failpoint=Failpoints(),
            now_ms=lambda: self.now,
        )

    def add(self, body: bytes = b'{"action": "opened"}') -> None:
        self.store.write_sync(
            lambda conn: deliveries.add(conn, digest="d1", event_type="curious", delivery="u", body=body, now_ms=self.now)
        )

    async def offer(self) -> None:
        """What the re-offering does once its time has come."""
        self.now += 900_000
        for digest in self.store.read_sync(lambda conn: deliveries.due(conn, self.now)):
            await self.inbox.handle(digest)

    def letters(self) -> list[tuple[str, str, str, int]]:
        return self.store.read_sync(deliveries.dead_letters)


async def test_a_handler_that_always_raises_ends_as_one_dead_letter(store: Store):
    room = Room(store)
    room.add()
    room.error = ValueError("no such thing")
    for _ in range(10):
        await room.offer()
    assert room.ran == deliveries.MAX_TRIES
    assert [result for result, _ in room.results] == ["retry"] * 4 + ["dead"]
    [(digest, kind, error, _)] = room.letters()
    assert (digest, kind) == ("d1", "curious")
    assert "ValueError: no such thing" in error
    room.error = None
    assert store.write_sync(lambda conn: deliveries.replay(conn, "d1"))
    await room.offer()
    assert room.letters() == []
    assert room.results[-1] == ("done", 1)
    assert not store.write_sync(lambda conn: deliveries.replay(conn, "none"))


async def test_a_body_that_cannot_be_read_is_a_dead_letter_too(store: Store):
    room = Room(store)
    room.add(b"{")
    for _ in range(10):
        await room.offer()
    assert len(room.letters()) == 1
    assert room.ran == 0


async def test_a_silent_forge_is_asked_again_for_a_day(store: Store):
    room = Room(store)
    room.add()
    room.error = AskAgain("the forge is silent")
    for _ in range(3 * deliveries.MAX_TRIES):
        await room.offer()
    assert room.letters() == []
    room.error = None
    await room.offer()
    assert room.results[-1] == ("done", 3 * deliveries.MAX_TRIES + 1)


async def test_a_delivery_that_kills_its_process_each_time_is_given_up(store: Store):
    room = Room(store)
    room.add()
    for _ in range(deliveries.MAX_TRIES):
        room.now += 10_000
        assert store.write_sync(lambda conn: deliveries.take(conn, "d1", room.now)) is not None
    await room.offer()
    assert room.ran == 0
    assert len(room.letters()) == 1


async def test_two_consumers_handle_it_once(store: Store):
    room = Room(store)
    room.add()
    await room.inbox.handle("d1")
    await room.inbox.handle("d1")
    assert room.ran == 1
