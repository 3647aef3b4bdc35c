"""The same world with the bot as a process of its own, to be killed and started again."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from world import World, free_port, until
from zygote import Forked, zygote

from bot.store import Store

ROOT = Path(__file__).resolve().parents[1]


class ServedWorld(World):
    """`serve()` starts `timmy-dispatch serve`; the store is read beside it, as the command line does.

    It is forked from a process that made the imports, unless `extra_environ` is given: then it is started as an operator does.
    """

    process: asyncio.subprocess.Process | Forked | None = None
    _store: Store | None = None
    extra_environ: dict[str, str] | None = None

    def write_config(self, **more: Any) -> Path:
        folder = self.state_dir.parent / "config"
        folder.mkdir(exist_ok=True)
        for name, secret in (("token", self.timmy.token), ("secret", self.stage.webhook_secret)):
            path = folder / name
            path.write_text(secret.reveal())
            path.chmod(0o600)
        data = self.settings(**more).model_dump(mode="json", exclude_defaults=True)
        data["forge"]["token_file"] = "token"
        data["webhook"]["secret_files"] = ["secret"]
        data["metrics"] = {"listen": f"127.0.0.1:{free_port()}"}
        path = folder / "dispatch.yml"
        path.write_text(json.dumps(data))
        path.chmod(0o600)
        return path

    async def serve(self, *, failpoint: str = "", **more: Any) -> asyncio.subprocess.Process | Forked:
        config = self.write_config(**more)
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.state_dir.parent),
            "PYTHONPATH": str(ROOT),
            "TIMMY_DISPATCH_FAILPOINT": failpoint,
            **(self.extra_environ or {}),
        }
        output = self.state_dir.parent / "serve.log"
        if self.extra_environ is None:
            self.process = zygote().fork(["--config", str(config), "serve"], environ=environ, output=output)
            return self.process
        with output.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "bot", "--config", str(config), "serve", cwd=ROOT, env=environ, stdout=out, stderr=out
            )
        return self.process

    async def listening(self, seconds: float = 30.0) -> None:
        async def open_port():
            assert self.process is not None
            if self.process.returncode is not None:
                raise AssertionError(f"serve ended with {self.process.returncode}: {self.log()[-3000:]}")
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return False
            writer.close()
            await writer.wait_closed()
            return True

        await until(open_port, seconds)

    async def stop_process(self) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        if process.returncode is None:
            process.terminate()
        return await asyncio.wait_for(process.wait(), 20)

    def log(self) -> str:
        return (self.state_dir.parent / "serve.log").read_text()

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = Store(self.settings().database_url())
            self._store.open()
        return self._store

    async def stop(self) -> None:
        await self.stop_process()
        if self._store is not None:
            self._store.close()
            self._store = None
