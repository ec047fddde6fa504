"""Runs the command line: `python -m vltok.train`."""

from vltok.train.cli import app

if __name__ == "__main__":
    app(prog_name="python -m vltok.train")
