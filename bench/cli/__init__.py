"""The command line: every file of this folder that defines `command` is the command of its name."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import typer

from peftdyno.engine.errors import UserError

PANELS = ("Train and score", "Compare", "Look", "Costs")
"""Headings of the commands in --help, in order; a command's file names one in PANEL."""
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
"""What is wrong with the place a user named, or with its disk."""
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130


def build() -> typer.Typer:
    """The application; importing a command's file must not import torch."""
    app = typer.Typer(
        name="peftdyno",
        help="Fine-tune language models with parameter-efficient methods, and measure what it costs.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    for name, module in sorted(_commands().items(), key=lambda item: (PANELS.index(item[1].PANEL), item[0])):
        settings = {"help_option_names": ["-h", "--help"]}
        app.command(
            name.replace("_", "-"),
            rich_help_panel=module.PANEL,
            epilog=_examples(module.EXAMPLES),
            no_args_is_help=getattr(module, "NEEDS_ARGUMENTS", False),
            context_settings=settings,
        )(_quiet_interrupt(module.command))
    return app


def _commands() -> dict[str, Any]:
    modules = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
    return {name: module for name, module in modules.items() if hasattr(module, "command")}


def _examples(lines: tuple[str, ...]) -> str:
    """The end of a command's help: typer makes one paragraph of each pair of line ends."""
    escaped = [line.replace("[", r"\[") for line in lines]
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  {line}" for line in escaped)


class Interrupted(Exception):
    """Ctrl-C during a command."""


def _quiet_interrupt(command: Callable[..., None]) -> Callable[..., None]:
    """The command with Ctrl-C as an ordinary exception, which every version of typer leaves alone."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            raise Interrupted from None

    return run


def run(arguments: list[str], prog: str) -> int:
    """Run a command line; its exit status. What a user got wrong is one line on stderr."""
    try:
        _check_instruction_set()
        status = build()(args=arguments, prog_name=prog, standalone_mode=False)
    except UserError as error:
        return _say(str(error), USER_ERROR)
    except Interrupted:
        return _say("interrupted; the same command goes on from here", INTERRUPTED)
    except BrokenPipeError:
        sys.stdout = None  # type: ignore[assignment]  # nothing more can be written, not even at exit
        return FAILED
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        return _say(f"{error.filename or 'output'}: {error.strerror}; what was there before is kept", USER_ERROR)
    except Exception as error:
        # Usage errors of typer, whose class differs between its versions.
        if not hasattr(error, "format_message"):
            raise
        return _say(_usage_line(error), USER_ERROR)
    return status if isinstance(status, int) else 0


def _check_instruction_set() -> None:
    """UserError where PEFTDYNO_ISA names an instruction set that cannot run here."""
    if not os.environ.get("PEFTDYNO_ISA"):
        return
    from peftdyno.kernels import cpu

    try:
        cpu.instruction_set()
    except ValueError as error:
        raise UserError(str(error)) from None


def _usage_line(error: Any) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} -h)" if context is not None else ""
    return error.format_message().strip().replace("\n", " ") + hint


def _say(message: str, status: int) -> int:
    print(f"peftdyno: {' '.join(message.split())}", file=sys.stderr)
    return status


def main() -> None:
    """The command `peftdyno`."""
    sys.exit(run(sys.argv[1:], "peftdyno"))


def engine_train() -> None:
    """The command `engine-train`: `peftdyno train`."""
    sys.exit(run(["train", *sys.argv[1:]], "peftdyno"))
