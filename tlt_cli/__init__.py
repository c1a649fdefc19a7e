"""tlt: model surgery on transformer checkpoints."""

__version__ = "0.1.0"
