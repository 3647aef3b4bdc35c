"""Floor of B1: a bare aiohttp handler that checks the signature and makes one durable insert into SQLite (WAL, synchronous=FULL) before it answers 202."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiohttp import web


def main() -> None:
    """Reads its facts from standard input and serves until it is ended."""
    facts = json.load(sys.stdin)
    database = sqlite3.connect(Path(facts["folder"]) / "floor.db", check_same_thread=False, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE deliveries (hash TEXT PRIMARY KEY, event TEXT, body BLOB, at INTEGER)")
    writer = ThreadPoolExecutor(1)
    secret = facts["secret"].encode()

    def insert(digest: str, event: str, body: bytes) -> None:
        database.execute("INSERT OR IGNORE INTO deliveries VALUES (?, ?, ?, ?)", (digest, event, body, time.time_ns()))

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()
        good = hmac.new(secret, body, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(good, request.headers.get("X-Gitea-Signature", "")):
            return web.Response(status=401)
        event = request.headers.get("X-Gitea-Event-Type", "")
        digest = hashlib.sha256(event.encode() + b"\0" + body).hexdigest()
        await asyncio.get_running_loop().run_in_executor(writer, insert, digest, event, body)
        return web.Response(status=202)

    app = web.Application(client_max_size=2**24)
    app.router.add_post("/webhook", receive)
    web.run_app(app, host="127.0.0.1", port=facts["port"], access_log=None, print=lambda *_: None)


main()
