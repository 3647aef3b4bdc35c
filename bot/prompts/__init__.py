"""Prompt texts, read as package data by `bot/prompt.py`."""
