"""The base class of the public optimizers, without their arguments.

optimizer     ShardedOptimizer: construction, groups, hooks, the step; start here
state_access  StateAccess, its base: state dicts, edits of `optimizer.state`
execution     decisions from the options
loss_scale    exchange of loss scale and skipped steps with a GradScaler
owners        which parameters already have an optimizer
compiling     keeps methods out of torch.compile
"""

from offload_adam.sharded_optimizer.optimizer import ShardedOptimizer

__all__ = ["ShardedOptimizer"]
