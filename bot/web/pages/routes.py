"""The pages' HTTP side: reads on the reader threads, renders in a thread, a few at a time, behind headers that let nothing foreign act."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import structlog
from aiohttp import hdrs, web
from sqlalchemy.engine import Connection

from bot.chatops import Command
from bot.models import Decision, OutcomeKind, SprintId, SprintState, SprintView
from bot.replies import POLICY, Links
from bot.snapshot import Fault, FleetSnapshot, Health
from bot.store import Store, is_away, sprints, steps
from bot.store import pages as rows
from bot.web.pages import sight
from bot.web.pages.access import COOKIE, COOKIE_SECONDS, Gate, Viewer
from bot.web.pages.fresh import Fresh
from bot.web.pages.render import STATIC, Renderer

log = structlog.get_logger()

LISTED = 50
RECENT = 20
STEPS = 40
AT_ONCE = 2
WAITING_AT_MOST = 32
BOARD_SECONDS = 1.0
LISTENERS = 100
LOOK_SECONDS = 1.0
TICK_MS = 10_000
LISTEN_SECONDS = 600.0
SEND_SECONDS = 10.0
FORM_BYTES = 4_096
FORM_SECONDS = 5.0

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
    "Cache-Control": "no-store",
}

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pages:
    """`add_to(app)` mounts them. `fleet(conn)` reads the snapshot and judges it; `kept_patch(id)` reads the diff of a refused sprint, or None."""

    def __init__(
        self,
        store: Store,
        gate: Gate,
        *,
        links: Links,
        fleet: Callable[[Connection], tuple[FleetSnapshot, Health]],
        kept_patch: Callable[[str], str | None],
        scrub: Callable[[str], str],
        commands: Mapping[str, Command],
        trigger_label: str,
        bot: str,
        version: str,
        now_ms: Callable[[], int],
        listeners: int = LISTENERS,
    ) -> None:
        self._store = store
        self._gate = gate
        self._links = links
        self._fleet = fleet
        self._kept_patch = kept_patch
        self._commands = commands
        self._now_ms = now_ms
        self._most_listeners = listeners
        self._listeners = 0
        self._waiting = 0
        self._places = asyncio.Semaphore(AT_ONCE)
        self._ending = asyncio.Event()
        self._render = Renderer(scrub, links=links, has_login=gate.has_login, version=version, trigger_label=trigger_label, bot=bot)
        self._board: Fresh[str, tuple[FleetSnapshot, Health, rows.Board]] = Fresh(self._read_board, seconds=BOARD_SECONDS)
        self._revisions: Fresh[str, tuple[SprintState, str] | None] = Fresh(self._read_revision, seconds=LOOK_SECONDS)

    def add_to(self, app: web.Application) -> None:
        """Adds the routes to the application that also takes deliveries."""
        one = "/sprints/{id:[A-Za-z0-9_-]{1,64}}"
        for path, handler in (
            ("/", partial(self._fleet_page, whole=True)),
            ("/live", partial(self._fleet_page, whole=False)),
            ("/help", self._help_page),
            ("/login", self._login_page),
            (one, partial(self._sprint_page, whole=True)),
            (f"{one}/live", partial(self._sprint_page, whole=False)),
            (f"{one}/events", self._events),
            ("/static/{name}", self._static),
        ):
            app.router.add_get(path, self._guarded(handler))
        app.router.add_post("/login", self._guarded(self._log_in))
        app.router.add_post("/logout", self._guarded(self._log_out))
        app.on_shutdown.append(self._end)

    async def _end(self, _app: web.Application) -> None:
        self._ending.set()

    def _guarded(self, handler: Handler) -> Handler:
        """Every answer carries the headers, and no error shows its text."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                response = web.Response(status=error.status, text=f"{error.reason}\n")
            except _BusyError:
                response = web.Response(
                    status=503, text="Too many pages are being read at once. Please try again.\n", headers={"Retry-After": "2"}
                )
            except Exception as error:
                if is_away(error):
                    log.warning("pages.store_away", error=type(error).__name__)
                    response = web.Response(status=503, text="The store cannot be read at the moment.\n", headers={"Retry-After": "5"})
                else:
                    log.exception("pages.failed", path=request.path)
                    response = web.Response(status=500, text="This page could not be made; the log of the service tells more.\n")
            if not response.prepared:
                response.headers.update({name: value for name, value in HEADERS.items() if name not in response.headers})
            return response

        return handle

    async def _one_at_a_time(self, work: Callable[[], Awaitable[T]]) -> T:
        """AT_ONCE pages are read and rendered at once, so that they never take the readers and the processor from the work."""
        if self._waiting >= WAITING_AT_MOST:
            raise _BusyError
        self._waiting += 1
        try:
            async with self._places:
                return await work()
        finally:
            self._waiting -= 1

    async def _html(self, name: str, *, status: int = 200, **values: Any) -> web.Response:
        text = await self._one_at_a_time(lambda: asyncio.to_thread(self._render, name, now=self._now_ms(), **values))
        return web.Response(status=status, text=text, content_type="text/html")

    async def _read(self, fn: Callable[[Connection], T]) -> T:
        return await self._one_at_a_time(lambda: self._store.read(fn))

    # the fleet

    async def _read_board(self, _key: str) -> tuple[FleetSnapshot, Health, rows.Board]:
        return await self._read(lambda conn: (*self._fleet(conn), rows.board(conn, limit=LISTED, recent=RECENT, now_ms=self._now_ms())))

    async def _fleet_page(self, request: web.Request, *, whole: bool) -> web.Response:
        viewer = self._gate.viewer(request)
        snapshot, health, board = await self._board.get("")
        everything = [*board.running, *(view for _, view in board.queued), *board.recent]
        held = [*(pause.repo_id for pause in board.pauses), *(plan.repo_id for plan, _ in board.plans)]
        visible = await self._gate.open_to(viewer, [*(view.repo_id for view in everything), *held])
        running = [view for view in board.running if view.repo_id in visible]
        queued = [(place, view) for place, view in board.queued if view.repo_id in visible]
        recent = [view for view in board.recent if view.repo_id in visible]
        return await self._html(
            "fleet.html" if whole else "_fleet.html",
            root="./",
            viewer=viewer,
            snapshot=snapshot,
            verdict=health.verdict,
            reasons=[(code.replace("_", " "), detail) for code, detail in _reasons(health, viewer)],
            board=board,
            running=running,
            queued=queued,
            recent=recent,
            pauses=[pause for pause in board.pauses if pause.repo_id in visible],
            plans=[(plan, title) for plan, title in board.plans if plan.repo_id in visible],
            hidden_running=board.in_flight - len(running),
            hidden_queued=board.waiting - len(queued),
            hidden_recent=len(board.recent) - len(recent),
        )

    # a sprint

    async def _visible(self, request: web.Request) -> SprintView | None:
        """The sprint, or None where there is none for this viewer: nobody learns which of the two it is."""
        sprint_id = SprintId(request.match_info["id"])
        view = await self._read(lambda conn: sprints.get(conn, sprint_id))
        return view if view is not None and await self._gate.may_see(self._gate.viewer(request), view) else None

    async def _gone(self, request: web.Request) -> web.Response:
        return await self._html("gone.html", status=404, root="../", viewer=self._gate.viewer(request))

    async def _sprint_page(self, request: web.Request, *, whole: bool) -> web.Response:
        found = await self._visible(request)
        if found is None:
            return await self._gone(request)
        start = _number(request.query.get("from"))
        viewer = self._gate.viewer(request)
        siblings = bool(await self._gate.open_to(viewer, [found.repo_id]))
        data = await self._read(lambda conn: _sprint_data(conn, found, start, siblings=siblings))
        now = self._now_ms()
        view: SprintView = data["view"]
        transcript: rows.Transcript = data["transcript"]
        patch_wanted = view.outcome is OutcomeKind.REFUSED and view.reason == POLICY
        patch: str | None = await asyncio.to_thread(self._kept_patch, view.id) if patch_wanted else None
        newest = transcript.start + len(transcript.steps) >= transcript.total
        return await self._html(
            "sprint.html" if whole else "_sprint.html",
            root="../",
            viewer=viewer,
            **data,
            steps=sight.shown_steps(transcript, view),
            bars=sight.bars(view, data["used_ms"] + sight.since_last_call(transcript, view, now)),
            elapsed=sight.elapsed_ms(view, now),
            patch=sight.patch_lines(patch) if patch else [],
            patch_wanted=patch_wanted,
            query=f"?key={self._links.key(view.id)}" if viewer.key and self._links.key(view.id) else "",
            alive=view.state is not SprintState.SETTLED,
            newest=newest,
            follow=max(transcript.start, transcript.total - 1) if newest else transcript.total,
            earlier=max(0, transcript.start - STEPS) if transcript.start else None,
            later=None if newest else transcript.start + len(transcript.steps),
        )

    async def _read_revision(self, sprint_id: str) -> tuple[SprintState, str] | None:
        return await self._read(lambda conn: rows.revision(conn, sprint_id))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: `changed` whenever the page would show something else, `over` once at the end."""
        view = await self._visible(request)
        if view is None:
            raise web.HTTPNotFound
        if self._listeners >= self._most_listeners:
            return web.Response(status=503, text="Too many are listening; the page still loads.\n", headers={"Retry-After": "10"})
        self._listeners += 1
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        try:
            await response.prepare(request)
            await _send(response, "retry: 3000\n\n")
            await self._tell(response, view.id)
        except (ConnectionError, TimeoutError, _BusyError):
            log.debug("pages.listener_left", sprint=view.id)
        except Exception:
            # The answer has begun: all that is left is to end it; the browser asks again.
            log.exception("pages.events", sprint=view.id)
        finally:
            self._listeners -= 1
        return response

    async def _tell(self, response: web.StreamResponse, sprint_id: str) -> None:
        told = ""
        until = time.monotonic() + LISTEN_SECONDS
        while not self._ending.is_set() and time.monotonic() < until:
            found = await self._revisions.get(sprint_id)
            if found is None or found[0] is SprintState.SETTLED:
                await _send(response, "event: over\ndata: 1\n\n")
                return
            # Times on the page go on though nothing happens; it also shows whether the listener is still there.
            revision = f"{found[1]}-{self._now_ms() // TICK_MS}"
            if revision != told:
                await _send(response, f"event: changed\ndata: {revision}\n\n")
                told = revision
            try:
                await asyncio.wait_for(self._ending.wait(), LOOK_SECONDS)
            except TimeoutError:
                continue

    # the rest

    async def _help_page(self, request: web.Request) -> web.Response:
        shown = [(name, command) for name, command in sorted(self._commands.items()) if not command.hidden]
        return await self._html("help.html", root="./", viewer=self._gate.viewer(request), commands=shown)

    async def _login_page(self, request: web.Request) -> web.Response:
        return await self._login(request)

    async def _login(self, request: web.Request, *, status: int = 200, problem: str = "") -> web.Response:
        if not self._gate.has_login:
            raise web.HTTPNotFound
        return await self._html("login.html", status=status, root="./", viewer=self._gate.viewer(request), problem=problem)

    async def _log_in(self, request: web.Request) -> web.Response:
        token = await _form_field(request, "token")
        cookie = self._gate.log_in(token, now=time.monotonic())
        if cookie is None:
            return await self._login(request, status=429, problem="Too many wrong tokens. Please wait a minute.")
        if not cookie:
            return await self._login(request, status=403, problem="That is not the access token.")
        response = web.Response(status=303, headers={hdrs.LOCATION: "./"})
        response.set_cookie(COOKIE, cookie, max_age=COOKIE_SECONDS, **self._cookie_place())
        return response

    async def _log_out(self, _request: web.Request) -> web.Response:
        response = web.Response(status=303, headers={hdrs.LOCATION: "./"})
        response.del_cookie(COOKIE, **self._cookie_place())
        return response

    def _cookie_place(self) -> dict[str, Any]:
        address = urlsplit(self._links.pages)
        return {"path": address.path or "/", "httponly": True, "samesite": "Lax", "secure": address.scheme == "https"}

    async def _static(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in STATIC:
            raise web.HTTPNotFound
        # Its address carries a digest of it, so that a new version is another address.
        caching = {"Cache-Control": "public, max-age=86400"}
        return web.Response(body=self._render.static[name], content_type=STATIC[name], charset="utf-8", headers=caching)


class _BusyError(Exception):
    """More pages wait than are worth waiting for."""


def _sprint_data(conn: Connection, view: SprintView, start: int | None, *, siblings: bool) -> dict[str, Any]:
    """All rows of one sprint's page, in one transaction."""
    view = sprints.get(conn, view.id) or view
    trail: list[Decision] = rows.trail(conn, view)
    return {
        "view": view,
        "position": sprints.position(conn, view.id) if view.state is SprintState.QUEUED else None,
        "transcript": rows.transcript(conn, view.id, start=start, limit=STEPS),
        "used_ms": steps.used_ms(conn, view.id),
        "trail": trail,
        "summary": rows.summary(conn, view.id),
        "siblings": rows.siblings(conn, view) if siblings else [],
    }


_OF_THE_MACHINE = frozenset(
    {Fault.SANDBOX_UNPROVEN, Fault.PROBE_FAILING, Fault.AGENT_DOWN, Fault.MODEL_DRIFT, Fault.TOKEN_EXPIRED, Fault.GITEA_ERRORS}
)


def _reasons(health: Health, viewer: Viewer) -> list[tuple[str, str]]:
    """The verdict's reasons; what a stranger could learn of the machine from them is left to who holds the token."""
    return [
        (reason.code, "the operator has been told" if reason.code in _OF_THE_MACHINE and not viewer.trusted else reason.detail)
        for reason in health.reasons
    ]


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 7 else None  # noqa: PLR2004 - more steps no sprint has


async def _send(response: web.StreamResponse, text: str) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await response.write(text.encode())


async def _form_field(request: web.Request, name: str) -> str:
    """One field of a small form; raises HTTPRequestEntityTooLarge and HTTPRequestTimeout."""
    body = b""
    try:
        async with asyncio.timeout(FORM_SECONDS):
            async for part in request.content.iter_any():
                body += part
                if len(body) > FORM_BYTES:
                    raise web.HTTPRequestEntityTooLarge(max_size=FORM_BYTES, actual_size=len(body))
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    return parse_qs(body.decode("utf-8", "replace")).get(name, [""])[0]
