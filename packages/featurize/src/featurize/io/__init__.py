"""Files, on this machine and remote.

`files` (paths of stores, atomic writes), `addresses` (images at fsspec addresses, with retries), `lock` and `bucket_lock`
(one run per store root), `home`, `yaml`. May import errors.
"""
