"""The cost of a run before it starts: FLOPs, a compiled program's cycles and bytes, chips and their peaks."""

from m2l2 import lazy

__all__ = ['Chip', 'count_flops', 'count_traffic', 'find_chip']

__getattr__, __dir__ = lazy(__name__, {
    'Chip': 'm2l2.planning.chips', 'find_chip': 'm2l2.planning.chips', 'count_flops': 'm2l2.planning.flops',
    'count_traffic': 'm2l2.planning.traffic'})
