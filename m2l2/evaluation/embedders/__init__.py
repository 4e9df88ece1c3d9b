"""Networks that hear: the embeddings that Frechet distances and probes are taken over."""
