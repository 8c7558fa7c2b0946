"""Complete the step that an earlier process decided last, from the state that it has kept.

complete_last_step
    KeptSteps.last_step    the records of the step; the decision may be another rank's
    _complete              what is left of the updates, launch by launch
    _publish               parameters from their master weights, then all-gathers
"""

from __future__ import annotations

from collections.abc import Sequence

from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.gradients.segments import BucketGradients
from offload_adam.params.bucket import BucketState
from offload_adam.spans import Stopwatch
from offload_adam.step.kept_steps import DecidedStep
from offload_adam.step.messages import UpdateInputs
from offload_adam.step.step import ShardedAdam
from offload_adam.step.update_tasks import UpdateTasks


def complete_last_step(core: ShardedAdam) -> DecidedStep | None:
    """Complete the last step of an earlier process if its state was adopted, else return None.

    Parameters, state and step counts then have the bits that they would have had. Collective.

    Raises:
        ValueError: on all ranks, the undo log is damaged. The state will not be adopted again.
    """
    kept = core.kept
    if kept is None or not kept.adopted:
        return None
    last = kept.last_step()
    _restore_counters(core.states, last)
    updates = last.updates
    try:
        with raise_on_all_ranks(core.ranks, "completing the step that was decided last"):
            if updates is not None:
                core.executor.run_on_worker("update", lambda: _complete(core.tasks, updates))
    except ValueError:
        kept.before_writing()
        raise
    _publish(core.tasks)
    core.synchronize()
    core.num_steps = last.num_steps
    core.has_updated = True
    return last


def _restore_counters(states: Sequence[BucketState], step: DecidedStep) -> None:
    """Set the step counts and scales of all parameters to those before the step."""
    for state in states:
        state.step_counts.numpy()[:] = step.step_counts[state.indices]
        if state.scales is not None:
            state.scales.numpy()[:] = step.scales[state.indices]


def _complete(tasks: UpdateTasks, inputs: UpdateInputs) -> None:
    """Run the launches that were not complete, and count the step.

    Launches read the gradients from the gradient shards. They modify the state, which includes
    parameters that are their own master weights.
    """
    for number in tasks.stream_waits.schedule.forward_order:
        state = tasks.states[number]
        active = inputs.active[state.indices]
        if not active.any() or state.layout.numel == 0:
            inputs.count_step(state, active)
            continue
        gradients, shard = BucketGradients(state), state.planes.gradient_shard
        assert shard is not None, "gradients of kept buckets are in shards"
        gradients.set_shard(shard, complete=True)
        launches = tasks.prepare(number, gradients, active, inputs).launches
        for part in launches.parts:
            part.run()
        launches.count_step()


def _publish(tasks: UpdateTasks) -> None:
    """Set all parameters to their rounded master weights, on every rank. Collective."""
    order, stopwatch = tasks.stream_waits.schedule.forward_order, Stopwatch()
    for number in order:
        state = tasks.states[number]
        if not state.own_master:
            state.shard.copy_(state.planes.master_weight)
    for number in order:
        if tasks.states[number].plan.gathers:
            tasks.gather(number, stopwatch)
            tasks.wait_for_parameters(number, stopwatch)
