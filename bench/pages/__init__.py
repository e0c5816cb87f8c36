"""Builders of the tables of README.md and docs/, which `bench.report` writes."""
