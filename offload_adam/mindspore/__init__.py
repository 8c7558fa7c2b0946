"""Adam as the documentation of `mindspore.nn.Adam` specifies it: arguments, groups, schedules.

adam             Adam: construction, steps, saved state; start here
arguments        checks of scalar arguments
groups           parameter groups with MindSpore's keys
dynamic          learning rates and weight decays that change with the step
decay_filter     parameters without weight decay
given_gradients  gradients passed to `opt(gradients)`
inspection       the properties and getters that MindSpore documents
"""

from offload_adam.mindspore.adam import Adam

__all__ = ["Adam"]
