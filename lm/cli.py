"""What the commands share: arguments from dataclasses, and one way to fail."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from lm.config import BUDGETS, RUNTIME, InputError, OptimizerConfig, RunConfig, TrainingConfig

Arguments = TypeVar("Arguments")


def main(command: Callable[[Sequence[str]], Any]) -> None:
    """Runs a command on the process's arguments. The user's mistakes end in one message and exit status 2.

    Where the process is one of several, all of them end together: see `lm.processes.watch`.
    """
    warnings.showwarning = _warn  # type: ignore[assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a text that a terminal has no letters for isn't lost
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command(sys.argv[1:])
        _finish()
        gc.freeze()  # the interpreter's last collection would look through all of JAX for a third of a second
    except SystemExit as end:
        if end.code in (None, 0, *STOPPED):
            _finish()
        else:
            _fail_all(f"ended with status {end.code}", end.code if isinstance(end.code, int) else 1)
        raise
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _reader_gone()
        if error.errno != errno.ENOSPC:
            _crash(error)
            raise
        _fail(_NO_SPACE.format(f" for {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        _fail_all("interrupted", 130)
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # at once: XLA's threads may be at work, and crash while the interpreter is taken down
    except Exception as error:
        if os.strerror(errno.ENOSPC) in str(error):  # a library's own error, of what the system told it
            _fail(_NO_SPACE.format(""))
        _crash(error)
        raise


_NO_SPACE = "no space is left on the disk{}: make room, and give the command again"
STOPPED = (130, 143)
"""Exit statuses of a run that Ctrl-C or SIGTERM has stopped in good order, on all processes."""


def _fail(message: str) -> NoReturn:
    _fail_all(message, 2)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _fail_all(message: str, status: int) -> None:
    """Ends all processes of a run of several; returns where this is the only one."""
    if "lm.processes.watch" in sys.modules:  # loads JAX
        sys.modules["lm.processes.watch"].fail(status, message)


def _crash(error: Exception) -> None:
    """What isn't the user's fault may be another process's; else it is shown here, and all processes end."""
    watch = sys.modules.get("lm.processes.watch")
    if watch is None or not watch.watching():
        return
    if isinstance(error, watch.HostError):
        watch.fail(watch.LOST_STATUS, str(error))
    watch.wait_for_word(error)
    traceback.print_exception(error)
    watch.fail(1, f"{type(error).__name__}: {error}")


def _finish() -> None:
    if "lm.processes.hosts" in sys.modules:
        sys.modules["lm.processes.hosts"].finish()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """For imports of what loads JAX: inside a command, so that Ctrl-C ends it cleanly.

    What they make stays to the end, so the garbage collector leaves it out, now and later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _warn(message: Warning | str, category: type[Warning], *_: object) -> None:
    """A warning as a line, without the place in the code: it is for the user. Of several processes the first warns."""
    if "lm.processes.hosts" in sys.modules and not sys.modules["lm.processes.hosts"].is_first():
        return
    print(f"warning: {message}", file=sys.stderr)


def _reader_gone() -> None:
    """Ends the command where nobody reads its output any more: there is nobody to tell."""
    _fail_all("nobody reads the output any more", 141)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def parse(kind: type[Arguments], arguments: Sequence[str], *, prog: str, default: Arguments | None = None) -> Arguments:
    """A dataclass from command-line arguments. Wrong ones are told with the nearest right ones, exit status 2."""
    config = (tyro.conf.FlagConversionOff,)
    if default is None:
        return tyro.cli(kind, args=list(arguments), prog=prog, config=config)
    return tyro.cli(kind, args=list(arguments), prog=prog, config=config, default=default)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Of a run of several processes, each started with the same command but for --process: how they find each other.

    What isn't given is taken from LM_COORDINATOR, LM_PROCESSES and LM_PROCESS, or from the cluster.
    """

    coordinator: str | None = None
    """Of several processes: HOST:PORT where the first is found. None: LM_COORDINATOR, else as the cluster says."""
    processes: int | None = None
    """How many there are. None: LM_PROCESSES, else as the cluster says (Slurm, Open MPI, Kubernetes, Cloud TPU), else
    1."""
    process: int | None = None
    """Which of them this one is, from 0. None: LM_PROCESS, else as the cluster says."""

    def connect(self) -> None:
        """Makes this process one of them; before JAX looks for devices."""
        from lm.processes import hosts  # loads JAX

        hosts.connect(self.coordinator, self.processes, self.process)


@dataclasses.dataclass(frozen=True)
class PresetArguments:
    """Arguments of a command that takes a preset and fields in place of its own."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class TrainArguments(Processes, PresetArguments):
    """Trains a language model. PRESET comes first: the name of a file in configs/, or the path of a .py file with a
    get_config(); without one it is tiny. Fields that are not given are the preset's."""

    workdir: str | None = None
    """Run directory; one that holds a run continues it. None: runs/PRESET."""


Configured = TypeVar("Configured", bound=PresetArguments)


def train_arguments(
    arguments: Sequence[str], preset: Callable[[str], RunConfig]
) -> tuple[RunConfig, Path, TrainArguments]:
    """The config, the run directory and all arguments of a train.py command line. Without a preset: tiny."""
    name, parsed = with_preset(TrainArguments, arguments, preset, prog="train.py")
    workdir = Path(f"runs/{Path(name).stem}" if parsed.workdir is None else parsed.workdir)
    return parsed.config, workdir, parsed


def with_preset(
    kind: type[Configured], arguments: Sequence[str], preset: Callable[[str], RunConfig], *, prog: str
) -> tuple[str, Configured]:
    """A preset's name, and arguments whose config is that preset's but for what is given."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if named else ("tiny", arguments)
    parsed = parse(kind, rest, prog=f"{prog} [PRESET]", default=kind(preset(name)))
    if parsed.config.init_from is not None:
        _check_going_on(rest)
    training, optimizer = _one_budget(parsed.config.training, rest), _as_read(parsed.config.optimizer, rest)
    config = dataclasses.replace(parsed.config, training=training, optimizer=optimizer)
    return name, dataclasses.replace(parsed, config=config)


def _check_going_on(arguments: Sequence[str]) -> None:
    """Raises InputError for fields that `--init-from` decides."""
    flags = _fields_given(arguments)
    free = {f"model.{name}" for name in RUNTIME}
    taken = [flag for flag in flags if flag.startswith(("model.", "tokenizer.")) and flag not in free]
    if taken:
        raise InputError(
            f"--{taken[0]} can't be given with --init-from, whose model and tokenizer are taken over: leave it out (of "
            f"the model, {', '.join(RUNTIME)} may be given)"
        )


def _fields_given(arguments: Sequence[str]) -> list[str]:
    """The fields that a command line sets, by dotted name, in its order."""
    names = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    return [name.removeprefix("--").replace("-", "_") for name in names]


def _as_read(optimizer: OptimizerConfig, arguments: Sequence[str]) -> OptimizerConfig:
    """Another optimizer or schedule given on the command line: the preset's fields that it doesn't read are left out.

    Those that are given there too stay, and are refused later.
    """
    from lm.validation import READERS  # loads JAX, which a help text does without

    given = _fields_given(arguments)
    unread = {
        field
        for field, (chooser, names) in READERS.items()
        if f"optimizer.{chooser}" in given and getattr(optimizer, chooser) not in names
    }
    left_out = {name: getattr(OptimizerConfig, name) for name in unread if f"optimizer.{name}" not in given}
    return dataclasses.replace(optimizer, **left_out)


def _one_budget(training: TrainingConfig, arguments: Sequence[str]) -> TrainingConfig:
    """A budget given on the command line takes the preset's place; two given there stay, and are refused later."""
    flags = {argument.split("=")[0] for argument in arguments}
    given = [name for name in BUDGETS if f"--training.{name}" in flags and getattr(training, name) is not None]
    if len(given) != 1:
        return training
    return dataclasses.replace(training, **dict.fromkeys(set(BUDGETS) - set(given)))  # type: ignore[arg-type]
