"""``python -m fgaif``: the command line. The method itself imports nothing of ``cluster``."""

import importlib

from fgaif.own_packages import own_packages_first

own_packages_first()
importlib.import_module("cluster.cli.main").main()
