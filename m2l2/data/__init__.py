"""Audio in and out of files, and the training data path over a folder of music.

`audio_io` (no Grain) serves inference as well; `pipeline` is the only file that needs Grain.
"""
