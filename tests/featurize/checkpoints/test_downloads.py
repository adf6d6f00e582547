"""Weights by name: fetched once, checked always, never half there."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from featurize.checkpoints import downloads
from featurize.checkpoints.downloads import PUBLISHED, RemoteFile, cached_path, find_weights
from featurize.errors import UserError

CONTENT = bytes(range(256)) * 9000


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Serves CONTENT at /good, the first half of it under the whole's length at /short."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/missing":
                self.send_error(404)
                return
            self.send_response(200)
            if self.path != "/unsized":
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/short" else CONTENT)

        def log_message(self, *_: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


class Ranges(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges, at most LIMIT bytes at a time from `/cut` and none at all from `/stop` after the first."""

    LIMIT = len(CONTENT) // 3 + 1
    etag = '"first"'
    requests: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.requests.append((self.path, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if self.headers.get("If-Range", self.etag) != self.etag:
            wanted, start = None, 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", self.etag)
        self.end_headers()
        limit = len(CONTENT) if self.path == "/whole" else self.LIMIT if not wanted or self.path == "/cut" else 0
        self.wfile.write(CONTENT[start : start + limit])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def ranges() -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    Ranges.requests.clear()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATURIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


@pytest.mark.parametrize("path", ["good", "unsized"])
def test_a_file_is_fetched_once_and_its_digest_written_down(
    server: str, cache: Path, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    place = RemoteFile(f"{server}/{path}", "w.pth")
    file = find_weights(None, place, "the encoder")
    assert file == cache / "w.pth" == cached_path(place)
    assert file.read_bytes() == CONTENT
    assert "fetching w.pth" in capfd.readouterr().err
    assert (cache / "w.pth.sha256").read_text().split() == [hashlib.sha256(CONTENT).hexdigest(), "w.pth"]
    nowhere = RemoteFile("http://127.0.0.1:9/gone", "w.pth")
    assert find_weights(None, nowhere, "the encoder") == file  # nothing is asked for again


def test_a_file_that_changes_later_is_an_error(server: str, cache: Path) -> None:
    place = RemoteFile(f"{server}/good", "w.pth")
    file = find_weights(None, place, "the encoder")
    file.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(UserError, match=r"is not the file it should be \(SHA-256 .* remove it and its .sha256"):
        find_weights(None, place, "the encoder")


def test_a_wrong_digest_is_not_kept(server: str, cache: Path) -> None:
    with pytest.raises(UserError, match=f"instead of {'0' * 64}; it is not kept: copy that file"):
        find_weights(None, RemoteFile(f"{server}/good", "w.pth", "0" * 64), "the encoder")
    assert left(cache) == []
    right = hashlib.sha256(CONTENT).hexdigest()
    find_weights(None, RemoteFile(f"{server}/good", "w.pth", right), "the encoder")
    assert left(cache) == ["w.pth"]
    # A pinned file that somebody brought is checked like a fetched one.
    (cache / "w.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match=f"expected {right}"):
        find_weights(None, RemoteFile(f"{server}/good", "w.pth", right), "the encoder")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("short", "was cut short after"), ("missing", "can't be fetched (Not Found)")],
)
def test_what_goes_wrong_on_the_way_leaves_nothing(server: str, cache: Path, path: str, sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        find_weights(None, RemoteFile(f"{server}/{path}", "w.pth"), "the encoder")
    assert sentence in str(raised.value)
    assert f"to {cache / 'w.pth'}, or name it with --weights FILE" in str(raised.value)
    assert left(cache) == []


def test_a_connection_that_breaks_is_opened_again_for_the_rest(ranges: str, cache: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    file = find_weights(None, RemoteFile(f"{ranges}/cut", "w.pth", digest), "the encoder")
    assert file.read_bytes() == CONTENT
    limit = Ranges.LIMIT
    assert [wanted for _, wanted in Ranges.requests] == [None, f"bytes={limit}-", f"bytes={2 * limit}-"]
    assert left(cache) == ["w.pth"]


def test_what_has_come_is_kept_for_the_next_command_unless_the_file_changes(
    ranges: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(UserError, match=r"was cut short after .* run the same command again"):
        find_weights(None, RemoteFile(f"{ranges}/stop", "w.pth", digest), "the encoder")
    (part,) = left(cache)
    assert part.endswith(".part") and (cache / part).stat().st_size == Ranges.LIMIT
    Ranges.requests.clear()
    assert find_weights(None, RemoteFile(f"{ranges}/whole", "w.pth", digest), "the encoder").read_bytes() == CONTENT
    assert [wanted for _, wanted in Ranges.requests] == [None, f"bytes={Ranges.LIMIT}-"]
    assert left(cache) == ["w.pth"]

    (cache / "w.pth").unlink()
    with pytest.raises(UserError, match="was cut short"):
        find_weights(None, RemoteFile(f"{ranges}/stop", "w.pth", digest), "the encoder")
    monkeypatch.setattr(Ranges, "etag", '"second"')
    Ranges.requests.clear()
    find_weights(None, RemoteFile(f"{ranges}/whole", "w.pth", digest), "the encoder")
    assert [wanted for _, wanted in Ranges.requests] == [None]
    assert left(cache) == ["w.pth"]


def test_several_processes_fetch_a_file_once(ranges: str) -> None:
    remote = RemoteFile(f"{ranges}/whole", "w.pth")
    with ThreadPoolExecutor(6) as pool:
        found = {pool.submit(find_weights, None, remote, "the encoder") for _ in range(6)}
    assert {future.result().read_bytes() for future in found} == {CONTENT}
    assert len(Ranges.requests) == 1


def test_offline_the_error_says_what_to_bring_where(featurize, cache: Path) -> None:  # type: ignore[no-untyped-def]
    outcome = featurize("check-encoder", "mocov3")
    assert outcome.code == 1
    place = PUBLISHED["mocov3-vit_base"]
    assert f"copy that file from {place.url} to {cache / place.file}, or name it with --weights FILE" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    outcome = featurize("embed-text", "--prompts", __file__, "--out", cache)
    assert f"to {cache / 'clip-ViT-L-14.pt'}, or name it with --text-weights FILE" in outcome.err


def test_a_file_that_is_named_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"x")
    assert find_weights(str(tmp_path / "mine"), None, "the encoder") == tmp_path / "mine"
    with pytest.raises(UserError, match=r"/nowhere of the encoder are not there; check --weights"):
        find_weights("/nowhere", PUBLISHED["clip-vit_b16"], "the encoder")


def test_openais_addresses_hold_the_digest_that_is_pinned() -> None:
    for place in PUBLISHED.values():
        assert place.url.startswith("https://")
        assert place.sha256 is None or len(place.sha256) == 64
        if "openaipublic" in place.url:
            assert place.sha256 == place.url.split("/")[-2]
    assert len({place.file for place in PUBLISHED.values()}) == len(PUBLISHED)


def test_a_cache_that_is_read_only_is_used_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that somebody filled for all: the digest can't be written down beside the file."""
    cache.mkdir()
    (cache / "w.pth").write_bytes(CONTENT)

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(downloads, "atomic_write", refuse)
    place = RemoteFile("http://127.0.0.1:9/gone", "w.pth")
    assert find_weights(None, place, "the encoder") == cache / "w.pth"
    assert left(cache) == ["w.pth"]
    (cache / "w.pth.sha256").write_text(f"{'0' * 64}  w.pth\n")
    with pytest.raises(UserError, match="is not the file it should be"):
        find_weights(None, place, "the encoder")


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FEATURIZE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        UserError, match=r"file/cache, where .* can't be written \(Not a directory\); set FEATURIZE_CACHE"
    ):
        find_weights(None, RemoteFile(f"{server}/good", "w.pth"), "the encoder")
