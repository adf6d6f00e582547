"""Weights of an `AutoencoderKL`, Stable Diffusion's above all: found by name, described from their header, loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurize.checkpoints.downloads import PUBLISHED, find_weights
from featurize.checkpoints.files import fit, read_description, read_state_dict
from featurize.checkpoints.headers import tensor_names
from featurize.errors import UserError
from featurize.io.home import expand_home

if TYPE_CHECKING:
    from featurize.checkpoints.files import State

EMBEDDED = ("tiny", "scenes")  # as weights: the small VAEs in the package (docs/tiny.md)
NAMES = ("sd-v1", "sd-vae-ft-ema", "sd-vae-ft-mse")  # as weights: fetched by name; the first is the default
SD_SCALE = 0.18215  # the latent scale that Stable Diffusion's VAE comes with, and U-ViT's on ImageNet

# Stable Diffusion's autoencoder, for files that come without a config.json.
SD_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": SD_SCALE,
}
# diffusers' own first name of an attention's layers, still that of the published files.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class AutoencoderFile:
    """An AutoencoderKL that is not loaded: its file, its configuration, and how the file names its tensors: `diffusers` or
    `original`."""

    path: Path
    config: dict[str, Any]
    layout: str

    @property
    def factor(self) -> int:
        """Pixels a side for one of the latent's cells."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def width(self) -> int:
        """Channels of the encoder's middle block."""
        return int(self.config["block_out_channels"][-1])

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return int(self.config["latent_channels"])


def describe_autoencoder(weights: str | None, flag: str) -> AutoencoderFile:
    """The file that `weights` names, without loading it. A config.json beside it describes it; else it is Stable Diffusion's.

    `weights` is a published name, `tiny`, a folder in diffusers' layout, or a file: diffusers', or CompVis' original
    (`autoencoder_kl.pth`). Raises UserError for a file that is not there or is damaged.
    """
    path = _find(weights, flag)
    described = read_description(path.with_name("config.json"))
    config = {key: value for key, value in described.items() if not key.startswith("_")} or SD_CONFIG
    for key in ("block_out_channels", "latent_channels"):
        if key not in config:
            raise UserError(f"{path.with_name('config.json')} does not give {key}; take the VAE's own config.json.")
    names = {name.removeprefix("first_stage_model.") for name in tensor_names(path)}
    original = any(name.startswith("encoder.down.") for name in names)
    # Links stay: in the Hugging Face cache they lead to files whose names lack the suffix.
    return AutoencoderFile(path.absolute(), config, "original" if original else "diffusers")


def load_autoencoder(file: AutoencoderFile, flag: str) -> Any:
    """diffusers' AutoencoderKL with the file's weights. Raises UserError where they don't fit its configuration."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # all of diffusers takes seconds to import

    try:
        vae = AutoencoderKL.from_config(file.config)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"The VAE in {file.path.parent} can't be loaded: {str(error).splitlines()[0]}.") from None
    state = {key.removeprefix("first_stage_model."): value for key, value in read_state_dict(file.path).items()}
    original = file.layout == "original"
    state = _to_diffusers(state, file) if original else {_renamed(key): value for key, value in state.items()}
    fit(vae, state, file.path, f"{flag} names an AutoencoderKL and the config.json beside it describes it")
    return vae


def _find(weights: str | None, flag: str) -> Path:
    if weights in EMBEDDED:
        return Path(str(files("featurize"))) / "weights" / f"{weights}_vae" / "diffusion_pytorch_model.safetensors"
    if weights is None or (weights in NAMES and not Path(weights).exists()):
        name = weights or NAMES[0]
        return find_weights(None, PUBLISHED[name], f"the VAE {name}", flag)
    path = expand_home(weights)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"The VAE's {path / 'config.json'} is not there; a folder is in diffusers' AutoencoderKL layout."
            )
        path = path / "diffusion_pytorch_model.safetensors"
    return find_weights(str(path), None, "the VAE", flag)


def _to_diffusers(state: State, file: AutoencoderFile) -> State:
    """CompVis' original names to diffusers'."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    # A whole training checkpoint also holds losses and discriminators: only the autoencoder is read.
    own = {
        key: value for key, value in state.items() if re.match(r"(encoder|decoder|quant_conv|post_quant_conv)\.", key)
    }
    try:
        converted = convert_ldm_vae_checkpoint(own, file.config)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"The VAE {file.path} is not in CompVis' original layout (no {error}); take a whole file."
        ) from None
    if len(converted) != len(own):
        raise UserError(
            f"The VAE {file.path} has {len(own)} tensors in CompVis' original layout, but {len(converted)} of them fit; "
            "a config.json beside it must describe it."
        )
    return converted


def _renamed(key: str) -> str:
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", key)
