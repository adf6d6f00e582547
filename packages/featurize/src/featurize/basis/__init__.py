"""The linear algebra between an encoder's tokens and a stored level: moments, the SVD basis, pooling, standardisation.

May import errors, io and execution (for the number of threads).
"""
