"""Nested generative models: one denoiser per level of a hierarchy of stored latents."""
