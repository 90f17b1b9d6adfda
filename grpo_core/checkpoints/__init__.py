"""Checkpoints and adapters on disk: written, described by a manifest, verified and read back.

Owns their files; the engine decides when one is written, and the worker copies it elsewhere. Invariant: nothing is
unpickled, and a checkpoint counts only with a manifest that names the digest of every file.
"""
