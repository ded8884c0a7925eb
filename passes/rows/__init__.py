"""Sequences as segments of rows: what is known about values, operators on segments, and the rebuilt graph."""
