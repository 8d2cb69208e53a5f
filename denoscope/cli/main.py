"""`denoscope`: the command and what its verbs share."""

import os
import sys
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console

from denoscope.cli import (
    bench,
    demo,
    features,
    guidance,
    match,
    models,
    propagate,
    sample,
    segment,
    shift,
    track,
    train,
    tune,
)
from denoscope.cli.options import invocation
from denoscope.errors import DenoscopeError

app = typer.Typer(
    name="denoscope",
    help="Read what diffusion models know about your photos.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("match")(match.match)
app.command("propagate")(propagate.propagate)
app.command("track")(track.track)
app.command("segment")(segment.segment)
app.command("features")(features.features)
app.command("shift")(shift.shift)
app.command("tune")(tune.tune)
app.command("bench")(bench.bench)
app.command("sweep")(bench.sweep)
app.command("sample")(sample.sample)
app.add_typer(guidance.app, name="guidance")
app.command("models")(models.models)
app.command("demo")(demo.demo)
app.add_typer(train.app, name="train")


@app.callback(invoke_without_command=True)
def front(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    winograd: Annotated[
        bool,
        typer.Option("--winograd", help="Faster convolutions on the CPU; the last digits of results differ."),
    ] = False,
) -> None:
    """Read what diffusion models know about your photos."""
    if version:
        from denoscope import __version__

        print(__version__)
        raise typer.Exit
    if winograd:
        from denoscope.denoisers.winograd import winograd as faster

        invocation().with_resource(faster())
    told: set[str] = set()

    def warn(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in told:
            told.add(str(message))  # once for all pictures
            Console(stderr=True).print("Note:", str(message), markup=False, highlight=False, soft_wrap=True)

    warnings.showwarning = warn


def main() -> None:
    """Run the command line; a mistake of the user's is one sentence and exit status 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console(stderr=True)
    try:
        app()
    except (DenoscopeError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        text = " ".join(str(error).split())
        console.print("Error:", text, markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
