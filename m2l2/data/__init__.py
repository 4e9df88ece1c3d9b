"""Audio in and out of files, prepared data, and the training data path.

`audio_io` re-exports `reader`, `writer` and `resampling`; inference uses it too, so it imports no Grain. `containers`
parses the headers of files, `prepare` writes prepared data, `pipeline` and `records` need Grain.
"""
