"""The web page in a bundle: what was cut and why, what it costs, what it saves.

Front door: `render` (page.py). Imports recipe and bundle; a build writes the page, so the compiler imports this room.
"""
