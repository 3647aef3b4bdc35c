"""What changed between two samples: states are compared by a pure function, and its events, one after the other, lead from the earlier to the later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Value = str | int | bool
Facets = Mapping[str, Value]
State = Mapping[str, Facets]


class Change(StrEnum):
    """What became of an entity."""

    APPEARED = "appeared"
    CHANGED = "changed"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Event:
    """One entity (`worker:NAME`, `sprint:ID`, ...) changed: the facets that differ, as they were and as they are; one that is missing was, or is, absent."""

    change: Change
    entity: str
    before: Facets
    after: Facets

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"event": str(self.change), "entity": self.entity, "before": dict(self.before), "after": dict(self.after)}


def diff(before: State, after: State) -> list[Event]:
    """What leads from one state to the other, by entity: the same two states give the same list, equal states an empty one."""
    events = []
    for entity in sorted(before.keys() | after.keys()):
        was, now = before.get(entity), after.get(entity)
        if was is None or now is None:
            change = Change.APPEARED if was is None else Change.GONE
            events.append(Event(change, entity, _sorted(was or {}), _sorted(now or {})))
            continue
        names = sorted(name for name in was.keys() | now.keys() if _differ(was.get(name), now.get(name)))
        if names:
            events.append(
                Event(
                    Change.CHANGED,
                    entity,
                    {name: was[name] for name in names if name in was},
                    {name: now[name] for name in names if name in now},
                )
            )
    return events


def is_state(found: object) -> bool:
    """Whether a value read from a file has the shape of a state."""
    return isinstance(found, dict) and all(
        isinstance(entity, str)
        and isinstance(facets, dict)
        and all(isinstance(name, str) and isinstance(value, str | int) for name, value in facets.items())
        for entity, facets in found.items()
    )


def _sorted(facets: Facets) -> dict[str, Value]:
    return dict(sorted(facets.items()))


def _differ(was: Value | None, now: Value | None) -> bool:
    return type(was) is not type(now) or was != now
