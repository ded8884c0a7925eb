"""Graph passes: each takes a Program and returns a new one and what it changed. One pass a file."""
