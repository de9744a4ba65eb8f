"""Built-in measurements, one file a family; ``ensdef.measure`` has the contract."""
