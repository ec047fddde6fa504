"""Runs the command line: `python -m vltok`."""

try:
    from vltok.cli import app
except ModuleNotFoundError as error:
    library = (error.name or "").partition(".")[0]
    if library not in ("typer", "rich"):
        raise
    raise SystemExit(f"python -m vltok needs {library}: python -m pip install 'vltok[cli]'") from error

if __name__ == "__main__":
    app(prog_name="python -m vltok")
