"""Graph passes: each takes a Program and returns new ones, with what it changed or declined.

One pass per file.

Front doors: `PassManager` (manager.py), and pipelines.py, which lists the passes of each captured program in
order. The analyses of a graph's structure are in analysis/. Imports program, operators, recipe's types and
bundle's names of state. For a new pass copy merge_duplicates.py (an edit in place) or split_at_output.py (one
that makes programs), and add a line to pipelines.py.
"""
