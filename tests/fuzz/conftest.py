"""How hypothesis runs here: the same examples each time, and no clock."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=150)
settings.load_profile("repeatable")
