"""Stores from Python: `open` a store root, read its levels as numpy or as a torch Dataset, `encode` further images into them.

The package itself offers these names: `featurize.open(root)`. May import all folders but `neighbours`, `reports` and `cli`.
"""
