"""Communicators over process groups, meshes, emulated links, and the launcher of ranks."""
