"""Feature stores, read only: one sealed store, blocks in remote storage, stores that belong together, and the way from
stored values to latents.

May import recipe.
"""
