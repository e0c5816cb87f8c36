"""Studies of many runs: the paper's protocols over seeds, and comparisons of methods."""
