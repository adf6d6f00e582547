"""Draws one image's way through a hierarchy, from noise to image, as docs/figures/hierarchy.svg.

    python docs/figures/hierarchy.py [NAME] [--image N]     # NAME: an exported folder or a hierarchy that ships with nestgen

Each level's map is a sampled one, coloured by its first three channels.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import click
import numpy as np
from PIL import Image

from nestgen import NestedPipeline

OUT = Path(__file__).with_name("hierarchy.svg")
SIDE, GAP, TOP = 132, 74, 62  # pixels of a map, between maps, above them
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #222; text-anchor: middle; }
.small { font-size: 13px; fill: #555; }
.line { stroke: #555; stroke-width: 1.6; fill: none; marker-end: url(#head); }
.dashed { stroke-dasharray: 5 4; }
.head { fill: #555; }
.box { fill: none; stroke: #999; rx: 6; }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e4e4; } .small { fill: #aaa; } .line { stroke: #aaa; } .head { fill: #aaa; }
}
"""


@click.command()
@click.argument("name", default="scenes")
@click.option("--image", default=4, show_default=True, help="Number of the image in the recipe's seed.")
def main(name: str, image: int) -> None:
    """Samples an image of NAME and draws its levels."""
    pipe = NestedPipeline.from_pretrained(name, device="cpu")
    sample = pipe(indices=[image], progress=False)
    levels = sorted(sample.latents, reverse=True)
    latents = [sample.latents[level][0].numpy() for level in levels]
    shapes = ["x".join(map(str, (*z_CHW.shape[1:], z_CHW.shape[0]))) for z_CHW in latents]
    OUT.write_text(drawing(levels, shapes, list(map(colours, latents)), np.asarray(sample.images[0])), encoding="utf-8")
    click.echo(OUT)


def colours(z_CHW: np.ndarray) -> np.ndarray:
    """The first three channels of a map as uint8 (H, W, 3)."""
    return (127.5 + 55 * z_CHW[:3].transpose(1, 2, 0)).clip(0, 255).astype(np.uint8)


def drawing(levels: list[int], shapes: list[str], maps: list[np.ndarray], image: np.ndarray) -> str:
    """The SVG: above, generating from the top level down; below, how the maps of training images are made."""
    columns = [*maps, image]
    width = GAP + len(columns) * (SIDE + GAP) - GAP + 10
    height = TOP + SIDE + 178
    lefts = [GAP + number * (SIDE + GAP) for number in range(len(columns))]
    middle, bottom = TOP + SIDE / 2, TOP + SIDE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Generating: one denoiser for each level, from noise at the top down to the image. Storing: a frozen encoder "
        "and a VAE make the levels of training images, once.</title>",
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
        '<path class="head" d="M0 0 10 5 0 10z"/></marker>',
        f'<text x="{lefts[0]}" y="22" style="text-anchor: start; font-weight: 600">Generating: a denoiser for each level</text>',
    ]
    for number, (level, shape, left) in enumerate(zip(levels, shapes, lefts)):
        parts += [
            _image(maps[number], left),
            _text(left + SIDE / 2, TOP - 10, f"z_{level}"),
            _text(left + SIDE / 2, bottom + 20, shape, "small"),
            _line(f"M{left - GAP + 8} {middle}H{left - 6}"),
            _text(left - GAP / 2, middle - 10, f"D_{level}"),
        ]
    parts += [
        _text(lefts[0] - GAP / 2, middle + 24, "noise", "small"),
        _image(image, lefts[-1]),
        _text(lefts[-1] + SIDE / 2, TOP - 10, "image"),
        _line(f"M{lefts[-1] - GAP + 8} {middle}H{lefts[-1] - 6}"),
        _text(lefts[-1] - GAP / 2, middle - 10, "VAE"),
        _text(lefts[-1] - GAP / 2, middle + 24, "decodes", "small"),
    ]
    # Storing: from the image back to every map.
    level_y, base = bottom + 34, bottom + 96
    parts += [_line(f"M{lefts[-1] + SIDE / 2} {bottom + 14}V{base}H{lefts[-2] + SIDE / 2}V{level_y}", "dashed")]
    encoder_x, feature_y = lefts[-1] + SIDE / 2, base + 38
    parts += [
        f'<path class="line dashed" style="marker-end: none" d="M{encoder_x} {base}V{feature_y}H{lefts[0] + SIDE / 2}"/>',
        _text((lefts[-1] + lefts[-2] + SIDE) / 2, base - 8, "VAE encodes", "small"),
        _text((lefts[-1] + lefts[-3] + SIDE) / 2, feature_y - 9, "frozen encoder, SVD, pooled, standardised", "small"),
    ]
    parts += [_line(f"M{left + SIDE / 2} {feature_y}V{level_y}", "dashed") for left in lefts[:-2]]
    text = "Storing: the levels of training images, made once"
    parts.append(f'<text x="{lefts[0]}" y="{height - 10}" style="text-anchor: start; font-weight: 600">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _image(pixels: np.ndarray, left: int) -> str:
    """Pixels enlarged without smoothing."""
    factor = max(1, SIDE // len(pixels))
    enlarged = Image.fromarray(np.repeat(np.repeat(pixels, factor, 0), factor, 1))
    file = io.BytesIO()
    enlarged.save(file, format="PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    place = f'x="{left}" y="{TOP}" width="{SIDE}" height="{SIDE}"'
    return f'<image {place} href="data:image/png;base64,{data}"/><rect class="box" {place}/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{text}</text>'


def _line(path: str, kind: str = "") -> str:
    return f'<path class="line {kind}" d="{path}"/>'


if __name__ == "__main__":
    main()
