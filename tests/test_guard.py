"""What counts as the work of an issue being done elsewhere, and what does not."""

from __future__ import annotations

import pytest

from bot.guard import blockers, work_of

ME, REPO = 1, 5


def pull(**changes: object) -> dict[str, object]:
    head = {"label": changes.pop("branch", "feature"), "repo_id": changes.pop("head_repo", REPO)}
    return {"number": 12, "title": "A change", "body": "", "user": {"id": 3, "login": "carol"}, "head": head} | changes


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"body": "Fixes #7"}, "closes it"),
        ({"title": "Resolves: acme/rocket#7"}, "closes it"),
        ({"title": "Keep the last row (#7)"}, "names it in its title"),
        ({"branch": "fix/issue-7-last-row"}, "has a branch of its name"),
        ({"branch": "carol:issues/7"}, "has a branch of its name"),
        ({"branch": "dispatch/issue-7"}, "is open on its branch"),
        ({"branch": "dispatch/issue-7-2"}, "is open on its branch"),
    ],
)
def test_what_does_the_work(changes: dict, how: str) -> None:
    [found] = work_of([pull(**changes)], me_id=ME, repo_id=REPO, issue=7)
    assert (found.number, found.author, found.how, found.own) == (12, "carol", how, False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"body": "See #7 for why"},
        {"body": "Fixes #70"},
        {"title": "Bump to 1.7 (#71)"},
        {"title": "acme/other#7 is like this"},
        {"branch": "release-7"},
        {"branch": "issue-70"},
        {"branch": "dispatch/issue-7", "head_repo": 9, "user": {"id": 1, "login": "timmy"}},
        {"title": "About #7", "user": {"id": 1, "login": "timmy"}},
        {"head": None, "user": None},
    ],
)
def test_what_does_not(changes: dict) -> None:
    assert work_of([pull(**changes)], me_id=ME, repo_id=REPO, issue=7) == ()


def test_ours_is_told_apart() -> None:
    [found] = work_of([pull(branch="dispatch/issue-7", user={"id": ME, "login": "timmy"})], me_id=ME, repo_id=REPO, issue=7)
    assert found.own


def test_only_open_dependencies_block() -> None:
    found = [
        {"number": 3, "state": "open"},
        {"number": 4, "state": "closed"},
        {"number": 5, "state": "open", "repository": {"full_name": "acme/rocket"}},
        {"number": 6, "state": "open", "repository": {"full_name": "acme/other"}},
        {"number": 0, "state": "open", "title": "HIDDEN"},
    ]
    assert blockers(found, "Acme/rocket") == ("#3", "#5", "an issue of another repository", "an issue of another repository")
