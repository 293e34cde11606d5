"""Variants compared honestly: one teacher, one student, several losses, paired seeds (recipe -> grid -> table).

``recipe`` reads what is to be compared, ``grid`` makes the runs, ``statistics`` says which differences are real, and
``table`` writes them down. What a run folder holds is all that passes between them.
"""

from __future__ import annotations

from gskd.comparison.grid import run_grid
from gskd.comparison.recipe import Comparison, Variant, load_comparison
from gskd.comparison.table import write_tables

__all__ = ["Comparison", "Variant", "load_comparison", "run_grid", "write_tables"]
