"""What a training leaves on disk: the folder, checkpoints, the log, averages of the weights.

May import recipe, stores, denoiser and diffusion.
"""
