"""Formats: one reader per shape of rows, found by the columns."""

from palate.data.formats.known import BY_NAME, FORMATS, Format, catalogue, detect, named, read_rows
from palate.data.formats.row import BadRow, Row

__all__ = ["BY_NAME", "FORMATS", "BadRow", "Format", "Row", "catalogue", "detect", "named", "read_rows"]
