"""Models: loading, making, adapters, heads, tokenizers. The only folder that imports transformers."""
