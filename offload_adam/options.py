"""The options of the optimizers, each declared once.

    a field below  -->  its check           when an optimizer is constructed
                   -->  ranks must agree    `shared=True`: compared at construction
                   -->  its YAML key        with the same default and range (config/declared.py)
                   -->  its documentation   of a policy's class, and of `offload-adam config`

A new option of a policy is a field here, the code that reads it, and a test. One of
`ExecutionOptions` also stands in the signatures and docstrings of the optimizers (a test compares
names and defaults). sharded_optimizer/execution.py decides from the options how an optimizer runs.
Nothing here imports torch or pydantic at run time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, get_args

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

C = TypeVar("C")

Pin = Literal["all", "staging", "none"]
"""What is pinned: state and the buffers of copies, these buffers alone, or nothing."""

_DECLARED = "offload_adam option"


class Rule(Protocol):
    """The values that an option may have."""

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise TypeError or ValueError, naming the option.

        Args:
            or_none: " or None" where None is allowed too.
        """
        ...


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False."""

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise TypeError for any other value."""
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool{or_none}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few strings; None is listed where the error is to name it."""

    values: tuple[str | None, ...]

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise ValueError for any other value."""
        if value not in self.values:
            named = [repr(known) for known in self.values]
            allowed = " or ".join(named) if len(named) < 3 else f"one of {', '.join(named)}"
            raise ValueError(f"{name} must be {allowed}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Dtype:
    """The torch dtype of this name; in YAML its short form, such as fp32."""

    name: str
    short: str

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise ValueError for any other value."""
        if str(value) != f"torch.{self.name}":
            raise ValueError(f"{name} must be torch.{self.name}{or_none}, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number in a range; a bool is none.

    kind: int, or float for any real number. At least one bound is given.
    above: an exclusive bound. least, most: inclusive ones.
    finite: infinity is not allowed; YAML never allows it.
    unit: for errors, such as "seconds".
    """

    kind: type[int] | type[float] = float
    above: float | None = None
    least: float | None = None
    most: float | None = None
    finite: bool = False
    unit: str = ""

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise TypeError for other types, ValueError outside of the range."""
        types = int if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, types):
            what = ("an int" if self.kind is int else "a number") + (self.unit and " of ")
            raise TypeError(f"{name} must be {what}{self.unit}{or_none}, not {value!r}")
        if not self._contains(value):
            raise ValueError(f"{name} must {self._range}, not {value}")

    def _contains(self, value: float) -> bool:
        # Comparisons alone: an int may be too large for a float, and with NaN each one is False.
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and not (self.finite and value == math.inf)
        )

    @property
    def _range(self) -> str:
        if self.above is not None:
            what = f"a finite number of {self.unit} " if self.finite else ""
            return f"be {what}above {self.above:g}"
        if self.most is not None:
            return f"lie in [{self.least:g}, {self.most:g}]"
        return f"be at least {self.least:g}"


class Option(NamedTuple):
    """What one field declares.

    text: what it means, for users.
    rule: None where the code that uses the option checks it.
    key: its dotted path in a run's configuration; "" where it has none.
    shared: ranks must have the same value.
    """

    name: str
    default: Any
    rule: Rule | None
    text: str
    key: str
    shared: bool


def option(
    default: Any, rule: Rule | None, text: str, *, key: str = "", shared: bool = False
) -> Any:
    """Declare a dataclass field as an option; None is allowed where it is the default."""
    return field(default=default, metadata={_DECLARED: (rule, text, key, shared)})


def options_of(policy: Any) -> Iterator[Option]:
    """Yield the options that a dataclass, or an instance of one, declares."""
    for item in fields(policy):
        if _DECLARED in item.metadata:
            yield Option(item.name, item.default, *item.metadata[_DECLARED])


def check_options(policy: Any) -> None:
    """Check every option of an instance.

    Raises:
        TypeError, ValueError: naming the option.
    """
    for declared in options_of(policy):
        value = getattr(policy, declared.name)
        optional = declared.default is None
        if declared.rule is not None and not (optional and value is None):
            declared.rule.check(declared.name, value, " or None" if optional else "")


def check_policy(name: str, policy: Any, kind: type) -> None:
    """Check that an argument is a policy of this kind, and all of its options.

    Raises:
        TypeError, ValueError: naming the argument or the option.
    """
    if not isinstance(policy, kind):
        raise TypeError(f"{name} must be {kind.__name__}(...), not {policy!r}")
    check_options(policy)


def _documented(policy: type[C]) -> type[C]:
    """Add the text of every option to the docstring of its class."""
    lines = [f"    {declared.name}: {declared.text}" for declared in options_of(policy)]
    policy.__doc__ = "\n".join([inspect.cleandoc(policy.__doc__ or ""), "", "Args:", *lines])
    return policy


@_documented
@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPolicy:
    """Where the optimizer's state lies and how it is moved, for `OffloadAdam(offload=...)`.

    Values are checked when an optimizer is constructed, so that a mistake on one rank is an error
    on all ranks.
    """

    pin: Pin = option(
        "all",
        Choice(get_args(Pin)),
        "Page-locked host memory where a parameter is on CUDA: 'all' state, only the buffers of "
        "copies ('staging'), or 'none'. If pinning all state fails, falls back to 'staging' with a "
        "warning.",
        key="memory.pin",
    )
    offload_fraction: float = option(
        1.0,
        Number(least=0, most=1),
        "Share of the elements of parameters on CUDA that have their state on the host, in whole "
        "buckets. The state of the buckets that the forward needs first stays on the GPU and is "
        "updated there, within 2 ULP of the host's result.",
        key="memory.offload_fraction",
        shared=True,
    )
    bucket_nbytes: int | None = option(
        None,
        Number(kind=int, least=1),
        "Bytes of parameters that are reduced and gathered at once; null for 32 MiB times the "
        "number of ranks, but at most 256 MiB or a 16th of all parameters, and at least 32 MiB.",
        key="optimizer.bucket_nbytes",
        shared=True,
    )
    snapshot_buffer_nbytes: int = option(
        0,
        Number(kind=int, least=0),
        "Most host bytes for copies that `begin_checkpoint` makes of unwritten state, so that "
        "updates need not wait for the disk.",
    )
    allow_overcommit: bool = option(
        False,
        Flag(),
        "Construct the optimizer even if the state of this node's ranks seems not to fit into its "
        "memory.",
        key="memory.allow_overcommit",
    )
    units: Sequence[torch.nn.Module] | None = option(
        None,
        None,
        "Parts of `module` that each wait for their own parameters when updates overlap. None: the "
        "children of every ModuleList.",
    )


@_documented
@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy:
    """When ranks give up on each other, for `OffloadAdam(failures=...)`.

    Values are checked when an optimizer is constructed, as those of `OffloadPolicy`.
    """

    dead_after: float = option(
        10.0,
        Number(above=0, finite=True, unit="seconds"),
        "Seconds without a heartbeat after which a rank is declared dead.",
        key="coordinator.dead_after",
    )
    stuck_after: float = option(
        300.0,
        Number(above=0, finite=True, unit="seconds"),
        "Seconds without progress after which a live rank that others wait for is declared hung.",
        key="coordinator.stuck_after",
    )

    @property
    def beat_s(self) -> float:
        """Seconds between two heartbeats."""
        return min(1.0, self.dead_after / 5)


_MAX_NORM = Number(above=0)  # infinity clips nothing


def check_max_norm(name: str, value: float | None) -> float | None:
    """Return a norm to clip to as a float, or None for no clipping.

    Raises:
        TypeError, ValueError: naming it.
    """
    if value is None:
        return None
    _MAX_NORM.check(name, value)
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionOptions:
    """The arguments that `OffloadAdam` and `Adam` have in common, besides hyperparameters.

    Their signatures repeat the names and defaults, so that `help()` and editors show them.
    """

    module: torch.nn.Module | None = None
    process_group: dist.ProcessGroup | None = None
    max_grad_norm: float | None = option(
        None,
        _MAX_NORM,
        "Clip gradients to this global 2-norm inside the update.",
        key="optimizer.max_grad_norm",
        shared=True,
    )
    gradient_reduction: str | None = option(
        None,
        Choice(("optimizer", "external")),
        "Who averages gradients over the ranks: the optimizer, or DistributedDataParallel.",
        key="optimizer.gradient_reduction",
    )
    reduce_dtype: torch.dtype | None = option(
        None,
        Dtype("float32", "fp32"),
        "fp32 to average 16-bit gradients in fp32; null for their own dtype.",
        key="optimizer.reduce_dtype",
        shared=True,
    )
    state_dtype: torch.dtype | None = option(
        None, Dtype("float32", "fp32"), "The dtype of the state; None for torch.float32."
    )
    accumulate: str | None = option(
        None,
        Choice(("host", None)),
        "'host' sends every microbatch's gradient at once and adds them up in fp32 on the host; "
        "null adds them up in `.grad` and sends the sum.",
        key="optimizer.accumulate",
        shared=True,
    )
    num_threads: int | None = option(
        None,
        Number(kind=int, least=1),
        "Threads of a rank's kernels; null for allowed cores / ranks on this node, less one where "
        "parameters are on a GPU.",
        key="optimizer.num_threads",
    )
    overlap: bool | None = option(
        None,
        Flag(),
        "Hide updates under the next forward; null does so on a GPU.",
        key="optimizer.overlap",
    )
    offload: OffloadPolicy = OffloadPolicy()
    failures: FailurePolicy = FailurePolicy()


def resolve_overlap(overlap: bool | None, *, hooked: bool, reduces: bool, on_device: bool) -> bool:
    """Tell whether updates run during the next forward.

    Gradients that others have averaged stay in `.grad`, where the next backward may write. An
    update that still reads them in host memory would be too late.

    Args:
        overlap: the option.
        hooked: the forward of a model waits for its parameters.
        reduces: the optimizer averages the gradients.
        on_device: all parameters are on a device.
    """
    if overlap is None:
        overlap = on_device
    return overlap and hooked and (reduces or on_device)
