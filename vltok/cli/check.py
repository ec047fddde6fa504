"""`vltok check`: whether a model is supported, and which methods go on it."""

from __future__ import annotations

import platform
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

PACKAGES = ("vltok", "torch", "transformers", "timm", "accelerate", "peft", "vllm")


def check(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its name on the hub if it was fetched before.")],
    download: Annotated[bool, typer.Option("--download", help="Let its config be fetched from the hub.")] = False,
) -> None:
    """Say whether a model is supported, which methods go on it, and why others don't.

    The model is built from its config, without weights and without memory for those of the language model, and each
    method is put on it and taken off again.
    """
    from vltok.errors import VltokError

    console = Console(highlight=False)
    console.print(", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name))), soft_wrap=True)
    console.print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        empty, processor = _build(model, download)
    except (OSError, ValueError) as error:
        typer.secho(f"error: {model} can't be built: {error}", err=True, fg="red")
        raise typer.Exit(1) from error
    from vltok import families

    try:
        view = families.view(empty, processor)
    except VltokError as error:
        console.print(f"[red]not supported:[/red] {error}", soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(f"{type(empty).__name__}: family [bold]{view.family.name}[/bold]")
    _fill(empty, view)
    table = Table("Method", "Goes on", "Why not", box=SIMPLE)
    for text, reason in _tried(empty, processor).items():
        table.add_row(text, "no" if reason else "yes", reason)
    console.print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _build(model: str, download: bool) -> tuple[Any, Any]:
    """The model on the meta device, with no weights, and its processor if there is one."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from vltok.files import find_model

    name, here = find_model(model, download), {"local_files_only": not download}
    config = AutoConfig.from_pretrained(name, **here)
    try:
        processor = AutoProcessor.from_pretrained(name, **here)
    except (OSError, ValueError, ImportError):
        processor = None
    whole = type(config) in AutoModelForImageTextToText._model_mapping
    with torch.device("meta"):
        return (AutoModelForImageTextToText if whole else AutoModel).from_config(config), processor


def _fill(model: Any, view: Any) -> None:
    """Give all but the decoder's layers memory and small numbers, as methods put weights beside them."""
    import torch

    decoder = set(view.family.decoder(view.host).modules()) if hasattr(view.family, "decoder") else set()
    for module in model.modules():
        if module not in decoder:
            module.to_empty(device="cpu", recurse=False)
            for weight in module.parameters(recurse=False):
                torch.nn.init.normal_(weight, std=0.02)


def _tried(model: Any, processor: Any) -> dict[str, str]:
    """Why each method does not go on a model, by its name; "" for those that do."""
    from vltok.api import apply
    from vltok.errors import VltokError
    from vltok.method import methods_by_name

    found = {}
    for name, cls in sorted(methods_by_name().items()):
        try:
            takes_ratio = "keep_ratio" in {field.name for field in fields(cls)}
            apply(model, cls(keep_ratio=0.5) if takes_ratio else cls(), processor=processor).remove()
            found[name] = ""
        except (VltokError, ValueError, TypeError) as error:
            found[name] = str(error)
    return found
