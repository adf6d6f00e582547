"""Training one level's denoiser: the order of the rows, batches, one step, the loop, several processes, previews.

May import everything but cli. Sampling and scoring stand below it, because previews sample and score.
"""
