"""Drops rights of a process permanently and without root: files, network, processes, memory.

Owns the system calls; the callers decide who is confined to what. Uses the standard library alone, and each module
imports little, because a confined process can import little. Invariant: no function gives a process a right.
"""
