"""Where published weights come from, and the folder that keeps them.

A file whose SHA-256 is known is checked against it. Of the others the digest is written down beside the file when it is
first seen and compared whenever the file is used: a file that changes later is an error. Most of them lie on plain web
servers; huggingface_hub fetches from the Hub alone, and pooch neither goes on with half a file nor keeps two processes apart.
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path

from tqdm import tqdm

from featurize.checkpoints.files import sha256_of
from featurize.errors import UserError
from featurize.io.files import atomic_write, to_disk
from featurize.io.home import cache_folder, expand_home

PIECE = 1 << 20
TIMEOUT = 30  # seconds without a byte
BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


@dataclass(frozen=True)
class RemoteFile:
    """The official address of a file, the name it is kept under, and its SHA-256 where that is known."""

    url: str
    file: str
    sha256: str | None = None


_FACEBOOK = "https://dl.fbaipublicfiles.com"
_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_HUB = "https://huggingface.co"
_CLIP_B16 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
_CLIP_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_CLIP_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"

# OpenAI's addresses contain the digest. Those of sd-vae-ft-mse and taesd are the Hub's, as many who pin these revisions have it.
PUBLISHED = {
    "mocov3-vit_base": RemoteFile(f"{_FACEBOOK}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar", "mocov3-vit-b-300ep.pth.tar"),
    "mocov3-vit_small": RemoteFile(f"{_FACEBOOK}/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar", "mocov3-vit-s-300ep.pth.tar"),
    "clip-vit_b16": RemoteFile(f"{_OPENAI}/{_CLIP_B16}/ViT-B-16.pt", "clip-ViT-B-16.pt", _CLIP_B16),
    "clip-vit_b32": RemoteFile(f"{_OPENAI}/{_CLIP_B32}/ViT-B-32.pt", "clip-ViT-B-32.pt", _CLIP_B32),
    "clip-vit_l14": RemoteFile(f"{_OPENAI}/{_CLIP_L14}/ViT-L-14.pt", "clip-ViT-L-14.pt", _CLIP_L14),
    "dino-vitb16": RemoteFile(f"{_FACEBOOK}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "dino-vitb16.pth"),
    "dino-vitb8": RemoteFile(f"{_FACEBOOK}/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", "dino-vitb8.pth"),
    "dino-vits16": RemoteFile(f"{_FACEBOOK}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", "dino-vits16.pth"),
    "dino-vits8": RemoteFile(f"{_FACEBOOK}/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", "dino-vits8.pth"),
    "dinov2-vits14_reg": RemoteFile(
        f"{_FACEBOOK}/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth", "dinov2-vits14_reg4.pth"
    ),
    "dinov2-vitb14_reg": RemoteFile(
        f"{_FACEBOOK}/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", "dinov2-vitb14_reg4.pth"
    ),
    "dinov2-vitl14_reg": RemoteFile(
        f"{_FACEBOOK}/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth", "dinov2-vitl14_reg4.pth"
    ),
    "sd-vae-ft-mse": RemoteFile(
        f"{_HUB}/stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493/diffusion_pytorch_model.safetensors",
        "sd-vae-ft-mse.safetensors",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "sd-vae-ft-ema": RemoteFile(
        f"{_HUB}/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors", "sd-vae-ft-ema.safetensors"
    ),
    "sd-v1": RemoteFile(
        f"{_HUB}/CompVis/stable-diffusion-v1-4/resolve/main/vae/diffusion_pytorch_model.safetensors",
        "sd-v1-vae.safetensors",
    ),
    "taesd": RemoteFile(
        f"{_HUB}/madebyollin/taesd/resolve/614f76814bbe30edbe2e627ace1c2234c81a2c0e/diffusion_pytorch_model.safetensors",
        "taesd.safetensors",
        "db169d69145ec4ff064e49d99c95fa05d3eb04ee453de35824a6d0f325513549",
    ),
}  # fmt: skip


def cached_path(remote: RemoteFile) -> Path:
    """Where this machine keeps the file, whether it has been fetched or not."""
    return cache_folder() / remote.file


def find_weights(option: str | None, remote: RemoteFile | None, what: str, flag: str = "--weights") -> Path:
    """The weights file of `what`: the file the user names, else the published one, fetched when it is not here yet.

    Raises UserError when there is no such file, it can't be fetched, or it is not the file it should be.
    """
    if option is not None:
        file = expand_home(option)
        if not file.is_file():
            raise UserError(f"The weights {file} of {what} are not there; check {flag}.")
        return file
    if remote is None:
        raise UserError(f"{what} needs its weights, and no address is known for them: {flag} FILE.")
    file = cached_path(remote)
    if not file.is_file():
        _fetch(remote, file, what, flag)
    _check(remote, file, flag)
    return file


def _fetch(remote: RemoteFile, file: Path, what: str, flag: str) -> None:
    """Bring the file; of several processes one does, and the others wait for it."""
    from filelock import FileLock

    by_hand = f"copy that file from {remote.url} to {file}, or name it with {flag} FILE"
    lock = file.with_name(f".{file.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock).acquire()
    except OSError as error:
        raise UserError(
            f"The weights of {what} are not on this machine, and {file.parent}, where they would be kept, can't be written "
            f"({error.strerror}); set FEATURIZE_CACHE to another folder, or name the file with {flag} FILE."
        ) from None
    with held:
        try:
            if file.is_file():
                return
            try:
                part = _download(remote, file)
            except BROKEN as error:
                reason = getattr(error, "reason", None) or error
                raise UserError(
                    f"The weights of {what} are not on this machine and can't be fetched ({reason}); {by_hand}."
                ) from None
            except _CutShortError as error:
                raise UserError(
                    f"{remote.url} was cut short after {error.size:,} of {error.total:,} bytes; run the same command again, or "
                    f"{by_hand}."
                ) from None
            if remote.sha256 and (digest := sha256_of(part)) != remote.sha256:
                part.unlink()
                raise UserError(
                    f"{remote.url} gave a file with the SHA-256 {digest} instead of {remote.sha256}; it is not kept: {by_hand}."
                )
            to_disk(part)
            part.replace(file)
            for stale in file.parent.glob(f".{file.name}.*.part"):  # of other versions
                stale.unlink()
        finally:
            lock.unlink(missing_ok=True)


class _CutShortError(Exception):
    def __init__(self, size: int, total: int) -> None:
        self.size, self.total = size, total


def _download(remote: RemoteFile, file: Path) -> Path:
    """The whole content as a file beside `file`.

    Where the server serves ranges, a connection that breaks is opened again for the rest, as long as each brings some of it;
    what has come by then is kept for the next command. Raises one of BROKEN or _CutShortError.
    """
    answer = urllib.request.urlopen(remote.url, timeout=TIMEOUT)
    total = int(answer.headers.get("Content-Length") or 0)
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    resumable = answer.headers.get("Accept-Ranges") == "bytes" and bool(version) and total > 0
    # Half of another version is not continued: its name is another one.
    part = file.with_name(f".{file.name}.{hashlib.sha256(f'{version} {total}'.encode()).hexdigest()[:12]}.part")
    size = part.stat().st_size if resumable and part.is_file() else 0
    try:
        with tqdm(total=total or None, desc=f"fetching {remote.file}", unit="B", unit_scale=True) as progress:
            while True:
                if size:
                    answer.close()
                    answer, size = _open_rest(remote.url, version, size)
                progress.n = before = size
                error = None
                with answer, part.open("ab" if size else "wb") as out:
                    try:
                        while piece := answer.read(PIECE):
                            out.write(piece)
                            progress.update(len(piece))
                    except BROKEN as broken:
                        error = broken
                    size = out.tell()
                if error is None and size >= total:
                    return part
                if not resumable or size <= before:
                    raise error or _CutShortError(size, total)
    except BaseException:
        if not resumable:
            part.unlink(missing_ok=True)
        raise


def _open_rest(url: str, version: str, size: int) -> tuple[HTTPResponse, int]:
    """(the answer, the offset at which it starts): 0 where the server sends the whole, because it has another version."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-", "If-Range": version})
    with suppress(urllib.error.HTTPError):  # nothing is left to send, for one
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
        return answer, size if answer.status == http.client.PARTIAL_CONTENT else 0
    return urllib.request.urlopen(url, timeout=TIMEOUT), 0


def _check(remote: RemoteFile, file: Path, flag: str) -> None:
    found = sha256_of(file)
    record = file.with_name(f"{file.name}.sha256")
    if remote.sha256 is None and not record.is_file():
        with suppress(OSError), atomic_write(record) as temporary:  # a shared cache may be read-only
            temporary.write_text(f"{found}  {file.name}\n")
        return
    expected = remote.sha256 or record.read_text().split()[0]
    if found != expected:
        raise UserError(
            f"{file} is not the file it should be (SHA-256 {found}, expected {expected}); remove it and its .sha256 to fetch it "
            f"again, or name another with {flag} FILE."
        )
