"""The options of the optimizers, each declared once.

    a field below  -->  its check           when an optimizer is constructed
                   -->  ranks must agree    `shared=True`: compared at construction
                   -->  its YAML key        with the same default and range (config/declared.py)
                   -->  its documentation   of a policy's class, and of `offload-adam config`

To add an option to a policy, add a field here, the code that reads it, and a test. An option of
`ExecutionOptions` is also added to the signatures and docstrings of the optimizers; a test compares
names and defaults. sharded_optimizer/execution.py turns the options into decisions. Nothing here
imports torch or pydantic at run time, so that the command line, which reads them, starts fast.
"""

from __future__ import annotations

import inspect
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, get_args

from offload_adam.printable import show

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

C = TypeVar("C")

Keep = Literal["none", "shared", "keeper"]
"""Whether the state outlives the process: not, in a file in shared memory, or at a keeper."""

Pin = Literal["all", "staging", "none"]
"""Page-locked host memory: state and staging buffers, staging buffers only, or none."""

StateFormat = Literal["fp32", "bf16", "mixed", "int8"]
"""Format of the state, the most exact first, see docs/internals/state-formats.md."""

LOW_PRECISION: tuple[StateFormat, ...] = ("bf16", "mixed", "int8")
"""All formats but "fp32"."""

CODED_FORMATS: tuple[StateFormat, ...] = ("mixed", "int8")
"""Formats with 8-bit codes in blocks of 128 elements, see `memory.codes`."""

MAX_STEP_COUNT = 2**24
"""Largest number of steps: optimizers count in float32, as torch does."""

_DECLARED = "offload_adam option"  # key in the metadata of a dataclass field


class Rule(Protocol):
    """The type and range of an option's values."""

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise TypeError or ValueError if `value` is not allowed.

        Args:
            name: the option's name, for the error message.
            or_none: " or None" if None is also allowed, for the error message.
        """
        ...


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False."""

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise TypeError if `value` is not a bool."""
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool{or_none}, not {show(value)}")


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few strings. `values` includes None if the error message should list it."""

    values: tuple[str | None, ...]

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise ValueError if `value` is not one of `values`."""
        if value not in self.values:
            named = [repr(known) for known in self.values]
            allowed = " or ".join(named) if len(named) < 3 else f"one of {', '.join(named)}"
            raise ValueError(f"{name} must be {allowed}, not {show(value)}")


@dataclass(frozen=True, slots=True)
class Dtype:
    """One torch dtype, such as `name="float32"`; `short` is its name in YAML, such as fp32."""

    name: str
    short: str

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise ValueError for any other dtype."""
        if str(value) != f"torch.{self.name}":
            raise ValueError(f"{name} must be torch.{self.name}{or_none}, not {value}")


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is not empty."""

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise TypeError for another type, ValueError for empty text or a null character."""
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a str{or_none}, not {show(value)}")
        if not value or "\0" in value:
            raise ValueError(f"{name} must be text without null characters, not {show(value)}")


def is_number(value: object) -> bool:
    """Return whether a value is a real number, of Python or NumPy. A bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """Return whether a value is an integer, of Python or NumPy. A bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def plain(number: Any) -> int | float:
    """Return a real number as Python's int or float.

    A stored NumPy number would get into state dicts, which `torch.load(weights_only=True)` then
    rejects, and into arithmetic with Python's floats, which NumPy does in float32.
    """
    return int(number) if isinstance(number, Integral) else float(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number in a range, of Python or NumPy, with at least one bound. A bool is rejected.

    kind: int, or float for any real number.
    above: exclusive lower bound.
    least, most: inclusive lower and upper bounds.
    finite: reject infinity. YAML values must always be finite.
    unit: for error messages, such as "seconds".
    """

    kind: type[int] | type[float] = float
    above: float | None = None
    least: float | None = None
    most: float | None = None
    finite: bool = False
    unit: str = ""

    def check(self, name: str, value: Any, or_none: str = "") -> None:
        """Raise TypeError for another type, ValueError for a number outside the range."""
        if not (is_integer(value) if self.kind is int else is_number(value)):
            what = ("an int" if self.kind is int else "a number") + (self.unit and " of ")
            raise TypeError(f"{name} must be {what}{self.unit}{or_none}, not {show(value)}")
        if not self._contains(value):
            raise ValueError(f"{name} must {self._range}, not {show(value)}")

    def _contains(self, value: float) -> bool:
        # No conversion: a Python int may be too large for a float. Every comparison with NaN is
        # False, so NaN is rejected by the bound that is always given.
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and not (self.finite and value == math.inf)
            and not (self.kind is float and is_integer(value) and value > sys.float_info.max)
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
    """The declaration of one option, read from its dataclass field.

    text: documentation for users.
    rule: check of the value; None if the code that uses the option checks it.
    key: dotted path in a run's YAML configuration; "" if the configuration does not have it.
    shared: all ranks must have the same value.
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
    """Declare a dataclass field as an option. None is allowed if it is the default."""
    return field(default=default, metadata={_DECLARED: (rule, text, key, shared)})


def options_of(policy: Any) -> Iterator[Option]:
    """Yield the options declared by a dataclass or by the class of an instance."""
    for item in fields(policy):
        if _DECLARED in item.metadata:
            yield Option(item.name, item.default, *item.metadata[_DECLARED])


def check_options(policy: Any) -> Any:
    """Check the value of every option of a policy instance, and return it with plain numbers.

    Raises:
        TypeError, ValueError: for the first wrong value; the message names the option.
    """
    numbers: dict[str, int | float] = {}
    for declared in options_of(policy):
        value = getattr(policy, declared.name)
        optional = declared.default is None
        if declared.rule is not None and not (optional and value is None):
            declared.rule.check(declared.name, value, " or None" if optional else "")
            if isinstance(declared.rule, Number):
                numbers[declared.name] = plain(value)
    return replace(policy, **numbers)


def check_policy(name: str, policy: Any, kind: type) -> Any:
    """Check that `policy` is a valid instance of `kind`, and return it with plain numbers.

    Args:
        name: the argument's name, for the error message.

    Raises:
        TypeError, ValueError: the message names the argument or the option.
    """
    if not isinstance(policy, kind):
        raise TypeError(f"{name} must be {kind.__name__}(...), not {show(policy)}")
    return check_options(policy)


def _documented(policy: type[C]) -> type[C]:
    """Add the text of every option to the docstring of its class."""
    lines = [
        textwrap.fill(
            f"{declared.name}: {declared.text}",
            width=100,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
        for declared in options_of(policy)
    ]
    policy.__doc__ = "\n".join([inspect.cleandoc(policy.__doc__ or ""), "", "Args:", *lines])
    return policy


@_documented
@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPolicy:
    """Where the optimizer stores its state and how it moves data, for `OffloadAdam(offload=...)`.

        OffloadAdamW(model.parameters(), module=model, offload=OffloadPolicy(pin="staging"))

    Values are checked when an optimizer is constructed, not here. A mistake on one rank then raises
    an error on all ranks.
    """

    pin: Pin = option(
        "all",
        Choice(get_args(Pin)),
        "Host memory to page-lock if a parameter is on CUDA: 'all' pins state and staging "
        "buffers, 'staging' only the buffers that copies go through, 'none' nothing. 'all' is "
        "fastest, but the system cannot swap the state out. If pinning all state fails, 'all' "
        "falls back to 'staging' with a warning.",
        key="memory.pin",
    )
    offload_fraction: float = option(
        1.0,
        Number(least=0, most=1),
        "Fraction, from 0 to 1, of the elements of parameters on CUDA whose state is in host "
        "memory, rounded up to whole buckets. Lower it if GPU memory is free: the buckets that the "
        "forward needs first then keep their state on the GPU and are updated there, within 2 ULP "
        "of the exact result. This takes 12 bytes per 16-bit parameter, or 8 per fp32 parameter, "
        "divided by the number of ranks, and the gradients of these buckets.",
        key="memory.offload_fraction",
        shared=True,
    )
    bucket_nbytes: int | None = option(
        None,
        Number(kind=int, least=1),
        "Bytes of parameters in one bucket, the unit of reduce-scatter, update and all-gather. "
        "By default 32 MiB times the number of ranks, limited to 256 MiB and to 1/16 of the bytes "
        "of all parameters, but at least 32 MiB. Lower it if the buffers for buckets take too much "
        "memory. Smaller buckets cost more launches and collectives.",
        key="optimizer.bucket_nbytes",
        shared=True,
    )
    snapshot_buffer_nbytes: int = option(
        0,
        Number(kind=int, least=0),
        "Maximum bytes of host memory, for each rank, into which `begin_checkpoint` copies state "
        "that is not yet on disk. An update waits for the disk only if the state of its bucket "
        "does not fit. 0 for no buffer.",
    )
    allow_overcommit: bool = option(
        False,
        Flag(),
        "Construct the optimizer even if the state of this node's ranks is predicted not to fit "
        "into the node's memory, instead of raising HostMemoryError. Set it if the prediction is "
        "wrong for this node, for example because other processes will free memory.",
        key="memory.allow_overcommit",
    )
    keep: Keep = option(
        "none",
        Choice(get_args(Keep)),
        "'shared' keeps the state in a file in shared memory (`keep_path`) that outlives the "
        "process. 'keeper' keeps it in anonymous memory, which a small process of its own holds: "
        "no file system limits its size. If the process is killed, the next one completes the step "
        "that was decided last, to the same bits, and continues from there without a checkpoint. "
        "All state must be in host memory. A further backward of a step needs accumulate='host' "
        "or no_sync().",
        key="memory.keep",
        shared=True,
    )
    keep_path: str | None = option(
        None,
        Text(),
        "Folder of kept state. Give each run its own: a run resumes from the state that it finds "
        "there. With 'shared', it has one file for each rank and should be in memory: in /dev/shm, "
        "or on another tmpfs or a hugetlbfs. With 'keeper', it has the keeper's socket and must be "
        "on a file system of the node: in /tmp.",
        key="memory.keep_path",
    )
    resume_kept: bool = option(
        True,
        Flag(),
        "With `keep`: continue from the state in `keep_path` if it is of the same model and world "
        "size, see `resumed_step` of the optimizer. If False, replace it.",
        shared=True,
    )
    attach_timeout: float = option(
        60.0,
        Number(least=0, finite=True, unit="seconds"),
        "Seconds to wait until the process that last used the kept state has ended.",
        key="memory.attach_timeout",
    )
    keep_for: float = option(
        900.0,
        Number(above=0, finite=True, unit="seconds"),
        "With 'keeper': seconds after which the state is freed if no process uses it.",
        key="memory.keep_for",
    )
    units: Sequence[torch.nn.Module] | None = option(
        None,
        None,
        "Submodules of `module` whose forward waits only for their own parameters, while updates "
        "of other parameters run. None for the children of every outermost ModuleList. Set it if "
        "the model's layers are not in a ModuleList.",
    )


@_documented
@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy:
    """When a rank counts as dead or hung, for `OffloadAdam(failures=...)`.

    Ranks that wait for it then raise `PeerFailedError`. Values are checked when an optimizer is
    constructed.
    """

    dead_after: float = option(
        10.0,
        Number(above=0, finite=True, unit="seconds"),
        "Seconds without a heartbeat after which a rank is declared dead. Raise it if the machine "
        "is so busy that live ranks miss heartbeats.",
        key="coordinator.dead_after",
    )
    stuck_after: float = option(
        300.0,
        Number(above=0, finite=True, unit="seconds"),
        "Seconds without progress after which a live rank that others wait for is declared hung. "
        "Raise it if one rank may work alone for longer, or use `optimizer.long_running()`.",
        key="coordinator.stuck_after",
    )

    @property
    def beat_s(self) -> float:
        """Seconds between two heartbeats."""
        return min(1.0, self.dead_after / 5)


STATE_FORMAT = Choice(get_args(StateFormat))
_MAX_NORM = Number(above=0)  # infinity clips nothing


def check_max_norm(name: str, value: float | None) -> float | None:
    """Check a maximum gradient norm; return it as a float, or None for no clipping.

    Raises:
        TypeError, ValueError: the message calls the value `name`.
    """
    if value is None:
        return None
    _MAX_NORM.check(name, value)
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionOptions:
    """The arguments that `OffloadAdam` and `Adam` have in common, except hyperparameters.

    Both signatures repeat these names and defaults, so that `help()` and editors show them.
    """

    module: torch.nn.Module | None = None
    process_group: dist.ProcessGroup | None = None
    max_grad_norm: float | None = option(
        None,
        _MAX_NORM,
        "Clip the global 2-norm of the gradients to this value, inside the update. By default they "
        "are not clipped.",
        key="optimizer.max_grad_norm",
        shared=True,
    )
    gradient_reduction: str | None = option(
        None,
        Choice(("optimizer", "external")),
        "Who averages gradients over the ranks: 'optimizer', or 'external' for "
        "DistributedDataParallel or your own code.",
        key="optimizer.gradient_reduction",
    )
    reduce_dtype: torch.dtype | None = option(
        None,
        Dtype("float32", "fp32"),
        "fp32 to average 16-bit gradients in fp32. By default they are averaged in their dtype.",
        key="optimizer.reduce_dtype",
        shared=True,
    )
    state_format: StateFormat = option(
        "fp32",
        STATE_FORMAT,
        "Format of the state: 'fp32', or 'bf16', 'mixed' or 'int8', each with less memory than the "
        "one before. These three round moments stochastically: 'bf16' to bfloat16, 'mixed' "
        "exp_avg to bfloat16 and exp_avg_sq to 8 bits, 'int8' both to 8 bits. A bf16 parameter is "
        "a part of its master weight: 'bf16' stores 16 more bits, exactly fp32, and 'mixed' and "
        "'int8' store 8 more bits. Prefer 'bf16' at learning rates below 1e-5. The state of "
        "tensors with fewer than two dimensions stays in fp32. A parameter group's own "
        "`state_format` applies to all of its parameters.",
        key="optimizer.state_format",
        shared=True,
    )
    accumulate: str | None = option(
        "auto",
        Choice(("auto", "host", "error", None)),
        "What a further backward of one step does if gradients leave `.grad` during backward. "
        "'auto' and 'host' reduce and copy its gradients too, and sum them in fp32: 'host' "
        "allocates memory for the sums at construction, 'auto' at the first such backward. 'error' "
        "raises. Backwards inside `no_sync()` are summed in `.grad`, and the sum is reduced once.",
        key="optimizer.accumulate",
        shared=True,
    )
    num_threads: int | None = option(
        None,
        Number(kind=int, least=1),
        "CPU threads of this rank's update. By default the allowed cores divided by the ranks of "
        "this node, minus one if parameters are on a GPU.",
        key="optimizer.num_threads",
    )
    overlap: bool | None = option(
        None,
        Flag(),
        "Return from `step()` before the updates finish: they run during the next forward. By "
        "default true with `module` (YAML: `streaming`, `use_offload`) if the model runs on a GPU.",
        key="optimizer.overlap",
    )
    defer: bool = option(
        False,
        Flag(),
        "Allocate no state before the first step. Set it if the model is sharded, or gets its "
        "values, after the optimizer is constructed.",
    )
    offload: OffloadPolicy = OffloadPolicy()
    failures: FailurePolicy = FailurePolicy()


def resolve_overlap(overlap: bool | None, *, hooked: bool, reduces: bool, on_device: bool) -> bool:
    """Return whether updates run during the next forward.

    Args:
        overlap: the option's value.
        hooked: hooks on the model's forward wait for its parameters.
        reduces: the optimizer averages the gradients.
        on_device: all parameters are on a device.
    """
    if overlap is None:
        overlap = on_device
    # Gradients that DDP or the caller averages stay in `.grad`. If they are in host memory, an
    # update that is still running reads them there while the next backward overwrites them.
    return overlap and hooked and (reduces or on_device)
