"""A traced model: `Program`, a torch.export graph with the roles of its inputs and outputs, and how one is captured.

Front doors: `Program` (program.py) and `capture_program` (trace.py). Imports no other room.
"""
