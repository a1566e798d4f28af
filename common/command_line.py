"""The command line of a script; its help is made of the script's module docstring."""

import argparse
from textwrap import dedent
from typing import NamedTuple


class Option(NamedTuple):
    """A script's own option: it sets a key to true, or with a metavar adds a text to a list."""

    purpose: str
    metavar: str | None = None
    excludes_images: bool = False


def script_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose `--help` begins with the docstring's first line and ends with its examples."""
    summary = docstring.strip().partition("\n")[0]
    examples = "\n".join(f"  {line}" for line in examples_in(docstring))
    return argparse.ArgumentParser(
        description=summary,
        epilog=f"examples:\n{examples}".replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def examples_in(docstring: str) -> list[str]:
    """The lines of a docstring that are commands: those that run python or torchrun."""
    lines = dedent(docstring).splitlines()
    return [line for line in lines if line.startswith(("python ", "torchrun "))]
