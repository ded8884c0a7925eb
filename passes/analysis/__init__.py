"""Analyses: what structure a Program's graph has.

They read the graph, change nothing, and know no model's names.

Their results refer to nodes of `program.exported.graph`; a `GraphEditor` copies a graph keeping the names of
its nodes.
"""
