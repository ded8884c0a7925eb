"""Sequences as segments of rows: facts about values, rules for operators, and the interpreter that applies them."""
