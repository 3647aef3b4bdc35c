"""Webhook deliveries as Gitea makes them: signed over the body, at most once, five seconds, no retry, and only to allowed hosts."""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import hmac
import ipaddress
import json
import random
import socket
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import urlencode, urlsplit

import aiohttp

from bot.demo.forge.payloads import Json
from bot.demo.forge.state import Hook, Repo, State

TIMEOUT: Final = 5.0
_REVIEWS: Final = ("pull_request_review_approved", "pull_request_review_rejected", "pull_request_review_comment")
_ISSUES: Final = ("issues", "issue_assign", "issue_label", "issue_milestone", "issue_comment")
_PULLS: Final = (
    "pull_request",
    "pull_request_assign",
    "pull_request_label",
    "pull_request_milestone",
    "pull_request_comment",
    "pull_request_sync",
    "pull_request_review_request",
)
_PLAIN: Final = ("create", "delete", "fork", "push", "repository", "release", "wiki", "package")
_COARSE: Final = {
    "pull_request_review_approved": "pull_request_approved",
    "pull_request_review_rejected": "pull_request_rejected",
    "pull_request_review_comment": "pull_request_comment",
    "pull_request_comment": "issue_comment",
    "issue_comment": "issue_comment",
}
_CGNAT: Final = ipaddress.ip_network("100.64.0.0/10")

Outcome = Literal["queued", "delivered", "failed", "refused", "dropped"]


@dataclass(slots=True)
class Delivery:
    """One delivery to one hook. `status` is the receiver's answer, `error` why there was none."""

    uuid: str
    hook: Hook = field(repr=False)
    event: str
    event_type: str
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    outcome: Outcome = "queued"
    status: int = 0
    error: str = ""
    seconds: float = 0.0

    @property
    def data(self) -> Json:
        """The payload as it was sent."""
        found: Json = json.loads(self.body)
        return found


def precise(names: list[str], *, old: bool) -> set[str]:
    """The precise events a subscription stands for; unknown names vanish, no name at all means push."""
    reviews = _REVIEWS if old else ("pull_request_review",)
    found: set[str] = set()
    for name in names:
        if name == "issues":
            found.update(_ISSUES)
        elif name == "issues_only":
            found.add("issues")
        elif name == "pull_request":
            found.update((*_PULLS, *reviews))
        elif name == "pull_request_only":
            found.add("pull_request")
        elif name == "pull_request_review":
            found.update(reviews)
        elif name in _ISSUES or name in _PULLS or name in _PLAIN or (not old and name in {"status", "workflow_job", "workflow_run"}):
            found.add(name)
    return found or {"push"}


def encode(payload: Json) -> bytes:
    """JSON as Go's MarshalIndent writes it: two blanks, UTF-8, and `<`, `>`, `&` escaped."""
    text = json.dumps(payload, indent=2, ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode()


def sign(hook: Hook, *, event_type: str, body: bytes, delivery: str, old: bool) -> dict[str, str]:
    """The headers of one delivery. Without a secret the signatures are sent empty, as Gitea does."""
    event = _COARSE.get(event_type) or ("issues" if event_type.startswith("issue") else "")
    event = event or ("pull_request" if event_type.startswith("pull_request") else event_type)
    sha256 = hmac.new(hook.secret.encode(), body, hashlib.sha256).hexdigest() if hook.secret else ""
    sha1 = hmac.new(hook.secret.encode(), body, hashlib.sha1).hexdigest() if hook.secret else ""
    headers = {"User-Agent": "Go-http-client/1.1", "Content-Type": "application/json"}
    for family in ("Gitea", "Gogs", "GitHub"):
        headers |= {f"X-{family}-Delivery": delivery, f"X-{family}-Event": event, f"X-{family}-Event-Type": event_type}
        if not old and family != "Gogs":
            headers[f"X-{family}-Hook-Installation-Target-Type"] = hook.level
    headers |= {"X-Gitea-Signature": sha256, "X-Gogs-Signature": sha256}
    headers |= {"X-Hub-Signature": f"sha1={sha1}", "X-Hub-Signature-256": f"sha256={sha256}"}
    if hook.authorization:
        headers["Authorization"] = hook.authorization
    return headers


async def _addresses(host: str) -> list[str]:
    if host == "localhost":
        return ["127.0.0.1"]
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return [str(address[4][0]) for address in found]


def host_allowed(host: str, addresses: list[str], rules: str) -> bool:
    """Whether ALLOWED_HOST_LIST lets a delivery go to a host that resolved to these addresses."""
    for rule in (part.strip().lower() for part in rules.split(",")):
        if rule == "*" or (rule and fnmatch.fnmatchcase(host.lower(), rule)):
            return True
        for text in addresses:
            ip = ipaddress.ip_address(text)
            shared = ip in _CGNAT if ip.version == _CGNAT.version else False
            private = (ip.is_private or shared) and not ip.is_loopback
            if (
                (rule == "loopback" and ip.is_loopback)
                or (rule == "private" and private)
                or (rule == "external" and not private and not ip.is_loopback)
            ):
                return True
            if "/" in rule and ip in ipaddress.ip_network(rule, strict=False):
                return True
    return False


class Hooks:
    """The delivery queue. Faults a test may switch on: `drop` loses deliveries, `copies` repeats each, `order` reverses what is waiting.

    One worker sends one after another, as `webhook_sender` does on a small machine; `workers` may be raised before start.
    """

    def __init__(self, state: State, *, allowed_hosts: str, delay: float) -> None:
        self.state = state
        self.allowed_hosts = allowed_hosts
        self.delay = delay
        self.drop = False
        self.drop_next = 0
        self.copies = 1
        self.order: Literal["fifo", "reverse", "random"] = "fifo"
        self.workers = 1
        self.timeout = TIMEOUT
        self.deliveries: list[Delivery] = []
        self._waiting: deque[Delivery] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._busy = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None

    # what is sent

    def of(self, repo: Repo) -> list[Hook]:
        """Every hook that a repository's events reach: its own, its owner's, the system's."""
        return [
            hook
            for hook in self.state.hooks.values()
            if hook.active
            and (
                (hook.level == "repository" and hook.owner == repo.id)
                or (hook.level in {"organization", "user"} and hook.owner == repo.owner_id)
                or hook.level == "system"
            )
        ]

    def wanted(self, repo: Repo, event_type: str, ref: str = "") -> list[Hook]:
        if self.state.old and event_type in {"status", "workflow_run", "workflow_job"}:
            return []
        name = "pull_request_review" if not self.state.old and event_type in _REVIEWS else event_type
        branch = ref.removeprefix("refs/heads/")
        return [
            hook
            for hook in self.of(repo)
            if name in hook.events and (not branch or not hook.branch_filter or fnmatch.fnmatchcase(branch, hook.branch_filter))
        ]

    def send(self, hook: Hook, event_type: str, body: bytes) -> None:
        """Queue one delivery, or lose it if the test said so."""
        for _ in range(self.copies):
            delivery = str(uuid.uuid4())
            headers = sign(hook, event_type=event_type, body=body, delivery=delivery, old=self.state.old)
            self._enqueue(
                Delivery(uuid=delivery, hook=hook, event=headers["X-Gitea-Event"], event_type=event_type, body=body, headers=headers)
            )

    def fire(self, repo: Repo, event_type: str, payload: Json, *, ref: str = "") -> None:
        hooks = self.wanted(repo, event_type, ref)
        if hooks:
            body = encode(payload)
            for hook in hooks:
                self.send(hook, event_type, body)

    def replay(self, delivery: Delivery) -> None:
        """The old body under a new UUID, as the button in Gitea's pages does. Never dropped, never copied."""
        fresh = str(uuid.uuid4())
        headers = sign(delivery.hook, event_type=delivery.event_type, body=delivery.body, delivery=fresh, old=self.state.old)
        self._enqueue(
            Delivery(
                uuid=fresh,
                hook=delivery.hook,
                event=delivery.event,
                event_type=delivery.event_type,
                body=delivery.body,
                headers=headers,
            ),
            sure=True,
        )

    def _enqueue(self, delivery: Delivery, *, sure: bool = False) -> None:
        self.deliveries.append(delivery)
        if not sure and (self.drop or self.drop_next > 0):
            self.drop_next = max(0, self.drop_next - 1)
            delivery.outcome = "dropped"
            return
        self._waiting.append(delivery)
        self._idle.clear()
        self._wake.set()

    # sending

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.timeout), skip_auto_headers=("Accept",))
        self._tasks = [asyncio.create_task(self._work(self._session)) for _ in range(self.workers)]

    async def stop(self) -> None:
        """What is on its way is lost, what waits is sent after the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._busy = 0
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def idle(self) -> None:
        """Wait until nothing is queued or on its way."""
        await self._idle.wait()

    async def _work(self, session: aiohttp.ClientSession) -> None:
        while True:
            while not self._waiting:
                if not self._busy:
                    self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            self._busy += 1
            try:
                if self.delay or self.order != "fifo":
                    # A moment for the burst to be complete, so that an order other than the acts' exists at all.
                    await asyncio.sleep(self.delay or 0.05)
                if not self._waiting:
                    continue
                if self.order == "random":
                    self._waiting.rotate(random.randrange(len(self._waiting)))  # noqa: S311
                await self._post(session, self._waiting.pop() if self.order == "reverse" else self._waiting.popleft())
            finally:
                self._busy -= 1

    async def _post(self, session: aiohttp.ClientSession, delivery: Delivery) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        parts = urlsplit(delivery.hook.url)
        host = parts.hostname or ""
        try:
            if not host_allowed(host, await _addresses(host), self.allowed_hosts):
                delivery.outcome = "refused"
                delivery.error = f"webhook can only call allowed HTTP servers (check your webhook.ALLOWED_HOST_LIST setting), deny '{host}'"
                return
            body, headers = delivery.body, dict(delivery.headers)
            if delivery.hook.content_type == "form":
                body, headers["Content-Type"] = urlencode({"payload": body}).encode(), "application/x-www-form-urlencoded"
            async with session.post(delivery.hook.url, data=body, headers=headers) as reply:
                await reply.read()
                delivery.status = reply.status
                delivery.outcome = "delivered" if 200 <= reply.status < 300 else "failed"  # noqa: PLR2004
        except asyncio.CancelledError:
            delivery.outcome, delivery.error = "failed", "the server was stopped"
            raise
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            delivery.outcome, delivery.error = "failed", f"{type(error).__name__}: {error}"
        finally:
            delivery.seconds = loop.time() - began
