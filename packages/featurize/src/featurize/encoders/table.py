"""The table of `featurize encoders`; no network is built for it."""

from __future__ import annotations

from featurize.checkpoints.downloads import PLACES, Place, kept_at
from featurize.codecs.vae import PUBLISHED
from featurize.encoders import Variant, kinds
from featurize.io.files import cache_folder

COLUMNS = ("encoder", "layer", "norm", "official crop", "input", "output", "weights")


def table() -> str:
    """One line an encoder, then where weights are kept and which codecs and text encoder have theirs there."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for name, kind in kinds().items():
        for variant, known in kind.variants.items():
            lines.append(_line(f"{name}:{variant}" if variant else name, known))
        if kind.any_variant:
            lines.append(
                (f"{name}:{kind.any_variant}", "last feature map", "the model's own", "the model's own", "its own", "its own",
                 "by name, or --weights"),
            )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    others = {f"vae:SIDE with {name}": PLACES[name] for name in PUBLISHED}
    others |= {"taesd:SIDE": PLACES["taesd"], "text clip": PLACES["clip-vit_l14"]}
    text += ["", f"Weights are kept in {cache_folder()} (FEATURIZE_CACHE changes that). Codecs and text:"]
    text += [f"  {name}: {_whereabouts(place)}" for name, place in others.items()]
    return "\n".join(text)


def _line(name: str, known: Variant) -> tuple[str, ...]:
    crop = f"{known.resize} {known.interpolation}, centre {known.input_size}" if known.resize else "none"
    output = "x".join(map(str, known.output))
    if known.place is not None:
        weights = _whereabouts(known.place)
    else:
        weights = {"tiny": "in the package", "vae": "as the codec vae's", "pixels": "none"}.get(
            name.partition(":")[0], "bring them: --weights FILE"
        )
    return name, known.layer, known.norm, crop, f"{known.input_size} px", output, weights


def _whereabouts(place: Place) -> str:
    return f"here ({place.file})" if kept_at(place).is_file() else f"not here; from {place.url}"
