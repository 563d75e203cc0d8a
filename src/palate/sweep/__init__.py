"""Sweeps: one recipe under several settings and several seeds, and what their comparison is worth."""
