"""The ``fgaif`` command."""
