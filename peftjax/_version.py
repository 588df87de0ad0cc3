"""The version, written here alone: a checkout without an installation knows it too."""

__version__ = '0.1.0'
