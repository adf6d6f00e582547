"""Files, on this machine and remote.

`files` (paths of stores, atomic writes), `addresses` (images at fsspec addresses, with retries), `lock` (one run per store
root), `yaml`. May import errors.
"""
