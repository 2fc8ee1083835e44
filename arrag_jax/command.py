"""Starts every command: parses flags and the config, reports errors in one line, sets up the compilation cache.

A command is a function ``main(config, **flags)``; ``arrag_jax/train.py`` is the shortest example.
"""

import contextlib
import dataclasses
import inspect
import keyword
import math
import os
import re
import runpy
import stat
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags as absl_flags
from ml_collections import ConfigDict, FieldReference, config_flags

from arrag_jax import console, progress, remote
from arrag_jax.errors import UserError, as_called, run_command
from arrag_jax.failures import explanation, out_of_memory, refused, tells_of_memory
from arrag_jax.fields import local_path, paths_in, pin
from arrag_jax.meeting import is_one_of_several
from arrag_jax.object_workdir import mirrored
from arrag_jax.parsing import config_file, parse, repeated
from arrag_jax.processes import WAIT, start_distributed
from arrag_jax.usage import Sections, keys_text

REQUIRED: Any = object()
OVERRIDE = re.compile(r"--?(no)?config\.")


class Flag(NamedTuple):
    """One flag of a command, of its default's type: str, int, float or bool; () = a string that can be repeated."""

    help: str
    default: Any = REQUIRED  # REQUIRED = a string that the user must give
    path: bool = False  # the flag is the path of a local file or folder; ~ is expanded
    several: bool = False  # a flag of default () that takes all words up to the next flag
    hub: str = ""  # kind of repository of the Hugging Face hub whose ids a path may be, too; "" = none
    storage: bool = False  # the path may be an address of object storage, which is then written


PROGRESS = Flag("show progress bars (on a terminal only); --noprogress turns them off", True)
VERBOSE = Flag("show what libraries log, and their own progress bars", False)
OWN = {"progress": PROGRESS, "verbose": VERBOSE}  # flags that may differ between the processes of one run
CONFIG = Flag(
    "config file, path.py or path.py:argument, or the name of a shipped one; --config.key=value overrides a key",
    path=True,
)
RAY = Flag("share the work over a Ray cluster: auto (the running one), HOST:PORT, or local (one of its own)", "")
RAY_CORES = Flag("CPU cores per worker of --ray, where the cluster has no accelerator", 4)
OPTIONAL_CONFIG = CONFIG._replace(default="")
Recorded = Callable[[dict[str, Any]], dict[str, Any]]  # from the flags' values to the config stored in a workdir


def main_with_config(
    main: Callable[..., int | None],
    config_class: type | None,
    processes: str = "",
    sections: Sections | None = None,
    recorded: Recorded | None = None,
    **flags: Flag,
) -> None:
    """Runs a command from the command line and exits.

    Reads ``--config path.py``, with overrides ``--config.key=value``, into the frozen dataclass ``config_class``, and
    reads the named flags; every command also has --noprogress and --verbose. Then calls ``main(config, **flags)``, or
    ``main(**flags)`` for a command without a config. The result of ``main`` is the exit code. A ``UserError``, such as
    a bad flag or a bad config, prints one line and exits with code 2. So do failures of the file system or of memory.

    A flag named "config" with the default "" makes the config optional. Without a config ``main`` gets None; if there
    are overrides, they change the config that ``recorded`` returns for the flags' values.

    Args:
      processes: whether several processes can share a run: "together" if each needs all others all the time, "apart"
        if not (see ``start_distributed``), "" if only one process is allowed. Several processes meet before ``main``
        is called, and the command gets a flag ``--wait``.
      sections: for each section that the config leaves free: the key that chooses its dataclass, and the choices.
    """
    if processes:
        flags["wait"] = Flag("seconds to wait for the other processes of the same run", WAIT)

    def run(argv: list[str]) -> int | None:
        values = _parse(argv, main, config_class, sections or {}, recorded, {**flags, **OWN})
        progress.show(values.pop("progress"))
        console.quiet(not values.pop("verbose"))
        given = values.pop("config") if config_class is not None else None
        arguments = [parse(config_class, given) if given else None] if config_class is not None else []
        with mirrored(values, [name for name, flag in flags.items() if flag.storage]) as require_one:
            if pin(_paths(flags, values, sections or {}, *arguments), values, given) and config_class is not None:
                arguments = [parse(config_class, given)]
            _start(processes, values, *arguments)
            require_one()
            return call(values, arguments)

    def call(values: dict[str, Any], arguments: list[Any]) -> int | None:
        try:
            for name, path in _paths(flags, values, sections or {}, *arguments):
                if not remote.is_remote(path):
                    _require_place(name, path)
            enable_compilation_cache()
            return main(*arguments, **values)
        except Exception as error:  # any library may be the source: data sets, checkpoints, metrics, images
            if console.is_closed(error):
                raise BrokenPipeError from error
            said = _explained(error, values.get("workdir"), *arguments)
            if said is None:
                raise
            raise UserError(said) from error

    console.prepare()
    console.quiet(True)
    with console.written_out():
        run_command(run, sys.argv)


def _start(processes: str, flags: dict[str, Any], config: Any = None) -> None:
    """Connects to the other processes of the run, if there are any; removes "wait" from the flags."""
    if processes:
        wait = flags.pop("wait")
        start_distributed(wait=wait, settings=_settings(config, flags), together=processes == "together")
    elif is_one_of_several():
        raise UserError("this command runs in one process; start it once, without JAX_COORDINATOR_ADDRESS and the like")


def _settings(config: Any, flags: dict[str, Any]) -> dict[str, Any]:
    """Returns every config key and flag by name, with its value; these must be equal in all processes of a run."""
    flat = {f"--{name}": value for name, value in flags.items() if name not in OWN}

    def add(section: Mapping[str, Any], prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, Mapping | ConfigDict):
                add(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value if isinstance(value, str | int | float | None) else repr(value)

    if config is not None:
        add(dataclasses.asdict(config), "config.")
    return flat


def enable_compilation_cache() -> None:
    """Stores compiled programs on disk, so that a second run does not compile them again.

    The folder is ``JAX_COMPILATION_CACHE_DIR`` if that is set, else ``~/.cache/arrag_jax/xla``. Nothing is stored if
    there is no home folder, or if it cannot be written.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no HOME, and no entry in the password file
        folder = Path.home() / ".cache" / "arrag_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))


def _paths(
    flags: dict[str, Flag], values: dict[str, Any], sections: Sections, config: Any = None
) -> Iterator[tuple[str, str]]:
    """Yields the name and value of every path that the flags or the config give."""
    for name, flag in flags.items():
        if flag.path and name in values:
            given = values[name] if isinstance(values[name], list) else [values[name]]
            yield from ((f"--{name}", path) for path in given if path)
    if config is not None:
        yield from paths_in(config)
        for section, (key, choices) in sections.items():
            name = f"config.{section}"
            yield from paths_in(parse(choices[getattr(config, key)], getattr(config, section), name), name)


def _require_place(name: str, path: str) -> None:
    """Raises UserError if the system cannot access a path, or if --workdir is not a folder and cannot be created."""
    place = Path(path).absolute()
    try:
        os.stat(place)
    except FileNotFoundError:
        if os.path.islink(place):
            raise UserError(f"{name}={path} is a link that leads to nothing; mend it, or give another path") from None
        if name != "--workdir":
            return  # the code that needs the file reports this
        place = next(parent for parent in place.parents if parent.exists())
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"cannot make {name}={path}: {place} cannot be written; choose another --workdir") from None
    except OSError as error:  # for example a loop of links, or a name that is too long
        raise UserError(refused(name, path, error)) from error
    if name == "--workdir" and not place.is_dir():
        raise UserError(f"{name}={path} cannot be a folder: {place} is none; choose another --workdir")


def _explained(error: Exception, workdir: str | None, config: Any = None) -> str | None:
    """Returns the message for a failure of the file system or of memory; None for any other error."""
    if isinstance(error, UserError):
        return None
    if not tells_of_memory(error):
        return explanation(error, workdir)
    mends = [f"lower config.batch_size (it is {config.batch_size})"] if hasattr(config, "batch_size") else []
    if hasattr(config, "accumulate"):
        mends.append(f"raise config.accumulate (it is {config.accumulate}), which leaves the update as it is")
    return out_of_memory(error, " or ".join(mends) or "close other programs, or take a machine with more memory")


def _parse(
    argv: list[str],
    main: Callable,
    config_class: type | None,
    sections: Sections,
    recorded: Recorded | None,
    flags: dict[str, Flag],
) -> dict[str, Any]:
    """Returns the flags' values by name, including "config"; if --help is given, prints the help and exits."""
    values = absl_flags.FlagValues()
    values.set_gnu_getopt()
    define: dict[type, Callable] = {bool: absl_flags.DEFINE_bool, int: absl_flags.DEFINE_integer}
    define |= {float: absl_flags.DEFINE_float, tuple: absl_flags.DEFINE_multi_string}
    if config_class is not None:
        flags = {"config": CONFIG, **flags}
    for name, flag in flags.items():
        default = None if flag.default is REQUIRED else flag.default
        define.get(type(default), absl_flags.DEFINE_string)(name, default, flag.help, flag_values=values)
    if {"-h", "-help", "--help", "-helpfull", "--helpfull"} & set(argv[1:]):
        text = inspect.unwrap(main).__globals__.get("__doc__") or main.__doc__ or ""
        about_flags = values.get_help(include_special_flags=False).partition(":\n")[2]  # drops the module's name
        print(as_called(f"{text.strip()}\n\nflags:\n{about_flags}"))
        if config_class is not None:
            print(keys_text(config_class, sections))
        sys.exit(0)
    try:
        rest = values(repeated(argv, [name for name, flag in flags.items() if flag.several]), known_only=True)
        parsed: dict[str, Any] = {name: values[name].value for name in flags}
        missing = [f"--{name}" for name, flag in flags.items() if flag.default is REQUIRED and not parsed[name]]
        if missing:
            raise UserError(f"missing {', '.join(missing)} (see --help)")
        for name, flag in flags.items():
            if flag.path and parsed[name]:
                parsed[name] = _local(parsed[name], f"--{name}", flag)
            if isinstance(parsed[name], float) and not math.isfinite(parsed[name]):
                raise UserError(f"--{name}={parsed[name]} must be a finite number")
        if config_class and parsed.get("config"):
            parsed["config"], rest = _override(_load(parsed["config"], config_class), config_class, rest)
        elif config_class and recorded and any(map(OVERRIDE.match, rest[1:])):
            config = ConfigDict(recorded(parsed))
            _open_up(config, config_class)
            parsed["config"], rest = _override(config, config_class, rest)
    except absl_flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise UserError(
            f"unknown argument {rest[1]!r} (flags are written --name=value): known are --{', --'.join(flags)}"
        )
    return parsed


def _local(given: str | list[str], name: str, flag: Flag) -> str | list[str]:
    paths = [local_path(x, name, flag.hub, flag.storage) for x in (given if isinstance(given, list) else [given])]
    return paths if isinstance(given, list) else paths[0]


def _load(value: str, config_class: type) -> ConfigDict:
    """Returns the config that ``get_config`` of a config file returns, ready for overrides."""
    path, _, argument = value.partition(":")
    path = config_file(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"config file {path} is not a file; give the path of one")
        open(path, "rb").close()
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}; give another --config") from error
    try:
        config = ConfigDict(runpy.run_path(path)["get_config"](*([argument] if argument else [])))
    except Exception as error:  # a config file is the user's code and may raise anything
        raise UserError(f"config file {path} failed: {type(error).__name__}: {error}") from error
    _open_up(config, config_class)
    return config


def _open_up(config: ConfigDict, config_class: type) -> None:
    """Adds an empty section for each one that is left out, and lets overrides set optional keys to None."""
    for name, hint in typing.get_type_hints(config_class).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if name not in config:
                config[name] = {}
            if isinstance(config[name], ConfigDict):
                _open_up(config[name], hint)
        elif name in config and type(None) in typing.get_args(hint):
            config[name] = FieldReference(config[name], field_type=object)  # any literal; parse checks the type


def _override(config: ConfigDict, config_class: type, argv: list[str]) -> tuple[ConfigDict, list[str]]:
    """Returns the config with the ``--config.key=value`` arguments applied, and the remaining arguments."""
    for argument in argv[1:]:
        if OVERRIDE.match(argument):
            _prepare(config, argument)
    values = absl_flags.FlagValues()
    values.set_gnu_getopt()
    try:
        # Unknown keys are accepted here, because parse reports them together with the nearest known key.
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=False, accept_new_attributes=True, sys_argv=argv
        )
        rest = values(argv, known_only=True)
    except TypeError as error:
        raise UserError(f"a --config override has the wrong type: {error}") from error
    _split_lists(values["config"].value, config_class)
    return values["config"].value, rest


def _split_lists(config: ConfigDict, config_class: type) -> None:
    """Splits texts such as "codebook,latent" into tuples, for fields that are tuples; absl does not split them."""
    for name, hint in typing.get_type_hints(config_class).items():
        value = config.get(name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, ConfigDict):
            _split_lists(value, hint)
            continue
        texts = (value,) if isinstance(value, str) else value
        if (
            typing.get_origin(hint) is tuple
            and isinstance(texts, tuple)
            and texts
            and all(isinstance(x, str) for x in texts)
        ):
            del config[name]  # because its type may be text
            config[name] = tuple(part.strip() for text in texts for part in text.split(",") if part.strip())


def _prepare(config: ConfigDict, argument: str) -> None:
    """Prepares the config for an override ``--config.section.key=value``.

    Raises:
      UserError: if the argument does not have that form, or the config has no such section.
    """
    path = argument.partition("=")[0]
    names = path.split(".")[1:]
    if not all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
        raise UserError(f"{path!r} names no key; overrides are written --config.key=value, lists as a whole")
    for name in names[:-1]:
        config = config.get(name) if isinstance(config, ConfigDict) else None
    if not isinstance(config, ConfigDict):
        raise UserError(f"unknown section in {path!r}; overrides are written --config.section.key=value")
    if hasattr(ConfigDict, names[-1]) and names[-1] in config:
        del config[names[-1]]  # absl would read the method of this name, such as "keys"
