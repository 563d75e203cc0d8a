"""Diagnosis: the report a run leaves behind."""
