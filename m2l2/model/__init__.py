"""The network: what turns spectrogram chunks into latents and noise into spectrogram chunks."""
