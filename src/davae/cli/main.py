"""``davae``: all commands, and how errors are reported."""

import logging
import signal
import sys
from types import ModuleType
from typing import Any, NoReturn

import typer
import typer.core

from davae.cli import (
    ablate,
    bench,
    cache,
    compare,
    configs,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    recipes,
    reconstruct,
    report,
    studio,
    train,
    upgrade,
)
from davae.errors import DavaeError
from davae.import_hooks import after_import
from davae.runtime.atomic_files import system_error
from davae.training.loop.signals import Stopped, TrainingStopped, ending_by_signals
from davae.version import __version__

_VERBS = [
    "demo",
    "recipes",
    "plan",
    "train",
    "cache",
    "upgrade",
    "generate",
    "reconstruct",
    "evaluate",
    "compare",
    "inspect",
    "ablate",
    "bench",
    "export",
    "convert",
    "report",
    "studio",
    "comfyui",
    "configs",
    "doctor",
]
"""In the order of use, which ``--help`` has."""


class _Verbs(typer.core.TyperGroup):
    """Lists the verbs in the order of use. Reports Ctrl-C as other signals, and files that end too early as bugs: typer
    would exit without a message."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_VERBS.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped(signal.SIGINT) from error
        except EOFError as error:
            raise RuntimeError("a file ended too early") from error


app = typer.Typer(
    cls=_Verbs,
    help="Larger images from the same number of tokens, for any latent diffusion model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(demo.demo)
app.add_typer(train.app, name="train", help="Train a stage of a recipe; the same command continues a stopped run.")
app.command()(plan.plan)
app.add_typer(recipes.app, name="recipes", help="List, show and copy recipes; write one for a pipeline of your own.")
app.command()(upgrade.upgrade)
app.command()(cache.cache)
app.add_typer(bench.app, name="bench", help="Benchmark base and upgraded models side by side in one process.")
app.add_typer(compare.app, name="compare", help="Compare autoencoders on the same images.")
app.add_typer(convert.app, name="convert", help="Convert published checkpoints to diffusers folders.")
app.command()(generate.generate)
app.command()(reconstruct.reconstruct)
app.add_typer(evaluate.app, name="evaluate", help="Measure the quality of reconstructed or generated images.")
app.command()(inspect.inspect)
app.command()(ablate.ablate)
app.command()(export.export)
app.command()(report.report)
app.command()(studio.studio)
app.command()(configs.configs)
app.command()(configs.comfyui)
app.command()(doctor.doctor)


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log more."),
) -> None:
    if version:
        typer.echo(f"davae {__version__}")
        raise typer.Exit
    from rich.logging import RichHandler

    from davae.runtime.console import PlainConsole, PlainFormatter, ToldOnce

    console = PlainConsole(stderr=True)
    handler: logging.Handler = logging.StreamHandler()  # not a terminal: one line per message, not wrapped
    form = "%(asctime)s %(message)s"
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, omit_repeated_times=False)
        form = "%(message)s"
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    handler.setFormatter(PlainFormatter(form, "%H:%M:%S"))
    if not verbose:
        handler.addFilter(ToldOnce())
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of an optional kernel on every CPU
    logging.getLogger("davae").setLevel(logging.DEBUG if verbose else logging.INFO)

    def quiet(library: ModuleType) -> None:
        """Turn off progress bars of loading and, without --verbose, warnings: transformers' about optional parts that
        davae does not use, diffusers' about an autoencoder class that it does not know."""
        library.utils.logging.disable_progress_bar()
        if not verbose:
            library.utils.logging.set_verbosity_error()

    after_import("transformers", quiet)
    after_import("diffusers", quiet)


def main() -> None:
    """Run the command line.

    Exit status: 0 success, 2 a user error, 1 a failure, 128 + number after a signal. System errors (files, memory) are
    shown as one line, bugs with their traceback.
    """
    try:
        with ending_by_signals():
            app()
    except DavaeError as error:
        _leave(str(error), 2, error)
    except TrainingStopped as stopped:
        _leave(str(stopped), 128 + stopped.signal)
    except (Stopped, KeyboardInterrupt) as stopped:
        number = stopped.signal if isinstance(stopped, Stopped) else signal.SIGINT
        kept = "what is finished is kept, nothing is half-written"
        _leave(f"stopped by {number.name}; {kept}, and the same command goes on or begins again", 128 + number)
    except Exception as error:
        told = system_error(error)
        if told is None:
            raise
        _leave(told, 1, error)


def _leave(text: str, status: int, error: BaseException | None = None) -> NoReturn:
    from davae.runtime.console import tell

    if error is not None:
        logging.getLogger("davae").debug("raised at:", exc_info=error)  # for --verbose
    tell(text, style="red" if error is not None else "")
    sys.exit(status)


if __name__ == "__main__":
    main()
