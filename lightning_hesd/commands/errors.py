"""Errors that end a command with one line."""

from __future__ import annotations


class CommandError(Exception):
    """The command cannot do what the user asked for; the message says why."""


def missing_dependency(error: ModuleNotFoundError) -> str:
    """Return the message about an optional dependency that is not installed."""
    return f"lightning-hesd: error: {error.name} is not installed; pip install 'lightning-hesd[cli]'"
