"""Where published weights come from, and the folder that keeps them.

A file whose SHA-256 is known is checked against it. Of the others the digest is written down beside the file when it is
first seen and compared whenever the file is used: a file that changes later is an error.
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from featurize.checkpoints.files import sha256_of
from featurize.errors import UserError
from featurize.io.files import atomic_write, cache_folder

PIECE = 1 << 20
TIMEOUT = 30  # seconds without a byte


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
    """Where the file of a place is kept, whether it is there or not."""
    return cache_folder() / remote.file


def find_weights(option: str | None, remote: RemoteFile | None, what: str, flag: str = "--weights") -> Path:
    """The weights file of `what`: the file the user names, else the one of its place, fetched when it is not there yet.

    Raises UserError when it is not there and can't be had, or is not the file it should be.
    """
    if option is not None:
        file = Path(option).expanduser()
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
    bring = f"bring that file from {remote.url} to {file}, or name it with {flag} FILE"
    with atomic_write(file) as temporary:
        digest = hashlib.sha256()
        try:
            with urllib.request.urlopen(remote.url, timeout=TIMEOUT) as answer, temporary.open("wb") as out:
                total = int(answer.headers.get("Content-Length") or 0)
                with tqdm(total=total or None, desc=f"fetching {remote.file}", unit="B", unit_scale=True) as progress:
                    while piece := answer.read(PIECE):
                        out.write(piece)
                        digest.update(piece)
                        progress.update(len(piece))
                size = out.tell()
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"The weights of {what} are not on this machine and can't be fetched ({reason}); {bring}."
            ) from None
        if total and size != total:
            raise UserError(
                f"{remote.url} was cut short after {size:,} of {total:,} bytes; run the same command again, or {bring}."
            )
        if remote.sha256 and digest.hexdigest() != remote.sha256:
            raise UserError(
                f"{remote.url} gave a file with the SHA-256 {digest.hexdigest()} instead of {remote.sha256}; it is not kept: "
                f"{bring}."
            )


def _check(remote: RemoteFile, file: Path, flag: str) -> None:
    found = sha256_of(file)
    record = file.with_name(f"{file.name}.sha256")
    if remote.sha256 is None and not record.is_file():
        with atomic_write(record) as temporary:
            temporary.write_text(f"{found}  {file.name}\n")
    expected = remote.sha256 or record.read_text().split()[0]
    if found != expected:
        raise UserError(
            f"{file} is not the file it should be (SHA-256 {found}, expected {expected}); remove it and its .sha256 to fetch it "
            f"again, or name another with {flag} FILE."
        )
