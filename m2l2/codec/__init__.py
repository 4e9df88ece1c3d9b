"""Audio -> latents -> audio with a trained model; files, streams, whole corpora."""

from m2l2 import lazy

__all__ = ['Codec', 'Latents', 'encode_dataset', 'export_stablehlo', 'load', 'load_snapshot', 'save_snapshot']

__getattr__, __dir__ = lazy(__name__, {
    'Codec': 'm2l2.codec.codec', 'load': 'm2l2.codec.codec', 'Latents': 'm2l2.codec.latents',
    'encode_dataset': 'm2l2.codec.bulk', 'export_stablehlo': 'm2l2.codec.export',
    'load_snapshot': 'm2l2.codec.snapshot', 'save_snapshot': 'm2l2.codec.snapshot'})
