"""Command line: one module per command. Modules import torch only inside the functions that run a command."""
