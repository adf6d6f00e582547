"""The one exception a user sees."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and how to fix it."""


class LostProcess(UserError):
    """Another process of the same training ended; what it printed says why."""


def interrupt_of(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C behind an error; None where there is none.

    Where it comes while a class is being made, Python raises RuntimeError from it.
    """
    link: BaseException | None = error
    while link is not None and not isinstance(link, KeyboardInterrupt):
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return link
