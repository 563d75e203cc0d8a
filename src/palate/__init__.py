"""palate teaches a language model taste."""
