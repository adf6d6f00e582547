"""The table of `featurize encoders`; no network is built for it."""

from __future__ import annotations

from featurize.checkpoints.autoencoder_kl import NAMES
from featurize.checkpoints.downloads import PUBLISHED, RemoteFile, cached_path
from featurize.encoders.encoder import Kind, Variant
from featurize.encoders.registry import kinds
from featurize.io.home import cache_folder

COLUMNS = ("encoder", "layer", "norm", "official crop", "input", "output", "weights")


def table() -> str:
    """One line per encoder, then the folder of fetched weights, and those of codecs and the text encoder."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for name, kind in kinds().items():
        for variant, published in kind.variants.items():
            lines.append(_line(f"{name}:{variant}" if variant else name, published, kind))
        if kind.any_variant:
            lines.append(
                (f"{name}:{kind.any_variant}", "last feature map", "the model's own", "the model's own", "its own", "its own",
                 "by name, or --weights"),
            )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    others = {f"vae:SIDE with {name}": PUBLISHED[name] for name in NAMES}
    others |= {"taesd:SIDE": PUBLISHED["taesd"], "text clip": PUBLISHED["clip-vit_l14"]}
    text += ["", f"Weights are kept in {cache_folder()} (FEATURIZE_CACHE changes that). Codecs and text:"]
    text += [f"  {name}: {_whereabouts(file)}" for name, file in others.items()]
    return "\n".join(text)


def _line(name: str, variant: Variant, kind: Kind) -> tuple[str, ...]:
    rule = variant.crop_of(variant.input_size)
    crop = f"{rule.resize} {rule.interpolation or variant.interpolation}, centre {rule.centre}" if rule else "none"
    output = "x".join(map(str, variant.output))
    weights = _whereabouts(variant.published) if variant.published else kind.weights
    return name, variant.layer, variant.norm, crop, f"{variant.input_size} px", output, weights


def _whereabouts(file: RemoteFile) -> str:
    return f"here ({file.file})" if cached_path(file).is_file() else f"not here; from {file.url}"
