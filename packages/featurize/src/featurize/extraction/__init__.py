"""From images to sealed arrays: the scan for the ledger, the basis, blocks, captions, levels; `extract` puts them in order.

`targets` says what is to be made, `plan` what it will take. May import everything below.
"""
