"""`init` and `doctor` against the embedded forge: set up, prove, repeat without harm, and say what is wrong and how to mend it."""

from __future__ import annotations

import asyncio
import json
import stat
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from bot import config
from bot.cli import _install, run
from bot.demo.forge import ForgeServer
from bot.doctor import Mark, Patient, Probe, account, checks, clock, examine, explain, labels, machine, state
from bot.doctor._delivery import Receiver
from bot.fleet.probes._proof import Proof, own_hooks
from bot.gitea import errors
from bot.gitea.aiohttp import GiteaClient
from bot.gitea.forge import Forge
from bot.models import StateLabel, UserError
from bot.redaction import Secret

SCOPES = ["write:issue", "write:repository", "read:user"]
WAIT = "2"


class House:
    """A forge with one repository, a bot account, and a folder for the bot's files."""

    def __init__(self, root: Path, server: ForgeServer) -> None:
        self.root, self.server = root, server
        self.config = root / "etc" / "dispatch.yml"
        self.token = root / "token"
        self.state = root / "state"
        self.port = 0

    async def furnish(self) -> None:
        await self.server.create_user("timmy")
        await self.server.create_repo("acme", "rocket", files={"README.md": "# rocket\n"})
        await self.server.add_collaborator("acme/rocket", "timmy", "admin")
        await self.new_token(SCOPES)
        listener = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        listener.close()
        await listener.wait_closed()

    async def new_token(self, scopes: list[str], login: str = "timmy") -> None:
        self.token.write_text(await self.server.create_token(login, scopes))
        self.token.chmod(0o600)

    async def cli(self, *arguments: str) -> int:
        """The command line in a thread of its own, while the forge answers here."""
        return await asyncio.to_thread(run, ["--config", str(self.config), *arguments])

    def flags(self, *more: str, repository: str = "acme/rocket") -> list[str]:
        return [
            *("--url", self.server.url, "--token-file", str(self.token), "-r", repository, "--wait", WAIT),
            *("--listen", f"127.0.0.1:{self.port}", "--public-url", f"http://127.0.0.1:{self.port}", "--state-dir", str(self.state)),
            *("--model-url", "http://127.0.0.1:9/v1", "--model", "m"),
            *more,
        ]

    def first(self, *more: str, **other: str) -> list[str]:
        return ["init", *self.flags(*more, **other)]

    def again(self, *more: str) -> list[str]:
        return ["init", "--wait", WAIT, *more]

    @property
    def hooks(self) -> list:
        return list(self.server.state.hooks.values())

    def labels(self, repository: str = "acme/rocket") -> dict[str, bool]:
        return {label.name: label.exclusive for label in self.server.repo(repository).labels}

    def files(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in sorted(self.config.parent.iterdir())}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with ForgeServer(tmp_path / "forge") as server:
        found = House(tmp_path, server)
        await found.furnish()
        yield found


@pytest.fixture(autouse=True)
def no_environment(monkeypatch, tmp_path):
    """The person's own Hermes and variables have no say here."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("HERMES_HOME", "CREDENTIALS_DIRECTORY", "TIMMY_GITEA_TOKEN", "TIMMY_WEBHOOK_SECRET"):
        monkeypatch.delenv(name, raising=False)


async def test_init_sets_everything_up_and_proves_it(house, capsys):
    before = time.time_ns() // 1_000_000
    assert await house.cli(*house.first()) == 0
    shown = capsys.readouterr()
    assert "a test delivery arrived, signed with our secret" in shown.out
    assert "the token belongs to 'timmy'" in shown.out
    assert house.labels() == {"dispatch": False} | dict.fromkeys(map(str, StateLabel), True)
    (hook,) = house.hooks
    assert (hook.active, hook.content_type, hook.url) == (True, "json", f"http://127.0.0.1:{house.port}/webhook")
    assert {"issues", "issue_comment", "issue_label", "pull_request", "push", "repository", "status", "workflow_run"} <= set(hook.events)
    files = house.files()
    assert set(files) == {"dispatch.yml", "gitea.token", "webhook.secret"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in house.config.parent.iterdir()} == {0o600}
    assert files["webhook.secret"].strip() == hook.secret
    assert len(hook.secret) == 64
    token = house.token.read_text()
    assert token not in files["dispatch.yml"] + shown.out + shown.err
    assert hook.secret not in files["dispatch.yml"] + shown.out + shown.err
    assert before <= int((house.state / "initialised").read_text()) <= time.time_ns() // 1_000_000
    loaded = config.load(house.config, environ={})
    assert loaded.secrets.forge_token.reveal() == token
    assert loaded.settings.state_dir == house.state


async def test_an_administrators_token_makes_the_bot_and_is_not_kept(house, capsys):
    await house.server.create_user("root1", admin=True)
    admin = await house.server.create_token("root1", ["write:admin", "write:repository", "read:user"])
    house.token.write_text(admin)
    flags = [word if word != "--token-file" else "--admin-token-file" for word in house.first("--bot", "helga")]
    assert await house.cli(*[word if word != "acme/rocket" else "acme/missing" for word in flags]) == 1
    assert "no repository acme/missing" in capsys.readouterr().err
    assert await house.cli(*flags[:-1], "timmy") == 1
    assert "there is an account 'timmy' already" in capsys.readouterr().err
    assert await house.cli(*flags[:-1], "root1") == 1
    assert not house.config.parent.exists()
    assert await house.cli(*flags) == 0
    shown = capsys.readouterr()
    assert "made the account 'helga'" in shown.out
    assert "a test delivery arrived, signed with our secret" in shown.out
    loaded = config.load(house.config, environ={})
    async with GiteaClient(house.server.url, loaded.secrets.forge_token) as client:
        me = await Forge(client).me()
        assert (me["login"], me["is_admin"]) == ("helga", False)
        assert (await Forge(client).repo("acme", "rocket"))["permissions"]["admin"]
    everything = "".join(house.files().values()) + shown.out + shown.err
    assert admin not in everything
    assert loaded.secrets.forge_token.reveal() not in shown.out + shown.err
    assert await house.cli(*flags) == 1
    assert "without --admin-token-file" in capsys.readouterr().err
    house.config.unlink()  # stopped half-way: what was made is gone on with
    assert await house.cli(*flags) == 0
    assert "made the account" not in capsys.readouterr().out


async def test_only_an_administrators_token_makes_accounts(house, capsys):
    flags = [word if word != "--token-file" else "--admin-token-file" for word in house.first("--bot", "helga")]
    assert await house.cli(*flags) == 1
    assert "no administrator of this server" in capsys.readouterr().err
    assert await house.cli(*flags, "--token-file", str(house.token)) == 1
    assert "exclude each other" in capsys.readouterr().err


async def test_a_second_run_changes_nothing(house, capsys):
    assert await house.cli(*house.first()) == 0
    before, hooked, marked = house.files(), house.hooks, (house.state / "initialised").read_text()
    assert await house.cli(*house.again()) == 0
    assert (house.files(), house.hooks, (house.state / "initialised").read_text()) == (before, hooked, marked)
    assert "webhook kept" in capsys.readouterr().out
    assert len(house.labels()) == 6


async def test_a_second_run_mends_what_was_spoilt(house, capsys):
    assert await house.cli(*house.first()) == 0
    (hook,) = house.hooks
    hook.active, hook.events = False, {"push"}
    house.server.repo("acme/rocket").labels.clear()
    await house.server.create_hook("acme/rocket", hook.url, secret="somebody-else")
    assert await house.cli(*house.again()) == 0
    assert len(house.hooks) == 1
    assert house.hooks[0].active
    assert len(house.labels()) == 6
    assert "a test delivery arrived" in capsys.readouterr().out


async def test_a_hook_of_an_earlier_version_is_named_and_completed_in_place(house, capsys):
    """Made before the bot heard of deleted branches: doctor says what is missing and what to do, init does it once, and then nothing more."""
    assert await house.cli(*house.first()) == 0
    (hook,) = house.hooks
    whole = hook.events
    hook.events = whole - {"delete"}
    assert "the webhook does not send: delete | run `timmy-dispatch init` again" in bad(await probes(house, "webhook"))
    assert await house.cli("doctor", "--only", "webhook") == 1
    known = (hook.id, hook.secret, hook.url)
    for said in ("webhook mended", "webhook kept"):
        assert await house.cli(*house.again()) == 0
        (mended,) = house.hooks
        assert (mended.id, mended.secret, mended.url, mended.events, mended.active) == (*known, whole, True)
        assert said in capsys.readouterr().out
        assert bad(await probes(house, "webhook")) == ""


async def test_a_hook_with_another_secret_is_replaced(house, capsys):
    assert await house.cli(*house.first()) == 0
    (hook,) = house.hooks
    hook.secret = "not-ours-any-more"
    assert await house.cli(*house.again()) == 0
    (fresh,) = house.hooks
    assert fresh.id != hook.id
    assert fresh.secret == house.files()["webhook.secret"].strip()
    assert "a test delivery arrived" in capsys.readouterr().out


async def test_a_hook_of_a_lost_secret_is_replaced_on_a_first_run(house):
    await house.server.create_hook("acme/rocket", f"http://127.0.0.1:{house.port}/webhook", secret="lost")
    await house.server.create_hook("acme/rocket", "http://elsewhere.example/webhook", secret="kept")
    assert await house.cli(*house.first()) == 0
    assert sorted(hook.url for hook in house.hooks) == [f"http://127.0.0.1:{house.port}/webhook", "http://elsewhere.example/webhook"]
    assert "lost" not in [hook.secret for hook in house.hooks]


async def test_a_repository_is_added_to_the_file_that_is_there(house, capsys):
    assert await house.cli(*house.first()) == 0
    house.config.write_text(house.config.read_text().replace("repositories:", "# mine\nrepositories:"))
    house.config.chmod(0o640)
    await house.server.create_repo("acme", "boat")
    await house.server.add_collaborator("acme/boat", "timmy", "admin")
    assert await house.cli(*house.again("-r", "acme/boat")) == 0
    loaded = config.load(house.config, environ={})
    assert [repository.name for repository in loaded.settings.repositories] == ["acme/boat", "acme/rocket"]
    assert "# mine\n" in house.config.read_text()
    assert stat.S_IMODE(house.config.stat().st_mode) == 0o640
    assert len(house.labels("acme/boat")) == 6
    assert capsys.readouterr().out.count("a test delivery arrived") == 3


async def test_a_new_token_is_stored_even_where_the_old_file_is_gone(house):
    assert await house.cli(*house.first()) == 0
    (house.config.parent / "gitea.token").unlink()
    assert await house.cli(*house.again()) == 2
    await house.new_token(SCOPES)
    assert await house.cli(*house.again("--token-file", str(house.token))) == 0
    assert house.files()["gitea.token"].strip() == house.token.read_text()


async def test_other_answers_than_the_file_has_are_refused(house, capsys):
    assert await house.cli(*house.first()) == 0
    before = house.files()
    assert await house.cli(*house.again("--url", "http://other.example")) == 1
    assert await house.cli(*house.again("--public-url", "http://other.example")) == 1
    assert house.files() == before
    assert "change it there" in capsys.readouterr().err


async def test_an_empty_repository_cannot_prove_yet(house, capsys):
    await house.server.create_repo("acme", "bare", empty=True)
    await house.server.add_collaborator("acme/bare", "timmy", "admin")
    assert await house.cli(*house.first(repository="acme/bare")) == 0
    assert "cannot be proven yet" in capsys.readouterr().out


async def test_silence_names_the_setting_of_gitea(house, capsys):
    house.server.hooks.allowed_hosts = "external"
    assert await house.cli(*house.first("--wait", "0.3")) == 0
    shown = capsys.readouterr().out
    assert "ALLOWED_HOST_LIST" in shown
    assert "polls meanwhile" in shown


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("token", "does not know this token"),
        ("scope", "write:issue, write:repository and read:user"),
        ("password", "gitea admin user must-change-password --unset NAME"),
        ("rights", "administrator of the repository"),
        ("hidden", "check the spelling"),
        ("archived", "unarchive it"),
        ("spelling", "OWNER/NAME"),
    ],
)
async def test_a_first_run_that_cannot_work_leaves_nothing_behind(house, capsys, spoil, says):
    repository = "acme/rocket"
    match spoil:
        case "token":
            house.token.write_text("0123456789abcdef")
        case "scope":
            await house.new_token(["read:issue", "write:repository", "read:user"])
        case "password":
            house.server.state.user("timmy").must_change_password = True
        case "rights":
            await house.server.add_collaborator("acme/rocket", "timmy", "write")
        case "hidden":
            repository = "acme/nothing"
        case "archived":
            await house.server.archive_repo("acme/rocket")
        case "spelling":
            repository = "rocket"
    assert await house.cli(*house.first(repository=repository)) == 1
    assert says in capsys.readouterr().out
    assert not house.config.parent.exists()
    assert not house.state.exists()
    assert (house.hooks, house.labels()) == ([], {})


async def test_missing_answers_are_named_where_nobody_can_be_asked(house, capsys):
    assert await house.cli("init", "--url", house.server.url) == 1
    assert "--token-file" in capsys.readouterr().err
    assert await house.cli("init") == 1
    assert "--url" in capsys.readouterr().err


async def test_an_open_token_file_is_refused(house, capsys):
    house.token.chmod(0o644)
    assert await house.cli(*house.first()) == 1
    assert f"chmod 600 {house.token}" in capsys.readouterr().err


async def test_init_warns_of_a_site_administrator_and_of_a_person(house, capsys):
    house.server.state.user("timmy").is_admin = True
    assert await house.cli(*house.first()) == 0
    assert "site administrator" in capsys.readouterr().out
    person = {"login": "alice", "last_login": "2026-11-20T10:00:00Z", "is_admin": False}
    found = [probe async for probe in account.identity(Told(person))]
    assert [probe.mark for probe in found] == [Mark.OK, Mark.WARN]
    found = [probe async for probe in account.identity(Told({**person, "last_login": "1970-01-01T00:00:00Z"}), people=("Alice",))]
    assert [probe.mark for probe in found] == [Mark.OK, Mark.WARN]


class Told:
    """A forge that knows one account."""

    def __init__(self, account: Mapping[str, object]) -> None:
        self._account = account

    async def me(self) -> Mapping[str, object]:
        return self._account


def test_a_state_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--state-dir"):
        _install.prepare_state(tmp_path / "file" / "state", 1)


def test_the_first_moment_stays(tmp_path):
    assert _install.prepare_state(tmp_path / "state", 5) == 5
    assert _install.prepare_state(tmp_path / "state", 9) == 5
    (tmp_path / "state" / "initialised").write_text("")
    assert _install.prepare_state(tmp_path / "state", 9) == 9
    assert (tmp_path / "state").stat().st_mode & 0o066 == 0


def test_a_list_in_one_line_is_left_to_the_person(tmp_path):
    path = tmp_path / "dispatch.yml"
    path.write_text("repositories: [{name: a/b}]\n")
    with pytest.raises(UserError, match="by hand: c/d"):
        _install.with_repositories(path, ["c/d"])


async def probes(house: House, *only: str, environ: Mapping[str, str] | None = None, wait: float = 2.0) -> list[Probe]:
    loaded = config.load(house.config, environ={})
    async with GiteaClient(loaded.settings.forge.url, loaded.secrets.forge_token) as client:
        patient = Patient(loaded.settings, loaded.secrets, Forge(client), environ or {}, wait)
        return [probe async for probe in examine(patient, [check for check in checks() if check.title in only])]


def bad(found: list[Probe], mark: Mark = Mark.FAIL) -> str:
    return "\n".join(f"{probe.name}: {probe.detail} | {probe.remedy}" for probe in found if probe.mark is mark)


FORGE_CHECKS = ("server and account", "clock", "rights", "labels", "webhook")


async def test_doctor_finds_a_good_house_in_order(house):
    assert await house.cli(*house.first()) == 0
    await house.server.protect_branch("acme/rocket", "main")
    found = await probes(house, *FORGE_CHECKS, "machine", "state")
    assert bad(found) == ""
    names = {probe.name for probe in found}
    assert {
        "server",
        "account",
        "clock",
        "acme/rocket scopes",
        "acme/rocket labels",
        "acme/rocket hook",
        "acme/rocket delivery",
        "git",
        "disk",
    } <= names


async def test_doctor_changes_nothing(house):
    assert await house.cli(*house.first()) == 0
    before = (house.files(), house.labels(), [(hook.id, hook.events) for hook in house.hooks])
    await probes(house, *FORGE_CHECKS)
    assert (house.files(), house.labels(), [(hook.id, hook.events) for hook in house.hooks]) == before


async def test_doctor_names_each_failure_with_its_remedy(house):
    assert await house.cli(*house.first()) == 0
    (hook,) = house.hooks
    hook.active = False
    repo = house.server.repo("acme/rocket")
    for label in list(repo.labels):
        if label.name == "dispatch/queued":
            label.exclusive = False
        if label.name == "dispatch/failed":
            repo.labels.remove(label)
    found = bad(await probes(house, *FORGE_CHECKS))
    assert "the webhook is switched off | run `timmy-dispatch init` again" in found
    assert "missing: dispatch/failed" in found
    assert "dispatch/queued" in found
    hook.active, hook.events = True, hook.events - {"issue_comment"}
    assert "does not send: issue_comment" in bad(await probes(house, "webhook"))
    hook.url = "http://elsewhere.example/webhook"
    assert "no webhook posts to" in bad(await probes(house, "webhook"))


async def test_doctor_tells_a_foreign_secret_and_silence_apart(house):
    assert await house.cli(*house.first()) == 0
    (hook,) = house.hooks
    good, hook.secret = hook.secret, "another-secret"
    assert "signed with another secret" in bad(await probes(house, "webhook"))
    hook.secret = good
    house.server.drop_deliveries = True
    assert "ALLOWED_HOST_LIST" in bad(await probes(house, "webhook", wait=0.3))


async def test_doctor_sees_rights_go(house):
    assert await house.cli(*house.first()) == 0
    await house.server.add_collaborator("acme/rocket", "timmy", "write")
    assert "everybody would be refused" in bad(await probes(house, "rights"))
    await house.server.remove_collaborator("acme/rocket", "timmy")
    assert "cannot push" in bad(await probes(house, "rights"))
    await house.server.rename_repo("acme/rocket", "boat")
    assert "is called 'acme/boat' now" in bad(await probes(house, "rights"))


async def test_doctor_asks_for_branch_protection(house):
    assert await house.cli(*house.first()) == 0
    assert "'main' is not protected" in bad(await probes(house, "rights"), Mark.WARN)


async def test_doctor_reads_the_running_service_where_it_has_the_port(house):
    from bot.store import Store, cursors

    assert await house.cli(*house.first()) == 0
    loaded = config.load(house.config, environ={})
    store = Store(loaded.settings.database_url())
    store.open()
    try:
        async with Receiver(f"127.0.0.1:{house.port}", loaded.secrets.webhook_secrets) as service:
            assert "no delivery came" in bad(await probes(house, "webhook", wait=0.3))

            async def take() -> None:
                service.forget("acme/rocket")
                assert await service.wait("acme/rocket", 10) is Proof.PROVEN
                await store.write(lambda conn: cursors.put(conn, cursors.LAST_TEST_PUSH, time.time_ns() // 1_000_000))

            taking = asyncio.create_task(take())
            assert bad(await probes(house, "webhook", wait=5)) == ""
            await taking
    finally:
        store.close()


async def test_doctor_on_another_machine_cannot_prove(house):
    assert await house.cli(*house.first()) == 0
    text = house.config.read_text().replace(f"listen: 127.0.0.1:{house.port}", "listen: 192.0.2.1:8080")
    house.config.write_text(text)
    assert "cannot be proven here" in bad(await probes(house, "webhook"), Mark.WARN)


async def test_doctor_command_line(house, capsys):
    assert await house.cli(*house.first()) == 0
    capsys.readouterr()
    assert await house.cli("doctor", "--only", "labels", "--only", "rights") == 0
    assert "all six" in capsys.readouterr().out
    house.server.repo("acme/rocket").labels.clear()
    assert await house.cli("doctor", "--json", "--only", "labels") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    (failed,) = [probe for probe in report["probes"] if probe["mark"] == "fail"]
    assert failed["name"] == "acme/rocket labels"
    assert failed["remedy"]
    assert await house.cli("doctor", "--only", "nonsense") == 2
    assert await house.cli("doctor", "--only", "list") == 0
    assert set(FORGE_CHECKS) <= set(capsys.readouterr().out.splitlines())


async def test_doctor_reports_faults_of_the_file(house, capsys):
    house.config.parent.mkdir()
    house.config.write_text("forge: {}\n")
    assert await house.cli("doctor", "--json") == 1
    names = {probe["name"] for probe in json.loads(capsys.readouterr().out)["probes"]}
    assert names == {"configuration"}


async def test_doctor_does_not_ask_a_dead_server_twice(house, capsys):
    assert await house.cli(*house.first()) == 0
    await house.server.stop()
    began = time.monotonic()
    assert await house.cli("doctor", "--only", "server and account", "--only", "rights", "--only", "labels", "--only", "webhook") == 1
    assert "is the server up?" in capsys.readouterr().out
    assert time.monotonic() - began < 25
    await house.server.start()


def test_every_check_has_a_title_and_a_place():
    titles = [check.title for check in checks()]
    assert len(set(titles)) == len(titles)
    assert titles[0] == "server and account"
    assert set(FORGE_CHECKS) | {"machine", "state", "model"} <= set(titles)


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        *(("1.22.6", Mark.OK), ("1.27.0-rc0", Mark.OK), ("15.0.3+gitea-1.22.0", Mark.OK), ("v1.26.3", Mark.OK)),
        *(("1.21.11", Mark.FAIL), ("10.0.0+gitea-1.22.0", Mark.FAIL), ("development", Mark.WARN), ("", Mark.WARN)),
    ],
)
def test_versions(text, mark):
    assert account.judge_version(text).mark is mark


@pytest.mark.parametrize(
    ("date", "mark"),
    [
        *(("Tue, 24 Nov 2026 21:00:00 GMT", Mark.OK), ("Tue, 24 Nov 2026 21:00:20 GMT", Mark.WARN)),
        *(("Tue, 24 Nov 2026 20:50:00 GMT", Mark.FAIL), ("", Mark.WARN), ("yesterday", Mark.WARN)),
    ],
)
def test_clocks(date, mark):
    moment = 1795554000.5
    assert clock.judge(date, moment, moment + 0.1).mark is mark


@pytest.mark.parametrize(
    "error", [errors.Unauthorized, errors.Forbidden, errors.NotFound, errors.Moved, errors.BadReply, errors.Unavailable, errors.Invalid]
)
def test_every_refusal_of_the_forge_has_a_remedy(error):
    detail, remedy = explain(error("words", status=400, method="GET", route="/x"))
    assert "words" in detail
    assert remedy


async def test_a_check_that_breaks_does_not_stop_the_others(house):
    from bot.doctor import Check, ok

    async def broken(_patient):
        raise ZeroDivisionError("x")
        yield

    async def well(_patient):
        yield ok("b", "fine")

    found = [probe async for probe in examine(None, [Check("a", broken), Check("b", well)])]
    assert [probe.mark for probe in found] == [Mark.FAIL, Mark.OK]


async def test_the_environment_of_the_engine(house):
    assert await house.cli(*house.first()) == 0
    found = await probes(house, "machine", environ={"DBOS__CLOUD": "true", "PYTHONPATH": "/x"})
    assert "DBOS__CLOUD" in bad(found)
    assert "PYTHONPATH" in bad(found, Mark.WARN)


async def test_machine_and_state_alone(tmp_path):
    assert (await machine.git()).mark is Mark.OK
    assert machine.disk(tmp_path / "not" / "there", 1).mark is Mark.OK
    assert machine.disk(tmp_path, 1 << 60).mark is Mark.WARN
    assert state.modes(tmp_path / "none").mark is Mark.WARN
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    assert state.modes(folder).mark is Mark.FAIL
    folder.chmod(0o700)
    assert state.modes(folder).mark is Mark.OK
    (tmp_path / "file").touch()
    assert state.modes(tmp_path / "file").mark is Mark.FAIL


async def test_receiver_refuses_what_is_not_signed():
    import aiohttp

    listener = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    async with Receiver(f"127.0.0.1:{port}", [Secret("our-secret")]) as receiver, aiohttp.ClientSession() as session:
        waiting = asyncio.create_task(receiver.wait("acme/rocket", 5))
        await asyncio.sleep(0)
        async with session.post(f"http://127.0.0.1:{port}/webhook", json={}) as reply:
            assert reply.status == 401
        assert await waiting is Proof.FORGED


async def test_labels_keep_what_people_chose(house):
    await house.server.create_label("acme/rocket", "dispatch", "#123456")
    assert await house.cli(*house.first()) == 0
    label = next(label for label in house.server.repo("acme/rocket").labels if label.name == "dispatch")
    assert label.color.lstrip("#") == "123456"
    assert set(labels.MEANINGS) == set(StateLabel)


def test_own_hooks_are_found_by_address_active_ones_first():
    loaded = config.Settings(
        forge=config.ForgeSettings(url="http://f.example"),
        repositories=({"name": "a/b"},),
        state_dir=Path("/s"),
        providers=({"from_hermes": True},),
        webhook=config.WebhookSettings(public_url="http://b.example"),
    )
    url = "http://b.example/webhook"
    given = [
        {"id": 1, "config": {"url": url}, "active": False},
        {"id": 2, "config": {"url": url + "/"}, "active": True},
        {"id": 3, "config": {"url": "http://c.example"}},
        {"id": 4, "config": None},
    ]
    assert [hook["id"] for hook in own_hooks(given, loaded.webhook.hook_url())] == [2, 1]


class Model:
    """An OpenAI-compatible endpoint with one answer."""

    def __init__(self, message: dict) -> None:
        self.message = message
        self.asked: list[dict] = []

    async def answer(self, request):
        from aiohttp import web

        self.asked.append(await request.json())
        body = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": self.message}],
        }
        if not self.asked[-1].get("stream"):
            return web.json_response(body)
        delta = {
            **self.message,
            **({"tool_calls": [{"index": 0, **call} for call in self.message["tool_calls"]]} if "tool_calls" in self.message else {}),
        }
        chunk = {**body, "object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": "stop", "delta": delta}]}
        return web.Response(text=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "ping", "arguments": "{}"}}],
}


@pytest.mark.parametrize(("message", "says"), [(CALL, ""), ({"role": "assistant", "content": "pong"}, "did not call the tool")])
async def test_the_model_must_call_a_tool(house, message, says):
    from aiohttp import web

    model = Model(message)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", model.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        assert await house.cli(*house.first("--model-url", f"http://127.0.0.1:{runner.addresses[0][1]}/v1")) == 0
        found = await probes(house, "model")
    finally:
        await runner.cleanup()
    assert says in bad(found)
    assert bool(bad(found)) is bool(says)
    assert model.asked


async def test_a_model_that_does_not_answer(house):
    assert await house.cli(*house.first()) == 0
    assert "check address, key and model name" in bad(await probes(house, "model"))


async def test_no_sandbox_is_a_warning_that_stays(house):
    assert await house.cli(*house.first()) == 0
    house.config.write_text(house.config.read_text() + "sandbox: {kind: none}\n")
    assert "sandbox.kind" in bad(await probes(house, "sandbox"), Mark.WARN)
