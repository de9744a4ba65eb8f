"""Data sets by name, one file per source; found by the registry."""
