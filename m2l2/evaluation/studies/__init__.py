"""Studies of a model that take many measurements: sweeps, probes of the latents, edits, baselines, excerpts."""
