"""What benchmarks have in common that fill a table of the README: how they run the program, and where the table goes."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run(command: list) -> str:
    """What `compress` printed for some arguments; its last line is shown if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "optimum_prune", "compress", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr.strip().split("\n")[-1])
    return done.stdout


def markdown(rows: list[list[str]]) -> str:
    """Rows as a table, the first as its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def write_into(readme: Path, name: str, table: str) -> None:
    """Writes a table between the two comments that have its name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    readme.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def fill(parser: argparse.ArgumentParser, name: str, table: Callable[[argparse.Namespace], str]) -> None:
    """Parses the command line, prints the table that is made of it, and writes it into the README that is named, if one is."""
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = table(options)
    print(found)
    if options.readme:
        write_into(options.readme, name, found)
