"""``davae``: the verbs, and how their errors end."""

import logging
import sys
from types import ModuleType

import typer

from davae.cli import (
    ablate,
    bench,
    cache,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    reconstruct,
    report,
    train,
    upgrade,
)
from davae.errors import DavaeError
from davae.import_hooks import after_import
from davae.training.loop.signals import TrainingStopped
from davae.version import __version__

app = typer.Typer(
    help="Larger images from the same number of tokens, for any latent diffusion model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(demo.demo)
app.add_typer(train.app, name="train", help="Train a stage by recipe; the same command continues a stopped run.")
app.command()(plan.plan)
app.command()(upgrade.upgrade)
app.command()(cache.cache)
app.add_typer(bench.app, name="bench", help="Native and upgraded, side by side in one process.")
app.add_typer(compare.app, name="compare", help="Autoencoders side by side on the same images.")
app.add_typer(convert.app, name="convert", help="Files that the authors published, to diffusers folders.")
app.command()(generate.generate)
app.command()(reconstruct.reconstruct)
app.add_typer(evaluate.app, name="evaluate", help="How good images are: reconstructed and generated.")
app.command()(inspect.inspect)
app.command()(ablate.ablate)
app.command()(export.export)
app.command()(report.report)
app.command()(doctor.doctor)


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version and leave."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Say more while working."),
) -> None:
    if version:
        typer.echo(f"davae {__version__}")
        raise typer.Exit
    from rich.logging import RichHandler

    from davae.runtime.console import PlainConsole, PlainFormatter

    console = PlainConsole(stderr=True)
    handler: logging.Handler = logging.StreamHandler()  # in a file a message is one line, however long
    form = "%(asctime)s %(message)s"
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, omit_repeated_times=False)
        form = "%(message)s"
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    handler.setFormatter(PlainFormatter(form, "%H:%M:%S"))
    logging.getLogger("davae").setLevel(logging.DEBUG if verbose else logging.INFO)

    def quiet(library: ModuleType) -> None:
        """No progress bars of a second's loading. Without --verbose no warnings: transformers gives them of optional
        parts that nothing here uses, diffusers of an autoencoder class that it does not know."""
        library.utils.logging.disable_progress_bar()
        if not verbose:
            library.utils.logging.set_verbosity_error()

    after_import("transformers", quiet)
    after_import("diffusers", quiet)


def main() -> None:
    """Run the command line. Exit status 0: success; 2: a mistake in what was asked; 1: a failure."""
    from davae.runtime.console import tell

    try:
        app()
    except DavaeError as error:
        logging.getLogger("davae").debug("where it came up:", exc_info=error)  # for --verbose
        tell(str(error), style="red")
        sys.exit(2)
    except TrainingStopped as stopped:
        tell(str(stopped))
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        tell("stopped; the same command continues from the last checkpoint")
        sys.exit(130)


if __name__ == "__main__":
    main()
