"""``python -m kornia_tinyvit`` is the command line."""

from kornia_tinyvit.cli import main

main()
