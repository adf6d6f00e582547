"""The process that adds noise, the samplers that remove it, and guidance.

May import recipe and denoiser.
"""
