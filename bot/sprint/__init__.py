"""The choreography of one sprint: prepare, work, vet, publish, settle; each step claims first, looks before it creates, and passes when repeated."""

from __future__ import annotations

from bot.sprint._ends import Kit
from bot.sprint._settle import SprintStages

__all__ = ["Kit", "SprintStages"]
