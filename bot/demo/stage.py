"""A cast, a repository and a hook on any Gitea, made by its API with an administrator's token: for the demo, tests and benchmarks alike."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bot.config import Secrets, Settings
from bot.gitea import accounts
from bot.gitea.aiohttp import GiteaClient
from bot.gitea.errors import ForgeError, Invalid, NotFound
from bot.gitea.forge import Forge
from bot.models import STATE_LABEL_COLORS
from bot.redaction import Secret

EVENTS = ("issues", "pull_request", "push", "delete", "repository", "status", "workflow_run")
BOT_SCOPES = ("write:issue", "write:repository", "read:user")
T = TypeVar("T")
TRIGGER = "dispatch"
MERGE_TRIES = 20
TRIGGER_COLOR = "#5319e7"


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody with a token, acting through the API as a browser would."""

    login: str
    id: int
    password: str
    token: Secret
    client: GiteaClient
    repo: str

    @property
    def forge(self) -> Forge:
        """The same person's view of the forge."""
        return Forge(self.client)

    async def open_issue(self, title: str, body: str = "") -> int:
        """A new issue; returns its number."""
        return int((await self._post("/issues", {"title": title, "body": body}))["number"])

    async def comment(self, issue: int, body: str) -> int:
        """A comment; returns its id."""
        return int((await self._post(f"/issues/{issue}/comments", {"body": body}))["id"])

    async def edit_comment(self, comment_id: int, body: str) -> None:
        """Another text for a comment."""
        await self.client.patch(f"/repos/{self.repo}/issues/comments/{comment_id}", {"body": body})

    async def label(self, issue: int, *names: str) -> None:
        """Sets labels."""
        await self._post(f"/issues/{issue}/labels", {"labels": list(names)})

    async def unlabel(self, issue: int, name: str) -> None:
        """Takes a label off."""
        labels = await self.client.getitem(f"/repos/{self.repo}/labels", {"limit": 50})
        label = next(item["id"] for item in labels if item["name"] == name)
        await self.client.delete(f"/repos/{self.repo}/issues/{issue}/labels/{label}")

    async def edit_issue(self, issue: int, **fields: object) -> None:
        """Another title, body or state."""
        await self.client.patch(f"/repos/{self.repo}/issues/{issue}", fields)

    async def merge(self, pull: int) -> None:
        """Merges a pull request; Gitea says 405 while it still looks for conflicts after a push."""
        for _ in range(MERGE_TRIES):
            try:
                await self._post(f"/pulls/{pull}/merge", {"Do": "merge"})
            except Invalid as error:
                if "try again" not in error.message.casefold():
                    raise
                await asyncio.sleep(1.0)
            else:
                return
        raise TimeoutError(f"pull request {pull} cannot be merged yet")

    async def put_file(self, branch: str, path: str, text: str, message: str = "a person's commit") -> None:
        """A commit by this person on an existing branch."""
        data = {"branch": branch, "content": base64.b64encode(text.encode()).decode(), "message": message}
        route = f"/repos/{self.repo}/contents/{path}"
        try:
            known = await self.client.getitem(route, {"ref": branch})
            await self.client.put(route, {**data, "sha": known["sha"]})
        except NotFound:
            await self.client.post(route, data)

    async def _post(self, path: str, data: object) -> Any:
        return await self.client.post(f"/repos/{self.repo}{path}", data)


@dataclass(slots=True)
class Stage:
    """The cast: `bot` (repository admin), `alice` (maintainer, owns the repository), `bob` (writer), `mallory` (stranger)."""

    url: str
    admin: GiteaClient
    repo: str
    repo_id: int
    people: dict[str, Person]
    webhook_secret: Secret
    logins: list[str] = field(default_factory=list)

    @classmethod
    async def build(cls, url: str, admin_token: Secret, *, files: Mapping[str, str], suffix: str = "", name: str = "slug") -> Stage:
        """Makes everybody and everything; `suffix` keeps names apart on a server that has other users."""
        admin = GiteaClient(url, admin_token)
        stage = cls(url, admin, f"alice{suffix}/{name}", 0, {}, Secret(secrets.token_hex(24)))
        try:
            await stage._make(files, suffix=suffix, name=name)
        except BaseException:
            await stage.remove()
            await stage.close()
            raise
        return stage

    async def _make(self, files: Mapping[str, str], *, suffix: str, name: str) -> None:
        for role in ("alice", "bob", "mallory", "timmy"):
            scopes = BOT_SCOPES if role == "timmy" else ("write:issue", "write:repository", "write:user")
            self.people[role] = await self._person(role + suffix, scopes)
        alice = self.people["alice"]
        await _whole(self._repository(name))
        for path, text in files.items():
            content = base64.b64encode(text.encode()).decode()
            data = {"content": content, "message": f"Add {path}", "branch": "main", "new_branch": "main"}
            await alice.client.post(f"/repos/{{owner}}/{{repo}}/contents/{path}", data, owner=alice.login, repo=name)
        await self._collaborator("timmy", "admin")
        await self._collaborator("bob", "write")
        await self.labels()

    async def _person(self, login: str, scopes: Sequence[str]) -> Person:
        password = Secret(secrets.token_hex(12))
        user_id = await _whole(self._account(login, password))
        secret = await accounts.token(self.url, login, password, name="stage", scopes=scopes)
        return Person(login, user_id, password.reveal(), secret, GiteaClient(self.url, secret), self.repo)

    async def _account(self, login: str, password: Secret) -> int:
        user_id = await accounts.create(self.admin, login, password, email=f"{login}@example.org")
        self.logins.append(login)
        return user_id

    async def _repository(self, name: str) -> None:
        data = {"name": name, "auto_init": False, "default_branch": "main"}
        self.repo_id = int((await self.people["alice"].client.post("/user/repos", data))["id"])

    async def _collaborator(self, role: str, permission: str) -> None:
        owner, _, repo = self.repo.partition("/")
        login = self.people[role].login
        await self.people["alice"].client.put(
            "/repos/{owner}/{repo}/collaborators/{login}", {"permission": permission}, owner=owner, repo=repo, login=login
        )

    async def labels(self) -> None:
        """The trigger label and the five exclusive state labels."""
        forge = self.people["timmy"].forge
        await forge.ensure_label(self.repo, TRIGGER, color=TRIGGER_COLOR, description="Timmy works on this issue")
        for label, color in STATE_LABEL_COLORS.items():
            await forge.ensure_label(self.repo, label, color=color, exclusive=True)

    async def hook(self, webhook_url: str) -> int:
        """The webhook, as `init` makes it; returns its id."""
        made = await self.people["timmy"].forge.create_hook(self.repo, webhook_url, self.webhook_secret, EVENTS)
        return int(made["id"])

    def secrets(self) -> Secrets:
        """What the service must not show."""
        return Secrets(forge_token=self.people["timmy"].token, webhook_secrets=(self.webhook_secret,))

    def settings(self, state_dir: Path, *, webhook_port: int, model_url: str, **changes: Any) -> Settings:
        """A configuration for this stage; `changes` are top-level keys of dispatch.yml."""
        data: dict[str, Any] = {
            "forge": {"url": self.url},
            "repositories": [{"name": self.repo}],
            "webhook": {"listen": f"127.0.0.1:{webhook_port}", "public_url": f"http://127.0.0.1:{webhook_port}"},
            "metrics": {"listen": "127.0.0.1:0"},
            "state_dir": str(state_dir),
            "providers": [{"name": "scripted", "base_url": model_url, "model": "scripted-1"}],
        }
        for key, value in changes.items():
            data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
        return Settings.model_validate(data)

    async def close(self) -> None:
        """Ends the connections."""
        for person in self.people.values():
            await person.client.close()
        await self.admin.close()

    async def remove(self) -> list[str]:
        """Deletes the repository and everybody; returns what could not be deleted."""
        left = []
        owner, _, repo = self.repo.partition("/")
        if self.repo_id:
            try:
                await self.people["alice"].client.delete("/repos/{owner}/{repo}", owner=owner, repo=repo)
            except ForgeError as error:
                left.append(f"{self.repo}: {error}")
        for login in self.logins:
            try:
                await self.admin.delete("/admin/users/{login}", login=login)
            except ForgeError as error:
                left.append(f"{login}: {error}")
        return left


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Carried to its end even where we are cancelled meanwhile: what was made must be known, to be removed."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
