"""The public listener: the webhook, and beside it the pages, or where there are none a word to whoever looks in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from bot import __version__
from bot.web.pages import Pages

HEADER_BYTES = 16_384


def build(webhook: Callable[[web.Request], Awaitable[web.StreamResponse]], pages: Pages | None = None) -> web.Application:
    """The application; its own body limit is off because intake and pages have theirs."""
    app = web.Application(client_max_size=0)
    app.router.add_post("/webhook", webhook)
    if pages is None:
        app.router.add_get("/", _root)
    else:
        pages.add_to(app)
    return app


async def _root(_request: web.Request) -> web.Response:
    return web.Response(text=f"timmy-dispatch {__version__}: Gitea posts its deliveries to /webhook.\n")
