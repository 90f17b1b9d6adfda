"""Storage of jobs: records in Valkey and objects in the bucket, with the content of each key and object.

Owns the names of keys and objects, their schemas and the Lua scripts; decides nothing about a job. Invariants: only Lua
scripts change a record, and a write-once object never changes.
"""
