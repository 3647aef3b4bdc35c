"""Finds handlers for an event, purely and in a fixed order; one handler that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from bot.gitea.sansio import Event

Handler = Callable[..., Awaitable[object]]
H = TypeVar("H", bound=Handler)


class Router:
    """Handlers by precise event type and action, in the order of registration."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, str | None, Handler]] = []

    def on(self, *event_types: str, action: str | None = None) -> Callable[[H], H]:
        """Register a coroutine function for one or several `X-Gitea-Event-Type`s; without `action` it takes them all."""
        if not event_types:
            raise ValueError("name at least one event type")

        def register(handler: H) -> H:
            self._routes.extend((event_type, action, handler) for event_type in event_types)
            return handler

        return register

    @classmethod
    def merge(cls, *routers: Router) -> Router:
        """A new router with the handlers of all `routers`, in the order given."""
        merged = cls()
        for router in routers:
            merged._routes.extend(router._routes)  # noqa: SLF001 - its own class
        return merged

    def fetch(self, event: Event) -> tuple[Handler, ...]:
        """The handlers of an event, each once. An action that is no string matches nothing."""
        found = (handler for kind, wanted, handler in self._routes if _matches(kind, wanted, event.event_type, event.action))
        return tuple(dict.fromkeys(found))

    def handles(self, event_type: str, action: str | None) -> bool:
        """Whether any handler takes such an event: what nobody takes need not be stored."""
        return any(_matches(kind, wanted, event_type, action) for kind, wanted, _ in self._routes)

    async def dispatch(self, event: Event, *args: object) -> list[tuple[str, Exception]]:
        """Await each handler with `(event, *args)`; what they raise comes back as (handler name, error) pairs."""
        failures: list[tuple[str, Exception]] = []
        for handler in self.fetch(event):
            try:
                await handler(event, *args)
            except Exception as error:
                failures.append((handler_name(handler), error))
        return failures


def _matches(wanted_type: str, wanted_action: str | None, event_type: str, action: object) -> bool:
    known = action is None or isinstance(action, str)
    return known and wanted_type == event_type and (wanted_action is None or wanted_action == action)


def handler_name(handler: Handler) -> str:
    """`module.qualname`, for logs and counters."""
    return f"{getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', type(handler).__qualname__)}"
