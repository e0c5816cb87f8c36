"""Command line: one module per command. Arguments only; the work is done by the tuner and the experiments."""
