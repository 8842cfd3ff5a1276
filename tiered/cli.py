"""The command line: `tiered COMMAND ...`. Each command is a file of tiered/commands."""

from __future__ import annotations

import logging
import os
import sys

import click

from tiered import commands
from tiered.version import __version__


class Commands(click.Group):
    """Finds commands in their folder, and imports only the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return commands.names()

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return commands.find(name) if name in commands.names() else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in commands.names():
            known = ", ".join(commands.names())
            raise click.UsageError(f"no command {args[0]!r}; the commands are: {known}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="tiered")
@click.option("-v", "--verbose", count=True, help="Log what the engine decides; -vv logs more.")
@click.option("--debug", is_flag=True, envvar="TIERED_DEBUG", help="Show tracebacks of errors.")
def app(verbose: int, debug: bool) -> None:
    """Run Mixture-of-Experts language models that do not fit.

    Hot experts stay in memory, cold ones on disk; each command has its own --help. Every option of
    a command can also be given as an environment variable: --expert-ram as TIERED_EXPERT_RAM.
    """
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("tiered").setLevel(level)
    if debug:
        os.environ["TIERED_DEBUG"] = "1"


def main(arguments: list[str] | None = None) -> None:
    """Run a command. What goes wrong is one line on standard error, and a non-zero exit."""
    try:
        app.main(arguments, prog_name="tiered", standalone_mode=False)
    except click.exceptions.Exit as finished:
        sys.exit(finished.exit_code)
    except click.Abort:
        click.echo("\nstopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("\nstopped", err=True)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("TIERED_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        click.echo(f"tiered: {message}", err=True)
        sys.exit(1)
