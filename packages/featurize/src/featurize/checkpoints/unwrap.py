"""Checkpoints of a training, taken apart down to one set of named tensors: those of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featurize.errors import UserError

# What the sets of weights in a training's checkpoint are called; other sets there are of losses, optimisers, schedules.
WRAPPERS = (
    "state_dict", "model", "model_state_dict", "module", "net", "network", "teacher", "student", "ema", "model_ema",
    "ema_model", "ema_state_dict", "state_dict_ema",
)  # fmt: skip
# What DataParallel, torch.compile and Lightning put before every name.
COMPILED, PREFIXES = "_orig_mod.", ("module.", "model.")


def unwrap(
    checkpoint: Mapping[str, Any], weights: Path, is_tensor: Callable[[Any], bool], wanted: str = ""
) -> Mapping[str, Any]:
    """The innermost mapping of names to tensors; `wanted` names the set that counts where there are several.

    Raises UserError for a checkpoint of several sets of weights, like a model and its moving average: which one is meant
    nobody but the user knows.
    """
    while True:
        sets = [name for name, value in checkpoint.items() if _holds_weights(value, is_tensor)]
        known = [name for name in sets if name in WRAPPERS]
        chosen = [wanted] if wanted in known else known
        if not known and not any(map(is_tensor, checkpoint.values())):
            chosen = sets  # of a name of the author's own
        if not chosen:
            return checkpoint
        if len(chosen) > 1:
            raise UserError(
                f"The weights {weights} are a training's checkpoint with several sets of weights ({', '.join(sorted(chosen))}); "
                f"save the one you mean alone, as torch.save(checkpoint['{sorted(chosen)[0]}'], FILE), and give that FILE."
            )
        checkpoint = checkpoint[chosen[0]]


def _holds_weights(value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    """Whether a value is a mapping of names to tensors, or wraps one under a known name."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return any(map(is_tensor, value.values())) or any(
        _holds_weights(value[name], is_tensor) for name in WRAPPERS if name in value
    )


def without_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without what DataParallel or Lightning put before every single name."""
    names = dict(state)
    while prefix := next((one for one in PREFIXES if names and all(name.startswith(one) for name in names)), ""):
        names = {name.removeprefix(prefix): value for name, value in names.items()}
    return names
