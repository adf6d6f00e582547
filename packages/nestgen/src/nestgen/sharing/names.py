"""Where an exported hierarchy is: a folder, one that ships with the package, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nestgen.errors import UserError

SHIPPED = Path(__file__).parents[1] / "pretrained"
# Of an exported folder: the VAE in diffusers' layout, which featurize reads too, and all files.
CODEC = "codec/diffusion_pytorch_model.safetensors"
FILES = ("config.json", "README.md", "*.safetensors", "codec/config.json", "scores/*.json", "features/*")

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def shipped() -> list[str]:
    """Names of the hierarchies that ship with the package."""
    return sorted(config.parent.name for config in SHIPPED.glob("*/config.json"))


def find_pretrained(name: str | Path, **download: Any) -> Path:
    """The folder of an exported hierarchy: the path itself, the shipped one of that name, or a downloaded repository.

    `download` are options of huggingface_hub's `snapshot_download`: revision, token, cache_dir, local_files_only. Raises
    UserError where there is none, or where it cannot be downloaded.
    """
    ships = str(name) in shipped()
    if Path(name).is_dir() and not (ships and not (Path(name) / "config.json").exists()):  # samples may have its name
        return Path(name)
    if ships:
        return SHIPPED / str(name)
    if isinstance(name, str) and _REPOSITORY.fullmatch(name) and not name.startswith("."):
        return _downloaded(name, download)
    there = f"the package ships {', '.join(shipped())}" if shipped() else "the package ships none"
    raise UserError(f"there is no exported hierarchy {name}: it is no folder, and {there}; check the name or path")


def _downloaded(repository: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES), **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"{repository} is no folder here and cannot be downloaded from the Hugging Face Hub ({reason}); "
            "check the name, and the network"
        ) from None
