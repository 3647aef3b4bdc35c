"""A real PostgreSQL for tests: started once a session on a port of the system's choice, one fresh database a test; and the two back ends by name."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

BACKENDS = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
UNPRIVILEGED = ("postgres", "nobody")


@functools.cache
def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`, of the newest version there is."""
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return folders[-1].parent if folders else Path(found).resolve().parent if found else None


def user() -> str | None:
    """Whom the server runs as: PostgreSQL refuses to be root."""
    if os.getuid():
        return None
    for name in UNPRIVILEGED:
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    raise AssertionError("there is no unprivileged user to run PostgreSQL as")


class PostgresServer:
    """One cluster in a folder of its own; `start` and `stop` may be repeated, the port stays."""

    def __init__(self) -> None:
        folder = binaries()
        assert folder is not None
        self._bin = folder
        self._user = user()
        self._folder = Path(tempfile.mkdtemp(prefix="timmy-postgres-", dir="/var/tmp"))
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        command = [
            self._bin / "initdb",
            "-D",
            self._folder / "data",
            "-U",
            "timmy",
            "--auth=trust",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C",
        ]
        subprocess.run(command, check=True, capture_output=True, user=self._user, cwd="/")

    def start(self) -> None:
        options = ["-c", "fsync=off", "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=300"]
        with (self._folder / "log").open("ab") as out:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._folder / "data", "-p", str(self.port), *options],
                stdout=out, stderr=out, user=self._user, cwd="/",
            )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            else:
                return

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is a fast shutdown, SIGQUIT an immediate one."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(30)

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, name: str) -> str:
        return f"postgresql://timmy@127.0.0.1:{self.port}/{name}"

    def database(self) -> str:
        """The address of a new, empty database."""
        self._made += 1
        name = f"test_{os.getpid()}_{self._made}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)


def require() -> None:
    if binaries() is None:
        pytest.skip("there is no PostgreSQL server here (initdb is neither on PATH nor under /usr/lib/postgresql)")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The session's server; skips where there is none."""
    require()
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(params=BACKENDS)
def database(request: pytest.FixtureRequest, base: Path) -> str:
    """The address of a fresh database, on both back ends."""
    if request.param == "sqlite":
        return f"sqlite:///{base / 'timmy.db'}"
    return request.getfixturevalue("postgres_server").database()
