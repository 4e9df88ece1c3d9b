"""What is measured: of a pair of signals, of two sets of embeddings, at the seams of chunks."""
