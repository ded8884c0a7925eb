"""Graph passes: each takes a Program and returns new ones and what it changed or declined. One pass a file.

Front doors: `PassManager` (manager.py), and pipelines.py, which lists the passes of each captured program in order.
What structure a graph has is asked of analysis/. Imports program, operators, recipe's types and bundle's names of
state. For a new pass copy merge_duplicates.py (an edit in place) or split_at_output.py (one that makes programs),
and add a line to pipelines.py.
"""
