"""Plain zarr arrays with a record for each block and a seal at the end, and the ledger of their rows.

`layout` holds every path, `metadata` what an array is, `write`, `seal` and `read` its blocks, `ledger` the rows.
May import errors, io, images and sources; nothing here runs tasks or encoders.
"""
