"""Imported as ``ensdef.methods``: one file per defence or family of defences."""
