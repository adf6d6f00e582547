"""Which images each space finds alike: search, the spaces compared, how far they overlap, and the sheet of `knn-viz`.

May import everything below. FAISS is imported in a process of its own, which has no torch.
"""
