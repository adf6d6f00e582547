"""Tar files read in place: `members` finds the files in one, `index` makes samples of them. May import what sources may."""
