"""apply() puts methods on a model and returns the handle that takes them off again and says what they did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from vltok import families
from vltok.calls import Calls
from vltok.edits import Edits
from vltok.handle import Attachment, Handle, settings
from vltok.method import Method
from vltok.run import Run


def apply(
    model: nn.Module,
    method: Method | str | Iterable[Method | str],
    *,
    processor: Any = None,
    family: str | None = None,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    text_tower: tuple[nn.Module, Any] | None = None,
) -> Handle:
    """Put one or several methods on a model, in place.

    Args:
        model: A Hugging Face vision-language model of a supported family: bare, with its head, or wrapped.
        method: The method, or several, applied in order; each may be text such as "todre,keep_ratio=0.1".
        processor: The model's processor, for methods that change how many placeholders an image gets.
        family: "generic" tries a model that belongs to no supported family: one with a `get_image_features` and a
            decoder with `layers`, called by keyword. Its first call tells whether features and placeholders agree.
        image_token_id: With family="generic": the id that stands for visual tokens of images; by default the config's.
        video_token_id: The same for videos.
        text_tower: A CLIPModel of transformers and its tokenizer, for methods that compare visual tokens with the
            question in CLIP's space. It runs where it is, so best beside the model; no part of it is saved with that.

    Returns:
        The handle that reports and removes. If anything fails, the model is left as it was.

    Raises:
        TypeError: If `model` is not a module, `method` not a Method, an id not an integer, or `text_tower` no pair.
        UnsupportedModelError: If the model, or a part the method needs, is not one vltok knows, or there are two.
        ValueError: If the method doesn't fit the model, or another one is in the way, or a text names none; or if
            `family` is another word, or ids are given without it.
    """
    methods = _read(method)
    marks = families.checked_marks(image_token_id, video_token_id)
    if family not in (None, "generic") or (family is None and marks):
        raise ValueError(
            f'family must be "generic" or left out, and ids of placeholders need it, got family={family!r} with {marks}'
        )
    if family is None:
        view = families.view(model, processor, text_tower)
    else:
        view = families.generic_view(model, marks, processor, text_tower)
    edits, run, calls = Edits(view.host), Run(), Calls(view.host)
    try:
        edits.before(view.host, calls.before_call)  # first, so that it is the last to go
        settled: tuple[Method, ...] = ()
        for item in methods:
            settled += (item.settled(view),)
            settled[-1].attach(view, edits, run)
        if edits.added_modules:
            view.mark_checkpoint(edits, settings(view.family.name, settled, marks))
        attachment = Attachment(settled, view.family.name, view.host, edits, run, calls, processor, marks)
        attachment.leave_on_host()
    except BaseException:
        edits.undo()
        raise
    return attachment.handle(model)


def _read(method: Any) -> tuple[Method, ...]:
    """The methods that `apply` was given, texts read.

    Raises:
        TypeError: If one is neither a method nor text.
        ValueError: If there is none, or a text names none.
    """
    several = isinstance(method, Iterable) and not isinstance(method, str | Mapping)
    methods = tuple(
        Method.from_text(item) if isinstance(item, str) else item for item in (method if several else [method])
    )
    for item in methods:
        if not isinstance(item, Method):
            hint = "; make an instance of it" if isinstance(item, type) and issubclass(item, Method) else ""
            raise TypeError(
                f'apply() takes methods such as vltok.ToDRE(keep_ratio=0.1), or "todre,keep_ratio=0.1" as text, got '
                f"{item!r}{hint}"
            )
    if not methods:
        raise ValueError("apply() takes at least one method, got none")
    return methods
