"""What every command does first: flags, one strict config, errors in one line, the compilation cache.

A command is a function ``main(config, **flags)``; see ``arrag_jax/train.py`` for the shortest one.
"""

import dataclasses
import errno
import keyword
import os
import re
import runpy
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags as absl_flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, FieldReference, config_flags

from arrag_jax.errors import UserError, run_command
from arrag_jax.files import FULL_DISK, tells_of_a_full_disk
from arrag_jax.parsing import parse

REQUIRED: Any = object()
OVERRIDE = re.compile(r"--?(no)?config\.")
REFUSED = {errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS}  # of a path that cannot be written


class Flag(NamedTuple):
    """One flag of a command; its type is its default's (str, int, float, bool; () = may be given several times)."""

    help: str
    default: Any = REQUIRED  # left out: a required string


def main_with_config(
    main: Callable[..., int | None],
    config_class: type | None,
    recorded: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **flags: Flag,
) -> None:
    """Runs a command from the command line and exits.

    Reads ``--config path.py`` (with overrides ``--config.key=value``) into the frozen dataclass
    ``config_class``, and the named flags beside it; then calls ``main(config, **flags)``, or
    ``main(**flags)`` for a command without a config. A flag named "config" with a default of "" makes
    the config one that may be left out; ``main`` then gets None, unless there are overrides, which are then of the
    config that ``recorded`` makes of the flags' values. Bad flags, bad configs and every other
    ``UserError`` print one line and exit with code 2, and so do a full disk and a --workdir that cannot be written;
    else ``main``'s result is the exit code.
    """

    def run(argv: list[str]) -> int | None:
        values = _parse(argv, main.__doc__ or "", config_class, flags, recorded)
        if "://" in (values.get("workdir") or ""):
            raise UserError(f"--workdir={values['workdir']} is an address; mount it, and give the folder")
        arguments = []
        if config_class is not None:
            given = values.pop("config")
            arguments = [parse(config_class, given) if given else None]
        enable_compilation_cache()
        try:
            result = main(*arguments, **values)
        except Exception as error:  # wherever it comes from: data sets, checkpoints, metrics, pictures
            explanation = _cannot_write(error, values.get("workdir"))
            if explanation is None:
                raise
            raise UserError(explanation) from error
        if jax.distributed.is_initialized():  # whoever is done first waits here, with no time limit
            multihost_utils.sync_global_devices("the command's end")
        return result

    run_command(run, sys.argv)


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second run does not compile them again.

    The folder is ``JAX_COMPILATION_CACHE_DIR`` where that is set, else ``~/.cache/arrag_jax/xla``.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "arrag_jax" / "xla"))


def _cannot_write(error: Exception, workdir: str | None) -> str | None:
    """What to say of a full disk, or of a refused path in the workdir or on the way to it; None of other errors."""
    where = getattr(error, "filename", None)
    if tells_of_a_full_disk(error):
        return f"cannot write {where or workdir or 'the result'}: {FULL_DISK}"
    if not workdir or where is None or getattr(error, "errno", None) not in REFUSED:
        return None
    folder, path = Path(workdir).absolute(), Path(where).absolute()
    if folder in (path, *path.parents) or path in folder.parents:
        return f"cannot write {where}: {error.strerror}; choose another --workdir"
    return None


def _parse(
    argv: list[str],
    doc: str,
    config_class: type | None,
    flags: dict[str, Flag],
    recorded: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> dict[str, Any]:
    """The flags' values by name, "config" among them; prints the help and exits when asked for it."""
    values = absl_flags.FlagValues()
    values.set_gnu_getopt()
    define = {bool: absl_flags.DEFINE_bool, int: absl_flags.DEFINE_integer, float: absl_flags.DEFINE_float}
    define[tuple] = absl_flags.DEFINE_multi_string
    if config_class is not None:
        flags = {
            "config": Flag("config file, path.py or path.py:argument; --config.key=value overrides a key"),
            **flags,
        }
    for name, flag in flags.items():
        default = None if flag.default is REQUIRED else flag.default
        define.get(type(default), absl_flags.DEFINE_string)(name, default, flag.help, flag_values=values)
    if {"-h", "--help"} & set(argv[1:]):
        print(f"{doc.strip()}\n{values.module_help(__name__)}")
        sys.exit(0)
    try:
        rest = values(argv, known_only=True)
        parsed = {name: values[name].value for name in flags}
        missing = [f"--{name}" for name, flag in flags.items() if flag.default is REQUIRED and parsed[name] is None]
        if missing:
            raise UserError(f"missing {', '.join(missing)} (see --help)")
        if parsed.get("config"):
            parsed["config"], rest = _override(_load(parsed["config"], config_class), config_class, rest)
        elif recorded and any(map(OVERRIDE.match, rest[1:])):
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


def _load(value: str, config_class: type) -> ConfigDict:
    """What ``get_config`` of a config file returns, ready for overrides."""
    path, _, argument = value.partition(":")
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        config = ConfigDict(runpy.run_path(path)["get_config"](*([argument] if argument else [])))
    except Exception as error:  # a config file is the user's code and may raise anything
        raise UserError(f"config file {path} failed: {type(error).__name__}: {error}") from error
    _open_up(config, config_class)
    return config


def _open_up(config: ConfigDict, config_class: type) -> None:
    """Gives a config an empty section for each one left out, and lets None be given to the keys that may be None."""
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
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
        if dataclasses.is_dataclass(hint) and isinstance(value, ConfigDict):
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
