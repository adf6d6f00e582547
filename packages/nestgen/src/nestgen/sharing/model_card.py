"""The model card of an exported hierarchy: README.md, with the metadata that the Hugging Face Hub reads at its top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestgen.sharing.names import CODEC

_SCORES = ("frechet_distance", "kid", "precision", "recall")


def model_card(config: Mapping[str, Any], scores: Mapping[str, dict[str, Any]]) -> str:
    """Markdown, from config.json and the score cards by name."""
    recipe = config["recipe"]
    parts = [
        _metadata(recipe),
        f"# {recipe['name']}\n\n{_summary(config)}",
        _levels(config),
        _usage(config),
        _training(config),
        _scores(scores),
        _limits(config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(recipe: Mapping[str, Any]) -> str:
    task = "text-to-image" if recipe.get("denoiser", {}).get("text") else "unconditional-image-generation"
    return f"---\nlibrary_name: nestgen\npipeline_tag: {task}\ntags:\n- nestgen\n- diffusion\n---"


def _side(config: Mapping[str, Any]) -> int:
    return int(config["codec"]["size"])


def _conditions(config: Mapping[str, Any]) -> str:
    options = config["recipe"].get("denoiser", {})
    classes, text = options.get("labels", 0), options.get("text")
    named = [f"one of {classes} classes"] * bool(classes) + ["a caption"] * bool(text)
    return " and ".join(named)


def _summary(config: Mapping[str, Any]) -> str:
    depth, side, given = len(config["levels"]), _side(config), _conditions(config)
    chain = " -> ".join(f"z_{level}" for level in reversed(range(depth)))
    images = f"Generates images of {side}x{side} pixels{f', given {given},' if given else ''}"
    if depth == 1:
        return f"{images} by one denoiser, of the image's own latent z_0: an ordinary latent diffusion model."
    return (
        f"{images} through a hierarchy of {depth} levels of latents: {chain} -> image. "
        "Each level has a denoiser of its own, conditioned on the level above it."
    )


def _levels(config: Mapping[str, Any]) -> str:
    rows = ["| level | latent | noise on it as a condition | denoiser | trained for |", "|---|---|---|---|---|"]
    for number, (entry, level) in enumerate(zip(config["levels"], config["recipe"]["levels"])):
        meta = entry["meta"]
        denoiser = f"U-ViT, width {meta['denoiser']['dim']}, {meta['denoiser']['depth'] + 1} blocks"
        sigma = str(level.get("sigma", 0.0)) if number else ""
        rows.append(f"| z_{number} | {entry['shape']} | {sigma} | {denoiser} | {meta['step']} steps |")
    encoder = config["data"].get("encoder", config["recipe"]["features"].get("encoder"))
    codec = config["codec"]["name"]
    decoded = "`z_0` is the image's pixels" if codec == "pixels" else f"`z_0` is decoded by a `{codec}`"
    above = f"; the levels above are features of the encoder `{encoder}`" if len(config["levels"]) > 1 else ""
    return "\n".join(["## Levels", "", *rows, "", f"{decoded}{above}."])


def _usage(config: Mapping[str, Any]) -> str:
    options = config["recipe"].get("denoiser", {})
    argument = 'prompt="a dog on a red sofa", ' if options.get("text") else "label=0, " if options.get("labels") else ""
    lines = [
        "## How to sample",
        "",
        "```sh",
        "nestgen sample --pretrained . --count 16 --out ../samples",
        "nestgen explore .",
        "```",
        "",
        "```python",
        "from nestgen import NestedPipeline",
        "",
        'pipe = NestedPipeline.from_pretrained(".")',
        f"images = pipe({argument}num_images=16, seed=0).images",
        "```",
        "",
        "Neither needs the training data or its features. Image i of a seed is the same on every machine, up to rounding.",
    ]
    codec = config["codec"]
    if codec.get("weights") not in (None, CODEC):
        lines += [
            "",
            f"The VAE is not in this folder: give its file, {codec['weights']}, with `--vae FILE` or `vae=FILE` "
            f"(SHA-256 {codec['weights_sha256']}).",
        ]
    return "\n".join(lines)


def _training(config: Mapping[str, Any]) -> str:
    data, meta = config["data"], config["levels"][0]["meta"]
    training, process = meta["training"], meta["process"]
    images = f"{data['rows']:,} images" if "rows" in data else "Images"
    source = f" of `{data['source']}`" if data.get("source") else ""
    flipped = ", and their mirror images" if data.get("views") == 2 else ""
    of_steps = f"over a window of {meta['ema_length']:g} of the steps" if "ema_length" in meta else ""
    averaged = of_steps or f"with a decay of {training['ema']:g}"
    optimizer = "Muon for the matrices within the blocks, AdamW for the rest" if training.get("muon") else "AdamW"
    return "\n".join(
        [
            "## Training",
            "",
            f"{images}{source}{flipped}. Batches of {training['batch']}, {optimizer} with a learning rate of "
            f"{training['lr']:g}, weights averaged {averaged}. Process `{process['kind']}`, predicting "
            f"`{process['prediction']}`. Everything else is in [config.json](config.json).",
        ]
    )


def _scores(scores: Mapping[str, dict[str, Any]]) -> str:
    if not scores:
        return "## Scores\n\nNone were given with this export."
    rows = ["| card | space | Fréchet distance | KID | precision | recall | samples |", "|---|---|---|---|---|---|---|"]
    for name, card in scores.items():
        for score in card["scores"]:
            numbers = " | ".join("" if score.get(key) is None else f"{score[key]:.3g}" for key in _SCORES)
            space = f"{score['space']}, {score['inception']}" if "inception" in score else score["space"]
            rows.append(f"| [{name}](scores/{name}.json) | {space} | {numbers} | {score['samples']:,} |")
    return "\n".join(["## Scores", "", *rows])


def _limits(config: Mapping[str, Any]) -> str:
    options, side = config["recipe"].get("denoiser", {}), _side(config)
    lines = [f"- It makes images of {side}x{side} pixels and of no other size."]
    if not options.get("text"):
        lines.append("- It takes no text.")
    if not options.get("labels"):
        lines.append("- It takes no classes.")
    lines += [
        "- It knows only what its training images show, with their biases. Nobody has checked it for any use but research.",
        "- It may repeat training images: `nestgen nearest` compares samples with them where the stores are at hand.",
    ]
    return "\n".join(["## What it cannot do", "", *lines])
