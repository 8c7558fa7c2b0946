"""Adam as the documentation of MindSpore specifies it: arguments, groups, schedules.

adam             Adam: construction, steps, what is saved; start here
arguments        checks of the arguments, one by one
groups           parameter groups with MindSpore's keys
dynamic          learning rates and weight decays that change with the step
decay_filter     parameters that weight decay leaves out
given_gradients  gradients that `opt(gradients)` is given
inspection       the properties and getters that MindSpore documents
"""

from offload_adam.mindspore.adam import Adam

__all__ = ["Adam"]
