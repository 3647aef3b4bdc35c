"""Webhook concerns, one a file; each module exposes `plugin`, a Router."""
