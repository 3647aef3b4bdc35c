"""The embedded Gitea-compatible forge; `ForgeServer` is all that the rest of the project needs."""

from __future__ import annotations

from bot.demo.forge.acts import RefusedError
from bot.demo.forge.hooks import Delivery
from bot.demo.forge.server import ForgeServer

__all__ = ["Delivery", "ForgeServer", "RefusedError"]
