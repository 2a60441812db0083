"""The error for a model of the hub that cannot be found or downloaded."""

from __future__ import annotations


class HubError(Exception):
    """There is no such model, the hub cannot be reached, or what came is not what was published."""
