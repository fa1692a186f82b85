"""``python -m fgaif``: the command line. The method itself imports nothing of ``cluster``."""

import importlib

importlib.import_module("cluster.cli.main").main()
