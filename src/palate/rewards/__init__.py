"""Rewards: who decides what an answer is worth."""
