"""One run at a time on a store root in a bucket, which has no locks: an object names the holder, who renews it while alive."""

from __future__ import annotations

import json
import logging
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread, main_thread
from typing import Any

from featurize.errors import UserError
from featurize.io.addresses import with_retries

log = logging.getLogger(__name__)

RENEWAL = 10.0  # seconds from one sign of life to the next
SILENCE = 60.0  # seconds without one after which the holder counts as dead
POLL = 1.0  # seconds between two looks at it

Mark = dict[str, Any]


def acquire(path: Path, about: Mark) -> Callable[[], None] | None:
    """What releases the lock; None when a living run holds it. `about` are facts on this run for whoever reads the object.

    The owner is a random token, since hosts and process numbers repeat in containers. A holder is watched by this machine's own
    clock, so that clocks need not agree: one that gives no sign for SILENCE seconds is dead, and its lock is taken over. What
    releases raises UserError if the lock was taken from this run, which was interrupted when it noticed.
    """
    mark = about | {"token": secrets.token_hex(16)}
    while True:
        holder = read_mark(path)  # first: some stores with S3's interface overwrite what `_create` is to leave alone
        if holder is None:
            if _create(path, _renewed(mark)):
                break
            continue  # another run was quicker
        if "token" not in holder:
            return None  # of an earlier version, which gives no signs
        later = _watch(path, holder)
        if later is None:
            continue
        if later != holder or not _take_over(path, holder, mark):
            return None
        log.info("%s was held by a run that gave no sign of life for %d s; taken over.", path.parent, SILENCE)
        break
    return _keep(path, mark)


def read_mark(path: Path) -> Mark | None:
    """What the object says of the holder; None where there is none, {} where it can't be understood.

    Raises UserError where it can't be read for a minute.
    """
    return with_retries(str(path), lambda: _read_once(path))


def _read_once(path: Path) -> Mark | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _renewed(mark: Mark) -> Mark:
    # The number, and not the time alone: two signs of one second must differ.
    return mark | {"sign": secrets.token_hex(4), "alive": datetime.now(UTC).isoformat(timespec="seconds")}


def _create(path: Path, mark: Mark) -> bool:
    """Whether the object could be made, where there was none."""
    try:
        path.fs.pipe_file(path.path, json.dumps(mark).encode(), mode="create")  # type: ignore[attr-defined]
    except FileExistsError:
        return False
    return True


def _watch(path: Path, holder: Mark) -> Mark | None:
    """The object as soon as it changes, or as it is after SILENCE seconds."""
    log.info("%s has a lock; looking for up to %d s whether its holder is alive.", path.parent, SILENCE)
    end = time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(POLL)
        if (now := read_mark(path)) != holder:
            return now
    return holder


def _take_over(path: Path, holder: Mark, mark: Mark) -> bool:
    """Whether the lock of a dead holder became this run's.

    Of several runs that found it dead, the one that makes the claim goes on. One that comes when the claim is removed again
    finds the successor's token in the lock.
    """
    claim = path.with_name(f"{path.name}-after-{holder['token']}")
    if not _create(claim, mark):
        return False
    try:
        if read_mark(path) != holder:
            return False
        path.write_bytes(json.dumps(_renewed(mark)).encode())
        return True
    finally:
        claim.unlink(missing_ok=True)


def _keep(path: Path, mark: Mark) -> Callable[[], None]:
    """Renew the object in a thread until what is returned is called."""
    ended, lost = Event(), Event()

    def renew() -> None:
        while not ended.wait(RENEWAL):
            with suppress(Exception):  # each file system has exceptions of its own; the next renewal may succeed
                found = _read_once(path)
                if found is None:
                    # Somebody removed it, and nobody holds the root: this run still does. If another one is quicker, its
                    # token is found next time.
                    _create(path, _renewed(mark))
                elif found.get("token", mark["token"]) == mark["token"]:  # one without a token is no other run's
                    path.write_bytes(json.dumps(_renewed(mark)).encode())
                else:
                    lost.set()
                    signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
                    return

    thread = Thread(target=renew, name="lock renewal", daemon=True)
    thread.start()

    def release() -> None:
        ended.set()
        thread.join()
        if lost.is_set():
            raise UserError(
                f"Another run has taken over {path.parent}, since this one gave no sign of life for {SILENCE:.0f} s; what is "
                "written is kept. Let the other one end, then run the same command again."
            )
        if (read_mark(path) or {}).get("token") == mark["token"]:
            path.unlink(missing_ok=True)

    return release
