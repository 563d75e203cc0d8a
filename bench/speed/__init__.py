"""palate beside its peers on the same work: `python -m bench.speed`. See docs/bench.md."""
