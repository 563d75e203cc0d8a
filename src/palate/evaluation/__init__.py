"""Evaluation: how good is it, and how sure are we."""
