"""Data: files and hubs in, records and batches out."""
