"""Computes: everything that touches a device."""
