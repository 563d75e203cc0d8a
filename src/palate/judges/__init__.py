"""Judges: who decides between two answers."""
