"""The papers' tables: what they print, what our protocols answer it with, and both side by side."""
