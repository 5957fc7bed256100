"""What the benchmarks' commands share: their flags, and one line on stderr for a user's mistake."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from fastmoe_lora import MoEConfig
from kernels import UserError
from train.files.atomic import write_text
from train.files.printing import printing


class Parser(argparse.ArgumentParser):
    """Of ``python -m bench.NAME``, whose module has the docstring ``about``; errors are one line."""

    def __init__(self, name: str, about: str | None) -> None:
        super().__init__(
            prog=f"python -m bench.{name}", description=(about or "").partition("\n")[0], allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help explains)\n")


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of the ``known`` names, separated by commas."""
    known = tuple(known)

    def read(text: str) -> list[str]:
        for name in (chosen := text.split(",")):
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"choose among {', '.join(known)}"
                raise argparse.ArgumentTypeError(f"unknown {name!r}: {hint}")
        return chosen

    return read


def pools(text: str) -> list[str]:
    """The type of a flag that takes pools N/k/S/r, separated by commas; " gelu" may follow one."""
    try:
        return [name for name in text.split(",") if MoEConfig.parse(name.removesuffix(" gelu"))]
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def finish(main: Callable[[], int]) -> NoReturn:
    """Exits with the status of ``main``, with 2 and one line after a UserError."""
    try:
        with printing():
            status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def keep(out: Path | None, text: str) -> None:
    """Writes ``text`` where --out gave a file."""
    if out:
        write_text(out, text)
