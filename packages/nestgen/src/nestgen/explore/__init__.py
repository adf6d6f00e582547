"""A local page to play with a hierarchy: `nestgen explore`. `session` makes the images, `server` answers the page's requests,
`page.html` is the page.

May import sampling, sharing, pipeline and scoring.
"""
