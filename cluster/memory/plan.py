"""Does the plan fit the devices' memory? Per phase and device, with the nearest setting that does.

    models = read_models(config, roles)                     # or facts of weights one does not have:
    models = {"checkpoints/llava-1.5-7b-hf": config_facts(LlavaConfig()), ...}
    plan = plan_memory(config, roles, parse_assumed("4x80"), models)
    plan.problems                                           # empty where all fits
    check_memory(config, roles, devices, models)            # raises ConfigError with a proposal

``config_facts`` is in `fgaif.lvlm.sizes`, ``parse_assumed`` in `cluster.memory.devices`, arithmetic
per actor in `cluster.memory.actors`. Everything here is pure: no Ray, no device is asked.

Actors are packed onto GPUs in the order in which a run starts them, each on the fullest GPU that
still has its share, as Ray chooses within a node. Ray may place otherwise where actors start in
another order (after deaths) or where there are several nodes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from rich.console import Console
from rich.table import Table

from cluster.memory.actors import GIB, PARTS, ActorMemory, Models, actor_memory, read_models
from cluster.memory.devices import Devices
from cluster.placement import ROLES, Bundle, Role, held_roles, phases, plan_roles
from fgaif.config import Config, with_overrides
from fgaif.errors import ConfigError

_RAY_HOST = GIB
"""Ray's own processes and object store, and the driver of a run, on the host."""
_EPSILON = 1e-6
_SIZES = (24, 40, 48, 80, 94, 141, 192)  # GB that GPUs are sold with


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """An actor of a phase: its GPUs by number, none for the host, and its memory."""

    bundle: Bundle
    gpus: tuple[int, ...]
    memory: ActorMemory
    sleeps: bool = False
    """An engine that gives its device's memory to others while they work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A device of a phase: ``gpu`` is its number, None the host; ``size`` None where unknown."""

    phase: str
    gpu: int | None
    size: int | None
    actors: tuple[Planned, ...]
    extra: int = 0

    @property
    def name(self) -> str:
        """As people say it."""
        return "host" if self.gpu is None else f"GPU {self.gpu}"

    @property
    def on_it(self) -> tuple[Planned, ...]:
        """Actors whose device it is; others only have their process on the host."""
        return tuple(actor for actor in self.actors if self.gpu is not None or not actor.gpus)

    @property
    def total(self) -> int:
        """Bytes of all its actors; with engines that sleep the larger of what there is while they
        are awake and while others work."""
        sleepers = [actor for actor in self.actors if actor.sleeps]
        if self.gpu is None or not sleepers:
            return self.extra + sum(self.part(actor) for actor in self.actors)
        others = [actor for actor in self.actors if not actor.sleeps]
        awake = sum(self.part(actor) for actor in sleepers) + sum(map(_idle, others))
        asleep = sum(actor.memory.process for actor in sleepers) + sum(map(self.part, others))
        return max(awake, asleep)

    def part(self, actor: Planned) -> int:
        """What one of its actors holds on it."""
        return actor.memory.host if self.gpu is None else actor.memory.total

    def problem(self) -> str:
        """Why it does not fit, empty where it does or its size is unknown."""
        if self.size is None or self.total <= self.size:
            return ""
        parts = [f"{actor.bundle.name} {self.part(actor) / GIB:.1f}" for actor in self.actors]
        if self.extra:
            parts.append(f"Ray and the driver {self.extra / GIB:.1f}")
        return (
            f"{self.phase}: {self.name} would hold {self.total / GIB:.1f} GiB of "
            f"{self.size / GIB:.1f}: {', '.join(parts)}"
        )


def _idle(actor: Planned) -> int:
    """What an actor keeps while a sleeping engine has woken: of judges and workers of reward
    training, which come and go while it sleeps, nothing."""
    if actor.bundle.role in ("judge", "trainer"):
        return 0
    return actor.memory.total - actor.memory.activations


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Loads of all devices in all phases."""

    devices: Devices
    loads: tuple[Load, ...]
    unplaced: tuple[str, ...]
    """Why actors have no GPU, by phase."""

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Everything that does not fit; empty where all fits, as far as sizes are known."""
        found = [*self.unplaced, *(load.problem() for load in self.loads)]
        for load in self.loads:
            found += [
                f"{load.phase}: {actor.bundle.name}: {actor.memory.shortage}"
                for actor in load.actors
                if load.gpu is not None and actor.gpus[0] == load.gpu and actor.memory.shortage
            ]
        return tuple(problem for problem in found if problem)

    @property
    def unknown(self) -> str:
        """One line where nothing could be compared, else empty."""
        needed = {load.gpu is not None for load in self.loads if load.size is None}
        if True in needed:
            return (
                f"the GPUs' memory is not known ({self.devices.found}), so nothing is compared "
                "with it: give --assume COUNTxGB, such as --assume 4x80"
            )
        if False in needed:
            return f"the host's memory is not known ({self.devices.found}), so it is not compared"
        return ""

    @property
    def fits(self) -> str:
        """What was compared, in one line, where all of that fits; empty where nothing was."""
        compared = {load.gpu is not None for load in self.loads if load.size is not None}
        if self.problems or not (self.unknown == "" or True in compared):
            return ""
        return f"{'the GPUs have room' if self.unknown else 'fits'} ({self.devices.found})"


def memory_table(plan: MemoryPlan) -> Table:
    """Render a plan: a block per phase and device, a row per actor, its parts in GiB."""
    table = Table(
        title="memory in GiB, estimated; what a phase needs at the same time", title_justify="left"
    )
    table.add_column("phase, device")
    table.add_column("actor")
    for column in (*PARTS, "all", "of"):
        table.add_column(column, justify="right")
    for load in plan.loads:
        title = f"{load.phase}, {load.name}"
        for actor in load.on_it:
            parts = [f"{getattr(actor.memory, part) / GIB:.1f}" for part in PARTS]
            table.add_row(title, actor.bundle.name, *parts, f"{load.part(actor) / GIB:.1f}", "")
            title = ""
        _add_sums(table, load)
        table.add_section()
    return table


def _add_sums(table: Table, load: Load) -> None:
    """The last row of a device: its sum; on a host with what actors on GPUs keep there."""
    title = "" if load.on_it else f"{load.phase}, {load.name}"
    blank = [""] * len(PARTS)
    others = [actor for actor in load.actors if actor not in load.on_it]
    if others:
        held = sum(load.part(actor) for actor in others)
        name = "what the actors on GPUs keep there"
        table.add_row(title, name, *blank, f"{held / GIB:.1f}", "")
        title = ""
    if load.extra:
        table.add_row(title, "Ray and the driver", *blank, f"{load.extra / GIB:.1f}", "")
        title = ""
    asleep = any(actor.sleeps for actor in load.on_it)
    title = title or ("(engines sleep while others work)" if asleep else "")
    size = "unknown" if load.size is None else f"{load.size / GIB:.1f}"
    style = "bold red" if load.problem() else None
    table.add_row(title, "all", *blank, f"{load.total / GIB:.1f}", size, style=style)


def plan_memory(
    config: Config,
    roles: Collection[Role] = ROLES,
    devices: Devices | None = None,
    models: Models | None = None,
) -> MemoryPlan:
    """Plan the memory of these roles on the devices (default: unknown ones).

    ``models`` holds facts of checkpoints by name; by default they are read from the checkpoints.

    Raises:
        CheckpointError: a checkpoint is missing.
    """
    devices = devices or Devices(gpus=None, host=None, found="no device was given")
    bundles = plan_roles(config, roles)
    present = held_roles(bundles)
    models = read_models(config, present) if models is None else models
    loads: list[Load] = []
    unplaced: list[str] = []
    seen: list[set[str]] = []
    for phase, order in phases(config).items():
        members = sorted(
            (bundle for bundle in bundles if bundle.role in order),
            key=lambda bundle: order.index(bundle.role),
        )
        names = {bundle.name for bundle in members}
        if not names or any(names <= before for before in seen):
            continue
        seen.append(names)
        places, lacking = pack(members, None if devices.gpus is None else len(devices.gpus))
        if lacking:
            unplaced.append(f"{phase}: {_no_room(lacking, devices)}")
            continue
        loads += _loads(phase, members, places, config, models, devices)
    return MemoryPlan(devices=devices, loads=tuple(loads), unplaced=tuple(unplaced))


def pack(
    bundles: Sequence[Bundle], count: int | None
) -> tuple[dict[str, tuple[int, ...]], list[Bundle]]:
    """Give each bundle GPU numbers below ``count`` (None: as many as it takes), in order.

    Shares below one go to the fullest GPU that has room, the lowest of equals; whole GPUs to free
    ones. Returns the numbers by name, and the bundles that found no room.
    """
    free: list[float] = [1.0] * (count or 0)
    places: dict[str, tuple[int, ...]] = {}
    lacking = []
    for bundle in bundles:
        whole, share = int(bundle.gpus), bundle.gpus - int(bundle.gpus)
        wanted = [1.0] * whole + ([share] if share > _EPSILON else [])
        taken: list[int] = []
        for part in wanted:
            fitting = [
                index
                for index, left in enumerate(free)
                if left >= part - _EPSILON and index not in taken
            ]
            if not fitting and count is None:
                free.append(1.0)
                fitting = [len(free) - 1]
            if not fitting:
                lacking.append(bundle)
                break
            best = min(fitting, key=lambda index: (free[index], index))
            taken.append(best)
        else:
            for part, index in zip(wanted, taken, strict=True):
                free[index] -= part
            places[bundle.name] = tuple(taken)
    return places, lacking


def _no_room(lacking: Sequence[Bundle], devices: Devices) -> str:
    names = ", ".join(f"{bundle.name} ({bundle.gpus:g} GPU)" for bundle in lacking)
    return f"no room among {len(devices.gpus or ())} GPUs ({devices.found}) for {names}"


def _loads(
    phase: str,
    members: Sequence[Bundle],
    places: Mapping[str, tuple[int, ...]],
    config: Config,
    models: Models,
    devices: Devices,
) -> Iterator[Load]:
    def size(index: int) -> int | None:
        return None if devices.gpus is None else devices.gpus[index]

    planned = [
        Planned(
            bundle=bundle,
            gpus=places[bundle.name],
            sleeps=config.cluster.engine.sleep and bundle.role == "rollout",
            memory=actor_memory(
                bundle.role,
                config,
                models,
                holds=bundle.holds,
                gpu=size(places[bundle.name][0]) if places[bundle.name] else None,
                on_gpu=bool(places[bundle.name]),
            ),
        )
        for bundle in members
    ]
    for index in sorted({index for actor in planned for index in actor.gpus}):
        on_it = tuple(actor for actor in planned if index in actor.gpus)
        yield Load(phase=phase, gpu=index, size=size(index), actors=on_it)
    yield Load(phase=phase, gpu=None, size=devices.host, actors=tuple(planned), extra=_RAY_HOST)


def check_memory(
    config: Config,
    roles: Collection[Role] = ROLES,
    devices: Devices | None = None,
    models: Models | None = None,
) -> MemoryPlan:
    """The plan, where it fits or sizes are unknown.

    Raises:
        ConfigError: names the device, its actors and the nearest setting that fits.
    """
    plan = plan_memory(config, roles, devices, models)
    refuse(plan, config, roles, models)
    return plan


def show_memory(
    config: Config,
    roles: Collection[Role],
    devices: Devices,
    console: Console,
    *,
    full: bool = True,
) -> None:
    """Print the plan of these roles; refuse it like :func:`check_memory`.

    ``full`` has every actor and its parts, else there is a line for each phase.
    """
    models = read_models(config, held_roles(plan_roles(config, roles)))
    plan = plan_memory(config, roles, devices, models)
    if not plan.loads and not plan.unplaced:
        return
    if full:
        console.print(memory_table(plan))
        for name, size in models.items():
            tokens = f"{name}: an image takes {size.image_tokens:,} tokens at most"
            console.print(tokens, markup=False, soft_wrap=True)
    else:
        for line in _memory_lines(plan):
            console.print(line, markup=False, soft_wrap=True, highlight=False)
    if plan.unknown:
        console.print(plan.unknown, soft_wrap=True, markup=False)
    refuse(plan, config, roles, models)
    if plan.fits:
        console.print(plan.fits, markup=False)


def _memory_lines(plan: MemoryPlan) -> Iterator[str]:
    """A line for each phase: what the fullest GPU, if there is any, and the host would hold."""
    for phase in dict.fromkeys(load.phase for load in plan.loads):
        loads = [load for load in plan.loads if load.phase == phase]
        gpus = sorted((load for load in loads if load.gpu is not None), key=lambda load: load.total)
        hosts = [load for load in loads if load.gpu is None]
        parts = [
            f"{load.name} {load.total / GIB:.1f}"
            + (f" of {load.size / GIB:.1f} GiB" if load.size is not None else " GiB")
            for load in (*gpus[-1:], *hosts)
        ]
        yield f"memory, {phase}: {', '.join(parts)}"


def refuse(
    plan: MemoryPlan, config: Config, roles: Collection[Role], models: Models | None = None
) -> None:
    """Raise ConfigError, with the nearest setting that fits, where the plan does not fit."""
    if plan.problems:
        lines = [*plan.problems, advise(plan, config, roles, models)]
        raise ConfigError("this does not fit the memory:\n" + "\n".join(lines))


def advise(
    plan: MemoryPlan,
    config: Config,
    roles: Collection[Role] = ROLES,
    models: Models | None = None,
) -> str:
    """The nearest setting that fits the plan's devices, or the devices that would do."""
    if models is None:
        models = read_models(config, held_roles(plan_roles(config, roles)))
    if found := nearest(config, roles, plan.devices, models):
        return f"this fits: {' '.join(found)}"
    return larger(config, roles, plan.devices, models)


def nearest(
    config: Config, roles: Collection[Role], devices: Devices, models: Models
) -> tuple[str, ...]:
    """Overrides with which the plan fits, as few and as mild as possible; empty if there are none.

    Tried from what only costs time to what changes results: smaller micro-batches, gradient
    checkpointing, another share for engines, shorter responses.
    """
    best: tuple[float, tuple[str, ...]] | None = None
    for cost, overrides in _candidates(config, roles):
        if best is not None and cost >= best[0]:
            continue
        if not plan_memory(with_overrides(config, overrides), roles, devices, models).problems:
            best = (cost, overrides)
    return () if best is None else best[1]


def _candidates(config: Config, roles: Collection[Role]) -> Iterator[tuple[float, tuple[str, ...]]]:
    """Overrides with a cost, cheapest settings first; a cost is a sum over the settings changed."""
    ppo = _halvings("ppo.micro_batch", config.ppo.micro_batch)
    reward = _halvings("reward.micro_batch", config.reward.micro_batch)
    none: list[tuple[float, tuple[str, ...]]] = [(0.0, ())]
    if not {"learner", "reference"} & set(roles):
        ppo = none
    if not {"reward", "trainer"} & set(roles):
        reward = none
    again = (
        none
        if config.policy.gradient_checkpointing
        else [
            *none,
            (2.5, ("policy.gradient_checkpointing=true",)),
        ]
    )
    shares = none + [
        (
            1.5 + abs(percent / 100 - config.cluster.engine.gpu_memory_utilization) * 5,
            (f"cluster.engine.gpu_memory_utilization={percent / 100:g}",),
        )
        for percent in range(95, 4, -5)
        if abs(percent / 100 - config.cluster.engine.gpu_memory_utilization) > _EPSILON
    ]
    lengths = none + [
        (
            8.0 * step,
            (f"policy.max_new_tokens={config.policy.max_new_tokens >> step}",),
        )
        for step in (1, 2)
        if config.policy.max_new_tokens >> step >= 32
    ]
    choices = [
        (sum(cost for cost, _ in chosen), tuple(item for _, items in chosen for item in items))
        for chosen in product(ppo, reward, again, shares, lengths)
    ]
    return iter(sorted(choices, key=lambda choice: choice[0]))


def _halvings(key: str, value: int) -> list[tuple[float, tuple[str, ...]]]:
    found: list[tuple[float, tuple[str, ...]]] = [(0.0, ())]
    while value > 1:
        value //= 2
        found.append((float(len(found)), (f"{key}={value}",)))
    return found


def larger(config: Config, roles: Collection[Role], devices: Devices, models: Models) -> str:
    """What devices would do, where no setting does."""
    if not devices.gpus:
        need = max(load.total for load in plan_memory(config, roles, devices, models).loads)
        return f"no smaller setting fits; a machine with {need / GIB:.0f} GiB would do"
    count = len(devices.gpus)
    for size in _SIZES:
        bytes_ = size * 10**9
        if bytes_ > min(devices.gpus):
            wished = Devices(gpus=(bytes_,) * count, host=None, found="")
            if (
                nearest(config, roles, wished, models)
                or not plan_memory(config, roles, wished, models).problems
            ):
                return f"no smaller setting fits; {count} GPU(s) of {size} GB would do"
    return "no smaller setting fits, nor would larger GPUs: give the roles more GPUs"
