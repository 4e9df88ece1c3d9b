"""Training: the loop, the step, checkpoints, several hosts, and the measurements of a run."""

from m2l2 import lazy

__all__ = ['Checkpoints', 'Objective', 'StepFunctions', 'TrainState', 'make_optimizer', 'make_step_functions', 'train']

__getattr__, __dir__ = lazy(__name__, {
    'train': 'm2l2.training.loop', 'Objective': 'm2l2.training.train_step', 'TrainState': 'm2l2.training.train_step',
    'StepFunctions': 'm2l2.training.train_step', 'make_step_functions': 'm2l2.training.train_step',
    'make_optimizer': 'm2l2.training.optim', 'Checkpoints': 'm2l2.training.checkpoint'})
