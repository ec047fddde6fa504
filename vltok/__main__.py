"""Runs the command line: `vltok`, or `python -m vltok`."""

try:
    from vltok.cli import app
except ModuleNotFoundError as error:
    library = (error.name or "").partition(".")[0]
    if library not in ("typer", "rich"):
        raise
    raise SystemExit(f"vltok's command line needs {library}: python -m pip install 'vltok[cli]'") from error


def main() -> None:
    """Run it."""
    app(prog_name="vltok")


if __name__ == "__main__":
    main()
