"""Pull requests, their files and diffs, reviews and merges."""

from __future__ import annotations

from typing import Any

from bot.demo.forge import gitio
from bot.demo.forge.acts import RefusedError
from bot.demo.forge.api import Call, Reply, Route
from bot.demo.forge.api_issues import check_version, optional
from bot.demo.forge.payloads import Json
from bot.demo.forge.state import Issue, Review


async def list_pulls(call: Call) -> Reply:
    """Newest first. 1.26 also filters by poster and base branch; an unknown poster is 400."""
    state = call.query("state") or "open"
    poster = call.query("poster") if not call.state.old else ""
    if poster and call.state.find_user(poster) is None:
        raise RefusedError(400, f"user does not exist [uid: 0, name: {poster}]")
    author = call.state.user(poster).id if poster else 0
    base = call.query("base_branch") if not call.state.old else ""
    found = [
        issue
        for issue in call.repo.issues.values()
        if issue.pull is not None
        and state in {"all", issue.state}
        and author in {0, issue.user_id}
        and (not base or issue.pull.base == base)
    ]
    found.sort(key=lambda i: -i.id)
    return call.listed(found, lambda i: call.shapes.pull(call.repo, i, listed=True), links=True)


async def create_pull(call: Call) -> Reply:
    people = call.people([*(call.body.get("assignees") or []), *filter(None, [call.text("assignee")])])
    reviewers = call.body.get("reviewers") or [] if not call.state.old else []
    issue = await call.acts.open_pull(
        call.actor, call.repo, head=call.text("head"), base=call.text("base"), title=call.text("title"), body=call.text("body")
    )
    labels = call.labels()
    if call.state.may(call.repo, call.user, "write"):
        if labels:
            await call.acts.add_labels(call.actor, call.repo, issue, labels)
        if people:
            await call.acts.edit_issue(call.actor, call.repo, issue, assignees=people)
        if reviewers:
            await call.acts.request_review(call.actor, call.repo, issue, call.people(reviewers))
    return Reply(call.shapes.pull(call.repo, issue), 201)


async def get_pull(call: Call) -> Reply:
    return Reply(call.shapes.pull(call.repo, call.pull()))


async def get_pull_by_branches(call: Call) -> Reply:
    """By base and head, whatever the state: the oldest, which may be closed."""
    base, head = call.var("base"), call.var("head")
    for issue in call.repo.issues.values():
        if issue.pull is not None and (issue.pull.base, issue.pull.head) == (base, head):
            return Reply(call.shapes.pull(call.repo, issue))
    raise call.acts.not_found()


async def edit_pull(call: Call) -> Reply:
    issue = call.pull()
    check_version(call, issue)
    people = call.people(call.body["assignees"]) if call.body.get("assignees") is not None else None
    if call.body.get("base"):
        await call.acts.retarget(call.actor, call.repo, issue, call.text("base"))
    await call.acts.edit_issue(
        call.actor,
        call.repo,
        issue,
        title=optional(call, "title"),
        body=optional(call, "body"),
        state=optional(call, "state"),
        assignees=people,
    )
    if call.body.get("labels") is not None and call.state.may(call.repo, call.user, "write"):
        await call.acts.add_labels(call.actor, call.repo, issue, call.labels(), replace=True)
    return Reply(call.shapes.pull(call.repo, issue), 201)


async def pull_files(call: Call) -> Reply:
    pull = call.pull().pr
    full, sha = call.state.full_name(call.repo), pull.head_sha
    found = await call.acts.threads.run(gitio.changes, call.repo.path, pull.merge_base, sha)

    def shape(change: gitio.Change) -> Json:
        shown: Json = {"filename": change.path}
        if change.previous:
            shown["previous_filename"] = change.previous
        return shown | {
            "status": change.status,
            "additions": change.additions,
            "deletions": change.deletions,
            "changes": change.additions + change.deletions,
            "html_url": f"{call.site.root_url}/{full}/src/commit/{sha}/{change.path}",
            "contents_url": f"{call.shapes.api}/repos/{full}/contents/{change.path}?ref={sha}",
            "raw_url": f"{call.site.root_url}/{full}/raw/commit/{sha}/{change.path}",
        }

    return call.listed(found, shape, links=True)


async def pull_diff(call: Call) -> Reply:
    pull = call.pull().pr
    raw = await call.acts.threads.run(gitio.diff, call.repo.path, pull.merge_base, pull.head_sha)
    return Reply(raw=raw)


async def is_merged(call: Call) -> Reply:
    if not call.pull().pr.merged:
        raise call.acts.not_found()
    return Reply(status=204)


async def merge_pull(call: Call) -> Reply:
    title, text = call.text("MergeTitleField"), call.text("MergeMessageField")
    await call.acts.merge(
        call.actor,
        call.repo,
        call.pull(),
        style=call.text("Do", "merge"),
        message=f"{title}\n\n{text}\n" if title else "",
        drop=bool(call.body.get("delete_branch_after_merge")),
    )
    return Reply(status=200)


# reviews


async def list_reviews(call: Call) -> Reply:
    issue = call.pull()
    shown = [r for r in issue.pr.reviews if r.state != "PENDING" or (call.user_or_none and r.user_id == call.user_or_none.id)]
    return call.listed(shown, lambda r: call.shapes.review(call.repo, issue, r))


async def create_review(call: Call) -> Reply:
    issue = call.pull()
    comments: list[dict[str, Any]] = call.body.get("comments") or []
    review = await call.acts.review(call.actor, call.repo, issue, event=call.text("event"), body=call.text("body"), comments=comments)
    return Reply(call.shapes.review(call.repo, issue, review))


def _review(call: Call) -> tuple[Issue, Review]:
    issue = call.pull()
    review = next((r for r in issue.pr.reviews if r.id == call.number("id")), None)
    if review is None:
        raise call.acts.not_found()
    return issue, review


async def get_review(call: Call) -> Reply:
    return Reply(call.shapes.review(call.repo, *_review(call)))


async def review_comments(call: Call) -> Reply:
    issue, review = _review(call)
    return Reply([call.shapes.review_comment(call.repo, issue, e) for e in review.comments])


async def dismiss_review(call: Call) -> Reply:
    call.need("admin")
    issue, review = _review(call)
    await call.acts.dismiss_review(call.actor, call.repo, issue, review, call.text("message"))
    return Reply(call.shapes.review(call.repo, issue, review))


async def resolve_comment(call: Call) -> Reply:
    call.need("write")
    found = call.state.find_entry(call.repo, call.number("id"))
    if found is None or found[1].type != "code":
        raise call.acts.not_found()
    found[1].resolver_id = call.user.id if call.request.path.endswith("/resolve") else 0
    return Reply(status=204)


async def request_reviewers(call: Call) -> Reply:
    issue = call.pull()
    people = call.people(call.body.get("reviewers"))
    remove = call.request.method == "DELETE"
    if not remove and any(user.id == issue.user_id for user in people):
        raise RefusedError(422, "poster of pr can't be reviewer")
    made = await call.acts.request_review(call.actor, call.repo, issue, people, remove=remove)
    return Reply(status=204) if remove else Reply([call.shapes.review(call.repo, issue, r) for r in made], 201)


_PULLS = "/repos/{owner}/{repo}/pulls"
_PULL = f"{_PULLS}/{{index}}"

ROUTES = (
    Route("GET", _PULLS, list_pulls),
    Route("POST", _PULLS, create_pull),
    Route("GET", f"{_PULLS}/{{index}}.{{diffType}}", pull_diff),
    Route("POST", f"{_PULLS}/comments/{{id}}/resolve", resolve_comment, new_only=True),
    Route("POST", f"{_PULLS}/comments/{{id}}/unresolve", resolve_comment, new_only=True),
    Route("GET", _PULL, get_pull),
    Route("PATCH", _PULL, edit_pull),
    Route("GET", f"{_PULL}/files", pull_files),
    Route("GET", f"{_PULL}/merge", is_merged),
    Route("POST", f"{_PULL}/merge", merge_pull),
    Route("GET", f"{_PULL}/reviews", list_reviews),
    Route("POST", f"{_PULL}/reviews", create_review),
    Route("GET", f"{_PULL}/reviews/{{id}}", get_review),
    Route("GET", f"{_PULL}/reviews/{{id}}/comments", review_comments),
    Route("POST", f"{_PULL}/reviews/{{id}}/dismissals", dismiss_review),
    Route("POST", f"{_PULL}/requested_reviewers", request_reviewers),
    Route("DELETE", f"{_PULL}/requested_reviewers", request_reviewers),
    Route("GET", f"{_PULLS}/{{base}}/{{head}}", get_pull_by_branches),
)
