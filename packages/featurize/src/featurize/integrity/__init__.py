"""Is a store what it says it is? `verify` finds what is not, `reencode` compares random rows, `repair` makes it again.

May import everything below; repair writes with the same functions as the extraction.
"""
