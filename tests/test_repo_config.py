"""`.dispatch.yml`: what it may say, what is a fault in it, that it only narrows, and that only the default branch says it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from talk import answered, issue_with, reacted, state_is
from world import FORGES, make_world, until

from bot.cli import main
from bot.doctor import Mark, Patient, repo_file
from bot.models import Permission
from bot.repo_config import MAX_BYTES, RepoFile, RepoLimits, narrow, parse_repo_config
from bot.settings import ForgeSettings, LimitSettings, ProviderSettings, RepositorySettings, Settings

DOCS = Path(__file__).parent.parent / "docs" / "dispatch-yml.md"


def told(text: str | bytes) -> list[str]:
    raw = text.encode() if isinstance(text, str) else text
    return parse_repo_config(raw).told()


def test_the_example_of_the_docs_is_in_order_and_the_docs_name_every_key() -> None:
    text = DOCS.read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = parse_repo_config(example.encode())
    assert config.faults == ()
    assert set(config.file.model_dump(exclude_defaults=True)) == set(RepoFile.model_fields)
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    for key in RepoFile.model_fields:
        assert any(f"`{key}`" in row or f"`{key}." in row for row in rows), key
    for key in RepoLimits.model_fields:
        assert any(f".{key}`" in row for row in rows), key


@pytest.mark.parametrize("text", [b"", b"\n", b"# nothing\n", b"{}", b"checks:\nsetup: ~\n", b"\xef\xbb\xbfchecks: []\n", None])
def test_nothing_said_is_no_fault(text: bytes | None) -> None:
    config = parse_repo_config(text)
    assert config.faults == ()
    assert config.file == RepoFile()


@pytest.mark.parametrize(
    ("text", "line", "column", "what", "remedy"),
    [
        ("limts: {steps: 3}", 1, 1, "`limts`: unknown key", "write `limits`"),
        ("limits: {stesp: 3}", 1, 10, "`limits.stesp`: unknown key", "write `steps`"),
        ("nonsense: 1", 1, 1, "`nonsense`: unknown key", "the keys here are checks, "),
        ("checks: make", 1, 1, "`checks`: should be a list, not 'make'", "Commands run in the sandbox"),
        ("checks:\n  - make\n  - 3", 3, 5, "`checks[1]`: should be text (numbers in quotes), not 3", "Commands run"),
        ("checks: ['']", 1, 10, "should not be empty", "Commands run"),
        (f"checks: {['x'] * 30}", 1, 1, "has too many entries", "Commands run"),
        ("limits:\n  steps: many", 2, 3, "`limits.steps`: should be a whole number, not 'many'", "Most model calls"),
        ("limits: {steps: 0}", 1, 10, "greater than or equal to 1", "Most model calls"),
        ("limits: {usd: .nan}", 1, 10, "`limits.usd`", "Most money"),
        ("limits: {usd: .inf}", 1, 10, "finite", "Most money"),
        ("limits: 3", 1, 1, "should be a mapping", "The most one sprint"),
        ("roles: {run: king}", 1, 9, "`roles.run`: 'king' is not one of them", "read, write, admin, operator"),
        ("roles: {Run: admin}", 1, 9, "'Run' is no verb", "small letters"),
        ("triggers: [labl]", 1, 12, "'labl' is not one of them", "label, command, assignment, mention"),
        ("base_branch: a b", 1, 1, "no branch", "for example main"),
        ("base_branch: dispatch/issue-1", 1, 1, "no branch", "for example main"),
        ("max_open_prs: true", 1, 1, "should be a whole number", "Most open pull requests"),
        ("setup: []\nplan_first: 'yes'", 2, 1, "`plan_first`: should be true or false, not 'yes'", "begins with a plan"),
        ("plan_first: 1", 1, 1, "should be true or false, not 1", "false changes nothing"),
        ("plan_frist: true", 1, 1, "`plan_frist`: unknown key", "write `plan_first`"),
        ("checks: [a]\nchecks: [b]", 2, 1, "`checks` stands twice (first in line 1)", "keep one"),
        ("- a\n- b", 1, 1, "not a mapping", "checks"),
        ("checks: [a\nb: c", 2, 2, "not valid YAML", "mend this line"),
        ("checks:\n\t- a", 2, 1, "not valid YAML", "never tabs"),
        ("a: &x [1]\nb: *x", 1, 4, "references", "write the value out"),
        ("checks: !!python/object/apply:os.system [id]", 1, 9, "tags", "leave the tag out"),
        ("a: 1\n---\nb: 2", 2, 1, "a second document", "keep one"),
        ("? [a, b]\n: c", 1, 3, "unhashable", "mend this line"),
        ("1: 2", 1, 1, "Keys should be strings", "documentation"),
    ],
)
def test_a_fault_has_its_place_and_its_remedy(text: str, line: int, column: int, what: str, remedy: str) -> None:
    fault = parse_repo_config(text.encode()).faults[0]
    assert (fault.line, fault.column) == (line, column)
    assert what in fault.text
    assert remedy in fault.remedy
    assert str(fault).count("Remedy:") == 1


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (BOMB.encode(), "references"),
        (b"[" * 30_000, "nested"),
        (b"{a: " * 9_000, "nested"),
        (b"- " * 20_000, "nested"),
        (b"#" * (MAX_BYTES + 1), "more than 65,536"),
        (b"checks: \xff\xfe", "byte 8 is not UTF-8"),
        (b"ok: 1\nchecks: caf\xe9", "not UTF-8"),
        ("checks: [a]".encode("utf-16"), "not UTF-8"),
        (b"checks: \x00", "not valid YAML"),
        (b"checks: 2026-13-45", "not valid YAML"),
        (b"limits: {steps: " + b"9" * 60_000 + b"}", "not valid YAML"),
        (b"%YAML 9.9\n---\n", "not valid YAML"),
    ],
)
def test_a_hostile_file_is_one_fault(raw: bytes, what: str) -> None:
    config = parse_repo_config(raw)
    assert config.file == RepoFile()
    assert len(config.faults) == 1
    assert what in config.faults[0].text


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(alphabet="checksetuplimi: -[]{}&*!|>'\"#\n\t,0159.", max_size=120).map(str.encode)))
def test_no_bytes_break_it(raw: bytes) -> None:
    config = parse_repo_config(raw)
    assert all(fault.line >= 1 and fault.column >= 1 for fault in config.faults)
    narrow(OPERATOR, REPOSITORY, config)


def test_what_is_not_at_fault_goes_on_narrowing() -> None:
    text = "limits: {stps: 4, steps: x, usd: 1}\nprotected_paths: [a, 3, b, 4, c, '']\nroles: {run: king, retry: admin}\nchecks: [1, ok]"
    config = parse_repo_config(text.encode())
    assert config.file.limits == RepoLimits(usd=1.0)
    assert config.file.protected_paths == ("a", "b", "c")
    assert config.file.roles == {"retry": "admin"}
    assert config.file.checks == ("ok",)
    assert len(config.faults) == 7
    assert [fault.line for fault in config.faults] == [1, 1, 2, 2, 2, 3, 4]
    many = parse_repo_config("".join(f"x{n}: 1\n" for n in range(25)).encode()).told()
    assert len(many) == 11
    assert many[-1] == "and 15 more"


OPERATOR = Settings(
    forge=ForgeSettings(url="https://git.example"),
    repositories=(RepositorySettings(name="acme/rocket"),),
    state_dir=Path("/var/lib/x"),
    providers=(ProviderSettings(name="p", base_url="https://llm.example/v1", model="m"),),
    limits=LimitSettings(steps=30, minutes=10, tokens=100_000, usd=2.0),
)
REPOSITORY = RepositorySettings(
    name="acme/rocket",
    checks=("make lint",),
    checks_timeout_seconds=300,
    roles={"run": "admin", "cancel": "write"},
    protected_paths=("secret/",),
    max_open_prs=4,
    triggers=("label", "command"),
)


def narrowed(text: str, settings: Settings = OPERATOR, repository: RepositorySettings = REPOSITORY) -> tuple[Settings, RepositorySettings]:
    config = parse_repo_config(text.encode())
    assert config.faults == ()
    return narrow(settings, repository, config)


def test_it_narrows() -> None:
    fleet, here = narrowed(
        "limits: {steps: 5, minutes: 2.5, tokens: 5000, usd: 0.5}\nchecks: [make test]\nchecks_timeout_minutes: 1\nprotected_paths: [db/]\n"
        "roles: {cancel: admin, retry: admin}\nmax_open_prs: 2\ntriggers: [label, mention]\nskip_labels: [design]\nplan_first: true"
    )
    assert fleet.limits.limits() == LimitSettings(steps=5, minutes=2.5, tokens=5000, usd=0.5).limits()
    assert here.checks == ("make lint", "make test")
    assert here.checks_timeout_seconds == 60
    assert here.protected_paths == ("secret/", "db/")
    assert here.roles == {"run": "admin", "cancel": "admin", "retry": "admin"}
    assert here.max_open_prs == 2
    assert here.plan_first
    assert fleet.triggers_of(here) == ("label",)
    assert fleet.skip_labels == (*OPERATOR.skip_labels, "design")


def test_it_never_widens() -> None:
    fleet, here = narrowed(
        "limits: {steps: 500, minutes: 500, tokens: 50000000, usd: 500}\nchecks_timeout_minutes: 600\nroles: {run: read, cancel: read}\n"
        "max_open_prs: 100\ntriggers: [label, command, assignment, mention]\nbase_branch: other",
        repository=REPOSITORY.model_copy(update={"base_branch": "main"}),
    )
    assert fleet.limits == OPERATOR.limits
    assert here.checks == ("make lint",)
    assert here.checks_timeout_seconds == 300
    assert here.roles == REPOSITORY.roles
    assert here.max_open_prs == 4
    assert fleet.triggers_of(here) == ("label", "command")
    assert here.base_branch == "main"
    assert here.allow_users == REPOSITORY.allow_users
    demanded = REPOSITORY.model_copy(update={"plan_first": True})
    assert narrowed("plan_first: false", repository=demanded)[1].plan_first
    assert not narrowed("plan_first: false")[1].plan_first
    free = OPERATOR.model_copy(update={"limits": LimitSettings(usd=0)})
    assert narrowed("limits: {usd: 3}", free)[0].limits.usd == 3
    assert narrowed("{}", free)[0].limits.usd == 0
    open_ended = RepositorySettings(name="acme/rocket")
    assert narrowed("base_branch: next\nmax_open_prs: 2", repository=open_ended)[1].max_open_prs == 2
    assert narrowed("base_branch: next", repository=open_ended)[1].base_branch == "next"
    assert narrowed("{}", repository=open_ended)[1] == open_ended.model_copy(update={"triggers": OPERATOR.triggers})


def test_the_command_line_checks_one(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yml", tmp_path / "bad.yml"
    good.write_text("checks: [make test]\n")
    bad.write_text("checks: [make test]\nlimts: {steps: 3}\n")
    runner = CliRunner()
    said = runner.invoke(main, ["check-config", "--repo-file", str(good)])
    assert (said.exit_code, said.output.strip()) == (0, f"{good}: in order (checks)")
    said = runner.invoke(main, ["check-config", "--repo-file", str(bad)])
    assert said.exit_code != 0
    assert f"{bad}:2:1: `limts`: unknown key. Remedy: write `limits`" in str(said.exception)
    assert runner.invoke(main, ["check-config", "--repo-file", str(tmp_path / "none")]).exit_code != 0


@pytest.mark.parametrize("live", FORGES)
async def test_only_the_default_branch_says_it(base: Path, live: str):
    """A writer's own branch, named with `base=`, has no checks and no limits of its own; the default branch's hold."""
    async with make_world(base, live=live == "live") as world:
        await world.alice.put_file(
            "main", ".dispatch.yml", "checks: ['false']\nlimits: {steps: 9}\nlimts: {steps: 2}\nroles: {queue: admin}\n"
        )
        fields = {"branch": "main", "new_branch": "easy", "content": "", "message": "an easier life"}
        known = await world.bob.client.getitem(f"/repos/{world.stage.repo}/contents/.dispatch.yml", {"ref": "main"})
        await world.bob.client.put(f"/repos/{world.stage.repo}/contents/.dispatch.yml", {**fields, "sha": known["sha"]})
        issue = await issue_with(world)
        await world.bob.comment(issue, "/dispatch run base=easy")
        refused = await world.bob.comment(issue, "/dispatch queue")
        sprint = await world.settled(issue)
        assert (sprint.outcome, sprint.reason, sprint.base_branch) == ("failed", "checks", "easy")
        assert [check["command"] for check in sprint.checks] == ["false"]
        assert sprint.limits.steps == 9
        status = await world.status_comment(issue)
        assert "`.dispatch.yml` on the default branch has faults" in status
        assert "line 3, column 1" in status
        assert "write 'limits'" in status or "write \\`limits\\`" in status, status
        await reacted(world, refused, "confused")
        assert any("needs administrator rights" in body for body in await world.by_bot(issue))
        patient = Patient(world.settings(), world.stage.secrets(), world.timmy.forge, {})
        [probe] = [found async for found in repo_file.run(patient)]
        assert (probe.mark, "line 3, column 1: `limts`: unknown key" in probe.detail) == (Mark.WARN, True)


async def test_setup_runs_first_and_says_when_it_fails(base: Path):
    async with make_world(base) as world:
        await world.alice.put_file(
            "main", ".dispatch.yml", "setup: ['echo prepared > .git/prepared']\nchecks: ['grep prepared .git/prepared']\n"
        )
        issue = await issue_with(world)
        await world.alice.label(issue, "dispatch")
        sprint = await world.settled(issue)
        assert sprint.outcome == "pull_request", sprint
        asked = len(world.model.requests)
        await world.alice.put_file("main", ".dispatch.yml", "setup: ['true', 'echo no such tool; exit 3']\n")
        other = await issue_with(world, title="another")
        await world.alice.label(other, "dispatch")
        sprint = await world.settled(other)
        assert (sprint.outcome, sprint.reason) == ("failed", "setup")
        status = await world.status_comment(other)
        assert "A setup command of this repository's `.dispatch.yml` fails, so no model was asked" in status
        assert "ended with exit code 3: no such tool" in status
        assert len(world.model.requests) == asked


async def test_labels_triggers_and_open_pull_requests_are_narrowed(base: Path):
    async with make_world(base) as world:
        await world.alice.put_file("main", ".dispatch.yml", "skip_labels: [dispatch/failed]\ntriggers: [command]\nmax_open_prs: 1\n")
        first = await issue_with(world)
        await world.alice.label(first, "dispatch")
        skipped = await issue_with(world, title="left alone")
        await world.alice.label(skipped, "dispatch/failed")
        comment = await world.alice.comment(skipped, "/dispatch")
        await reacted(world, comment, "confused")
        assert any("it carries the label dispatch/failed" in body for body in await world.by_bot(skipped))
        await answered(world, first)
        assert await world.sprint(first) is None
        await world.alice.comment(first, "/dispatch")
        assert (await world.settled(first)).outcome == "pull_request"
        second = await issue_with(world, title="second")
        await world.alice.comment(second, "/dispatch")
        view = await state_is(world, second, "queued")

        async def held() -> Any:
            return (await world.sprint(second)).waiting == "open_prs"

        await until(held)
        assert view is not None


def test_permission_names_are_the_roles() -> None:
    assert {"READ", "WRITE", "ADMIN", "OPERATOR"} <= set(Permission.__members__)
