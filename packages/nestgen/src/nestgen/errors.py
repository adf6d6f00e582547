"""The one exception a user sees."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and how to fix it."""


class LostProcess(UserError):
    """Another process of the same training ended; what it printed says why."""
