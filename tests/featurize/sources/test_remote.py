"""Pictures far away: S3 (a server in this process) and HTTP, read by ranges, and what goes wrong there in one sentence."""

from __future__ import annotations

import functools
import http.server
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import webdataset

from featurize.errors import UserError
from featurize.io import addresses
from featurize.io.home import cache_folder
from featurize.sources import list_images, read, read_in_order
from tests.featurize.conftest import random_picture


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "DEADLINE", 0.5)
    monkeypatch.setattr(addresses, "FIRST_WAIT", 0.01)


def noise(index: int) -> bytes:
    """A PNG file of some 35 kB: more than a window of the reader."""
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (108, 108, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def large_shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shards of twelve noisy pictures each, with labels and captions."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"s-{number}.tar")) as writer:
            for index in range(12 * number, 12 * number + 12):
                writer.write({"__key__": f"{index:03d}", "cls": index, "png": noise(index), "txt": f"caption {index}"})
    return [folder / "s-0.tar", folder / "s-1.tar"]


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that knows ranges, notes what is asked for, and fails a few times if told to."""

    asked: ClassVar[list[tuple[str, int]]] = []
    failing = 0

    def end_headers(self) -> None:
        self.send_header("ETag", f'"{self.path}"')
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        if type(self).failing:
            type(self).failing -= 1
            self.send_error(503)
            return
        data = path.read_bytes()
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:  # type: ignore[attr-defined]
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last or len(data)) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        type(self).asked.append((self.path, len(part)))
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def web(large_shards: list[Path]) -> Iterator[Callable[[bool], str]]:
    """Starts a web server over the large shards, with ranges or without; gives its address."""
    servers = []

    def start(ranges: bool) -> str:
        handler = functools.partial(Ranges, directory=str(large_shards[0].parent))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.ranges = ranges  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        Ranges.asked.clear()
        Ranges.failing = 0
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def same_but_for_places(far: tuple, near: tuple) -> None:
    assert [(p.key, p.offset, p.size, p.label, p.captions) for p in far] == [
        (p.key, p.offset, p.size, p.label, p.captions) for p in near
    ]
    assert [read(p) for p in far] == [read(p) for p in near]


def test_shards_on_s3_are_the_same_as_here(bucket: str, large_shards: list[Path]) -> None:
    system = fsspec.filesystem("s3")
    for shard in large_shards:
        system.put_file(str(shard), f"{bucket}/data/{shard.name}")
    near = list_images(f"wds:{large_shards[0].parent}/s-{{0..1}}.tar", "train", None).images
    far = list_images(f"wds:{bucket}/data/s-{{0..1}}.tar", "train", None).images
    assert far[0].source == f"{bucket}/data/s-0.tar"
    same_but_for_places(far, near)
    for pattern in ("s-*.tar", ""):
        assert list_images(f"wds:{bucket}/data/{pattern}", "train", None).images == far
    # Other content of the same length is another version.
    system.pipe_file(f"{bucket}/data/s-0.tar", large_shards[0].read_bytes().replace(b"caption 0", b"caption 1"))
    again = list_images(f"wds:{bucket}/data/s-*.tar", "train", None).images
    assert again[0].captions == ("caption 1",)
    assert again[0].version != far[0].version
    assert again[-1] == far[-1]


def test_only_headers_and_annotations_are_fetched_for_a_listing(
    web: Callable[[bool], str], large_shards: list[Path]
) -> None:
    address = web(True)
    far = list_images(f"wds:{address}/s-{{0..1}}.tar", "train", None).images
    fetched = sum(size for _, size in Ranges.asked)
    assert fetched < 0.6 * sum(shard.stat().st_size for shard in large_shards)
    assert max(size for _, size in Ranges.asked) <= addresses.WINDOW + 1024
    Ranges.asked.clear()
    assert list_images(f"wds:{address}/s-{{0..1}}.tar", "train", None).images == far
    assert not Ranges.asked  # what was found is kept: only the versions are asked for
    for kept in (cache_folder() / "shards").iterdir():
        kept.write_bytes(b"damaged")
    assert list_images(f"wds:{address}/s-{{0..1}}.tar", "train", None).images == far
    Ranges.asked.clear()
    assert read(far[3]) == noise(3)
    assert Ranges.asked == [("/s-0.tar", far[3].size)]
    same_but_for_places(far, list_images(f"wds:{large_shards[0].parent}", "train", None).images)


def test_a_server_that_hiccups_is_asked_again_and_one_that_fails_is_named(
    web: Callable[[bool], str], large_shards: list[Path]
) -> None:
    address = web(True)
    (picture, *_) = list_images(f"wds:{address}/s-0.tar", "train", 1).images
    Ranges.failing = 2
    assert read(picture) == noise(0)
    Ranges.failing = 1_000_000
    with pytest.raises(
        UserError, match=r"s-0\.tar can't be read .*503.* tried [1-9]\d* times in 0\.5 s; .* it goes on"
    ):
        read(picture)
    assert Ranges.failing <= 1_000_000 - 3


def test_a_server_without_ranges_is_named(web: Callable[[bool], str]) -> None:
    with pytest.raises(UserError, match="range"):
        list_images(f"wds:{web(False)}/s-0.tar", "train", None)


def test_a_far_shard_that_is_not_there_or_cut_is_named(
    web: Callable[[bool], str], bucket: str, large_shards: list[Path]
) -> None:
    for address in (web(True), bucket):
        with pytest.raises(UserError, match=r"nothing\.tar is not there"):
            list_images(f"wds:{address}/nothing.tar", "train", None)
    fsspec.filesystem("s3").pipe_file(f"{bucket}/cut.tar", large_shards[0].read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut\.tar ends early"):
        list_images(f"wds:{bucket}/cut.tar", "train", None)
    with pytest.raises(UserError, match="No shard is named like"):
        list_images(f"wds:{bucket}/x*.tar", "train", None)


def test_folders_imagenet_and_coco_on_s3(bucket: str, tmp_path: Path) -> None:
    from tests.featurize.sources.test_sources import coco

    system = fsspec.filesystem("s3")
    for wnid in ("n01440764", "n01443537"):
        (tmp_path / "imagenet" / "val" / wnid).mkdir(parents=True)
        for number in range(2):
            random_picture(number).save(tmp_path / "imagenet" / "val" / wnid / f"{number}.JPEG", format="JPEG")
    (tmp_path / "flat").mkdir()
    for name in ("b.png", "a.png", "a-2.png"):
        random_picture(1).save(tmp_path / "flat" / name)
    (tmp_path / "flat" / "captions.csv").write_text("file_name,caption\na.png,one\na-2.png,two\n")
    coco(tmp_path / "coco", "train2014")
    system.put(str(tmp_path), f"{bucket}/all", recursive=True)
    root = next(name for name in system.find(bucket) if name.endswith("captions.csv")).removesuffix(
        "/flat/captions.csv"
    )
    for kind, place, split in (("imagenet", "imagenet", "val"), ("folder", "flat", "train"), ("coco", "coco", "train")):
        far = list_images(f"{kind}:s3://{root}/{place}", split, None)
        near = list_images(f"{kind}:{tmp_path}/{place}", split, None)
        there = [number for number, picture in enumerate(near.images) if picture.size]
        same_but_for_places(tuple(far.images[n] for n in there), tuple(near.images[n] for n in there))
        assert [p.key for p in far.images] == [p.key for p in near.images]
        assert len(far.remarks) == len(near.remarks)
    with pytest.raises(FileNotFoundError):
        read(list_images(f"coco:s3://{root}/coco", "train", None).images[1])
    with pytest.raises(UserError, match="is not there; check the path of SOURCE"):
        list_images(f"folder:s3://{root}/nowhere", "train", None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*arguments: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", without)
    for protocol, package in (("s3", "s3fs"), ("https", "aiohttp"), ("gcs", "gcsfs")):
        addresses._file_system_of.cache_clear()
        with pytest.raises(UserError, match=f"run `pip install {package}`"):
            list_images(f"wds:{protocol}://bucket/a.tar", "train", None)
    addresses._file_system_of.cache_clear()


def test_a_network_that_fails_during_extraction_is_not_taken_for_a_changed_picture(web: Callable[[bool], str]) -> None:
    from hashlib import sha256

    from featurize.extraction.loader import load_crops_of
    from featurize.extraction.reading import readers
    from featurize.images.crop import SQUARE, InputSpec

    (picture, *_) = list_images(f"wds:{web(True)}/s-0.tar", "train", 1).images
    how, digest = (SQUARE, (InputSpec(16, "bicubic"),), "ignore"), sha256(noise(0)).hexdigest()

    def load(digest: str) -> np.ndarray:
        [reader] = readers([picture], [True])
        [crop], _, _ = load_crops_of(picture, reader, digest, *how)
        return crop

    assert load(digest).shape == (16, 16, 3)
    Ranges.failing = 1_000_000
    with pytest.raises(UserError, match="run the same command again, it goes on"):
        load(digest)
    Ranges.failing = 0
    with pytest.raises(UserError, match="has changed since the ledger was made"):
        load("0" * 64)


def test_pictures_side_by_side_are_fetched_by_one_request(web: Callable[[bool], str], large_shards: list[Path]) -> None:
    images = list_images(f"wds:{web(True)}/s-{{0..1}}.tar", "train", None).images
    Ranges.asked.clear()
    chosen = [
        images[index] for index in (0, 1, 2, 4, 5, 9, 13, 12)
    ]  # a refused one, others that are further away, and back
    assert [reader() for reader in read_in_order(chosen)] == [noise(index) for index in (0, 1, 2, 4, 5, 9, 13, 12)]
    fetched = {name: [size for path, size in Ranges.asked if path == name] for name in ("/s-0.tar", "/s-1.tar")}
    # A picture has 35 kB, so that one may be read over and three may not. Nothing is read backwards.
    assert [len(sizes) for sizes in fetched.values()] == [2, 2]
    assert sum(fetched["/s-1.tar"]) == images[12].size + images[13].size
    Ranges.asked.clear()
    assert [reader() for reader in read_in_order(images)] == [noise(index) for index in range(24)]
    assert len(Ranges.asked) == 2
