"""Parameter-efficient fine-tuning for any JAX function."""

__version__ = '0.1.0'
