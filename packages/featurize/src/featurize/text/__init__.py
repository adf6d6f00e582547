"""Text encoders for captions and prompts. May import errors, io, checkpoints and recipe."""
