"""Emitters: each turns Programs into engines of one backend for a bundle. One emitter a file."""
