"""CoDiCodec's published weights as an m2l2 snapshot, and its public form of latents.

CoDiCodec (PyPI `codicodec`, by the authors of Music2Latent2; its code and weights are CC BY-NC 4.0) is a point of
m2l2's config space: configs/codicodec.py. Its state dict is read (`reading`), checked tensor by tensor and renamed
(`weights`), and written (`importing`) without changing numbers. `verification` runs the original and m2l2 on one input;
tests/conformance compares with the original's outputs. `exchange` converts latents and tokens.
"""

from m2l2 import lazy

__all__ = ['Tensor', 'convert_weights', 'from_public', 'import_codicodec', 'read_state_dict', 'state_dict_table',
           'to_public', 'verify_against_torch']

__getattr__, __dir__ = lazy(__name__, {
    'from_public': 'm2l2.interop.codicodec.exchange', 'to_public': 'm2l2.interop.codicodec.exchange',
    'import_codicodec': 'm2l2.interop.codicodec.importing', 'read_state_dict': 'm2l2.interop.codicodec.reading',
    'verify_against_torch': 'm2l2.interop.codicodec.verification',
    **dict.fromkeys(('Tensor', 'convert_weights', 'state_dict_table'), 'm2l2.interop.codicodec.weights')})
