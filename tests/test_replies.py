"""Every sentence, word for word, and the promise that none of them acts: no command, no mention, no foreign markup."""

from __future__ import annotations

import inspect
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bot import replies
from bot.chatops import parse
from bot.figures import Example, Failure, Figures, Group, Outage, Spread
from bot.models import (
    FailureReason,
    IssueRef,
    Limits,
    OutcomeKind,
    Position,
    Reply,
    RepoId,
    Source,
    SprintId,
    SprintState,
    SprintView,
    Stop,
    WaitingReason,
)

VERBS = (
    *(
        "approve",
        "cancel",
        "deny",
        "explain",
        "fleet",
        "health",
        "help",
        "logs",
        "pause",
        "plan",
        "priority",
        "prompt",
        "queue",
        "resume",
        "retry",
        "revise",
        "run",
        "skip",
        "status",
    ),
    "unskip",
    "watchdog",
)
FIGURES = Figures(
    since_ms=0,
    until_ms=12 * 3_600_000,
    asked={"label": 2, "schedule": 1},
    outcomes={"pull_request": 2, "no_change": 1},
    repositories=(Group("acme/rocket", {"pull_request": 2, "no_change": 1}, 9, 1000, 1.2, 1),),
    opened=2,
    merged=1,
    to_pull=Spread.of([240_000, 300_000]),
    steps=9,
    tokens=1000,
    usd=1.2,
    calls=9,
    failed_calls=1,
    calls_usd=1.25,
    failures=(Failure("no_change", "", 1, (Example("acme/rocket#7", "it *changed* nothing, @alice"),)),),
    waits={"open_prs": 2},
    crashes=1,
    outages=(Outage("nous/hermes-4", "billing", 0),),
    queued=2,
)
LINKS = replies.Links("https://git.example", "https://bot.example")
SPRINT = {
    "issue": 7,
    "title": "parse() drops *rows* @alice #3",
    "state": "queued",
    "waiting": "",
    "note": "",
    "place": 3,
    "capped": False,
    "steps": 0,
    "max_steps": 60,
    "usd": 0.0,
    "model": "",
    "outcome": "",
    "reason": "",
    "pr": 0,
    "pr_state": "",
    "requester": "bob",
    "since_ms": 1000,
    "stopping": "",
}
WORKING = SPRINT | {"state": "working", "steps": 4, "usd": 0.02}
DONE = SPRINT | {"state": "settled", "outcome": "pull_request", "pr": 12}
FLEET = {"scope": "fleet", "repo": "", "here": False, "by": "alice", "since_ms": 1000, "until_ms": 7_201_000, "reason": "the *host* moves"}
REPO = {"scope": "repo", "repo": "acme/rocket", "here": True, "by": "bob", "since_ms": 1000, "until_ms": 0, "reason": ""}
ELSEWHERE = REPO | {"repo": "acme/other", "here": False}
SKIP = {"by": "bob", "since_ms": 1000, "reason": "we do it @alice"}
WORKER = {"name": "n1-0", "state": "busy", "slots": 2, "running": 1, "age_ms": 3000}
TRAIL = [
    {"made_ms": 1000, "kind": "run", "result": "denied", "reason": "pull request #12 by carol closes it", "actor": "bob"},
    {"made_ms": 2000, "kind": "run", "result": "ok", "reason": "queued", "actor": "bob"},
    {"made_ms": 2500, "kind": "cancel", "result": "rate_limited", "reason": "too many commands", "actor": "bob"},
    {"made_ms": 2600, "kind": "run", "result": "invalid", "reason": "options", "actor": "bob"},
    {"made_ms": 2700, "kind": "run", "result": "error", "reason": "the forge could not be asked for a day", "actor": "bob"},
    {"made_ms": 3000, "kind": "wait", "result": "cap", "reason": "1 of 1 running in this repository", "actor": ""},
    {"made_ms": 4000, "kind": "admit", "result": "ok", "reason": "admitted, time 1", "actor": ""},
    {"made_ms": 5000, "kind": "requeue", "result": "provider", "reason": "no provider can be called", "actor": ""},
    {"made_ms": 6000, "kind": "settle", "result": "no_change", "reason": "fixed *already*", "actor": ""},
    {"made_ms": 7000, "kind": "settle", "result": "pull_request", "reason": "pull_request", "actor": ""},
]
LINES = [
    {"n": 1, "tool": "run_command", "arguments": '{"command": "sh test.sh"}', "result": "exit code 1\n```\n/dispatch run @alice"},
    {"n": 2, "tool": "", "arguments": "", "result": "billed: timeout"},
    {"n": 3, "tool": "read_file", "arguments": '{"path": "a"}', "result": "x"},
    {"n": 4, "tool": "run_command", "arguments": "{}", "result": None},
]
VERB = {"usage": "/dispatch run [instructions]", "summary": "Works on it", "needs": "WRITE", "examples": ["/dispatch", "/dispatch run"]}
RUNNING = {
    "started_ms": 60_000,
    "steps": 4,
    "tokens": 12_345,
    "usd": 0.12,
    "model": "qwen`3",
    "provider": "ollama",
    "doing": "run_command: `sh test.sh` @bob",
    "sandbox": "bubblewrap",
}
ENDED = RUNNING | {
    "state": SprintState.SETTLED,
    "settled_ms": 250_000,
    "files": 2,
    "checks": (
        {"command": "sh test.sh | cat", "exit_code": 0, "seconds": 1.2},
        {"command": "lint", "exit_code": 2},
        {"command": "slow", "exit_code": None, "seconds": 60},
    ),
    "flagged": (".gitea/x.yml",),
}


def view(**changes: object) -> SprintView:
    first = {
        "id": SprintId("01J"),
        "repo_id": RepoId(5),
        "issue": IssueRef("acme", "rocket", 7),
        "state": SprintState.QUEUED,
        "title": "Keep the last row",
        "requester": "bob",
        "limits": Limits(60, 2700, 2_000_000, 5.0),
    }
    return SprintView(**(first | changes))


def status(**changes: object) -> str:
    return replies.status_comment(view(**changes), position=Position(3, 2), now_ms=100_000, links=LINKS)


REPLIES = [
    (
        "not_understood",
        {"text": "/dispatch rnu", "problem": "There is no verb `rnu`.", "suggestion": "/dispatch run"},
        (
            "I could not read the command in `/\u200bdispatch rnu`. There is no verb `rnu`. Did you mean `/dispatch run`?\n"
            "\n"
            "`/dispatch help` lists what I can do."
        ),
    ),
    (
        "not_understood",
        {"text": "", "problem": "One comment may hold 5 commands.", "suggestion": ""},
        ("I could not read the command. One comment may hold 5 commands.\n\n`/dispatch help` lists what I can do."),
    ),
    (
        "plan",
        {
            "text": "1. Fold case in `lib/slug.sh`.\n2. Run @tests; Closes #4.\n\n/dispatch run <!-- x -->",
            "requester": "alice",
            "state": "waiting",
            "until_ms": 1800000000000,
        },
        (
            "📝 **A plan for this issue**, asked for by `alice`. The agent says:\n"
            "\n"
            "> 1. Fold case in `lib/slug.sh`.\n"
            "> 2. Run @\u200btests; C\u200bloses #\u200b4.\n"
            ">\n"
            "> /\u200bdispatch run <\u200b!-- x -->\n"
            "\n"
            "Nothing was changed so far. It waits for somebody with the right to decide, until 2027-01-15 08:00 UTC:\n"
            "\n"
            "- `/dispatch approve` goes on with exactly this plan\n"
            "- `/dispatch revise` with your words after it makes another one\n"
            "- `/dispatch deny` lets it go"
        ),
    ),
    (
        "plan",
        {"text": "1. a", "requester": "alice", "state": "waiting", "until_ms": 1800000000000, "edited": True, "follow_up": True},
        (
            "📝 **A revised plan for this issue**, asked for by `alice`. The agent says:\n"
            "\n"
            "> 1. a\n"
            "\n"
            "The issue was edited after this plan was approved, so it **waits again** for somebody with the right to decide, until 2027-01-15 08:00 UTC:\n"
            "\n"
            "- `/dispatch approve` goes on with exactly this plan\n"
            "- `/dispatch revise` with your words after it makes another one\n"
            "- `/dispatch deny` lets it go"
        ),
    ),
    (
        "plan",
        {"text": "1. a", "requester": "alice", "state": "approved", "until_ms": 1800000000000, "by": "bob"},
        ("📝 **A plan for this issue**, asked for by `alice`. The agent says:\n\n> 1. a\n\n✅ **Approved** by `bob`."),
    ),
    (
        "plan",
        {"text": "1. a", "requester": "alice", "state": "denied", "until_ms": 1800000000000, "by": "bob", "reason": "too *wide*"},
        (
            "📝 **A plan for this issue**, asked for by `alice`. The agent says:\n"
            "\n"
            "> 1. a\n"
            "\n"
            "⛔ **Denied** by `bob`: too \\*wide\\*. `/dispatch plan` makes a new one."
        ),
    ),
    (
        "plan",
        {"text": "1. a", "requester": "alice", "state": "expired", "until_ms": 1800000000000},
        (
            "📝 **A plan for this issue**, asked for by `alice`. The agent says:\n"
            "\n"
            "> 1. a\n"
            "\n"
            "⌛ **Nobody decided in time**, so this plan is let go; nothing was changed. `/dispatch plan` makes a new one."
        ),
    ),
    (
        "plan",
        {"text": "1. a", "requester": "alice", "state": "closed", "until_ms": 1800000000000},
        (
            "📝 **A plan for this issue**, asked for by `alice`. The agent says:\n"
            "\n"
            "> 1. a\n"
            "\n"
            "🗄️ **The issue was closed**, so this plan is let go; nothing was changed."
        ),
    ),
    (
        "plan",
        {"text": "1. a", "requester": "alice", "state": "superseded", "until_ms": 1800000000000, "reason": "a newer plan was made"},
        (
            "📝 **A plan for this issue**, asked for by `alice`. The agent says:\n"
            "\n"
            "> 1. a\n"
            "\n"
            "🔁 **Not valid any more**: a newer plan was made."
        ),
    ),
    (
        "plan_edited",
        {"author": "mallory"},
        (
            "Not started: the text of this issue, written by `mallory`, was changed after the plan was made. Read both again. If the plan still fits: `/dispatch approve` once more. If not: `/dispatch revise` with your words after it, or `/dispatch plan`."
        ),
    ),
    (
        "plan_waits_again",
        {},
        (
            "The issue was edited after its plan was approved, so nothing was started. Read both again. If the plan still fits: `/dispatch approve`. If not: `/dispatch revise` with your words after it, or `/dispatch plan`."
        ),
    ),
    (
        "plan_denied",
        {"reason": "too wide"},
        ("The plan is let go (too wide); nothing was changed. `/dispatch plan` makes a new one."),
    ),
    (
        "no_plan",
        {"verb": "approve"},
        ("There is no plan to approve here. `/dispatch plan` makes one."),
    ),
    (
        "no_plan",
        {"verb": "approve", "state": "approved", "by": "bob"},
        ("There is no plan to approve here. The last one was approved by `bob` already. `/dispatch plan` makes one."),
    ),
    (
        "no_plan",
        {"verb": "deny", "state": "expired", "by": ""},
        ("There is no plan to deny here. Nobody decided on the last one in time. `/dispatch plan` makes one."),
    ),
    (
        "plan_in_work",
        {"sprint": WORKING},
        "This issue is already working, step 4 of 60, $0.02 so far: there is no plan to change any more. `/dispatch cancel` stops it.",
    ),
    (
        "plan_in_work",
        {"sprint": WORKING | {"planning": True}},
        (
            "The plan is still being made: this issue is planning, step 4 of 60, $0.02 so far. Decide when it is here; `/dispatch revise` with "
            "your words after it changes it now, `/dispatch cancel` stops it."
        ),
    ),
    (
        "plan_in_work",
        {"sprint": WORKING | {"planning": True, "stopping": "revise"}, "another_waits": True},
        (
            "The plan is being made anew: this issue is beginning its plan anew. Decide when it is here, or say `/dispatch cancel` first: then "
            "the plan before it can be decided on."
        ),
    ),
    (
        "plan_not_kept",
        {},
        "The plan that the last sprint worked by is not kept any more. `/dispatch plan` makes a new one, `/dispatch run` works without one.",
    ),
    (
        "plan_taken_along",
        {"sprint": WORKING | {"planning": True}},
        "The plan is begun anew with your words, and only that one will be posted. What was used so far counts towards the limits.",
    ),
    (
        "plan_taken_along",
        {"sprint": WORKING | {"planning": True, "state": "queued", "place": 2}},
        "Taken along: this issue is queued for a plan, 2nd in line, and the plan will be made with your words.",
    ),
    (
        "status",
        {
            "active": None,
            "last": DONE | {"outcome": "planned", "reason": "waiting"},
            "now_ms": 61_000,
            "plan": {"until_ms": 1_800_000_000_000},
        },
        (
            "📝 A plan waits for a person's decision until 2027-01-15 08:00 UTC.\n"
            "\n"
            "**Last:** a plan waits for approval (1 min ago).\n"
            "\n"
            "`/dispatch approve` goes on with it, `/dispatch revise` and your words change it, `/dispatch deny` lets it go."
        ),
    ),
    (
        "queue",
        {
            "rows": [],
            "running": 0,
            "waiting": 0,
            "hidden": 0,
            "plans": [{"ref": "#7", "title": "Keep *the* last", "until_ms": 1_800_000_000_000}],
        },
        (
            "0 sprints running, 0 waiting.\n"
            "\n"
            "📝 1 plan waiting for a person's `/dispatch approve`:\n"
            "\n"
            "- `#7` Keep \\*the\\* last, until 2027-01-15 08:00 UTC"
        ),
    ),
    ("queued", {"sprint": SPRINT}, "Understood. This issue is queued, 3rd in line. The status comment follows it from here."),
    (
        "already_active",
        {"sprint": WORKING},
        "This issue is already working, step 4 of 60, $0.02 so far, asked for by `bob`. It stays one sprint. To stop it: `/dispatch cancel`.",
    ),
    (
        "already_active",
        {"sprint": SPRINT | {"requester": "", "waiting": "cap", "note": "2 of 2"}},
        "This issue is already queued, 3rd in line, waiting because as many sprints as allowed are running already (2 of 2). It stays one sprint. To stop it: `/dispatch cancel`.",
    ),
    (
        "already_active",
        {"sprint": WORKING | {"planning": True}},
        "This issue is already planning, step 4 of 60, $0.02 so far, asked for by `bob`. It stays one sprint. To stop it: `/dispatch cancel`. To say what the plan should be like: `/dispatch revise` with your words after it.",
    ),
    (
        "already_active",
        {"sprint": WORKING | {"stopping": "cancel"}},
        "This issue is already being cancelled, asked for by `bob`. Ask again when it has ended.",
    ),
    ("status", {"active": None, "last": None, "now_ms": 1}, "Nothing has run on this issue yet. `/dispatch run` starts."),
    (
        "status",
        {"active": WORKING, "last": DONE, "now_ms": 61_000},
        ("**Now:** working, step 4 of 60, $0.02 so far (for 1 min).\n\n**Before:** done: pull request #12 (1 min ago)."),
    ),
    (
        "status",
        {"active": None, "last": DONE | {"pr_state": "merged"}, "now_ms": 7_261_000},
        "**Last:** done: pull request #12, merged (2 h 1 min ago).",
    ),
    (
        "status",
        {"active": None, "last": DONE | {"outcome": "failed", "reason": "checks"}, "now_ms": 61_000},
        (
            "**Last:** failed: the checks of this repository fail on the change; the draft is pull request #12 (1 min ago).\n"
            "\n"
            "`/dispatch retry` starts again."
        ),
    ),
    ("queue", {"rows": [], "running": 0, "waiting": 0, "hidden": 0}, "0 sprints running, 0 waiting."),
    (
        "queue",
        {
            "rows": [WORKING | {"ref": "#7", "here": True}, SPRINT | {"ref": "#8", "here": False, "title": "a|b"}],
            "running": 1,
            "waiting": 3,
            "hidden": 2,
        },
        (
            "1 sprint running, 3 waiting.\n"
            "\n"
            "| Issue | State |\n"
            "|---|---|\n"
            "| `#7` parse() drops \\*rows\\* @\u200balice #\u200b3 (this one) | working, step 4 of 60, $0.02 so far |\n"
            "| `#8` a\\|b | queued, 3rd in line |\n"
            "\n"
            "2 of them not shown: in other repositories, or further down."
        ),
    ),
    (
        "queue",
        {"rows": [], "running": 2, "waiting": 9, "hidden": 11},
        "2 sprints running, 9 waiting. None of this repository is among the first. 11 of them not shown: in other repositories, or further down.",
    ),
    (
        "cancelled",
        {"issue": 7},
        "Cancelled. The sprint of issue #7 had not begun, so nothing was changed. To start again: `/dispatch run`.",
    ),
    ("stopping", {}, "Stopping it now; what runs is ended within seconds. The status comment says when it is done."),
    (
        "too_late",
        {"sprint": SPRINT | {"state": "publishing"}},
        "Too late to cancel: the sprint is already at publishing its pull request. Close that if you do not want it.",
    ),
    (
        "too_late",
        {"sprint": DONE},
        "Too late to cancel: the sprint is already past publishing pull request #12. Close that if you do not want it.",
    ),
    ("nothing_to_cancel", {}, "There is nothing to cancel: no sprint is queued or running for this issue."),
    ("nothing_to_retry", {}, "There is nothing to retry: no sprint has ended on this issue yet. `/dispatch run` starts the first one."),
    (
        "help_text",
        {"verbs": [VERB], "has": "WRITE"},
        (
            "Write a command at the start of a line, several per comment if you like. Text in quotes and code is never a command.\n"
            "\n"
            "| Command | What it does | Who |\n"
            "|---|---|---|\n"
            "| `/dispatch run [instructions]` | Works on it | write |\n"
            "\n"
            "<details><summary>Examples</summary>\n"
            "\n"
            "- `/dispatch`\n"
            "\n"
            "</details>\n"
            "\n"
            "Your own level on this repository is write. What stands on the lines below a `run` or `retry` goes to the agent as instructions."
        ),
    ),
    (
        "not_permitted",
        {"login": "mallory", "verb": "run", "needs": "WRITE", "has": "READ"},
        "Not done: `/dispatch run` needs write access here, and `mallory` has read access. Somebody with that right can ask for it; nothing was started.",
    ),
    (
        "not_permitted_label",
        {"login": "mallory", "label": "dispatch"},
        "Not started: the label `dispatch` was put on by `mallory`, who has no write access here. Somebody with write access can read the issue, take the label off and put it on again.",
    ),
    (
        "not_permitted_mention",
        {"login": "mallory"},
        "Not started: `mallory` mentions me in this issue, but has no write access here. Somebody with write access can read the issue and ask with `/dispatch run`.",
    ),
    (
        "not_permitted_assignment",
        {"login": "mallory"},
        "Not started: `mallory`, who assigned me, has no write access here. Somebody with write access can read the issue and ask with `/dispatch run`.",
    ),
    (
        "addressed",
        {},
        "I act on commands only, so that people can talk about me as well as to me. `/dispatch run` at the start of a line starts work on this issue, with your words after it as instructions; `/dispatch help` lists the rest.",
    ),
    (
        "command_unread",
        {},
        "I read commands in comments only, not in the text of an issue or in a review, so the one that is there was not obeyed. Write it as a comment of its own, at the start of a line.",
    ),
    (
        "commands_off",
        {"ways": ["label", "assignment", "mention"]},
        "Not started: a comment starts nothing in this repository. To start: put the trigger label on, or assign the issue to me, or mention me in the issue's text.",
    ),
    (
        "not_on_list",
        {"login": "mallory"},
        "Not done: I am not an administrator of this repository, so I cannot ask what `mallory` may do, and the list of allowed people does not have that name. The operator can make the bot an administrator or add the name to `allow_users`.",
    ),
    (
        "forge_silent",
        {"hours": 24},
        "Not done: for 24 hours the forge could not say whether you may. Nothing was started. Please ask again.",
    ),
    ("not_yet", {}, "Not started: the forge cannot be asked about the issue just now. Please try again when it answers."),
    ("archived", {}, "Not started: this repository is archived, so no branch and no pull request can be made."),
    ("issue_closed", {}, "Not started: this issue is closed. Reopen it first, then ask again."),
    (
        "report",
        {"figures": Figures(since_ms=0, until_ms=12 * 3_600_000, repo="acme/rocket", running=1).to_json()},
        "### Report: the last 12 hours in `acme/rocket`\n\n1970-01-01 00:00 UTC to 1970-01-01 12:00 UTC. No sprint was asked for and none ended. "
        "1 running and 0 queued now.",
    ),
    (
        "report",
        {"figures": FIGURES.to_json()},
        """\
### Report: the last 12 hours

1970-01-01 00:00 UTC to 1970-01-01 12:00 UTC. 0 running and 2 queued now.

| | |
|---|---|
| Asked for | 3 sprints (label 2, schedule 1) |
| Ended | 3 sprints: pull request 2, no change 1 |
| Pull requests | 2 opened, 1 merged, 0 closed without a merge |
| Cost | $1.20, 1,000 tokens, 9 steps, $1.20 per merged pull request |
| Model calls | 9, 1 of them failed, $1.25 |
| Trigger to pull request | half within 4 min, nine of ten within 5 min, the longest 5 min |
| Trigger to start | none |
| Trouble | crashes 1 |

| Repository | Sprints | Pull requests | Merged | Cost |
|---|---|---|---|---|
| `acme/rocket` | 3 | 2 | 1 | $1.20 |

**Came to nothing:**
- 1 × `no change`
  - `acme/rocket#7`: it \\*changed\\* nothing, @\u200balice

**Waited for:** open prs 2

**Provider down:** `nous/hermes-4` (billing)""",
    ),
    (
        "gave_up",
        {"attempts": 3, "outcome": "no_change", "detail": "nothing *was* changed"},
        "I took this issue from the backlog 3 times and it came to nothing, so I do not take it up by myself again. "
        "The last one ended as `no change`: nothing \\*was\\* changed.\n\n"
        "Say what to do differently, or split it; `/dispatch run` starts whenever you ask, and `/dispatch explain` tells what happened.",
    ),
    (
        "not_our_pull",
        {},
        "Not started: this is a pull request of a person, and I do not work on those. Open an issue that says what to do, and ask there.",
    ),
    (
        "pull_over",
        {"pull": 9, "state": "merged"},
        "Not started: pull request #9 is merged. What is still to do belongs into a new issue, or comment `/dispatch run` on the old one.",
    ),
    (
        "pull_over",
        {"pull": 9, "state": "closed"},
        "Not started: pull request #9 is closed. Open it again and ask once more, or begin anew with `/dispatch run` on its issue.",
    ),
    (
        "nothing_to_follow",
        {},
        "Not started: this issue has no open pull request of mine to go on with. `/dispatch run` begins one.",
    ),
    ("issue_gone", {"issue": 7}, "Not done: this pull request belongs to issue #7, and I cannot find that issue any more."),
    (
        "not_permitted_review",
        {"login": "mallory"},
        "Not started: `mallory` requests changes, but has no write access here. "
        "Somebody with write access can ask for them: a review of their own, or a comment `/dispatch run` with what to do after it.",
    ),
    (
        "follow_up_begins",
        {"source": "review", "login": "bob", "issue": 7, "why": ""},
        "🔧 **I take up the review by `bob`**, with every unresolved comment, on this branch. How it goes is told on #7; `/dispatch cancel` stops it.",
    ),
    (
        "follow_up_begins",
        {"source": "checks", "login": "bob", "issue": 7, "why": "ci/test"},
        "🔧 **Red: ci/test.** I try to mend what I pushed, on this branch. How it goes is told on #7; `/dispatch cancel` stops it.",
    ),
    (
        "checks_same",
        {"why": "ci/test", "tries": 1},
        "🛑 **Still red: ci/test**, in the same way as before a follow-up of mine, so I stop here (1 try so far). "
        "`/dispatch run` with a hint after it goes on.",
    ),
    (
        "checks_tried",
        {"why": "ci/test", "tries": 2},
        "🛑 **Still red: ci/test**. I tried 2 times and leave it to you now. `/dispatch run` with a hint after it goes on.",
    ),
    (
        "round_ended",
        {
            "issue": 7,
            "outcome": "updated",
            "reason": "",
            "detail": "",
            "head": "0123456789abcdef",
            "summary": "Empty input gives *nothing*.",
            "remarks": [
                {"where": "lib/slug.sh:3", "author": "bob", "said": "quotes it, @alice", "changed": True},
                {"where": "test.sh:9", "author": "bob", "said": "", "changed": True},
                {"where": "README.md", "author": "bob", "said": "", "changed": False},
            ],
            "ask_review": ["bob"],
        },
        "✅ **Updated** with `0123456789`.\n\nThe agent says:\n\n> Empty input gives *nothing*.\n\n**The comments, one by one:**\n\n"
        "- `lib/slug.sh:3` (`bob`): quotes it, @\u200balice\n"
        "- `test.sh:9` (`bob`): the file was changed; the agent says nothing more about it\n"
        "- `README.md` (`bob`): not changed in this round\n\nPlease look again: `bob`.\n\n<sub>Details on #7</sub>",
    ),
    (
        "round_ended",
        {
            "issue": 7,
            "outcome": "failed",
            "reason": "checks",
            "detail": "",
            "head": "0123456789abcdef",
            "summary": "",
            "remarks": [],
            "ask_review": [],
        },
        "❌ **Failed.** The checks of this repository fail on the change. What there is so far is in `0123456789`, as a draft.\n\n"
        "<sub>Details on #7</sub>",
    ),
    ("not_on_pull", {"verb": "cancel", "issue": 7}, "`/dispatch cancel` does not work on a pull request. Use it on #7."),
    ("not_on_pull", {"verb": "cancel", "issue": 0}, "`/dispatch cancel` does not work on a pull request. Use it on an issue."),
    (
        "text_changed",
        {"author": "mallory"},
        "Not started: the text of this issue, written by `mallory`, is no longer the one you asked for. Read it again; if it is right, ask once more.",
    ),
    (
        "text_unverified",
        {"author": "mallory"},
        "Not started: no delivery reached me when you asked, so I cannot be sure that the text of `mallory` is still the one you read. Read it again; if it is right, ask once more.",
    ),
    (
        "too_old",
        {"text": "/dispatch run", "asked_ms": 0, "now_ms": 90_000_000},
        "I only found `/\u200bdispatch run` now, 1 d 1 h after it was asked, so I did not act on it. If it still holds, ask again.",
    ),
    (
        "rate_limited",
        {"login": "bob", "limit": 10, "minutes": 10},
        "Not done: `bob` has used 10 commands in 10 minutes, which is the most I take. Please wait a little and ask again.",
    ),
    ("gone", {}, "Not started: the issue or its repository no longer exists, or the bot may no longer see it."),
    (
        "over_limit",
        {"option": "budget", "asked": "$9", "most": "$5"},
        "Not started: `budget=$9` is more than is allowed here. The most is `budget=$5`.",
    ),
    (
        "option_needs",
        {"option": "priority", "needs": "ADMIN"},
        "Not started: the option `priority=` is for people with the level admin here.",
    ),
    (
        "ops_issue",
        {},
        "This issue mirrors an alert; I open and close it myself and never work on it. Open an issue that says what should be changed.",
    ),
    (
        "unknown_answer",
        {},
        "This was answered by another version of the bot, and the words are lost. `/dispatch status` tells how things stand.",
    ),
    (
        "status",
        {"active": None, "last": None, "now_ms": 61_000, "pauses": [FLEET, REPO], "skip": SKIP},
        (
            "⏸️ The whole fleet is paused by `alice` until 1970-01-01 02:00 UTC: the \\*host\\* moves.\n"
            "\n"
            "⏸️ This repository is paused by `bob`.\n"
            "\n"
            "⏭️ `bob` has put this issue on the skip list 1 min ago: we do it @\u200balice (`/dispatch unskip` takes it off).\n"
            "\n"
            "Nothing has run on this issue yet."
        ),
    ),
    (
        "status",
        {
            "active": SPRINT | {"waiting": "paused", "note": "this repository, by bob"},
            "last": None,
            "now_ms": 61_000,
            "pauses": [REPO],
            "skip": None,
        },
        (
            "⏸️ This repository is paused by `bob`.\n"
            "\n"
            "**Now:** queued, waiting because the bot is paused (this repository, by bob) (for 1 min)."
        ),
    ),
    (
        "queue",
        {"rows": [], "running": 0, "waiting": 2, "hidden": 2, "pauses": [FLEET]},
        "0 sprints running, 2 waiting. ⏸️ The whole fleet is paused by `alice` until 1970-01-01 02:00 UTC: the \\*host\\* moves. None of this repository is among the first. 2 of them not shown: in other repositories, or further down.",
    ),
    (
        "in_the_way",
        {"obstacles": ["pull request #12 by carol closes it", "it carries the label wont*fix"], "skipped": False},
        (
            "Not started:\n"
            "\n"
            "- pull request #\u200b12 by carol closes it\n"
            "- it carries the label wont\\*fix\n"
            "\n"
            "To start all the same: `/dispatch run force`."
        ),
    ),
    (
        "in_the_way",
        {"obstacles": ["bob has put this issue on the skip list (later)"], "skipped": True},
        (
            "Not started:\n"
            "\n"
            "- bob has put this issue on the skip list (later)\n"
            "\n"
            "To take it off the list: `/dispatch unskip`. To start all the same: `/dispatch run force`."
        ),
    ),
    (
        "paused",
        {"pause": FLEET, "now_ms": 1000, "running": 2, "waiting": 3},
        "⏸️ The whole fleet is paused by `alice` until 1970-01-01 02:00 UTC: the \\*host\\* moves. 2 sprints running now will be finished; what waits (3) keeps its place. It ends by itself in 2 h; earlier with `/dispatch resume fleet`.",
    ),
    (
        "paused",
        {"pause": REPO, "now_ms": 1000, "running": 0, "waiting": 0},
        "⏸️ This repository is paused by `bob`. Nothing runs at the moment; what is asked for now waits. It ends with `/dispatch resume repo`.",
    ),
    (
        "resumed",
        {"pause": REPO, "now_ms": 301_000, "fleet": FLEET},
        "▶️ Resumed: this repository was paused for 5 min by `bob`. But the whole fleet is paused by `alice` until 1970-01-01 02:00 UTC: the \\*host\\* moves; an operator ends that with `/dispatch resume fleet`.",
    ),
    (
        "resumed",
        {"pause": FLEET, "now_ms": 301_000, "fleet": None},
        "▶️ Resumed: the whole fleet was paused for 5 min by `alice`. What waited goes on now.",
    ),
    (
        "nothing_to_resume",
        {"scope": "repo", "fleet": FLEET},
        "There is nothing to resume: this repository is not paused. But the whole fleet is paused by `alice` until 1970-01-01 02:00 UTC: the \\*host\\* moves; an operator ends that with `/dispatch resume fleet`.",
    ),
    (
        "nothing_to_resume",
        {"scope": "fleet", "fleet": None},
        "There is nothing to resume: the whole fleet is not paused.",
    ),
    (
        "skipped",
        {"reason": "we do it", "cancelled": True, "running": False},
        "⏭️ On the skip list (we do it): I leave this issue alone, whoever asks. Its sprint had not begun and is cancelled. Back off the list: `/dispatch unskip`. Once in spite of it: `/dispatch run force`.",
    ),
    (
        "skipped",
        {"reason": "", "cancelled": False, "running": True},
        "⏭️ On the skip list: I leave this issue alone, whoever asks. The sprint that runs goes on; `/dispatch cancel` stops it. Back off the list: `/dispatch unskip`. Once in spite of it: `/dispatch run force`.",
    ),
    (
        "unskipped",
        {"skip": SKIP, "now_ms": 61_000},
        "Off the skip list, where `bob` had put it 1 min ago. `/dispatch run` starts.",
    ),
    (
        "not_skipped",
        {},
        "This issue is not on the skip list. `/dispatch run` starts.",
    ),
    (
        "explanation",
        {
            "rows": TRAIL,
            "hidden": 3,
            "active": SPRINT | {"waiting": "cap", "note": "1 of 1"},
            "last": None,
            "pauses": [],
            "skip": None,
            "now_ms": 61_000,
        },
        (
            "**Now:** queued, 3rd in line, waiting because as many sprints as allowed are running already (1 of 1) (for 1 min).\n"
            "\n"
            "**How it came to this**, newest last:\n"
            "\n"
            "3 older ones are left out.\n"
            "\n"
            "- 1970-01-01 00:00 UTC: `bob` asked for `run`: refused, pull request #\u200b12 by carol closes it.\n"
            "- 1970-01-01 00:00 UTC: `bob` asked for `run`: queued.\n"
            "- 1970-01-01 00:00 UTC: `bob` asked for `cancel`: refused, too many commands in a short time.\n"
            "- 1970-01-01 00:00 UTC: `bob` asked for `run`: not possible, options.\n"
            "- 1970-01-01 00:00 UTC: `bob` asked for `run`: an error, the forge could not be asked for a day.\n"
            "- 1970-01-01 00:00 UTC: it waits (cap): 1 of 1 running in this repository.\n"
            "- 1970-01-01 00:00 UTC: it was its turn: a slot was reserved.\n"
            "- 1970-01-01 00:00 UTC: back into the queue (provider): no provider can be called.\n"
            "- 1970-01-01 00:00 UTC: the sprint ended as no change: fixed \\*already\\*.\n"
            "- 1970-01-01 00:00 UTC: the sprint ended as pull request."
        ),
    ),
    (
        "explanation",
        {"rows": [], "hidden": 0, "active": None, "last": None, "pauses": [], "skip": None, "now_ms": 61_000, "dead": 2},
        (
            "Nothing has run on this issue yet. `/dispatch run` starts.\n"
            "\n"
            "Nothing is in the way of a start now.\n"
            "\n"
            "Nothing has been decided about this issue so far.\n"
            "\n"
            "⚠️ 2 deliveries of the forge were given up; `timmy-dispatch replay` shows them to the operator."
        ),
    ),
    (
        "explanation",
        {"rows": [], "hidden": 0, "active": None, "last": None, "pauses": [], "skip": SKIP, "now_ms": 61_000},
        (
            "⏭️ `bob` has put this issue on the skip list 1 min ago: we do it @\u200balice (`/dispatch unskip` takes it off).\n"
            "\n"
            "Nothing has run on this issue yet.\n"
            "\n"
            "Nothing has been decided about this issue so far."
        ),
    ),
    (
        "explanation",
        {
            "rows": [],
            "hidden": 0,
            "active": None,
            "last": None,
            "pauses": [],
            "skip": None,
            "now_ms": 61_000,
            "obstacles": ["it carries the label wontfix", "pull request #12 by carol closes it"],
            "looked": False,
        },
        (
            "Nothing has run on this issue yet. `/dispatch run` starts.\n"
            "\n"
            "**In the way of a start now:**\n"
            "\n"
            "- it carries the label wontfix\n"
            "- pull request #\u200b12 by carol closes it\n"
            "\n"
            "The forge does not answer just now: what other people work on, and what this issue depends on, is not looked at.\n"
            "\n"
            "Nothing has been decided about this issue so far."
        ),
    ),
    (
        "log",
        {"sprint": WORKING, "lines": LINES},
        (
            "The sprint is working, step 4 of 60, $0.02 so far.\n"
            "\n"
            "<details><summary>The last 4 actions</summary>\n"
            "\n"
            "````text\n"
            '1. run_command {"command": "sh test.sh"}\n'
            "    exit code 1\n"
            "    ```\n"
            "    /\u200bdispatch run @\u200balice\n"
            "2. the model gave no answer\n"
            "    billed: timeout\n"
            '3. read_file {"path": "a"}\n'
            "    x\n"
            "4. run_command {}\n"
            "    (still running, or cut off)\n"
            "````\n"
            "\n"
            "</details>"
        ),
    ),
    (
        "log",
        {"sprint": SPRINT, "lines": []},
        "The sprint is queued, 3rd in line. The agent has not called a tool so far.",
    ),
    (
        "nothing_logged",
        {},
        "There is no log: nothing has run on this issue yet. `/dispatch run` starts.",
    ),
    (
        "priority_set",
        {"sprint": SPRINT | {"place": 1}, "before": 5, "after": 2},
        "Priority 2 instead of 5 (1 is most urgent). The sprint is queued, next in line.",
    ),
    (
        "not_waiting",
        {"sprint": WORKING},
        "The sprint is working, step 4 of 60, $0.02 so far: it waits for nobody any more, so its priority changes nothing.",
    ),
    (
        "not_waiting",
        {"sprint": None},
        "There is no sprint of this issue in the queue, so there is no priority to change. `/dispatch run priority=N` starts with one.",
    ),
    (
        "health",
        {
            "verdict": "degraded",
            "reasons": ["unavailable: nous", "1 running, 0 admitted, last moved 3 s ago"],
            "pauses": [FLEET, ELSEWHERE],
        },
        (
            "🟡 **DEGRADED**\n"
            "\n"
            "- unavailable: nous\n"
            "- 1 running, 0 admitted, last moved 3 s ago\n"
            "- The repository `acme/other` is paused by `bob`"
        ),
    ),
    (
        "fleet",
        {"workers": [WORKER], "rows": [{"repo": "acme/rocket", "in_flight": 1, "queued": 2}], "hidden": 4, "pauses": [REPO]},
        (
            "1 worker, 1 of 2 slots busy. ⏸️ This repository is paused by `bob`.\n"
            "\n"
            "| Worker | State | Busy | Last sign of life |\n"
            "|---|---|---|---|\n"
            "| `n1-0` | busy | 1 of 2 | 3 s ago |\n"
            "\n"
            "| Repository | Running | Waiting |\n"
            "|---|---|---|\n"
            "| `acme/rocket` | 1 | 2 |\n"
            "\n"
            "Besides, 4 sprints in other repositories."
        ),
    ),
    (
        "fleet",
        {"workers": [], "rows": [], "hidden": 0, "pauses": []},
        ("No worker is there: the service does not run.\n\nNo sprint is queued or running."),
    ),
    (
        "watchdog",
        {
            "rows": [
                {
                    "name": "disk",
                    "verdict": "ok",
                    "ran_ms": 1000,
                    "policy": "watch",
                    "wished": False,
                    "reasons": ["state folder: 9.0 GiB free"],
                    "more": 0,
                    "hidden": 0,
                    "acted_ms": 0,
                    "acted": "",
                },
                {
                    "name": "model",
                    "verdict": "failing",
                    "ran_ms": 1000,
                    "policy": "act",
                    "wished": True,
                    "reasons": ["default: runs *a* | b, @alice"],
                    "more": 1,
                    "hidden": 2,
                    "acted_ms": 1000,
                    "acted": "error",
                },
            ],
            "now_ms": 61_000,
        },
        (
            "2 probes, 1 with something to tell.\n"
            "\n"
            "| Probe | Verdict | Looked | What it sees |\n"
            "|---|---|---|---|\n"
            "| `disk` | 🟢 ok | 1 min ago | state folder: 9.0 GiB free |\n"
            "| `model` (may act) | 🔴 failing | 1 min ago | default: runs \\*a\\* \\| b, @\u200balice; 1 more; 2 in other repositories; last action 1 min ago: error; asked to act now |"
        ),
    ),
    (
        "watchdog",
        {"rows": [], "now_ms": 1},
        "The watchdog has not looked yet: it is switched off, or the service has just been started.",
    ),
    (
        "watchdog_wished",
        {"names": ["disk", "model"]},
        "The watchdog looks now and does what helps: `disk`, `model`. `/dispatch watchdog` shows in a moment what came of it; a pause holds it.",
    ),
    (
        "prompt_text",
        {"text": "Solve `it`.\n\n```\nx = 1\n```", "comments": 2},
        (
            "The task of this issue with 2 comments by people with write access, as a prompt for another agent. It holds no secret; whoever uses it brings their own access.\n"
            "\n"
            "<details><summary>The prompt</summary>\n"
            "\n"
            "````text\n"
            "Solve `it`.\n"
            "\n"
            "```\n"
            "x = 1\n"
            "```\n"
            "````\n"
            "\n"
            "</details>"
        ),
    ),
    (
        "prompt_text",
        {"text": "Solve it.", "comments": 0},
        (
            "The task of this issue, as a prompt for another agent. It holds no secret; whoever uses it brings their own access.\n"
            "\n"
            "<details><summary>The prompt</summary>\n"
            "\n"
            "```text\n"
            "Solve it.\n"
            "```\n"
            "\n"
            "</details>"
        ),
    ),
]

STATUS = [
    (
        {},
        (
            "⏳ **Queued, 3rd in line.**\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        {"waiting": WaitingReason.CAP, "waiting_note": "2 of 2", "not_before_ms": 200_000},
        (
            "⏳ **Queued, waiting.** It waits because as many sprints as allowed are running already (2 of 2). It is 3rd in line. Not before 1 min 40 s from now.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        {"waiting": WaitingReason.PAUSED},
        (
            "⏳ **Queued, waiting.** It waits because the bot is paused.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        {"state": SprintState.ADMITTED, "source": Source.LABEL},
        (
            "⏳ **About to start.** A slot is reserved.\n"
            "\n"
            "<sub>Asked for by `bob` by label · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        RUNNING | {"state": SprintState.PREPARING},
        (
            "🔧 **Preparing.** Reading the issue and fetching the repository.\n"
            "\n"
            "<details><summary>4 steps, $0.12, 40 s</summary>\n"
            "\n"
            "| | |\n"
            "|---|---|\n"
            "| Model | `qwen'3` (ollama) |\n"
            "| Steps | 4 of 60 |\n"
            "| Tokens | 12,345 of 2,000,000 |\n"
            "| Cost | $0.12 of $5.00 |\n"
            "| Time | 40 s of 45 min |\n"
            "| Waited before | 1 min |\n"
            "| Sandbox | bubblewrap |\n"
            "\n"
            "</details>\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        RUNNING | {"state": SprintState.WORKING},
        (
            "🔧 **Working, step 4 of 60.** Now: run\\_command: \\`sh test.sh\\` @\u200bbob.\n"
            "\n"
            "<details><summary>4 steps, $0.12, 40 s</summary>\n"
            "\n"
            "| | |\n"
            "|---|---|\n"
            "| Model | `qwen'3` (ollama) |\n"
            "| Steps | 4 of 60 |\n"
            "| Tokens | 12,345 of 2,000,000 |\n"
            "| Cost | $0.12 of $5.00 |\n"
            "| Time | 40 s of 45 min |\n"
            "| Waited before | 1 min |\n"
            "| Sandbox | bubblewrap |\n"
            "\n"
            "</details>\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        RUNNING | {"state": SprintState.WORKING, "stop": Stop.CANCEL, "stop_by": "alice", "sandbox": "none"},
        (
            "🛑 **Stopping**, because `alice` cancelled it. What runs is being ended.\n"
            "\n"
            "⚠️ Runs **without a sandbox**, as the operator has set it.\n"
            "\n"
            "<details><summary>4 steps, $0.12, 40 s</summary>\n"
            "\n"
            "| | |\n"
            "|---|---|\n"
            "| Model | `qwen'3` (ollama) |\n"
            "| Steps | 4 of 60 |\n"
            "| Tokens | 12,345 of 2,000,000 |\n"
            "| Cost | $0.12 of $5.00 |\n"
            "| Time | 40 s of 45 min |\n"
            "| Waited before | 1 min |\n"
            "| Sandbox | none |\n"
            "\n"
            "</details>\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        {"state": SprintState.WORKING, "stop": Stop.REVISE, "stop_by": "alice", "options": {"mode": "plan"}},
        (
            "🔁 **Beginning the plan anew**, with what `alice` said about it.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        {"state": SprintState.WORKING, "stop": Stop.DRAIN},
        (
            "🔁 **Going back into the queue.** It goes on from there by itself.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        RUNNING | {"state": SprintState.VETTING, "attempt": 2, "limits": None},
        (
            "🔧 **Checking the result.** Running the checks of the repository and looking at what changed.\n"
            "\n"
            "<details><summary>4 steps, $0.12, 40 s</summary>\n"
            "\n"
            "| | |\n"
            "|---|---|\n"
            "| Model | `qwen'3` (ollama) |\n"
            "| Steps | 4 |\n"
            "| Tokens | 12,345 |\n"
            "| Cost | $0.12 |\n"
            "| Time | 40 s |\n"
            "| Waited before | 1 min |\n"
            "| Attempt | 2 |\n"
            "| Sandbox | bubblewrap |\n"
            "\n"
            "</details>\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J) · stop it with `/dispatch cancel`</sub>"
        ),
    ),
    (
        {"state": SprintState.PUBLISHING},
        (
            "🔧 **Publishing.** Pushing the branch and opening the pull request.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [live transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        ENDED | {"outcome": OutcomeKind.PULL_REQUEST, "pr": 12},
        (
            "✅ **Done: [pull request #12](https://git.example/acme/rocket/pulls/12) is open**, 2 files changed.\n"
            "\n"
            "| Check | Result |\n"
            "|---|---|\n"
            "| `sh test.sh \\| cat` | ✅ passed in 1 s |\n"
            "| `lint` | ❌ exit code 2 |\n"
            "| `slow` | ❌ cut off in 1 min |\n"
            "\n"
            "**Look closely at:**\n"
            "\n"
            "- `.gitea/x.yml`\n"
            "\n"
            "Merging it closes this issue. For another try: `/dispatch retry`.\n"
            "\n"
            "<details><summary>4 steps, $0.12, 3 min 10 s</summary>\n"
            "\n"
            "| | |\n"
            "|---|---|\n"
            "| Model | `qwen'3` (ollama) |\n"
            "| Steps | 4 of 60 |\n"
            "| Tokens | 12,345 of 2,000,000 |\n"
            "| Cost | $0.12 of $5.00 |\n"
            "| Time | 3 min 10 s of 45 min |\n"
            "| Waited before | 1 min |\n"
            "| Sandbox | bubblewrap |\n"
            "\n"
            "</details>\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        ENDED | {"outcome": OutcomeKind.UPDATED, "pr": 12, "pr_state": "merged", "checks": (), "flagged": ()},
        (
            "✅ **Done: [pull request #12](https://git.example/acme/rocket/pulls/12) is updated**, 2 files changed. It has been merged.\n"
            "\n"
            "No checks are declared for this repository: nothing was tested.\n"
            "\n"
            "<details><summary>4 steps, $0.12, 3 min 10 s</summary>\n"
            "\n"
            "| | |\n"
            "|---|---|\n"
            "| Model | `qwen'3` (ollama) |\n"
            "| Steps | 4 of 60 |\n"
            "| Tokens | 12,345 of 2,000,000 |\n"
            "| Cost | $0.12 of $5.00 |\n"
            "| Time | 3 min 10 s of 45 min |\n"
            "| Waited before | 1 min |\n"
            "| Sandbox | bubblewrap |\n"
            "\n"
            "</details>\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {"state": SprintState.SETTLED, "outcome": OutcomeKind.NO_CHANGE, "detail": "The issue is fixed *already*."},
        (
            "🟰 **Done: nothing was changed**, so there is no pull request.\n"
            "\n"
            "The issue is fixed \\*already\\*.\n"
            "\n"
            "If something should change here, say what in the issue or in a comment such as `/dispatch run please also ...`.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {
            "state": SprintState.SETTLED,
            "outcome": OutcomeKind.REFUSED,
            "reason": "policy",
            "detail": "A path is protected.",
            "flagged": (".gitea/x.yml",),
        },
        (
            "⛔ **Not published: the change breaks a rule of this repository.** The patch is kept on the [sprint's page](https://bot.example/sprints/01J).\n"
            "\n"
            "A path is protected.\n"
            "\n"
            "**Look closely at:**\n"
            "\n"
            "- `.gitea/x.yml`\n"
            "\n"
            "Narrow the task and ask again with `/dispatch retry`, or let the operator change the rule.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {"state": SprintState.SETTLED, "outcome": OutcomeKind.BUDGET, "pr": 12, "reason": "steps"},
        (
            "⏸️ **Stopped at a limit (steps).** What there is so far is in the draft [pull request #12](https://git.example/acme/rocket/pulls/12).\n"
            "\n"
            "Look at what is there. `/dispatch retry` goes on from there, `/dispatch retry fresh` begins anew; a smaller task or a larger limit helps.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {"state": SprintState.SETTLED, "outcome": OutcomeKind.CANCELLED, "stop_by": "bob"},
        (
            "🛑 **Cancelled by `bob`.** Nothing was published.\n"
            "\n"
            "To start again: `/dispatch retry`.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {
            "state": SprintState.SETTLED,
            "outcome": OutcomeKind.PULL_REQUEST,
            "pr": 12,
            "files": 1,
            "detail": "slug() now lowers *all* letters, see @alice.",
            "config_faults": ("line 2, column 1: `limts`: unknown key. Remedy: write `limits`, if you mean that.",),
        },
        (
            "✅ **Done: [pull request #12](https://git.example/acme/rocket/pulls/12) is open**, 1 file changed.\n"
            "\n"
            "The agent says: slug() now lowers \\*all\\* letters, see @\u200balice.\n"
            "\n"
            "No checks are declared for this repository: nothing was tested.\n"
            "\n"
            "Merging it closes this issue. For another try: `/dispatch retry`.\n"
            "\n"
            "⚠️ `.dispatch.yml` on the default branch has faults. What is at fault is left out, and the operator's settings stand:\n"
            "\n"
            "- line 2, column 1: \\`limts\\`: unknown key. Remedy: write \\`limits\\`, if you mean that.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {
            "state": SprintState.SETTLED,
            "outcome": OutcomeKind.CANCELLED,
            "stop_by": "bob",
            "reason": "unassigned",
            "detail": "cancelled by bob",
            "source": Source.ASSIGNMENT,
        },
        (
            "🛑 **Cancelled by `bob`, because I was unassigned.** Nothing was published.\n"
            "\n"
            "To start again: `/dispatch retry`.\n"
            "\n"
            "<sub>Asked for by `bob` by assignment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {"state": SprintState.SETTLED, "outcome": OutcomeKind.CANCELLED, "stop_by": "bob", "reason": "closed"},
        (
            "🛑 **Cancelled by `bob`, because the issue was closed.** Nothing was published.\n"
            "\n"
            "Reopen the issue and ask again with `/dispatch retry`.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {"state": SprintState.SETTLED, "outcome": OutcomeKind.FAILED, "reason": "checks", "pr": 12},
        (
            "❌ **Failed.** The checks of this repository fail on the change. What there is so far is in the draft [pull request #12](https://git.example/acme/rocket/pulls/12).\n"
            "\n"
            "Look at the output of the checks, then finish the draft by hand, or say what to do differently with `/dispatch retry` and your words after it.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {"state": SprintState.SETTLED, "outcome": OutcomeKind.FAILED, "reason": "clone"},
        (
            "❌ **Failed.** The repository could not be fetched. No pull request was opened.\n"
            "\n"
            "This is for the operator: `timmy-dispatch doctor` names the cause and its remedy. Afterwards: `/dispatch retry`.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
    (
        {"state": SprintState.SETTLED, "outcome": OutcomeKind.FAILED, "reason": "pr", "branch": "dispatch/issue-7"},
        (
            "❌ **Failed.** The branch was pushed, but the pull request could not be opened. The work is on the branch `dispatch/issue-7`.\n"
            "\n"
            "This is for the operator: `timmy-dispatch doctor` names the cause and its remedy. Afterwards: `/dispatch retry`.\n"
            "\n"
            "<sub>Asked for by `bob` by comment · [transcript](https://bot.example/sprints/01J)</sub>"
        ),
    ),
]


@pytest.mark.parametrize(("name", "data", "expected"), REPLIES)
def test_reply(name: str, data: dict, expected: str) -> None:
    assert replies.render(Reply(name, data), key="reply:command:1") == f"{expected}\n\n<!-- timmy-dispatch:v1 key=reply:command:1 -->"


@pytest.mark.parametrize(("changes", "expected"), STATUS)
def test_status_comment(changes: dict, expected: str) -> None:
    assert status(**changes) == expected


def test_pr_body() -> None:
    summary = "I fixed `parse`.\n\n```\n/dispatch run\n<!-- x\nCloses #3 @bob ![a](b) <details>"
    body = replies.pr_body(
        view(**ENDED),
        summary=summary,
        issue=7,
        checks=ENDED["checks"],
        flagged=[".gitea/x.yml"],
        models=["m1"],
        sandbox="bubblewrap",
        requester="bob",
        links=LINKS,
        key="sprint:01J",
    )
    assert body == (
        "Closes #7\n"
        "\n"
        "**Look closely at:**\n"
        "\n"
        "- `.gitea/x.yml`\n"
        "\n"
        "The agent says:\n"
        "\n"
        "> I fixed `parse`.\n"
        ">\n"
        "> ```\n"
        "> /\u200bdispatch run\n"
        "> <\u200b!-- x\n"
        "> C\u200bloses #\u200b3 @\u200bbob !\u200b[a](b) <\u200bdetails>\n"
        "\n"
        "**Checks**, run by the bot on exactly this tree:\n"
        "\n"
        "| Check | Result |\n"
        "|---|---|\n"
        "| `sh test.sh \\| cat` | ✅ passed in 1 s |\n"
        "| `lint` | ❌ exit code 2 |\n"
        "| `slow` | ❌ cut off in 1 min |\n"
        "\n"
        "<sub>Written for `bob` by `m1`, sandbox `bubblewrap`. Read it like a stranger's work before you merge. · [transcript](https://bot.example/sprints/01J)</sub>\n"
        "\n"
        "<!-- timmy-dispatch:v1 key=sprint:01J -->"
    )


def test_pr_body_of_little() -> None:
    body = replies.pr_body(
        view(),
        summary=" ",
        issue=7,
        checks=[],
        flagged=[],
        models=[],
        sandbox="none",
        requester="",
        links=replies.Links("https://git.example"),
        key="sprint:01J",
    )
    assert body == (
        "Closes #7\n"
        "\n"
        "The agent left no summary.\n"
        "\n"
        "**Checks**: none are declared for this repository.\n"
        "\n"
        "<sub>Written by no model, **without a sandbox**. Read it like a stranger's work before you merge.</sub>\n"
        "\n"
        "<!-- timmy-dispatch:v1 key=sprint:01J -->"
    )


@pytest.mark.parametrize(
    ("title", "draft", "expected"),
    [
        ("Keep the last row", False, "Keep the last row"),
        ("Keep the last row", True, "WIP: Keep the last row"),
        ("WIP: [wip] fix #3", True, "WIP: f\u200bix #\u200b3"),
        ("WIP:", False, "Issue 7"),
        ("", True, "WIP: Issue 7"),
        ("two\nlines @bob", False, "two lines @\u200bbob"),
    ],
)
def test_pr_title(title: str, draft: bool, expected: str) -> None:
    assert replies.pr_title(view(title=title), draft=draft) == expected


def test_commit_message() -> None:
    made = replies.commit_message(view(title="# Fix #3"), summary="Done.\nCloses #4\n\nmore", trailer="Agent: timmy")
    assert made == "F\u200bix #\u200b3\n\nDone. C\u200bloses #\u200b4\n\nRefs #7\n\nAgent: timmy\n"
    assert replies.commit_message(view(title="#"), summary="") == "Work on issue 7\n\nRefs #7\n"


def test_a_refusal_by_the_guard_names_its_escape() -> None:
    told = status(
        state=SprintState.SETTLED, outcome=OutcomeKind.REFUSED, reason=replies.OTHER_WORK, detail="pull request #12 by carol closes it"
    )
    assert "pull request #\u200b12 by carol closes it" in told
    assert "To start all the same: `/dispatch run force`." in told


def test_a_long_log_is_cut() -> None:
    line = {"n": 1, "tool": "read_file", "arguments": "{}", "result": "y" * 3000}
    told = replies.log(sprint=WORKING, lines=[line] * 40)
    assert "[cut: 3000 characters]" in told
    assert "[cut]\n" in told
    assert len(told) < 20_000


@pytest.mark.parametrize("text", ["```\nx\n```", "~~~\n````` ", "</details>\n\n/dispatch run", "`" * 40])
def test_a_fence_holds_whatever_stands_in_it(text: str) -> None:
    for said in (replies.prompt_text(text=text, comments=0), replies.log(sprint=WORKING, lines=[LINES[0] | {"result": text}])):
        assert parse(said, VERBS) == []
        assert said.count("<details>") == 1
        fence = said.splitlines()[-3]
        assert set(fence) == {"`"}
        assert said.count(fence) == 2


def test_the_terminal_gets_plain_words() -> None:
    shown = replies.on_terminal(Reply("log", {"sprint": WORKING, "lines": LINES}))
    assert shown.startswith("The sprint is working")
    assert "<" not in shown
    assert "/dispatch run @alice" in shown
    assert replies.on_terminal(Reply("prompt_text", {"text": "Solve <it>.", "comments": 0})) == "Solve <it>."


def test_every_reply_has_its_snapshot_and_documents_its_cause() -> None:
    assert {name for name, _, _ in REPLIES} == set(replies.reply_names())
    assert all(inspect.getdoc(replies._text._SAID[name]) for name in replies.reply_names())


def test_a_reaction_alone_has_no_text_and_an_unknown_name_has_a_general_one() -> None:
    assert replies.render(Reply(), key="reply:x") == ""
    assert replies.render(Reply("from_the_future", {"x": 1}), key="reply:x").startswith("This was answered by another version")


def _said() -> list[str]:
    said = [replies._text._SAID[name](**data) for name, data, _ in REPLIES]
    said += [status(**changes) for changes, _ in STATUS]
    said += [status(state=SprintState.SETTLED, outcome=OutcomeKind.FAILED, reason=reason) for reason in (*FailureReason, "", "new")]
    said += [status(waiting=waiting) for waiting in WaitingReason]
    said += [status(state=state, outcome=outcome) for state in SprintState for outcome in (None, *OutcomeKind)]
    said += [
        replies.sprint_in_words(SPRINT | {"state": state.value, "outcome": outcome})
        for state in SprintState
        for outcome in ("", *OutcomeKind)
    ]
    said += [status(source=source) for source in Source]
    return said


def test_nothing_the_bot_says_is_a_command_or_a_mention() -> None:
    for text in _said():
        assert parse(text, VERBS) == [], text
        assert not [line for line in text.splitlines() if line.lstrip(" >-*").startswith("/dispatch")], text
        assert "@" not in text.replace("@\u200b", ""), text
        assert len(text) < 5000


HOSTILE = st.lists(
    st.sampled_from([*"/dispatch run\n\r`@bob#12![](x)<!-->|*_\\ \u200b\x1b", "<details>", "Closes #1", "```", "/dispatch"]), max_size=60
).map("".join)


@settings(max_examples=200, deadline=None)
@given(HOSTILE)
def test_foreign_words_do_nothing_wherever_they_stand(text: str) -> None:
    made = [
        status(title=text, doing=text, state=SprintState.WORKING, requester=text, model=text, provider=text, started_ms=1),
        status(
            state=SprintState.SETTLED,
            outcome=OutcomeKind.FAILED,
            detail=text,
            flagged=(text,),
            checks=({"command": text, "exit_code": 1},),
            reason=text,
        ),
        status(waiting=WaitingReason.CAP, waiting_note=text),
        replies.not_understood(text=text, problem="x", suggestion=""),
        replies.already_active(SPRINT | {"title": text, "requester": text, "note": text, "waiting": "cap"}),
        replies.queue(rows=[SPRINT | {"ref": "#8", "here": False, "title": text}], running=1, waiting=0, hidden=0),
        replies.not_permitted(login=text, verb="run", needs="WRITE", has="READ"),
        replies.text_changed(text),
        replies.quoted(text),
        replies.in_the_way(obstacles=[text], skipped=True),
        replies.paused(pause=FLEET | {"by": text, "reason": text}, now_ms=1, running=1, waiting=1),
        replies.status(active=None, last=None, now_ms=1, pauses=[ELSEWHERE | {"repo": text}], skip=SKIP | {"by": text, "reason": text}),
        replies.decision_in_words(TRAIL[0] | {"reason": text, "actor": text}),
        replies.decision_in_words(TRAIL[8] | {"reason": text}),
        replies.skipped(reason=text, cancelled=False, running=False),
        replies.health(verdict="idle", reasons=[text], pauses=[]),
        replies.log(sprint=WORKING, lines=[LINES[0] | {"tool": text, "arguments": text, "result": text}]),
    ]
    for comment in made:
        assert parse(comment, VERBS) == []
        assert "<!-- timmy" not in comment
        assert not re.search(r"(?<!\w)@b", comment)
        assert not re.search(r"\bCloses #1", comment)
    for line in (replies.escape(text), replies.code(text), replies.pr_title(view(title=text), draft=True)):
        assert "\n" not in line
        assert "\x1b" not in line


@pytest.mark.parametrize(
    ("number", "word"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th"), (21, "21st"), (111, "111th")],
)
def test_ordinal(number: int, word: str) -> None:
    assert replies.ordinal(number) == word


@pytest.mark.parametrize(
    ("ms", "word"),
    [
        (-5, "0 s"),
        (999, "0 s"),
        (42_000, "42 s"),
        (60_000, "1 min"),
        (250_000, "4 min 10 s"),
        (7_500_000, "2 h 5 min"),
        (273_600_000, "3 d 4 h"),
    ],
)
def test_duration(ms: int, word: str) -> None:
    assert replies.duration(ms) == word


@pytest.mark.parametrize(("usd", "word"), [(0, "$0.00"), (0.0042, "$0.0042"), (0.38, "$0.38"), (1234.5, "$1,234.50")])
def test_money(usd: float, word: str) -> None:
    assert replies.money(usd) == word


@pytest.mark.parametrize(
    ("place", "capped", "word"), [(1, False, "next in line"), (3, False, "3rd in line"), (200, True, "beyond the first 200 in line")]
)
def test_place(place: int, capped: bool, word: str) -> None:
    assert replies.place_in_words(place, capped=capped) == word


def test_a_long_text_is_cut_before_its_marker() -> None:
    text = replies.with_marker("x" * 100_000, "sprint:1")
    assert len(text) < 60_100
    assert text.endswith("[cut]\n\n<!-- timmy-dispatch:v1 key=sprint:1 -->")


def test_links() -> None:
    assert LINKS.pull(IssueRef("acme", "rocket", 7), 12) == "https://git.example/acme/rocket/pulls/12"
    assert replies.Links("https://git.example").sprint("01J") == ""


def test_the_trace_is_named_once_there_is_one() -> None:
    traced = replies.Links("https://git.example", trace_of=lambda sprint: f"trace-of-{sprint}")

    def shown(**fields: object) -> str:
        return replies.status_comment(view(**fields), position=None, now_ms=1, links=traced)

    assert "· trace `trace-of-" in shown(state=SprintState.WORKING, started_ms=1)
    assert "trace" not in shown(state=SprintState.QUEUED, started_ms=0)


ALERT = {
    "labels": {"alertname": "DispatchWorkerHeartbeatLost", "service": "timmy-dispatch", "severity": "warning", "worker": "n1-0"},
    "annotations": {
        "summary": "Worker n1-0 lost its heartbeat",
        "description": "It is 3m old.",
        "runbook_url": "https://git.example/r/x.md",
    },
    "starts_us": 1_795_570_605_000_000,
}
SHOWN_ALERT = """\
- **DispatchWorkerHeartbeatLost** (warning), since 2026-11-25 01:36:45 UTC
  Worker n1-0 lost its heartbeat
  It is 3m old.
  What to do: <https://git.example/r/x.md>
  `worker=n1-0`"""


def test_the_issue_that_mirrors_alerts() -> None:
    foot = "<sub>I mirror Alertmanager here: the issue closes when nothing fires any more, and I never work on it.</sub>"
    assert replies.alert_title({"alertname": "DispatchBotDown", "service": "timmy-dispatch"}) == "Alert: DispatchBotDown"
    assert replies.alert_title({"severity": "critical", "zone": "a"}) == "Alert: alerts (severity=critical, zone=a)"
    assert replies.alert_title({}) == "Alert: alerts"
    assert replies.alert_body([ALERT]) == f"**1 alert firing.**\n\n{SHOWN_ALERT}\n\n{foot}"
    assert replies.alert_body([]) == f"**Resolved.**\n\n\n{foot}"
    assert replies.alert_body([ALERT] * 60).count("HeartbeatLost**") == 50
    assert "and 10 more" in replies.alert_body([ALERT] * 60)
    assert replies.alert_comment("resolved", [], 2, 0) == "Resolved: nothing of this group fires any more."
    assert replies.alert_comment("again", [], 0, 1) == "It fires again."
    assert replies.alert_comment("changed", [ALERT], 1, 2) == f"2 alerts firing now.\n\nBegan:\n\n{SHOWN_ALERT}\n\nEnded: 1."
    body = replies.with_marker(replies.alert_body([ALERT]), replies.alert_key("1f", 3))
    assert body.endswith("<!-- timmy-dispatch:v1 key=alert:1f:3 -->")
    assert replies.mirrors_alerts(body)
    assert not replies.mirrors_alerts(replies.with_marker("text", "sprint:alert:1"))
