"""What all commands share: flags, config overrides and errors of the user.

A command is a module with a docstring (its `--help`, with an example) and
`main(argv=None)`; `run(main)` ends it with code 2 and a short "error: ..." when its
input is wrong.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import gc
import importlib.util
import json
import os
import pathlib
import sys
import traceback
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from t5x_lite import config as config_lib
from t5x_lite import config_keys


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and name the nearest flag."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n{self.prog} --help lists all flags.\n")

    def parse_args(self, args=None, namespace=None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        for arg in args if self._subparsers is None else []:
            name = arg.split("=", 1)[0]
            if name.startswith("--") and name not in self._option_string_actions:
                hint = config_lib.nearest(name, self._option_string_actions)
                self.error(f"there is no flag {name}{hint}")
        return super().parse_args(args, namespace)


def parser(doc: str | None) -> Parser:
    """A parser whose `--help` is the docstring of the module and its flags."""
    prog = pathlib.Path(sys.argv[0])
    return Parser(
        prog=f"python -m t5x_lite.{prog.stem}" if prog.suffix == ".py" else prog.name,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_reading(parser: argparse.ArgumentParser):
    """Flags of how text is read, for `sources.Options.of` the parsed arguments."""
    for field in dataclasses.fields(config_keys.DataConfig):
        if field.name in ("field", "documents", "bad_utf8"):
            parser.add_argument(
                f"--{field.name}",
                default=field.default,
                choices=field.metadata["among"],
                help=f"{field.metadata['doc']} (default {field.default})",
            )


def parse_config(
    doc: str | None, argv=None, **others: str | tuple[str, str] | tuple[bool, str]
):
    """Parses `--config=FILE[:ARG]`, `--config.a.b=VALUE` and other flags.

    Args:
      doc: docstring of the command.
      argv: arguments without the program's name; None = those of the process.
      others: flag name -> help if it is required (`workdir="directory of the run"`),
        else (default, help); (False, help) = a switch.

    Returns:
      (the ConfigDict with overrides applied, the other flags).

    Raises:
      ValueError, KeyError, FileNotFoundError: naming the flag and the way out.
    """
    flag_parser = parser(doc)
    flag_parser.epilog = "config keys:\n" + config_lib.describe()
    flag_parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="Python file, run as it is, with get_config(arg=''); see configs/",
    )
    for name, about in others.items():
        if isinstance(about, str):
            flag_parser.add_argument(f"--{name}", required=True, help=about)
        elif about[0] is False:
            flag_parser.add_argument(f"--{name}", action="store_true", help=about[1])
        else:
            flag_parser.add_argument(f"--{name}", default=about[0], help=about[1])
    argv = sys.argv[1:] if argv is None else list(argv)
    overrides, rest = [], []
    i = 0
    while i < len(argv):
        if argv[i].lstrip("-").startswith(("config.", "noconfig.")):
            # "--config.a.b VALUE" is also accepted, as by absl.
            joined = "=" in argv[i] or i + 1 == len(argv) or argv[i + 1][:2] == "--"
            overrides.append(argv[i] if joined else f"{argv[i]}={argv[i + 1]}")
            i += 1 if joined else 2
        else:
            rest.append(argv[i])
            i += 1
    found = flag_parser.parse_args(rest)
    raw = load_config(found.config)
    apply_overrides(raw, overrides)
    return raw, found


def load_config(name: str) -> ml_collections.ConfigDict:
    """Runs `get_config` of a config file, or reads the config.json of a run.

    Args:
      name: 'FILE' or 'FILE:ARG'; ARG is handed to `get_config`.
    """
    path, _, arg = name.partition(":")
    if not os.path.isfile(path):
        there = [str(p) for p in sorted(pathlib.Path("configs").glob("*.py"))]
        close = difflib.get_close_matches(path, there, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise FileNotFoundError(f"--config={name}: there is no file {path!r}.{hint}")
    if path.endswith(".json"):
        return _config_of_a_run(name, path)
    spec = importlib.util.spec_from_file_location("t5x_lite_config_file", path)
    if spec is None or spec.loader is None:
        raise ValueError(
            f"--config={name}: {path!r} is neither a .py file nor a run's config.json."
        )
    module = importlib.util.module_from_spec(spec)
    with _errors_of(name, path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"--config={name}: {path!r} does not define get_config(arg=''). "
            "See configs/base.py."
        )
    with _errors_of(name, path):
        raw = module.get_config(arg) if arg else module.get_config()
    if not isinstance(raw, ml_collections.ConfigDict):
        raise ValueError(
            f"--config={name}: get_config returned {type(raw).__name__}, not a "
            "ConfigDict. Start from configs/base.py's and return it."
        )
    return raw


def _config_of_a_run(name: str, path: str) -> ml_collections.ConfigDict:
    try:
        found = json.loads(pathlib.Path(path).read_text())["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(
            f"--config={name}: {path!r} is not the config.json of a run: it has no "
            f"'config' ({type(e).__name__}). Give WORKDIR/config.json or a .py file."
        ) from e
    frozen = config_lib.freeze(found)
    try:
        return ml_collections.ConfigDict(config_lib.to_json(frozen, tuples=True))
    except (TypeError, ValueError) as e:  # a name with a dot, say
        raise ValueError(f"--config={name}: {e}") from e


@contextlib.contextmanager
def _errors_of(name: str, path: str):
    """Any error of a config file becomes one line that names the line of the file."""
    try:
        yield
    except Exception as e:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(e.__traceback__)
            if os.path.abspath(frame.filename) == os.path.abspath(path)
        ]
        where = f" ({path}, line {lines[-1]})" if lines else ""
        raise ValueError(
            f"--config={name}: the file failed with {type(e).__name__}: "
            f"{message_of(e)}{where}"
        ) from e


def apply_overrides(raw: ml_collections.ConfigDict, overrides: list[str]):
    """Sets `--config.a.b=VALUE` in place; values get the type of the field."""
    overrides = [o for o in overrides if not _new_knob(raw, o)]
    for override in overrides:
        _check_key(raw, override)
    values = flags.FlagValues()
    argv = ["", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", raw, flag_values=values, sys_argv=argv
        )
        left = values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as e:
        raise ValueError(message_of(e)) from e
    if left:
        raise ValueError(f"{left[0]!r} belongs to no flag. Write --config.a.b=VALUE.")


def _new_knob(raw: ml_collections.ConfigDict, override: str) -> bool:
    """Sets a knob of the objective that the config file does not list.

    Each objective has its own; what is none of them is refused where they are known.
    """
    flag, has_value, text = override.partition("=")
    section, _, name = flag.lstrip("-").rpartition(".")
    knobs: Any = raw["objective"]
    known = section != "config.objective" or name in knobs
    if known or not has_value:
        return False
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    with raw.unlocked():
        knobs[name] = value
    return True


def _check_key(raw: ml_collections.ConfigDict, override: str):
    flag, has_value, _ = override.partition("=")
    path = flag.lstrip("-").partition(".")[2]
    node: Any = raw
    for part in path.split("."):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            leaves = list(_leaves(raw))
            by_name = {leaf.rpartition(".")[2]: leaf for leaf in reversed(leaves)}
            close = difflib.get_close_matches(path, leaves, n=1, cutoff=0.75)
            last = difflib.get_close_matches(path.rpartition(".")[2], by_name, n=1)
            close += [by_name[name] for name in last]
            hint = f" Did you mean --config.{close[0]}?" if close else ""
            keys = list(node) if isinstance(node, ml_collections.ConfigDict) else []
            if not hint and keys:
                hint = f" Known here: {', '.join(keys)}."
            raise KeyError(f"{flag}: there is no config key {path!r}.{hint}")
        node = node[part]
    if dataclasses.is_dataclass(getattr(config_lib.Config(), path, None)):
        raise ValueError(
            f"{flag} is a section; setting it would drop its other keys. Set them one "
            f"by one, as in --config.{path}.{next(iter(node))}=VALUE."
        )
    if not has_value and not isinstance(node, bool):
        raise ValueError(f"{flag} needs a value: {flag}={node!r}, say.")


def _leaves(node: ml_collections.ConfigDict, prefix: str = ""):
    for name, value in node.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def message_of(e: BaseException) -> str:
    """The text of an error; str() of a KeyError would add quotes."""
    text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
    return text.strip() or type(e).__name__


def run(main):
    """Runs a command and exits: 2 and "error: ..." if its input was wrong.

    Only what our own code raised, and errors of files, count as the user's; anything
    else is a defect and keeps its traceback.
    """
    # What is imported by now stays; collections need not go through it each time.
    gc.freeze()
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:
        # The reader (`| head`) has gone: keep Python from failing again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if not is_users(e):
            raise
        print(f"error: {message_of(e)}", file=sys.stderr)
        sys.exit(exit_code(e))


class TryAgain(ValueError):
    """What the same command need not meet the next time: a process that is late."""


def exit_code(e: BaseException) -> int:
    """2 for an error of the user, 75 (sysexits' EX_TEMPFAIL) for `TryAgain`, else 1."""
    if isinstance(e, TryAgain):
        return 75
    return 2 if is_users(e) else 1


def is_users(e: BaseException) -> bool:
    """Is it an error of the user's input? See `run`."""
    if isinstance(e, OSError):
        return True
    if not isinstance(e, (ValueError, KeyError, FloatingPointError)):
        return False
    innermost = pathlib.Path(traceback.extract_tb(e.__traceback__)[-1].filename)
    return innermost.parent.is_relative_to(pathlib.Path(__file__).parent)
