"""How commands fail: one line that says what is wrong and what to do, and an exit code.

2: the user can fix it. 130: Ctrl-C. 141: the reader of the output has left, as `head` does. A
fault of the program raises, with its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from metarl.cli.interrupts import is_the_program
from metarl.cli.streams import results, results_apart
from metarl.envs.errors import UserError, raised
from metarl.envs.guard import is_of_user_code

_ROOM = "make room there, or choose another place"
_RIGHTS = "choose a place that may be written to, or change its rights"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOENT: "is its folder still there?",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def exit_code(command: Callable[[], int]) -> int:
    """Return a command's exit code; tell its error in a line."""
    with results_apart(to_the_end=is_the_program()):
        return _exit_code(command)


def _exit_code(command: Callable[[], int]) -> int:
    try:
        code = command()
        results().flush()
        return code
    except UserError as error:
        return _told(error.command, error)
    except Exception as error:
        told = _out_of_memory(error) or _of_user_code(error) or _of_the_system(error)
        if told is None:
            raise
        return told
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _out_of_memory(error: Exception) -> int | None:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return _told("out of memory: take fewer tasks or episodes, or a smaller network", error)
    return None


def _of_user_code(error: Exception) -> int | None:
    """Tell an environment's error; with `python -X dev` it raises, with its traceback."""
    if not is_of_user_code(error) or sys.flags.dev_mode:
        return None
    return _told(": ".join([*getattr(error, "__notes__", ()), raised(error)]), error)


def _of_the_system(error: Exception) -> int | None:
    """Tell what the operating system refuses."""
    if not isinstance(error, OSError):
        return None
    if isinstance(error, BrokenPipeError) and _reader_left():
        return 141
    if error.filename is None:
        return None
    notes = [_REMEDIES.get(error.errno or 0, ""), *getattr(error, "__notes__", ())]
    return _told(f"{error.filename}: {'; '.join(filter(None, [error.strerror, *notes]))}", error)


def _reader_left() -> bool:
    """Return whether nobody reads standard output any more; if so it is silent from then on."""
    poll = select.poll()
    poll.register(results(), 0)  # errors and hang-ups are told without being asked for
    left = bool(poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), results().fileno())
    return left


def _told(message: str, error: Exception) -> int:
    if not getattr(error, "elsewhere", False):  # or the rank that it is of tells it
        print(f"error: {message}", file=sys.stderr)
    return 2


def parse(parser: Callable[..., Any], kind: Any, arguments: list[str], **options: Any) -> Any:
    """Return what tyro.cli makes of a command line; what it refuses is a UserError of one line.

    tyro's boxes are read, since its hooks for errors are private: a text of another form still
    ends as one line, only less well put.
    """
    said = [word for word in arguments if word.partition("=")[0] == "--family-options"]
    if len(said) > 1:  # the last would be taken, and the others lost
        raise UserError(
            "--family-options is there twice: name all options after one, as in"
            " --family-options low=0.5 high=1.5"
        )
    box = io.StringIO()
    helped = not {"-h", "--help"}.isdisjoint(arguments)
    try:
        streams = contextlib.redirect_stderr(box), contextlib.redirect_stdout(results())
        with streams[0], streams[1], _unwrapped(helped):
            return parser(kind, args=arguments, **options)
    except SystemExit as error:
        if not error.code:
            raise
    help_command = f"{options['prog']} --help"
    known: list[str] = []
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        parser(kind, args=["--help"], **options)
    known = sorted(set(re.findall(r"(?<!\S)--[a-z][\w.-]*", page.getvalue())))
    raise UserError(f"{_one_line(box.getvalue(), known)} ({help_command} lists the options)")


@contextlib.contextmanager
def _unwrapped(helped: bool) -> Iterator[None]:
    """Let tyro write long lines, unless it is help that it writes."""
    before = os.environ.get("COLUMNS")
    if not helped:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


_PATTERNS: Mapping[str, str] = {
    r"Error parsing (\S+): invalid literal for int\(\) with base 10: '(.*)'":
        "{0} must be a whole number, got {1!r}",
    r"Error parsing (\S+): could not convert string to float: '(.*)'":
        "{0} must be a number, got {1!r}",
    r"Error parsing (\S+): Could not find valid parse for arguments: \[(.*)\]":
        "{0} cannot be made of {1}; several values stand apart, as in 0.1 0.05",
    r"Missing value for argument '(\S+)'.*": "{0} needs a value",
    r"Error parsing (--\S+): (.*)": "{0}: {1}",
    r"Error parsing \S+: (.*)": "{0}",  # a config's own message, which names its key
}  # fmt: skip


def _one_line(box: str, known: list[str]) -> str:
    """Return what a box of tyro's says above its first rule."""
    from metarl.envs.errors import did_you_mean

    text = re.sub(r"\x1b\[[\d;]*m", "", box)
    sections: list[list[str]] = [[]]
    for line in text.splitlines():
        inner = line.strip("│ ")
        if inner.strip("─-"):
            sections[-1].append(inner)
        else:
            sections.append([])
    # In a frame the title is in the frame; without, where output is no UTF-8, it is a section.
    framed = text.startswith("╭")
    said = sections[0][1:] if framed else sections[min(1, len(sections) - 1)]
    line = " ".join(said)
    if match := re.fullmatch(r"Unrecognized (?:options|arguments): (.*)", line):
        words = match[1].split(", ")
        option = next((word for word in words if word.startswith("-")), None)
        if option is None:
            if words[0].lower() not in ("true", "false"):
                return f"{words[0]!r} is not expected here"
            switch = next((name for name in known if re.search(r"\bno-", name)), "--no-NAME")
            return f"{words[0]!r} is not expected here: a switch is turned off as in {switch}"
        name = option.partition("=")[0]
        # A section's switch is turned off by --section.no-name.
        off = re.sub(r"^--no-(.*\.)", r"--\1no-", name)
        return f"no option {name!r}{did_you_mean(off, known)}"
    pattern = r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)\."
    if match := re.fullmatch(pattern, line):
        value, option, choices = match.groups()
        names = re.findall(r"'([^']*)'", choices)
        return f"{option} must be one of {', '.join(names)}, got {value!r}"
    for pattern, message in _PATTERNS.items():
        if match := re.fullmatch(pattern, line):
            return message.format(*match.groups())
    return line or "the command line cannot be read"
