"""The application: the command line, training runs, reports and tuned models in use."""
