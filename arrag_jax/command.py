"""What every command does first: flags, one strict config, errors in one line, the compilation cache.

A command is a function ``main(config, **flags)``; see ``arrag_jax/train.py`` for the shortest one.
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

from arrag_jax import console, progress
from arrag_jax.errors import UserError, as_called, run_command
from arrag_jax.failures import explanation, out_of_memory, refused, tells_of_memory
from arrag_jax.fields import local_path, paths_in
from arrag_jax.meeting import is_one_of_several
from arrag_jax.parsing import config_file, parse
from arrag_jax.processes import WAIT, start_distributed
from arrag_jax.usage import Sections, keys_text

REQUIRED: Any = object()
OVERRIDE = re.compile(r"--?(no)?config\.")


class Flag(NamedTuple):
    """One flag of a command; its type is its default's (str, int, float, bool; () = may be given several times)."""

    help: str
    default: Any = REQUIRED  # left out: a required string
    path: bool = False  # of a file or folder: must be local, and ~ is expanded


PROGRESS = Flag("show progress bars, which appear on a terminal alone; --noprogress: not", True)
VERBOSE = Flag("show what libraries log, their bars and their advice", False)
OWN = {"progress": PROGRESS, "verbose": VERBOSE}  # flags that each process of a run may have as it likes
CONFIG = Flag(
    "config file, path.py or path.py:argument, or the name of a shipped one; --config.key=value overrides a key",
    path=True,
)
OPTIONAL_CONFIG = CONFIG._replace(default="")
Recorded = Callable[[dict[str, Any]], dict[str, Any]]  # from the flags' values to a config that a workdir records


def main_with_config(
    main: Callable[..., int | None],
    config_class: type | None,
    processes: str = "",
    sections: Sections | None = None,
    recorded: Recorded | None = None,
    **flags: Flag,
) -> None:
    """Runs a command from the command line and exits.

    Reads ``--config path.py`` (with overrides ``--config.key=value``) into the frozen dataclass
    ``config_class``, and the named flags beside it (--noprogress and --verbose are every command's); then calls
    ``main(config, **flags)``, or ``main(**flags)`` for a command without a config. A flag named "config"
    with a default of "" makes the config one that may be left out; ``main`` then gets None, unless there are overrides,
    which are then of the config that ``recorded`` makes of the flags' values. Bad flags, bad configs and every other
    ``UserError`` print one line and exit with code 2, and so do failures of the file system and of memory; else
    ``main``'s result is the exit code.

    Args:
      processes: whether a run may have several of them: "together" if each needs all others all the time, "apart" if
        not, as ``start_distributed`` has it; "": one alone. Several are started before ``main`` is called, and have
        a flag ``--wait`` more.
      sections: the dataclasses of the sections that the config leaves free: by section, the key that chooses one, and
        the choices.
    """
    if processes:
        flags["wait"] = Flag("of several processes: seconds in which all must have come", WAIT)

    def run(argv: list[str]) -> int | None:
        values = _parse(argv, main, config_class, sections or {}, recorded, {**flags, **OWN})
        progress.show(values.pop("progress"))
        console.quiet(not values.pop("verbose"))
        arguments = []
        if config_class is not None:
            given = values.pop("config")
            arguments = [parse(config_class, given) if given else None]
        _start(processes, values, *arguments)
        try:
            for name, path in _paths(flags, values, sections or {}, *arguments):
                _require_place(name, path)
            enable_compilation_cache()
            result = main(*arguments, **values)
        except Exception as error:  # wherever it comes from: data sets, checkpoints, metrics, pictures
            if console.is_closed(error):
                raise BrokenPipeError from error
            said = _explained(error, values.get("workdir"), *arguments)
            if said is None:
                raise
            raise UserError(said) from error
        return result

    console.prepare()
    console.quiet(True)
    with console.written_out():
        run_command(run, sys.argv)


def _start(processes: str, flags: dict[str, Any], config: Any = None) -> None:
    """Meets the other processes of the run, if any; takes "wait" out of the flags."""
    if processes:
        wait = flags.pop("wait")
        start_distributed(wait=wait, settings=_settings(config, flags), together=processes == "together")
    elif is_one_of_several():
        raise UserError("this command runs in one process; start it once, without JAX_COORDINATOR_ADDRESS and the like")


def _settings(config: Any, flags: dict[str, Any]) -> dict[str, Any]:
    """Every key of a config and every flag by name: what all processes of a run must have in common."""
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
    """Keeps compiled programs on disk, so that a second run does not compile them again.

    The folder is ``JAX_COMPILATION_CACHE_DIR`` where that is set, else ``~/.cache/arrag_jax/xla``. Where there is no
    home folder, or none that can be written, nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # the latter: no HOME, and no entry in the password file
        folder = Path.home() / ".cache" / "arrag_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))


def _paths(
    flags: dict[str, Flag], values: dict[str, Any], sections: Sections, config: Any = None
) -> Iterator[tuple[str, str]]:
    """Name and value of every path that is given."""
    for name, flag in flags.items():
        if _is_path(name, flag) and name in values:
            given = values[name] if isinstance(values[name], list) else [values[name]]
            yield from ((f"--{name}", path) for path in given if path)
    if config is not None:
        yield from paths_in(config)
        for section, (key, choices) in sections.items():
            name = f"config.{section}"
            yield from paths_in(parse(choices[getattr(config, key)], getattr(config, section), name), name)


def _require_place(name: str, path: str) -> None:
    """Raises UserError if the system cannot look at a path, or if a --workdir is no folder and cannot become one."""
    place = Path(path).absolute()
    try:
        os.stat(place)
    except FileNotFoundError:
        if os.path.islink(place):
            raise UserError(f"{name}={path} is a link that leads to nothing; mend it, or give another path") from None
        if name != "--workdir":
            return  # who needs it says so
        place = next(parent for parent in place.parents if parent.exists())
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"cannot make {name}={path}: {place} cannot be written; choose another --workdir") from None
    except OSError as error:  # a loop of links, a name that is too long, …
        raise UserError(refused(name, path, error)) from error
    if name == "--workdir" and not place.is_dir():
        raise UserError(f"{name}={path} cannot be a folder: {place} is none; choose another --workdir")


def _explained(error: Exception, workdir: str | None, config: Any = None) -> str | None:
    """What to say of a failure of the file system or of memory; None of other errors."""
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
    """The flags' values by name, "config" among them; prints the help and exits when asked for it."""
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
        about_flags = values.get_help(include_special_flags=False).partition(":\n")[2]  # after the module's name
        print(as_called(f"{text.strip()}\n\nflags:\n{about_flags}"))
        if config_class is not None:
            print(keys_text(config_class, sections))
        sys.exit(0)
    try:
        rest = values(argv, known_only=True)
        parsed: dict[str, Any] = {name: values[name].value for name in flags}
        missing = [f"--{name}" for name, flag in flags.items() if flag.default is REQUIRED and not parsed[name]]
        if missing:
            raise UserError(f"missing {', '.join(missing)} (see --help)")
        for name, flag in flags.items():
            if _is_path(name, flag) and parsed[name]:
                parsed[name] = _local(parsed[name], f"--{name}")
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


def _is_path(name: str, flag: Flag) -> bool:
    return flag.path or name == "workdir"


def _local(given: str | list[str], name: str) -> str | list[str]:
    return [local_path(path, name) for path in given] if isinstance(given, list) else local_path(given, name)


def _load(value: str, config_class: type) -> ConfigDict:
    """What ``get_config`` of a config file returns, ready for overrides."""
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
    """Gives a config an empty section for each one left out, and lets None be given to the keys that may be None."""
    for name, hint in typing.get_type_hints(config_class).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if name not in config:
                config[name] = {}
            if isinstance(config[name], ConfigDict):
                _open_up(config[name], hint)
        elif name in config and type(None) in typing.get_args(hint):
            config[name] = FieldReference(config[name], field_type=object)  # any literal; parse checks its type


def _override(config: ConfigDict, config_class: type, argv: list[str]) -> tuple[ConfigDict, list[str]]:
    """The config after its ``--config.key=value`` arguments, and the arguments that are left."""
    for argument in argv[1:]:
        if OVERRIDE.match(argument):
            _prepare(config, argument)
    values = absl_flags.FlagValues()
    values.set_gnu_getopt()
    try:
        # Unknown keys are let in here; parse names them, with the nearest known one.
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=False, accept_new_attributes=True, sys_argv=argv
        )
        rest = values(argv, known_only=True)
    except TypeError as error:
        raise UserError(f"a --config override has the wrong type: {error}") from error
    _split_lists(values["config"].value, config_class)
    return values["config"].value, rest


def _split_lists(config: ConfigDict, config_class: type) -> None:
    """Makes lists of texts such as "codebook,latent" where the class has lists; flags take one for a list of one."""
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
            del config[name]  # whose type may be text
            config[name] = tuple(part.strip() for text in texts for part in text.split(",") if part.strip())


def _prepare(config: ConfigDict, argument: str) -> None:
    """Makes way for an override ``--config.section.key=value``.

    Raises:
      UserError: it is not of that form, or the config has no such section.
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
        del config[names[-1]]  # "keys" is a method as well, which flags would take for the value that is there
