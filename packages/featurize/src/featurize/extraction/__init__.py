"""From images to sealed arrays: the first pass over a source (scan, basis, blocks), captions, levels.

`extract` puts them in order, `targets` says what is to be made, `plan` what it will take. May import everything below.
"""
