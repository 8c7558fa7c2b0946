"""The base class of the public optimizers, without their arguments.

optimizer      ShardedOptimizer: construction, groups, hooks, the step; start here
follows_model  FollowsModel, its base: a model that changes before the first step
state_access   StateAccess, the base of both: state dicts, edits of `optimizer.state`
execution      decisions from the options
ddp            who averages gradients, and whether they are averaged
loss_scale     exchange of loss scale and skipped steps with a GradScaler
owners         which parameters already have an optimizer
"""

from offload_adam.sharded_optimizer.optimizer import ShardedOptimizer

__all__ = ["ShardedOptimizer"]
