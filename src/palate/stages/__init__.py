"""Stages: one job of a run each."""
