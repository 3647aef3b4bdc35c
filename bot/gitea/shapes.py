"""Which payloads an event name may carry: the signature covers the body alone, so a captured one can return under another name.

`_MARKS` are the keys that tell payloads apart, `_SHAPES` which of them a type must and may have, `_ACTIONS` which type owns an
action where several share one shape. Unknown types, actions and further keys are normal and pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MARKS = frozenset(
    {
        *("issue", "comment", "pull_request", "review", "ref", "ref_type", "before", "forkee", "page", "release"),
        *("sha", "workflow_run", "workflow_job", "run", "package"),
    }
)
_PULL = (("pull_request",), ("review", "before", "after"))
_SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "issues": (("issue",), ()),
    "issue_label": (("issue",), ()),
    "issue_assign": (("issue",), ()),
    "issue_milestone": (("issue",), ()),
    "issue_comment": (("issue", "comment"), ()),
    "pull_request_comment": (("issue", "comment"), ("pull_request",)),
    "pull_request": _PULL,
    "pull_request_sync": _PULL,
    "pull_request_label": _PULL,
    "pull_request_assign": _PULL,
    "pull_request_milestone": _PULL,
    "pull_request_review_request": _PULL,
    "pull_request_review_approved": (("pull_request", "review"), ()),
    "pull_request_review_rejected": (("pull_request", "review"), ()),
    "pull_request_review_comment": (("pull_request", "review"), ()),
    "push": (("ref", "before"), ()),
    "create": (("ref", "ref_type"), ("sha",)),
    "delete": (("ref", "ref_type"), ()),
    "fork": (("forkee",), ()),
    "wiki": (("page",), ("comment",)),
    "release": (("release",), ()),
    "repository": ((), ()),
    "status": (("sha",), ()),
    "workflow_run": (("workflow_run",), ("pull_request",)),
    "workflow_job": (("workflow_job",), ("pull_request",)),
    "action_run_failure": (("run",), ()),
    "action_run_recover": (("run",), ()),
    "action_run_success": (("run",), ()),
    "package": (("package",), ()),
}
_STATES = frozenset({"opened", "closed", "reopened", "edited", "deleted"})
_ACTIONS: dict[str, frozenset[str]] = {
    "issues": _STATES,
    "issue_label": frozenset({"label_updated", "label_cleared"}),
    "issue_assign": frozenset({"assigned", "unassigned"}),
    "issue_milestone": frozenset({"milestoned", "demilestoned"}),
    "pull_request": _STATES,
    "pull_request_sync": frozenset({"synchronized"}),
    "pull_request_label": frozenset({"label_updated", "label_cleared"}),
    "pull_request_assign": frozenset({"assigned", "unassigned"}),
    "pull_request_milestone": frozenset({"milestoned", "demilestoned"}),
    "pull_request_review_request": frozenset({"review_requested", "review_request_removed"}),
    "pull_request_review_approved": frozenset({"reviewed"}),
    "pull_request_review_rejected": frozenset({"reviewed"}),
    "pull_request_review_comment": frozenset({"reviewed"}),
}
_OWNED = frozenset().union(*_ACTIONS.values())


def fits(event_type: str, data: Mapping[str, Any]) -> bool:
    """Whether `data` can be the payload of `event_type`; a type that is not in the tables takes any object."""
    shape = _SHAPES.get(event_type)
    if shape is None:
        return True
    required, optional = shape
    present = {key for key in _MARKS if data.get(key) is not None}
    action = data.get("action")
    owned = _ACTIONS.get(event_type)
    return (
        present.issuperset(required)
        and present.issubset({*required, *optional})
        and (action is None or isinstance(action, str))
        and (owned is None or (action is not None and (action in owned or action not in _OWNED)))
        and _fits_closely(event_type, data)
    )


def _fits_closely(event_type: str, data: Mapping[str, Any]) -> bool:
    match event_type:
        case "issue_comment" | "pull_request_comment":
            objects = isinstance(data["comment"], dict) and isinstance(data["issue"], dict)
            return objects and data.get("is_pull") is (event_type == "pull_request_comment")
        case "pull_request_review_approved" | "pull_request_review_rejected" | "pull_request_review_comment":
            review = data["review"]
            return isinstance(review, dict) and review.get("type") == event_type
        case "push":
            return all(isinstance(data.get(key), str) for key in ("ref", "before", "after"))
        case "issues" | "issue_label" | "issue_assign" | "issue_milestone":
            return isinstance(data["issue"], dict)
        case "repository":
            return isinstance(data.get("repository"), dict) and isinstance(data.get("action"), str)
        case "status":
            return isinstance(data.get("state"), str) and isinstance(data.get("context"), str)
        case _:
            return "pull_request" not in data or isinstance(data["pull_request"], dict | None)
