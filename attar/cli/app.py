"""The command line's root, and what becomes of errors."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

from attar.errors import AttarError, out_of_memory
from attar.files import file_error

app = typer.Typer(
    help="attar makes generative vision models small and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from attar import __version__

        print(f"attar {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@contextmanager
def _calm() -> Iterator[None]:
    """Other libraries' advice stays out of our output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        yield


def main() -> None:
    """Entry point. Whatever a user can cause is one line on stderr and an exit code: 1; 2 for arguments that cannot
    be parsed; 130 for an interrupt."""
    try:
        with _calm():
            code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == 130:
            raise KeyboardInterrupt
        if isinstance(code, int):
            sys.exit(code)
    except AttarError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        resumes = sys.argv[1:2] in (["compress"], ["allocate"])
        _fail(f"interrupted{': run the same command again to go on' if resumes else ''}", code=130)
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, SafetensorError) as error:
        _fail(str(file_error(error)))
    except Exception as caught:
        error: Any = caught
        # the parser's own errors, whichever package they come from
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(error.format_message(), code=error.exit_code)
        if hasattr(error, "exit_code"):
            sys.exit(error.exit_code)
        if type(error).__name__ == "Abort":
            _fail("interrupted", code=130)
        if out_of_memory(error):
            device = type(error).__name__ == "OutOfMemoryError"
            what = "the device is out of memory: use --device cpu, or" if device else "out of memory:"
            _fail(f"{what} {_with_less(sys.argv[1] if len(sys.argv) > 1 else '', device)}")
        raise


def _with_less(command: str, device: bool) -> str:
    """What a command can do to need less memory, of the device or of the machine."""
    if command == "bench":
        return "lower --tokens"
    if command not in ("compress", "allocate"):
        return "take a smaller size or fewer frames" + (", or add --offload model" if device else "")
    samples = "select.count" if command == "compress" else "allocate.samples"
    return (
        "take a smaller size or fewer frames, " + ("" if device else f"lower {samples}, ") + "or add --stream"
    )


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
