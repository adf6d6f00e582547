"""Weights files: found or fetched, read without running code, fitted into a network only where every tensor fits.

`downloads` (published files), `files` (digests, reading, fitting), `headers` (names without reading), `torchscript`, and
what encoders and codecs share of `clip` and `autoencoder_kl`. May import errors and io.
"""
