"""Captions and prompts through CLIP's text tower: `text/77x768.zarr` and its offsets (docs/store-format.md)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from featurize.checkpoints.clip import ACTIVATIONS, activation_layer, prove_activation, read_clip
from featurize.checkpoints.downloads import PLACES, find_weights
from featurize.checkpoints.files import fit, sha256_of, sidecar
from featurize.errors import UserError
from featurize.execution.engine import Run, device_of_worker
from featurize.io.files import atomic_write
from featurize.recipe import Features
from featurize.store.ledger import Ledger, captions_digest
from featurize.store.store import FORMAT, ArraySpec, is_sealed, prepare, rows_of, seal, write_block

log = logging.getLogger(__name__)

BLOCK_ROWS = 512  # 60 MB of 77x768 float16
BATCH = 32  # captions a forward pass: fixed and padded, so that no setting changes a rounding
PLACE = PLACES["clip-vit_l14"]
WHAT, FLAG = "the text encoder clip", "--text-weights"
NETWORK = {
    "context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12, "activation": "quick_gelu",
}  # fmt: skip


@dataclass(frozen=True)
class TextSpec:
    """Which text encoder a user asked for; small enough to send to any worker."""

    name: str
    weights: str | None = None


@dataclass(frozen=True)
class TextCard:
    """A text encoder without its network: its file, its tokens and width, and everything that decides its values."""

    weights: Path
    network: dict[str, Any]
    identity: dict[str, Any]

    @property
    def tokens(self) -> int:
        return int(self.network["context_length"])

    @property
    def width(self) -> int:
        return int(self.network["width"])


@dataclass(frozen=True)
class TextEncoder:
    """A loaded text encoder: `encode` takes captions and gives their hidden states (B, tokens, width) float32."""

    card: TextCard
    encode: Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class TextTask:
    """One block of text rows."""

    path: Path
    block: int
    captions: tuple[str, ...]
    encoder: TextSpec


def text_card(spec: TextSpec) -> TextCard:
    """What is known of a text encoder before its network is built.

    A JSON beside the weights may describe another, smaller tower (`model_args`: width, heads, layers...). Raises UserError
    for weights that are missing and for a description that no tower has.
    """
    weights = find_weights(spec.weights, PLACE, WHAT, FLAG)
    changes = sidecar(weights).get("model_args") or {}
    if changes.keys() - NETWORK.keys():
        raise UserError(
            f"{weights.with_suffix('.json')} describes what no text tower has: {min(changes.keys() - NETWORK.keys())}."
        )
    network: dict[str, Any] = {**NETWORK, **changes}
    if network["activation"] not in ACTIVATIONS:
        raise UserError(f"{WHAT} has no activation '{network['activation']}'; known are {', '.join(ACTIVATIONS)}.")
    identity = {
        "name": spec.name,
        "network": network,
        "weights_sha256": sha256_of(weights),
        "layer": "last",
        "norm": "final layer norm",
        "projection": False,
        "padding": "end of text",
    }
    return TextCard(weights, network, identity)


@lru_cache(maxsize=1)
def load_text_encoder(spec: TextSpec, device: str) -> TextEncoder:
    """`clip`: the text tower of CLIP ViT-L/14, whose last hidden states after the final layer norm condition Stable
    Diffusion and U-ViT (transformers' `CLIPTextModel`). Raises UserError for weights that are missing or don't fit."""
    from open_clip.transformer import LayerNorm, TextTransformer

    card = text_card(spec)
    network = card.network
    file = read_clip(card.weights)
    prove_activation(file, network["activation"], card.weights, WHAT)
    model = TextTransformer(
        context_length=network["context_length"],
        vocab_size=network["vocab_size"],
        width=network["width"],
        heads=network["heads"],
        layers=network["layers"],
        output_dim=None,  # the projection comes after what is wanted
        act_layer=activation_layer(network["activation"]),
        norm_layer=LayerNorm,
    )
    state = {key: value for key, value in file.text.items() if key != "text_projection"}
    fit(model, state, card.weights, f"{FLAG} names a CLIP with a text tower of 12 layers and 768 channels (ViT-L/14)")
    model.eval().requires_grad_(False).to(device)

    def encode(captions: Sequence[str]) -> np.ndarray:
        ids_BT = torch.tensor([token_ids(caption, card.tokens) for caption in captions], device=device)
        with torch.inference_mode():
            x_BTD = model.token_embedding(ids_BT) + model.positional_embedding
            x_BTD = model.ln_final(model.transformer(x_BTD, attn_mask=model.attn_mask))
        return x_BTD.float().cpu().numpy()

    return TextEncoder(card, encode)


@cache
def _tokenizer() -> Any:
    """CLIP's byte-pair encoding, whose vocabulary ships with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def text_spec(features: Features) -> TextSpec:
    """The text encoder that a recipe or the command line asks for."""
    return TextSpec(str(features.text), features.text_weights)


def token_ids(caption: str, tokens: int) -> list[int]:
    """Start of text, the caption's tokens (cut to fit), end of text, and end of text again up to `tokens`.

    The padding is transformers', on which U-ViT trained. open_clip's own pads with 0, which gives other hidden states after
    the caption's end, and the denoiser sees those too.
    """
    tokenizer = _tokenizer()
    ids = tokenizer.encode(caption)[: tokens - 2]
    return [tokenizer.sot_token_id, *ids, *[tokenizer.eot_token_id] * (tokens - 1 - len(ids))]


def seen_part(caption: str, tokens: int) -> str | None:
    """The part that is seen of a caption with too many tokens, None when all of it is."""
    ids = _tokenizer().encode(caption)
    return _tokenizer().decode(ids[: tokens - 2]).strip() if len(ids) > tokens - 2 else None


def embed_captions(root: Path, ledger: Ledger, spec: TextSpec, run: Run) -> list[Path]:
    """Embed every caption of a root's ledger, or what is left of it; the paths of the two sealed arrays."""
    captions, offsets = captions_of(ledger)
    if not captions:
        raise UserError(f"None of the pictures of {root} has a caption; leave --text out.")
    path = _embed(root / "text", captions, ledger.keys_sha256, spec, run)
    block_rows = min(len(offsets), 1 << 16)
    array = ArraySpec(
        root / "text" / "offsets.zarr", "offsets", offsets.shape, "int64", block_rows, ledger.keys_sha256,
        {"captions_sha256": captions_digest(captions), "offsets_sha256": hashlib.sha256(offsets.tobytes()).hexdigest()}, {},
    )  # fmt: skip
    for block in prepare(array):
        rows = rows_of(block, block_rows, len(offsets))
        write_block(array.path, block, offsets[rows.start : rows.stop])
    if not is_sealed(array.path):
        seal(array)
    return [path, array.path]


def captions_of(ledger: Ledger) -> tuple[list[str], np.ndarray]:
    """All captions, row by row, and the offsets (rows + 1,) int64 that tie the text rows to them."""
    by_row = ledger.table["captions"].to_pylist()
    offsets = 1 + np.concatenate([[0], np.cumsum([len(own) for own in by_row])]).astype(np.int64)
    return [caption for own in by_row for caption in own], offsets


def embed_prompts(prompts: Path, out: Path, spec: TextSpec, run: Run) -> Path:
    """Embed a file of prompts, one a line, into `out`; the path of the sealed array.

    Raises UserError for a file that is empty or not UTF-8, and for a folder that holds other prompts.
    """
    try:
        lines = prompts.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"The prompts {prompts} are not UTF-8 text (byte {error.start}); save the file as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"The prompts {prompts} can't be read ({error.strerror}); check --prompts.") from None
    if not lines:
        raise UserError(f"The file {prompts} holds no prompt; write one a line.")
    tokens = text_card(spec).tokens
    keys = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    path = _embed(out / "text", lines, keys, spec, run)
    table = pa.table(
        {
            "row": pa.array(range(1, len(lines) + 1), pa.int64()),
            "prompt": pa.array(lines, pa.string()),
            "truncated": pa.array([seen_part(line, tokens) is not None for line in lines], pa.bool_()),
        }
    )
    with atomic_write(out / "prompts.parquet") as temporary:
        pq.write_table(table.replace_schema_metadata({"format": FORMAT, "keys_sha256": keys}), temporary)
    return path


def _embed(folder: Path, captions: list[str], keys_sha256: str, spec: TextSpec, run: Run) -> Path:
    """The array of the empty caption and of these, sealed."""
    card = text_card(spec)
    texts = ["", *captions]
    array = ArraySpec(
        path=folder / f"{card.tokens}x{card.width}.zarr",
        kind="text",
        shape=(len(texts), card.tokens, card.width),
        dtype="float16",
        block_rows=BLOCK_ROWS,
        keys_sha256=keys_sha256,
        provenance={
            "encoder": card.identity,
            "captions_sha256": captions_digest(captions),
            "keys_sha256": keys_sha256,
            "dtype": "float16",
        },
        attributes={"views": 1, "null_row": 0, "options": {"text": spec.name, "text_weights": spec.weights}},
    )
    todo = prepare(array)
    if todo:
        _warn_of_cuts(captions, card.tokens)
    tasks = text_tasks(array.path, texts, todo, spec)
    with tqdm(total=len(texts), desc="embedding captions", unit=" captions", smoothing=0.1) as progress:
        progress.update(len(texts) - sum(len(task.captions) for task in tasks))
        for _, count in run(write_text_block, tasks):
            progress.update(count)
    if not is_sealed(array.path):
        seal(array)
    return array.path


def text_tasks(path: Path, texts: Sequence[str], blocks: Sequence[int], spec: TextSpec) -> list[TextTask]:
    """The tasks that write some blocks; `texts` are the empty caption and all others."""
    return [
        TextTask(path, block, tuple(texts[row] for row in rows_of(block, BLOCK_ROWS, len(texts))), spec)
        for block in blocks
    ]


def write_text_block(task: TextTask) -> int:
    """Embed and write the task's block; its number of captions."""
    encoder = load_text_encoder(task.encoder, device_of_worker())
    parts = []
    for start in range(0, len(task.captions), BATCH):
        batch = task.captions[start : start + BATCH]
        parts.append(encoder.encode([*batch, *[""] * (BATCH - len(batch))])[: len(batch)])
    write_block(task.path, task.block, np.concatenate(parts))
    return len(task.captions)


def _warn_of_cuts(captions: list[str], tokens: int) -> None:
    cuts = [
        (number, seen) for number, caption in enumerate(captions, 1) if (seen := seen_part(caption, tokens)) is not None
    ]
    if cuts:
        number, seen = cuts[0]
        log.warning(
            "%d of %d captions have more than %d tokens and are cut; the first is number %d, which ends for the encoder "
            "with '...%s'.", len(cuts), len(captions), tokens, number, seen[-40:],
        )  # fmt: skip
