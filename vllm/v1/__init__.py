"""The engine: requests, scheduling, workers and their processes, for any model family.

Imports nothing, so that each part loads only what it needs.
"""
