"""Imported as ``ensdef.benchmarks``: one TOML file per protocol."""
