"""What every optimizer of this package is beneath its arguments: shards, hooks, the step."""

from offload_adam.sharded_optimizer.optimizer import ShardedOptimizer

__all__ = ["ShardedOptimizer"]
