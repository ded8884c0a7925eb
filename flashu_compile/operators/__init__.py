"""Torch operators of our own, which passes put into graphs and which engines in PyTorch call: a file each.

Importing a file registers its operator. Imports no other room.
"""
