"""The one exception of an image that can't be used."""

from __future__ import annotations


class BadImage(Exception):
    """An image that can't be decoded, with the reason for the ledger."""
