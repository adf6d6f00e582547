"""A trained hierarchy as one folder to hand on: weights, configuration, codec and model card; and where such folders are.

May import recipe, stores, denoiser, diffusion, runs and sampling.
"""
