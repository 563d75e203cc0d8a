"""Algorithms: one page each, settings + prepare + loss."""
