"""Every option once: its type, default, bound and documentation.

A field of one of the classes below is an option: `Annotated[type, text]`, or `Annotated[type, text, check]`. `analyze`,
`Monitor` and the callbacks take the fields of such a class as their keywords (see `ww_monitor.signatures`): type
checkers know names and types, `help()`, `inspect.signature` and YAML the defaults and the texts too. A new option is a
field here and the place that uses it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ww_monitor.errors import InvalidArgument, SpectralWarning, check_names, check_positive_int, check_share
from ww_monitor.matrix import Matrix
from ww_monitor.record import Action, Rule, Sink, Skipped
from ww_monitor.signatures import Settings
from ww_monitor.spectra.marchenko_pastur import SIGNIFICANCE
from ww_monitor.spectra.traps import REPLICAS

Preset = Literal["default", "weightwatcher"]

MAX_OVERHEAD = 0.02
"""Share of a run's time that training may lose to the monitor (our choice: what nobody switches a monitor off for)."""

WHOLE: Mapping[str, int] = {"*": 1}
"""`split` that leaves every fused weight whole, as weightwatcher does."""


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions(Settings):
    """Which definitions an analysis follows."""

    preset: Annotated[
        Preset, '`"default"`, or `"weightwatcher"` for that tool\'s columns and definitions (version 0.7.7).'
    ] = "default"
    metrics: Annotated[
        Sequence[str] | str | None,
        'Names of metrics; `None` for the preset\'s standard ones, `"all"` for those that cost a multiple too.',
    ] = None
    seed: Annotated[int, "Seed of the private generator that shuffles."] = 0
    replicas: Annotated[int, "Shuffles a layer that may hold a trap.", check_positive_int] = REPLICAS
    significance: Annotated[
        float,
        "Probability of a false spike in a random layer, and of a false trap in one shuffle of it.",
        check_share,
    ] = SIGNIFICANCE
    fit: Annotated[
        Literal["csn", "hill", "truncated"],
        '`"csn"` (Clauset, Shalizi & Newman), `"hill"` (the `fit_k` largest eigenvalues), or `"truncated"` (a power'
        ' law with exponential cut-off from the xmin of `"csn"` on).',
    ] = "csn"
    fit_k: Annotated[
        int | None, "Size of the Hill estimator's tail; `None` for half of the eigenvalues.", check_positive_int
    ] = None
    fix_fingers: Annotated[
        Literal[None, "clip_xmax"],
        '`"clip_xmax"` leaves up to ten largest eigenvalues out where that lowers alpha by more than 1.',
    ] = None
    aspect_ratio: Annotated[
        float | None,
        "Fit the tail to windows of this ratio of long to short side (FARMS), so that alpha can be compared between"
        " layers of different shape; `None` fits the whole matrices.",
    ] = None
    strict: Annotated[bool, "Raise on the first layer that fails, instead of giving it a status."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.fit_k is not None and self.fit != "hill") or (self.fix_fingers and self.fit == "hill"):
            raise InvalidArgument(
                f"{self.where}: fit_k goes with fit='hill', fix_fingers with the others; got fit={self.fit!r},"
                f" fit_k={self.fit_k!r}, fix_fingers={self.fix_fingers!r}"
            )
        if self.aspect_ratio is not None and not self.aspect_ratio >= 1:
            raise InvalidArgument(f"{self.where}: aspect_ratio must be None or >= 1; got {self.aspect_ratio!r}")


def matching(pattern: str, names: Collection[str]) -> frozenset[str]:
    """The names that a pattern selects: itself, else those it matches with brackets as they are, else as a glob.

    >>> names = ["fc", "fc.lora[a]", "fc.lora[b]", "h1", "h2"]
    >>> [sorted(matching(p, names)) for p in ("fc.lora[a]", "*.lora[b]", "*.lora[*]", "h[12]", "x")]
    [['fc.lora[a]'], ['fc.lora[b]'], ['fc.lora[a]', 'fc.lora[b]'], ['h1', 'h2'], []]
    """
    if pattern in names:
        return frozenset([pattern])
    literal = pattern.replace("[", "[[]")
    hits = (frozenset(name for name in names if fnmatchcase(name, glob)) for glob in (literal, pattern))
    return next(filter(None, hits), frozenset())


def warn(message: str) -> None:
    """Issue a `SpectralWarning`."""
    warnings.warn(f"ww_monitor: {message}", SpectralWarning, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class Patterns(Settings):
    """Which layers to look at, by their names."""

    include: Annotated[
        Sequence[str],
        "Globs on layer names; none keeps all. A name selects itself, and brackets are read as they are where a name"
        " has them (`*.lora[default]`).",
    ] = ()
    exclude: Annotated[Sequence[str], "Globs on layer names to leave out, also where they are included."] = ()

    def __post_init__(self) -> None:
        for name, value in (("include", self.include), ("exclude", self.exclude)):
            if isinstance(value, str):
                raise InvalidArgument(f"{self.where}: {name} must be a sequence of globs; got the string {value!r}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Select(Patterns):
    """Which matrices to analyse.

    >>> import torch
    >>> Select(include=["encoder.*"], exclude=["*.head"]).reason_to_skip(
    ...     Matrix("encoder.head", "dense", (1, 64, 32), lambda: torch.zeros(1, 64, 32)))
    "excluded by pattern '*.head'"
    """

    min_size: Annotated[
        int, "Least number of eigenvalues of a layer; 8 is the least tail a power-law fit accepts.", check_positive_int
    ] = 8
    max_size: Annotated[int | None, "Largest number of eigenvalues of a layer.", check_positive_int] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_size is not None and self.max_size < self.min_size:
            raise InvalidArgument(
                f"{self.where}: max_size must be None or >= min_size={self.min_size}; got {self.max_size!r}"
            )

    def reason_to_skip(self, matrix: Matrix, names: Mapping[str, Collection[str]] | None = None) -> str:
        """Why `matrix` is left out, or `""` if it is analysed.

        Args:
            matrix: One of a model.
            names: What each pattern selects in that model; `None` asks of this name alone.
        """
        own = {p: matching(p, [matrix.name]) for p in (*self.include, *self.exclude)} if names is None else names
        if self.include and not any(matrix.name in own[pattern] for pattern in self.include):
            return "matches no include pattern"
        for pattern in self.exclude:
            if matrix.name in own[pattern]:
                return f"excluded by pattern {pattern!r}"
        if matrix.num_eigenvalues < self.min_size:
            return f"{matrix.num_eigenvalues} eigenvalues, fewer than min_size={self.min_size}"
        if self.max_size is not None and matrix.num_eigenvalues > self.max_size:
            return f"{matrix.num_eigenvalues} eigenvalues, more than max_size={self.max_size}"
        return ""

    def apply(
        self, items: Iterable[Matrix | Skipped], *, say: Callable[[str], None] = warn
    ) -> Iterator[Matrix | Skipped]:
        """The same items in the same order, with every matrix that is not wanted turned into a `Skipped`.

        Args:
            items: All of a model.
            say: Is told of a pattern that matches no name; a `SpectralWarning` where none is given.
        """
        listed = list(items)
        known = [item.name for item in listed]
        names = {pattern: matching(pattern, known) for pattern in (*self.include, *self.exclude)}
        for pattern, selected in names.items():
            if known and not selected:
                argument = "include" if pattern in self.include else "exclude"
                say(f"{argument}={pattern!r} matches no layer; the first are {', '.join(map(repr, known[:3]))}")
        for item in listed:
            reason = self.reason_to_skip(item, names) if isinstance(item, Matrix) else ""
            yield Skipped(item.name, item.kind, item.shape, reason) if reason else item


@dataclass(frozen=True, kw_only=True)
class Stored(Settings):
    """Which of the models that a checkpoint or a mapping holds."""

    part: Annotated[
        str, 'Which state dict of several in a file or mapping to read, by its path (`"ema"`); else all but averages.'
    ] = ""


@dataclass(frozen=True, kw_only=True)
class WalkOptions(Settings):
    """What counts as one matrix."""

    split: Annotated[
        Mapping[str, int | Sequence[int]] | None,
        "Glob on the name → number or sizes of the parts that a fused weight is cut into along its outputs; fused"
        " projections of known models are cut without it, 1 leaves them whole (as weightwatcher's preset does).",
    ] = None
    experts: Annotated[
        Literal["separate", "pooled"],
        '`"separate"` gives a matrix for each expert of a stacked weight, `"pooled"` one with a slice for each.',
    ] = "separate"
    lora: Annotated[
        Sequence[Literal["base", "delta", "merged"]],
        'Which of `"base"`, `"delta"` (B·A with its scale) and `"merged"` to analyse of a layer with adapters.',
    ] = ("base", "delta")

    def for_walker(self, preset: str) -> dict[str, Any]:
        """The keywords of a walker under a preset."""
        whole = WHOLE if self.split is None and preset == "weightwatcher" else self.split
        return {"split": whole, "experts": self.experts, "lora": self.lora}


@dataclass(frozen=True)
class RunOptions(Settings):
    """When to analyse a training, for what, and whom to tell."""

    renamed: ClassVar[Mapping[str, str]] = {"still_bytes": "copy_budget_bytes"}
    ignored: ClassVar[Mapping[str, str]] = {
        "layers_per_step": "a snapshot is of one step; mode='async' is for models whose analysis is felt in a step"
    }

    every_n_steps: Annotated[
        int | None,
        "Analyse when a multiple of this many optimizer steps is reached. If neither this nor `every_n_epochs` is"
        " given, as often as `max_overhead` allows. A callback also analyses before the first step and after the last.",
        check_positive_int,
    ] = None
    every_n_epochs: Annotated[int | None, "Analyse at the end of every so many epochs.", check_positive_int] = None
    _: KW_ONLY
    max_overhead: Annotated[
        float,
        "Share of the run's time that training may lose to the monitor. With an explicit cadence it only warns, once,"
        " after a minute.",
        check_share,
    ] = MAX_OVERHEAD
    mode: Annotated[
        Literal["sync", "async"],
        '`"sync"`, or `"async"`: training goes on while a thread analyses a copy of the weights. One more copy may'
        " wait; if a third is taken the waiting one is dropped and counted in `ww/snapshots_dropped`.",
    ] = "sync"
    copy_budget_bytes: Annotated[
        int | None,
        "Memory on the training device for such a copy; what does not fit is copied to the host. `None` for a quarter"
        " of what is free.",
        check_positive_int,
    ] = None
    stop_on: Annotated[
        Literal[None, "traps", "harmful_traps", "broken_layers"],
        '`"traps"` stops the run when a correlation trap persists, `"harmful_traps"` when one does that the outputs'
        ' depend on (`ww_monitor.trap_harm`), `"broken_layers"` when a layer is NaN. The rule is applied also where'
        " `rules` leaves it out.",
    ] = None
    patience: Annotated[
        int, "For how many consecutive snapshots that must hold in the same layer.", check_positive_int
    ] = 3
    track_delta: Annotated[
        bool,
        "Follow how far each matrix has moved from its weights at the first snapshot: `delta_norm` = ‖W − W₀‖_F/‖W₀‖_F,"
        " and `left_rotation`, `right_rotation` = how far its 8 leading singular directions have turned, 0 to 1."
        " Fine-tuning turns them while spectra stay put. Holds a copy of the weights on the host; a resumed run begins"
        " anew at its first snapshot, and says so.",
    ] = False
    track_updates: Annotated[
        bool,
        "Measure what the one optimizer step before a snapshot changed, ΔW: `update_ratio` = RMS(ΔW)/RMS(W) of W before"
        " it; `update_spectral_norm` = σmax(ΔW), in the scale of the layer's eigenvalues; `update_stable_rank` ="
        " ‖ΔW‖²_F/σmax²; `update_alignment` = ‖UᵀΔWV‖²_F/‖ΔW‖²_F, its share in the 8 leading left and right singular"
        " directions of W. Weights that train are copied to the host before a step after which a snapshot is due. One"
        " step is all that is accumulated for an update and, with several optimizers, what they do in one batch. Half"
        " precision is replaced by float32 masters where the optimizer has them. NaN where rounding hides the update,"
        " for frozen layers, and at a snapshot that could not be foreseen, as in Keras with `steps_per_execution` > 1.",
    ] = False
    rules: Annotated[
        Sequence[Rule] | None, "What to look for (`ww_monitor.rules`); `None` for the `TRAINING_RULES` there."
    ] = None
    actions: Annotated[
        Sequence[Action],
        "What changes the run by what is seen (`ww_monitor.actions`): learning rates or weight decays by layer, on"
        " groups that `ww_monitor.actions.param_groups` has made. Only logged while its `dry_run` is true; else it"
        ' needs `every_n_steps`, at whose multiples its factors change, and `mode="sync"`, so that a run can be'
        " repeated. A loop of your own calls `Monitor.act_on(optimizer)`. Keras has no groups; there a step is changed"
        " after it was made, at the cost of a copy of the weights.",
    ] = ()
    sinks: Annotated[Sequence[Sink], "Where snapshots go (`ww_monitor.sinks`), beside what a callback writes."] = ()
    keep: Annotated[
        int,
        "Snapshots that `history` keeps at most, the latest ones, beside the first; fewer, but never less than the 16"
        " that rules see, where they would have more than 20,000 layers between them. The sinks get all.",
        check_positive_int,
    ] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sinks", tuple(self.sinks))  # of an iterator, which can be read once
        for sink in self.sinks:
            if isinstance(sink, type) or not isinstance(sink, Sink):
                raise InvalidArgument(f"{self.where}: sinks must have write and close; got {sink!r}")
        object.__setattr__(self, "actions", tuple(self.actions))
        for action in self.actions:
            if isinstance(action, type) or not isinstance(action, Action):
                raise InvalidArgument(f"{self.where}: actions must be as ww_monitor.record.Action; got {action!r}")
            if not action.dry_run and (self.every_n_steps is None or self.mode != "sync"):
                raise InvalidArgument(
                    f"{self.where}: actions that are no dry run need every_n_steps and mode='sync', for their times"
                    f" must not depend on a clock; got every_n_steps={self.every_n_steps!r}, mode={self.mode!r}"
                )


@dataclass(frozen=True)
class CallbackOptions(WalkOptions, Select, AnalysisOptions, RunOptions):
    """What every callback takes."""

    where: ClassVar[str] = "SpectralMonitor"
    _: KW_ONLY
    publish: Annotated[
        str | Sequence[str],
        'What trackers, logs and progress bars get: `"key"` for the few values that matter (see'
        ' `ww_monitor.sinks.published`), `"all"`, or names of metrics and globs on keys, such as'
        ' `["key", "entropy", "ww_alpha/*.mlp.*"]`. The history file has everything.',
        check_names,
    ] = "key"
    console: Annotated[bool, "Print findings, a line at the start, and a table at the end."] = True
    history: Annotated[bool, "Write the history file."] = True
    harm_inputs: Annotated[
        Any,
        "A batch, on which `ww_monitor.trap_harm` says what each trap does to the outputs, where there is one: a"
        ' tensor, a mapping passed by name, or a tuple of arguments. `None` draws one if `stop_on="harmful_traps"`.',
    ] = None
    prefix: Annotated[
        str,
        'Put before every key that others see, such as `"teacher/"`, so that two monitors of one run keep apart. Where'
        " two would share their keys the second one's get `2/`.",
    ] = ""


@dataclass(frozen=True)
class KerasOptions(CallbackOptions):
    """What the Keras callback takes: Keras has no folder of its own."""

    _: KW_ONLY
    folder: Annotated[str | Path, "Where the history file goes; it is made at the first snapshot."] = "ww_logs"
