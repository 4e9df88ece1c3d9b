"""Audio in and out of files, prepared data, and the training data path.

`audio_io` (no Grain) is the face of `reader`, `writer` and `resampling`, and serves inference as well; `containers`
knows what files hold; `prepare` makes the data; `pipeline` and `records` are the files that need Grain.
"""
