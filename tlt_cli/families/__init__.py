"""Model families as data: one TOML table each, and the code that fits a table to a checkpoint's header."""

from tlt_cli.families.fit import Fit, Place, fit
from tlt_cli.families.table import Family, known_families, load_family

__all__ = ["Family", "Fit", "Place", "fit", "known_families", "load_family"]
