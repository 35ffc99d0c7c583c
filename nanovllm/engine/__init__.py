"""Decides: pure Python and numpy, no torch."""
