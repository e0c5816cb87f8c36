"""Benchmarks: each checks its result against a baseline first, then times both in one run."""
