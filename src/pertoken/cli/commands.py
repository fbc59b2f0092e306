"""The command line as a process: its commands, its exit codes, and what it says of errors.

Everything heavy is imported inside of the command that needs it, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
import threading

import typer

from pertoken.cli.audit import audit_app
from pertoken.cli.checking import checking_app
from pertoken.cli.models import models_app, tokenizer_app
from pertoken.cli.output import own_streams
from pertoken.cli.talk import talk_app
from pertoken.cli.training import training_app
from pertoken.cli.words import as_flags
from pertoken.errors import PertokenError
from pertoken.text import plain

__all__ = ["app", "command", "main"]

app = typer.Typer(
    name="pertoken",
    help="Pretrain and fine-tune language models: every supervised token counts once, however the work is split.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for commands in (training_app, audit_app, checking_app, models_app, talk_app):
    app.add_typer(commands)
app.add_typer(tokenizer_app, name="tokenizer")


def command() -> None:
    """`main` as a process of its own, which ends at once where nothing waits for its end.

    Python takes a third of a second to take apart what torch has loaded. Left to it are threads that are still at work,
    and libraries that have more to do: the compiler's workers, a tracker's connection.
    """
    try:
        main()
    except SystemExit as end:
        others = {"torch._inductor", "wandb"} & sys.modules.keys()
        if others or any(not thread.daemon for thread in threading.enumerate()[1:]) or not isinstance(end.code, int):
            raise
        for stream in (sys.stdout, sys.stderr):  # None where it was closed from the start
            if stream is not None:
                stream.flush()  # nothing of the command's own is left to write: `_run` has seen to it
        os._exit(end.code)


def main() -> None:
    """Run the command line; a user's error becomes one message on stderr and its exit code."""
    if _is_a_rank():
        from pertoken.training.parallel import end_process

        end_process(_run())
    sys.exit(_run())


def _run() -> int:
    """The exit code of the command that was asked for. The first rank that fails says why, on stderr."""
    with own_streams() as out:
        try:
            code = _asked_for()
            if code == 0:
                out.flush()  # raises OutputLost where the last of it does not get through
            return code
        except PertokenError as error:
            if str(error) and _speaks():
                lines = (f"error: {as_flags(str(error))}", *map(as_flags, getattr(error, "__notes__", ())))
                print(plain("\n".join(lines)), file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            if not _speaks():
                return 1  # in the wake of another rank, which has said why
            from pertoken.cli.bug_report import say_unforeseen

            return say_unforeseen(error, sys.argv[1:])


def _asked_for() -> int:
    """The command's own exit code, or that of a command line which is none."""
    try:
        app(prog_name="pertoken")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _is_a_rank() -> bool:
    """Whether torchrun has started this process with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _speaks() -> bool:
    """Whether no other rank has failed, and said why, before this process."""
    if not _is_a_rank():
        return True
    from pertoken.training.parallel import first_to_fail

    return first_to_fail()
