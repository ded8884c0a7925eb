"""Emitters: each turns Programs into engines of one backend and writes them to a bundle. One emitter a file."""
