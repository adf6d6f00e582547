"""The commands, by what they are for. They parse, and call; `cli.py` puts them together."""
