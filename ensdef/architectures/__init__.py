"""Member networks by name, one file per family; found by the registry."""
