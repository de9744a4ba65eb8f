"""Imported as ``ensdef.attacks``: one file per attack or family of attacks."""
