"""The web page in a bundle: what was cut and why, what it costs, what it saves."""
