"""TokenPackerHDProcessor: prompts with large pictures for LLaVA with TokenPacker, as tiles and a thumbnail.

All of TokenPacker-HD that TokenPacker isn't is done here: to the model, each tile is one image. Importing this module
loads transformers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoProcessor, BatchFeature, LlavaProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from vltok.errors import CheckpointError
from vltok.files import check_settings, read_json
from vltok.methods.condensing.token_packer.tiles import (
    Thumbnail,
    candidate_grids,
    choose_grid,
    expand_placeholders,
    picture_ids,
    slice_image,
)
from vltok.version import __version__

SETTINGS_FILE = "vltok_hd.json"
_SETTINGS = ("max_tiles", "thumbnail", "separators")
_PARTS = ("image_processor", "tokenizer")
# What would contradict the grid, and what means nothing once placeholders have become pictures.
_REFUSED_IMAGES = {"do_resize", "size", "resample", "do_center_crop", "crop_size", "do_pad", "pad_size", "data_format"}
_REFUSED_TEXT = {"text_pair", "text_target", "text_pair_target", "is_split_into_words", "stride", "return_length"}
_REFUSED_TEXT |= {"return_overflowing_tokens"}


class TokenPackerHDProcessor(ProcessorMixin):
    r"""Prepare prompts with large pictures for a LLaVA model with TokenPacker on, as TokenPacker-HD does.

    Is called like the processor it wraps. A picture becomes a grid of tiles and a thumbnail; its placeholder becomes
    those of all tiles, with a comma between the tiles of a row and a newline after each row. Everything else is the
    wrapped processor's, read at every call: a TokenPacker handle that comes or goes is followed, whichever of the two
    processors it was given.

    Args:
        processor: The model's LlavaProcessor. Tiles have the size of the pictures it makes.
        max_tiles: The most tiles of a picture, 9, 16 or 25; the thumbnail comes on top.
        thumbnail: "released" scales the padded tiles down, as released checkpoints expect; "sound" the picture itself.
        separators: Ids of comma and newline. By default what the tokenizer's `convert_tokens_to_ids([",", "\n"])`
            gives, which is what released checkpoints were trained with, although a llama tokenizer has no piece "\n"
            and answers with its unknown token. To train anew with such a tokenizer, rather take the piece of the
            newline byte, `tokenizer.convert_tokens_to_ids("<0x0A>")`.

    Raises:
        TypeError: If `processor` is not a LlavaProcessor.
        ValueError: If a setting is unknown, or the tokenizer lacks the placeholder or a separator.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        max_tiles: int = 9,
        thumbnail: Thumbnail = "released",
        separators: Sequence[int] | None = None,
    ) -> None:
        _check_kind(processor)
        candidate_grids(max_tiles)
        if thumbnail not in get_args(Thumbnail):
            raise ValueError(f'thumbnail must be "released" or "sound", got {thumbnail!r}')
        self.processor = processor
        self.max_tiles = max_tiles
        self.thumbnail = thumbnail
        self.separators = separators
        if self.tokenizer.convert_tokens_to_ids(self.image_token) != self.image_token_id:
            raise ValueError(
                f"{self.image_token!r} is not a token of this tokenizer; add it as a special token, then make the "
                "LlavaProcessor anew"
            )
        if self.image_token_id in self.separator_ids:
            raise ValueError(f"a separator can't be {self.image_token_id}, the placeholder; got {self.separator_ids}")

    def __getattr__(self, name: str) -> Any:
        if name == "processor" or name.startswith("__"):  # not there yet while this object is copied or unpickled
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PARTS or name == "chat_template":  # the wrapped processor saves these
            setattr(self.processor, name, value)
        else:
            super().__setattr__(name, value)

    def __copy__(self) -> TokenPackerHDProcessor:
        """One whose parts may be set without a trace on this one's."""
        return type(self)(copy.copy(self.processor), self.max_tiles, self.thumbnail, self.separators)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Name the parts of the processor, as transformers asks for them."""
        return list(_PARTS)

    @property
    def separator_ids(self) -> tuple[int, int]:
        """Ids of the comma between two tiles and of the newline after a row.

        Raises:
            ValueError: If they are not two ids of the tokenizer, or it has none and none were given.
        """
        ids = self.separators
        if ids is None:
            ids = self.tokenizer.convert_tokens_to_ids([",", "\n"])
            if None in ids:
                raise ValueError(
                    f"the tokenizer has no {'comma' if ids[0] is None else 'newline'}, and no unknown token to stand "
                    "for it; pass separators=(comma_id, newline_id)"
                )
        size = len(self.tokenizer)
        if not isinstance(ids, list | tuple) or len(ids) != 2 or not all(_is_id(index, size) for index in ids):
            raise ValueError(f"separators must be two token ids in 0..{size - 1}, got {ids!r}")
        return tuple(ids)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels: that of the pictures which the wrapped processor makes.

        Raises:
            ValueError: If they are no squares, or not made of whole patches.
        """
        name = "crop_size" if getattr(self.image_processor, "do_center_crop", None) else "size"
        size = dict(getattr(self.image_processor, name, None) or {})
        side = size.get("height")
        if side is None or side != size.get("width"):
            raise ValueError(
                f"a tile must be a square of the size that the model sees, but the image processor's {name} is {size}; "
                'set it to {"height": side, "width": side}'
            )
        if not self.patch_size or side % self.patch_size:
            raise ValueError(
                f"a tile of {side} x {side} pixels is not made of whole patches: the processor's patch_size is "
                f"{self.patch_size}"
            )
        return side

    @property
    def tokens_per_tile(self) -> int:
        """Placeholders that the wrapped processor writes for a picture of one tile."""
        # It is asked, as it may write other numbers in a block of `handle.using`. If this one was given to a handle in
        # its place, the handle's numbers are here.
        own = type(self.processor).replace_image_token.__get__(self)
        write = own if "patch_size" in vars(self) else self.processor.replace_image_token
        side = self.tile_size
        return write({"pixel_values": [torch.zeros(()).expand(3, side, side)]}, 0).count(self.image_token)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare pictures, prompts, or prompts with pictures.

        Args:
            images: A picture (PIL, array, tensor, path or URL), a list for all prompts, or a list for each prompt.
            text: A prompt or several, with one placeholder, such as "<image>", for each picture.
            videos: Not supported.
            audio: Not supported.
            kwargs: As for LlavaProcessor, such as padding, padding_side, truncation, max_length, return_tensors.
                Truncation shortens the text, never a picture. With return_mm_token_type_ids, a picture is 1 from its
                first tile to its last newline: what is no target in training. Offsets are those in the prompt as given.

        Returns:
            input_ids and attention_mask, (B, T), and pixel_values, (tiles of all pictures in order, 3, tile, tile).

        Raises:
            ValueError: If placeholders and pictures don't match, truncation would cut a picture, or an option is not
                supported.
        """
        if videos is not None or audio is not None:
            raise ValueError("TokenPacker-HD takes images and text; videos and audio are not supported")
        if images is None and text is None:
            raise ValueError("nothing to prepare: pass images, text or both")
        options = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        for kind, refused in (("images_kwargs", _REFUSED_IMAGES), ("text_kwargs", _REFUSED_TEXT)):
            if given := sorted(name for name in refused if options[kind].get(name) not in (None, False)):
                raise ValueError(f"TokenPacker-HD doesn't support {', '.join(given)}; leave it out")
        images = self.image_processor.fetch_images([] if images is None else images)
        sliced = [self._slice(image, options["images_kwargs"]) for image in make_flat_list_of_images(images)]
        return_tensors = options["text_kwargs"].pop("return_tensors", None)
        with_types = options["text_kwargs"].pop("return_mm_token_type_ids", options.get("return_mm_token_type_ids"))
        options["text_kwargs"].pop("return_text_replacement_offsets", None)

        data: dict[str, Any] = {}
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError(f"text must be a string or a list of strings, got {text!r}")
            is_nested = isinstance(images, list) and all(isinstance(item, list) for item in images)
            per_prompt = [len(item) for item in images] if is_nested and images else None
            data = self._encode(prompts, [ids for ids, _ in sliced], per_prompt, **options["text_kwargs"])
            if not with_types:
                del data["mm_token_type_ids"]
        if sliced:
            data["pixel_values"] = torch.cat([tiles for _, tiles in sliced])
        return BatchFeature(data, tensor_type=return_tensors)

    def _slice(self, image: Any, options: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
        """Token ids and tiles of a picture."""
        fixed = {"do_resize": False, "do_center_crop": False, "do_pad": False, "return_tensors": "pt"}
        pixels = self.image_processor(image, **{**options, **fixed})["pixel_values"][0]  # (3, H, W)
        grid = choose_grid(*pixels.shape[1:], self.max_tiles, self.tile_size)
        tiles = slice_image(pixels, grid, self.tile_size, self.thumbnail)
        return picture_ids(grid, self.tokens_per_tile, self.image_token_id, self.separator_ids), tiles

    def _encode(
        self,
        prompts: list[str],
        pictures: list[list[int]],
        per_prompt: list[int] | None,
        padding: Any = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: Any = None,
        max_length: int | None = None,
        **options: Any,
    ) -> dict[str, list]:
        """Tokenize prompts, put the pictures in, then truncate and pad: lists of each field, one per prompt."""
        padding = padding or False
        if truncation is None:
            truncation = max_length is not None and not padding  # as tokenizers read it
        limit = None
        if truncation and truncation != "do_not_truncate":
            limit = max_length or self.tokenizer.model_max_length
        encoded = self.tokenizer(prompts, **options)
        counts = [ids.count(self.image_token_id) for ids in encoded["input_ids"]]
        _check_counts(self.image_token, counts, len(pictures), per_prompt)

        rest, rows = iter(pictures), []
        for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            row = {name: values[index] for name, values in encoded.items()}
            own = list(islice(rest, count))
            growth = sum(map(len, own)) - count
            if limit is not None and len(row["input_ids"]) + growth > limit:
                row = self._truncate(prompt, count, limit - growth, options)
                if row is None:
                    raise ValueError(
                        f"max_length={limit} would cut an image of prompt {index}: images take {growth + count} of "
                        f"its {len(encoded['input_ids'][index]) + growth} tokens; allow more, or lower max_tiles"
                    )
            ids, source = expand_placeholders(row["input_ids"], self.image_token_id, own)
            row["mm_token_type_ids"] = [int(token == self.image_token_id) for token in row["input_ids"]]
            rows.append({name: [values[i] for i in source] for name, values in row.items()} | {"input_ids": ids})
        fields = {name: [row[name] for row in rows] for name in rows[0]}
        if not padding:
            return fields

        own_fields = {name: fields.pop(name) for name in ("mm_token_type_ids", "offset_mapping") if name in fields}
        padded = self.tokenizer.pad(
            fields,
            padding,
            max_length if padding == "max_length" else None,
            pad_to_multiple_of,
            padding_side,
            return_attention_mask="attention_mask" in fields,
        )
        is_left = (padding_side or self.tokenizer.padding_side) == "left"
        for name, values in own_fields.items():
            filler = (0, 0) if name == "offset_mapping" else 0
            for row, ids in zip(values, padded["input_ids"], strict=True):
                padding_of_row = [filler] * (len(ids) - len(row))
                row[:] = padding_of_row + row if is_left else row + padding_of_row
        return {**padded, **own_fields}

    def _truncate(self, prompt: str, count: int, room: int, options: dict[str, Any]) -> dict[str, list] | None:
        """Tokenize a prompt to at most `room` tokens, or None if a placeholder would go."""
        specials = self.tokenizer.num_special_tokens_to_add() if options.get("add_special_tokens", True) else 0
        if count and room < count + specials:
            return None
        row = dict(self.tokenizer(prompt, truncation=True, max_length=room, **options))
        return row if row["input_ids"].count(self.image_token_id) == count else None

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Tokens, with separators, and tiles of pictures of these sizes, (height, width) each."""
        if image_sizes is None:
            return MultiModalData()
        grids = [choose_grid(*size, self.max_tiles, self.tile_size) for size in image_sizes]
        ids = [picture_ids(grid, self.tokens_per_tile, self.image_token_id, self.separator_ids) for grid in grids]
        tiles = [rows * columns + (rows * columns > 1) for rows, columns in grids]
        return MultiModalData(num_image_tokens=[len(picture) for picture in ids], num_image_patches=tiles)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save the wrapped processor, and vltok_hd.json beside it.

        Raises:
            ValueError: With `push_to_hub`, which would leave vltok_hd.json behind; call the method push_to_hub().
        """
        if push_to_hub:
            raise ValueError("save to a folder only; to upload, call push_to_hub(repo_id) of this processor")
        files = self.processor.save_pretrained(str(save_directory), **kwargs)
        path = Path(save_directory, SETTINGS_FILE)
        settings = {"vltok_version": __version__, **{name: getattr(self, name) for name in _SETTINGS}}
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return [*files, str(path)]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, processor: LlavaProcessor | None = None, **kwargs: Any
    ) -> TokenPackerHDProcessor:
        """Load what `save_pretrained` wrote.

        Args:
            folder: A local folder.
            processor: The processor to wrap, such as `handle.processor`; by default the one saved in the folder.
            kwargs: For loading that one.

        Raises:
            FileNotFoundError: If the folder has no vltok_hd.json.
            CheckpointError: If that file is not what `save_pretrained` writes.
        """
        path = Path(folder, SETTINGS_FILE)
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no {SETTINGS_FILE}; give a local folder saved by this class")
        settings = read_json(path)
        check_settings(settings, str(path))
        expected = {"vltok_version", *_SETTINGS}
        if settings.keys() != expected:
            raise CheckpointError(f"{path} must have the fields {', '.join(sorted(expected))}; got {settings!r}")
        if processor is None:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, **kwargs)
        _check_kind(processor)
        writer = settings.pop("vltok_version")
        try:
            return cls(processor, **settings)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} (written by vltok {writer}) doesn't fit: {error}") from error


def _check_kind(processor: object) -> None:
    if not isinstance(processor, LlavaProcessor):
        raise TypeError(f"processor must be the LlavaProcessor of a LLaVA model, got {type(processor).__name__}")


def _check_counts(placeholder: str, counts: list[int], pictures: int, per_prompt: list[int] | None) -> None:
    """Raise ValueError unless each prompt has a placeholder for each of its pictures."""
    if sum(counts) != pictures:
        raise ValueError(f"{pictures} images came for {sum(counts)} placeholders {placeholder!r}; each needs one")
    if per_prompt is not None and per_prompt != counts:
        raise ValueError(
            f"the lists of images hold {per_prompt}, but the prompts have {counts} placeholders {placeholder!r}"
        )


def _is_id(value: object, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size
