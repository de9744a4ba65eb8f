"""``python -m ensdef``."""

from ensdef.cli import main

main()
