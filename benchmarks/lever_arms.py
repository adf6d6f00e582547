"""The arms of `benchmarks.levers`: what each changes of a recipe, as it was before it took what they found."""

from __future__ import annotations

from typing import Any

LOGIT = {"process": {"logit_normal": [0.0, 1.0]}}
DECAY = {"training": {"lr_decay": "linear"}}
FLOW = {"process": {"kind": "flow", "prediction": "velocity"}}
SIDE = {"training": {"side_loss": 0.25}}
CODEC = {"features": {"z0_weights": "scenes"}, "levels": {0: {"shape": "8x8x6"}}}
POSITIONS = {"denoiser": {"positions": "sinusoids"}}
# The recipes as they were before they took what these arms found.
PLAIN: dict[str, dict[str, Any]] = {
    "scenes": {
        "features": {"z0_weights": "tiny"},
        "levels": {0: {"shape": "8x8x8"}},
        "denoiser": {"gaussian": False},
        "process": {"logit_normal": None},
        "training": {
            "batch": 32, "lr": 1e-3, "muon": None, "lr_decay": None, "side_loss": None, "betas": [0.9, 0.99], "ema": 0.998,
        },
        "sampling": {"guidance": [1.0, 0.0, 0.0, 0.0], "internal_guidance": None},
    },
    "photos": {
        "denoiser": {"positions": "random"},
        "process": {"logit_normal": None},
        "training": {
            "batch": 32, "lr": 1e-3, "muon": None, "lr_decay": None, "side_loss": None, "betas": [0.9, 0.99], "ema": 0.995,
        },
        "sampling": {"guidance": 0.0, "internal_guidance": None},
    },
}  # fmt: skip
# What an arm changes of the plain recipe; of levels each, or those that are numbered.
ARMS: dict[str, list[dict[str, Any]]] = {
    "today": [],
    "decay": [DECAY],
    "cosine decay": [{"training": {"lr_decay": "cosine"}}],
    "inverse-sqrt decay": [{"training": {"lr_decay": "inverse-sqrt"}}],
    "logit-normal": [LOGIT],
    "flow": [FLOW],
    "flow, logit-normal": [FLOW, LOGIT],
    "flow, shift auto": [FLOW, {"levels": {"shift": "auto"}}],
    "x": [FLOW, {"process": {"prediction": "x"}}],
    "side loss": [SIDE],
    "internal guidance 1.5": [SIDE, {"sampling": {"internal_guidance": {"scale": 1.5, "interval": [0.3, 1.0]}}}],
    "internal guidance 2": [SIDE, {"sampling": {"internal_guidance": {"scale": 2.0, "interval": [0.3, 1.0]}}}],
    "batch 64": [{"training": {"batch": 64, "lr": 1.4e-3}}],
    "batch 128": [{"training": {"batch": 128, "lr": 2e-3}}],
    "muon, batch 128": [{"training": {"batch": 128, "lr": 2e-3, "muon": 2e-3}}],
    "muon, batch 64": [{"training": {"batch": 64, "lr": 1.4e-3, "muon": 2e-3}}],
    "together": [DECAY, LOGIT, {"training": {"batch": 64, "lr": 1.4e-3, "muon": 2e-3}}],
    "together, internal guidance 2": [
        DECAY,
        LOGIT,
        {"training": {"batch": 64, "lr": 1.4e-3, "muon": 2e-3, "side_loss": 0.25}},
        {"sampling": {"internal_guidance": {"scale": 2.0, "interval": [0.3, 1.0]}}},
    ],
    "linear part": [{"denoiser": {"gaussian": True}}],
    "positions": [POSITIONS],
    "align": [{"training": {"align": {"weight": 0.5, "until": 0.4}}}],
}
# Arms of one of them alone, by its codec or its number of levels.
OWN_ARMS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "scenes": {
        "codec": [CODEC],
        "scenes' best": [
            CODEC,
            DECAY,
            SIDE,
            {"denoiser": {"gaussian": True}},
            {"process": {"logit_normal": [0.3, 1.1]}},
            {"training": {"batch": 128, "lr": 2e-3, "muon": 5e-3, "betas": [0.9, 0.95], "ema": 0.995}},
            {"sampling": {"internal_guidance": {"scale": 1.5, "interval": [0.3, 1.0]}}},
        ],
    },
    "photos": {
        "photos' best": [
            POSITIONS,
            DECAY,
            SIDE,
            {"process": {"logit_normal": [0.5, 1.0]}},
            {"training": {"batch": 64, "lr": 2e-3, "muon": 5e-3, "betas": [0.9, 0.95]}},
            {"sampling": {"guidance": [0.5, 0.0, 0.0], "internal_guidance": {"scale": 1.5, "interval": [0.3, 1.0]}}},
        ],
    },
}


def arms_of(data: str) -> dict[str, list[dict[str, Any]]]:
    """All arms of scenes or of photos."""
    return ARMS | OWN_ARMS.get(data, {})
