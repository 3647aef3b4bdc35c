"""Pages made for people: the fleet, a sprint's transcript, help. They only read, and show nothing that has not passed the redactor."""

from __future__ import annotations

from bot.web.pages.access import Gate, Openness
from bot.web.pages.routes import Pages

__all__ = ["Gate", "Openness", "Pages"]
