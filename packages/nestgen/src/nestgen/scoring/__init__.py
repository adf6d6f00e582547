"""How good samples are: scores against real images, and looks at what each level decides.

May import sampling and what is below it.
"""
