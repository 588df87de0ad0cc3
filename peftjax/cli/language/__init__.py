"""The command line for decoder language models."""
