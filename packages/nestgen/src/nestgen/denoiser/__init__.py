"""The network: a U-ViT with a condition path, its configuration, first weights and operations.

May import recipe; no module here knows of stores, noise levels or training.
"""
