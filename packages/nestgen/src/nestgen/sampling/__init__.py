"""Images from trained denoisers: one descent through the hierarchy, which the command, the Python pipeline, the
hierarchy sheet and the diagnosis share.

May import recipe, stores, denoiser, diffusion and runs.
"""
