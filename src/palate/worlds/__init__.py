"""Worlds: self-made tasks whose true taste is known."""
