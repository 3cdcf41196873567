"""A dataclass becomes a command line: one field per line (type, default, help sentence), nothing else to keep in step.

The idea is nanoGPT's block of options at the top of train.py; the magic is left out. No exec, no globals: argparse does
the parsing. Never `type=bool` in argparse: any text, even "False", would then be true; a bool field becomes the pair
--flag / --no-flag.

    @dataclass
    class Config:
        lr: float = option(1e-3, "peak learning rate; lower it for public weights", group="training", above=0)
    config = parse_config(Config, presets={"laptop": {"lr": 5e-4}}, argv=["--preset", "laptop"])

And `UserError` and `run_script`: how every mistake of the user ends in one sentence and exit code 2.
"""
import argparse
import dataclasses
import difflib
import errno
import operator
import os
import re
import sys
import typing


class UserError(Exception):
    """A mistake the user can mend. Its text is one sentence that names the file or flag and the remedy."""


# how a field may limit a number: option(.., above=0) excludes 0, least=0 includes it
LIMITS = {"above": operator.gt, "least": operator.ge, "below": operator.lt}


def option(default, help, choices=None, group=None, **limits):
    """A dataclass field with a help sentence; choices: the words it may be; group: the heading of this field and the
    next ones in -h; limits: see LIMITS."""
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**value, metadata=dict(help=help, choices=choices, group=group, limits=limits))


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a sentence for the caller instead of a usage dump."""

    def error(self, message):
        unknown = message.partition("unrecognized arguments: ")[2].partition("=")[0].partition(" ")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"python {self.prog} -h lists every flag"
        raise UserError(f"{message[:200]}; {hint}")


def flag_name(field):
    """n_layer -> --n-layer."""
    return "--" + field.replace("_", "-")


def parse_config(cls, argv=None, presets=None, description=None, default_preset=None):
    """Fill the dataclass `cls` from the command line. Order of authority: flags, then the preset, then the defaults.

    presets: {"name": {field: value}}; adds a --preset flag when given, whose default is `default_preset`. The result
    carries `given`, the names of the fields that flags have set. Raises UserError on an unknown flag, preset or choice,
    and on a value of the wrong type, out of its range, or empty.
    """
    presets, hints = presets or {}, typing.get_type_hints(cls)
    for name, values in presets.items():
        unknown = sorted(values.keys() - hints.keys())
        assert not unknown, f"preset {name} sets fields that do not exist: {unknown}"
    parser = _Parser(usage="%(prog)s [options]", description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS,
                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110))
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="a named set of options; other flags win over it" +
                            (f" [{default_preset}]" if default_preset else ""))
    group = parser
    for field in dataclasses.fields(cls):
        group = parser.add_argument_group(field.metadata["group"]) if field.metadata["group"] else group
        _add_flag(group, field, hints[field.name])
    flags = vars(parser.parse_args(argv))
    preset = flags.pop("preset", default_preset)
    config = cls(**{**presets.get(preset, {}), **flags})
    config.given = frozenset(flags)
    _check_ranges(config)
    return config


def peek(argv, name, default=None):
    """The value of --name in a command line that is parsed in full later, or the default; True for a bare flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag_name(name), nargs="?", const=True, default=default)
    return vars(parser.parse_known_args(argv)[0])[name]


def _add_flag(parser, field, hint):
    """One field, one flag: int, float, str, bool, `T | None`, or list[T] (one or more values)."""
    if type(None) in typing.get_args(hint):                     # `int | None`: parsed as int, None means "not given"
        hint = typing.get_args(hint)[0]
    many = typing.get_origin(hint) is list
    kind, choices = typing.get_args(hint)[0] if many else hint, field.metadata["choices"]
    shown = "" if many or field.default is None else f" [{field.default}]"
    text, flag = (field.metadata["help"] + shown).replace("%", "%%"), flag_name(field.name)
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        parser.add_argument(flag, type=kind, choices=choices, metavar=None if choices else field.name.upper(),
                            help=text, nargs="+" if many else None)


def _check_ranges(config):
    """Raise UserError for a number outside the range its field names, or an empty text (an unset shell variable)."""
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), flag_name(field.name)
        if value == "" or isinstance(value, list) and "" in value:
            raise UserError(f"{flag} was given an empty value; leave the flag out, or name something")
        if not isinstance(value, (int, float)):
            continue
        if not abs(value) < 1e15:                               # inf and nan, too
            raise UserError(f"{flag} must be an ordinary number, not {value}")
        for name, limit in field.metadata["limits"].items():
            if not LIMITS[name](value, limit):
                raise UserError(f"{flag} must be {name.replace('least', 'at least')} {limit}, not {value}")


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
    if hasattr(sys.stdout, "reconfigure"):  # a name that is not UTF-8 as the bytes it is: a printed command must work
        sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding == "utf-8" else "backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                                     # `sample.py .. | head -1`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        message = _sentence(error)
        if message is None:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _sentence(error):
    """What the user is told of it; None if it is no mistake of theirs, but a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        return "memory ran out; ask for less at once (train.py: a higher --accum), or for a smaller model"
    if "RANK" in os.environ and re.search("Connection (closed|reset|refused)|peer|NCCL", str(error)):
        return "another process of this run has ended; its own message, or torchrun's report, says why"
    if isinstance(error, OSError) and error.errno is not None:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "raise ulimit -n" if (
            error.errno in (errno.EMFILE, errno.ENFILE)) else "check the path"
        return f"cannot use {error.filename or 'the output folder'}: {error.strerror}; {remedy}, or choose another"
