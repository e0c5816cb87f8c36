"""Studies of many runs: the paper's protocols over seeds, method comparisons, and ablations of Skip Tuning."""
