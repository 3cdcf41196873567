"""A dataclass becomes a command line: one field per line (type, default, help sentence), nothing else to keep in step.

The idea is nanoGPT's block of options at the top of train.py; the magic is left out. No exec, no globals: argparse does
the parsing, so -h works, an unknown flag is refused, and --no-compile means what it says. Never `type=bool` in
argparse: any text, even "False", would then be true; a bool field becomes the pair --flag / --no-flag.

    @dataclass
    class Config:
        lr: float = option(1e-3, "peak learning rate; lower it when fine-tuning public weights", group="training")
        image: list[str] = option([], "image files, folders or URLs")

    config = parse_config(Config, presets={"laptop": {"lr": 5e-4}}, argv=["--preset", "laptop"])

`UserError` and `run_script`: how every mistake of the user ends in one sentence and exit code 2.
"""
import argparse
import codecs
import dataclasses
import difflib
import errno
import io
import os
import re
import sys
import types
import typing


class UserError(Exception):
    """A mistake the user can mend. Its text is one sentence that names the file or flag and the remedy."""


def option(default, help, choices=None, group=None, above=None, least=None, below=None):
    """A dataclass field with a help sentence (and, where the answer is one of a few words, those words).

    group: the heading under which -h lists this field and those that follow it. above, least, below: the range of a
    number, 0 excluded for above=0, 0 included for least=0.
    """
    metadata = {"help": help, "choices": choices, "group": group, "above": above, "least": least, "below": below}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a sentence for the caller instead of a usage dump."""

    def error(self, message):
        for word in message.partition("unrecognized arguments: ")[2].split():
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            if near:
                message += f"; did you mean {near[0]}?"
                break
        raise UserError(f"{message[:200]} (python {self.prog} -h lists every flag)")


def flag_name(field):
    """n_layer -> --n-layer."""
    return "--" + field.replace("_", "-")


def parse_config(cls, argv=None, presets=None, description=None, default_preset=None):
    """Fill the dataclass `cls` from the command line. Order of authority: flags, then the preset, then the defaults.

    presets: {"name": {field: value}}; adds a --preset flag when given, whose default is `default_preset`. The result
    carries `given`, the fields that flags have set, and `preset`, the name.
    Raises UserError on an unknown flag, preset, choice, a value of the wrong type, out of its range, or empty.
    """
    presets, names = presets or {}, {f.name for f in dataclasses.fields(cls)}
    for name, values in presets.items():
        assert values.keys() <= names, f"preset {name} sets fields that do not exist: {sorted(values.keys() - names)}"
    parser = _Parser(usage="%(prog)s [options]", description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS,
                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110))
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="a named set of options; other flags win over it" +
                            (f" [{default_preset}]" if default_preset else ""))
    hints, group = typing.get_type_hints(cls), parser
    for field in dataclasses.fields(cls):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        _add_flag(group, field, hints[field.name])
    flags = vars(parser.parse_args(argv))
    preset = flags.pop("preset", default_preset)
    config = cls(**{**presets.get(preset, {}), **flags})
    config.given, config.preset = frozenset(flags), preset
    check_ranges(config)
    return config


def peek(argv, name, default=None):
    """The value of --name in a command line that is parsed in full later, or the default; True for a bare flag."""
    flag = flag_name(name)
    for k, word in enumerate(argv):
        if word == flag:
            default = argv[k + 1] if argv[k + 1:] and not argv[k + 1].startswith("--") else True
        elif word.startswith(flag + "="):
            default = word.partition("=")[2]
    return default


def _add_flag(parser, field, hint):
    """One field, one flag: int, float, str, bool, `T | None`, or list[T] (one or more values)."""
    kind = hint
    if isinstance(kind, types.UnionType):                       # `int | None`: parsed as int, None means "not given"
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
    extra = {"nargs": "+"} if typing.get_origin(kind) is list else {}
    kind = typing.get_args(kind)[0] if extra else kind
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    shown = "" if default is None or default == [] else f" [{default}]"
    text, flag = (field.metadata["help"] + shown).replace("%", "%%"), flag_name(field.name)
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        choices = field.metadata["choices"]
        shown = None if choices else field.name.upper()
        parser.add_argument(flag, type=kind, choices=choices, metavar=shown, help=text, **extra)


def check_ranges(config):
    """Raise UserError for a number outside the range its field names, or an empty text (an unset shell variable)."""
    for field in dataclasses.fields(config):
        value, limits, flag = getattr(config, field.name), field.metadata, flag_name(field.name)
        if value == "" or isinstance(value, list) and "" in value:
            raise UserError(f"{flag} was given an empty value; leave the flag out, or name something")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if not abs(value) < 1e15:                               # inf and nan, too
            raise UserError(f"{flag} must be an ordinary number, not {value}")
        for name, holds, phrase in (("above", lambda a, b: a > b, "above"), ("least", lambda a, b: a >= b, "at least"),
                                    ("below", lambda a, b: a < b, "below")):
            if limits[name] is not None and not holds(value, limits[name]):
                raise UserError(f"{flag} must be {phrase} {limits[name]}, not {value}")


def check_sizes(sizes, **choices):
    """Refuse by name the sizes that no model has, as of a damaged config.json, before anything is built of them.

    Whole numbers are at least 1, or 0 where the default is 0 or None; fractions within 0..1; names among `choices`.
    """
    for field in dataclasses.fields(sizes):
        value, default, good = getattr(sizes, field.name), field.default, True
        if field.name in choices:
            good = value in list(choices[field.name])
        elif isinstance(default, (bool, float)):
            good = type(value) in (type(default), int) and 0 <= value <= 1
        elif default is None or isinstance(default, int):
            good = value is default or type(value) is int and value >= (1 if default else 0)
        if not good:
            raise UserError(f"no model can be built with {field.name} {value!r:.40} (in {type(sizes).__name__})")


def out_of_memory(error):
    """Whether memory ran out: torch has several ways to say so, on each device."""
    words = "out of memory|allocate memory|not enough memory|ALLOC_FAILED|tried to allocate"
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or isinstance(
        error, RuntimeError) and bool(re.search(words, str(error)))


def run_script(main):
    """Run a script's main(): a UserError, a disk that refuses, memory that ran out: one sentence and exit code 2."""
    codecs.register_error("as_bytes", _as_bytes)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="as_bytes")
    try:
        main()
    except UserError as error:
        sys.exit(_complain(error))
    except BrokenPipeError:                                     # `sample.py .. | head -1`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            sys.exit(_complain("memory ran out; ask for less at once (train.py: a higher --accum), or for a smaller "
                               "model"))
        if re.search("Connection (closed|reset)|peer|NCCL", str(error)) and "RANK" in os.environ:
            sys.exit(_complain("another process of this run has ended; its own message says why"))
        if not isinstance(error, OSError) or error.errno is None:
            raise
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the path"
        where = error.filename or "the output folder"
        sys.exit(_complain(f"cannot use {where}: {error.strerror}; {remedy}, or choose another"))
    except KeyboardInterrupt:
        sys.exit(130)


def _as_bytes(error):
    """File names that are not UTF-8 are printed as the bytes they are, so that a printed command works; other characters
    that have no bytes are escaped."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


def _complain(message):
    print(f"error: {message}", file=sys.stderr)
    return 2
