"""Collator: samples to a padded batch with labels on the answers alone, images and videos whole."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Value
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch.nn import functional as F

from vltok.engine.projector import scales_of
from vltok.processing import TokenPackerHDProcessor
from vltok.train.data import (
    BadImageError,
    Sample,
    SampleError,
    open_image,
    open_video,
    pad_square,
    read_sample,
)
from vltok.train.prompt import PromptText, PromptWriter, Style, places_of_marks, unmark

logger = logging.getLogger(__name__)
OnFault = Literal["raise", "drop"]
IGNORE = -100  # the label that losses skip
SCALE = "scale_factor"  # in a batch: what its placeholders were written for
TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # one entry per token
GREY_SIZE = (224, 224)  # of pictures that stand in for others
_LEARNED = "assistant_masks"  # as transformers calls it


class _Reader:
    """Stands in for a processor's tokenizer: takes the marks of answers out of the text and notes their tokens."""

    def __init__(self, tokenizer: Any, prompt: PromptText) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        (prompt,) = [unmark(each) for each in ([text] if isinstance(text, str) else text)]
        if prompt.learned != self._prompt.learned:
            raise ValueError(f"it makes {prompt.learned} of the answers {self._prompt.learned}")
        encoded = self._tokenizer([prompt.text], *args, **options, return_offsets_mapping=True)
        (offsets,) = encoded.pop("offset_mapping")
        encoded[_LEARNED] = [tokens_in(offsets, prompt.answers)]
        marks = places_of_marks(text if isinstance(text, str) else text[0])
        token_at = encoded.char_to_token  # some processors look for places in the text that they passed
        encoded.char_to_token = lambda row, place: token_at(row, place - bisect_left(marks, place))
        return encoded


def tokens_in(offsets: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> list[bool]:
    """Say for each token, given by its first character and the one behind its last, whether it reaches into a place."""
    return [any(start < stop and start < end and stop > begin for begin, end in places) for start, stop in offsets]


@dataclass
class _Encoded:
    """One sample in tokens: what the processor returned, and its labels, (T,)."""

    features: dict[str, Any]
    labels: torch.Tensor

    def cut(self, length: int) -> None:
        """Leave out the tokens from `length` on."""
        self.labels = self.labels[:length]
        for key in TOKEN_KEYS:
            if key in self.features:
                self.features[key] = self.features[key][:, :length]


@dataclass(frozen=True)
class _Opened:
    """A sample's prompt and its media, opened; without a loss if one of them couldn't be."""

    prompt: PromptText
    images: list[Image.Image]
    videos: list[Any]
    name: str
    is_good: bool = True


class Collator:
    """Makes batches: prompts in the model's style, labels -100 on everything but answers and their end-of-turn tokens.

    Works with any processor that replaces placeholders in the text by the tokens of images and videos: answers are
    followed through it by marks in the text. A conversation longer than `max_length` loses its end; an image or video
    that would be cut through goes with it. A dropped sample stays in the batch without labels, and with a grey picture
    for its own if one can't be opened: it trains nothing, and the batch keeps its shape on every process. `dropped`
    counts these.

    Where the method on the model has several scale factors, placeholders are those of the one that counts when a batch
    is made. `drawing` gives a collator that draws one for each batch.

    A batch of texts gets a grey picture behind its shortest text, where causal attention lets nothing learn from it. So
    every process calls vision tower and projector in every step, as distributed training expects.

    Args:
        processor: The model's processor, as the methods on the model have set it.
        style: How prompts look, see `PromptWriter`.
        max_length: Most tokens of a sample, visual tokens included.
        on_bad_image: "raise" for an error about an image or video that can't be opened, or "drop" to warn and drop the
            sample.
        on_too_long: "raise" for an error about a sample without any answer token in `max_length`, or "drop".
        pad_to_square: Pad pictures to a square in the colour of the image processor's mean first (LLaVA's stage 2).
        always_picture: Whether batches of texts get that grey picture; needless where only the language model trains.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        processor: Any,
        *,
        style: Style = "auto",
        max_length: int = 2048,
        on_bad_image: OnFault = "raise",
        on_too_long: OnFault = "raise",
        pad_to_square: bool = False,
        always_picture: bool = True,
    ) -> None:
        for name, value in (("on_bad_image", on_bad_image), ("on_too_long", on_too_long)):
            if value not in get_args(OnFault):
                raise ValueError(f'{name} must be "raise" or "drop", got {value!r}')
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.processor = processor
        self.write = PromptWriter(processor, style)
        self.max_length, self.pad_to_square, self.always_picture = max_length, pad_to_square, always_picture
        self.on_bad_image, self.on_too_long = on_bad_image, on_too_long
        self._dropped = {"bad image": Value("q", 0), "too long": Value("q", 0)}  # shared with the loader's workers
        self._epoch = Value("q", 0)  # so is this
        self._draws = False
        self._axes: dict[str, int] = {}  # see _axis

    @property
    def dropped(self) -> dict[str, int]:
        """How often a sample was dropped so far, for each reason: once per epoch that it came up in."""
        return {reason: count.value for reason, count in self._dropped.items()}

    @property
    def epoch(self) -> int:
        """Number of the epoch, on which draws depend; who trains sets it before the epoch's first batch."""
        return self._epoch.value

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.value = value

    def drawing(self) -> Collator:
        """A collator like this one that draws a scale factor for each batch, if the method on the model has several.

        A batch then says as "scale_factor" what its placeholders were written for; pop it, and call the model in a
        block of `handle.using(scale_factor=...)`. The draw hangs on the samples of the batch and on `epoch` alone, so
        it is the same in any process, and after a run was resumed.
        """
        twin = copy.copy(self)
        twin._draws = True
        return twin

    def __call__(self, samples: Sequence[Sample | Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch: the processor's tensors, padded on the right, and labels, (B, T).

        Raises:
            SampleError: If a sample can't be trained on, and is not to be dropped.
        """
        samples = [item if isinstance(item, Sample) else read_sample(item) for item in samples]
        is_hd = isinstance(self.processor, TokenPackerHDProcessor)
        scales = scales_of(self.processor.processor if is_hd else self.processor)
        if not self._draws or scales is None:
            return self._batch(samples)
        drawn = _draw(scales.every, samples, self.epoch)
        with scales.at(drawn):
            return {**self._batch(samples), SCALE: drawn}

    def _batch(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        prompts = [self._open(sample) for sample in samples]
        encoded = [self._fit(prompt) for prompt in prompts]
        if self.always_picture and not any("pixel" in key for item in encoded for key in item.features):
            self._append_picture(min(encoded, key=lambda item: len(item.labels)))
        length = max(len(item.labels) for item in encoded)
        padding = self.processor.tokenizer.pad_token_id
        fill = {"input_ids": self.processor.tokenizer.eos_token_id if padding is None else padding}
        batch = {"labels": torch.stack([F.pad(e.labels, (0, length - len(e.labels)), value=IGNORE) for e in encoded])}
        for key in dict.fromkeys(key for item in encoded for key in item.features):
            parts = [item.features[key] for item in encoded if key in item.features]
            if key in TOKEN_KEYS:
                parts = [F.pad(part, (0, length - part.shape[1]), value=fill.get(key, 0)) for part in parts]
            is_pixels = key.startswith("pixel_values") and len(parts) > 1
            batch[key] = _concatenate(parts, self._axis(key, prompts, encoded) if is_pixels else 0)
        return batch

    def _open(self, sample: Sample) -> _Opened:
        """Write a sample's prompt and open its media."""
        prompt = self.write(sample)
        try:
            images = [open_image(source, sample.name) for source in sample.images]
            videos = [open_video(source, sample.name) for source in sample.videos]
        except BadImageError as error:
            if self.on_bad_image == "raise":
                raise
            self._drop("bad image", str(error))
            text = self.write.wrapped["image"]
            return _Opened(PromptText(text), [self._grey_picture()], [], sample.name, is_good=False)
        if self.pad_to_square:
            images = [pad_square(image, self._background()) for image in images]
        return _Opened(prompt, images, videos, sample.name)

    def _fit(self, opened: _Opened) -> _Encoded:
        """Tokenise one sample, within `max_length`."""
        encoded = self._tokenise(opened)
        if len(encoded.labels) > self.max_length:
            # The processor must not see the media that don't fit: tokens and pixels go together.
            encoded = self._tokenise(self._shorten(opened))
            encoded.cut(self.max_length)
        if opened.is_good and (encoded.labels == IGNORE).all():
            message = f"{opened.name} has no answer within max_length={self.max_length} tokens; raise max_length"
            if self.on_too_long == "raise":
                raise SampleError(f'{message}, or leave such samples out with on_too_long="drop"')
            self._drop("too long", message)
        return encoded

    def _shorten(self, opened: _Opened) -> _Opened:
        """Cut the text before the first image or video that ends beyond `max_length`."""
        tokens = "|".join(map(re.escape, (*self.write.wrapped.values(), *self.write.placeholders.values())))
        places = list(re.finditer(tokens, opened.prompt.text))
        while places and len(self._tokenise(self._before(opened, places[-1].end())).labels) > self.max_length:
            opened = self._before(opened, places.pop().start())
        return opened

    def _before(self, opened: _Opened, stop: int) -> _Opened:
        """The first characters of a prompt, with the media in them."""
        prompt = opened.prompt.cut(stop)
        if not prompt.text.strip():
            prompt = PromptText(self.processor.tokenizer.eos_token)
        counts = {kind: prompt.text.count(token) for kind, token in self.write.placeholders.items()}
        images, videos = opened.images[: counts.get("image", 0)], opened.videos[: counts.get("video", 0)]
        return replace(opened, prompt=prompt, images=images, videos=videos)

    def _tokenise(self, opened: _Opened) -> _Encoded:
        processor = copy.copy(self.processor)  # shows every change that a handle makes, and is this call's own
        processor.tokenizer = _Reader(self.processor.tokenizer, opened.prompt)
        bos, text = processor.tokenizer.bos_token, opened.prompt.marked()
        options: dict[str, Any] = {}
        if bos is not None and opened.prompt.text.startswith(bos):
            options["add_special_tokens"] = False
        if opened.prompt.suffix is not None:
            options["suffix"] = [opened.prompt.suffix]
        if opened.images:
            # Some don't cut images into tiles where a prompt has several; a single one needs no list of lists.
            options["images"] = [opened.images] if len(opened.images) > 1 else opened.images
        if opened.videos:
            options["videos"] = [opened.videos]
            if not any(isinstance(video, str) for video in opened.videos):
                options["do_sample_frames"] = False  # frames were picked already
        try:
            features = dict(processor(text=[text], return_tensors="pt", **options))
        except Exception as error:
            raise SampleError(f"{opened.name}: {type(self.processor).__name__} refuses it: {error}") from error
        ids, learned = features["input_ids"], features.pop(_LEARNED, None)
        if self.write.style == "suffix":  # the processor says itself which tokens are the answer's
            learned = features.pop("labels") != IGNORE
        if learned is None or learned.shape != ids.shape:
            raise SampleError(
                f"{opened.name}: its answers can't be followed through {type(self.processor).__name__}, which doesn't "
                "hand the prompt to its tokenizer as text"
            )
        return _Encoded(features, ids[0].masked_fill(~learned[0].bool(), IGNORE))

    def _append_picture(self, encoded: _Encoded) -> None:
        """Put a grey picture behind a text, of which nothing is learned."""
        prompt = PromptText(self.write.wrapped["image"])
        grey = self._tokenise(_Opened(prompt, [self._grey_picture()], [], "the grey image"))
        for key, value in grey.features.items():
            if key in TOKEN_KEYS:
                own = encoded.features.get(key, value.new_zeros(1, len(encoded.labels)))
                value = torch.cat([own, value], dim=1)
            encoded.features[key] = value
        encoded.labels = torch.cat([encoded.labels, grey.labels])

    def _axis(self, key: str, prompts: list[_Opened], encoded: list[_Encoded]) -> int:
        """Along which axis the processor puts the pixels of samples together: where two take twice the room of one.

        Most have rows for them; some have one row, in which the patches of all follow one another.
        """
        if key not in self._axes:
            opened, own = next(pair for pair in zip(prompts, encoded, strict=True) if key in pair[1].features)
            one = own.features[key]
            if not isinstance(one, torch.Tensor) or len(one) > 1:
                return 0
            media = {name: [given] * 2 for name in ("images", "videos") if (given := getattr(opened, name))}
            text = [opened.prompt.text] * 2
            try:
                two = self.processor(text=text, return_tensors="pt", padding=True, **media)[key]
                grown = [axis for axis in range(one.dim()) if two.shape[axis] == 2 * one.shape[axis]]
            except (ValueError, TypeError):  # it takes no lists of lists, and has a row for each image
                grown = []
            self._axes[key] = grown[0] if grown else 0
        return self._axes[key]

    def _grey_picture(self) -> Image.Image:
        return Image.new("RGB", GREY_SIZE, self._background())

    def _background(self) -> tuple[int, int, int]:
        means = getattr(self.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        return tuple(round(255 * mean) for mean in means)

    def _drop(self, reason: str, message: str) -> None:
        with self._dropped[reason].get_lock():
            self._dropped[reason].value += 1
        logger.warning("dropped (%s): %s", reason, message)


def _draw(scales: Sequence[int], samples: Sequence[Sample], epoch: int) -> int:
    """One of the scale factors, each as likely as another, by the texts of a batch and the number of the epoch."""
    words = repr([epoch, *((sample.name, sample.turns) for sample in samples)])
    return scales[int.from_bytes(hashlib.sha256(words.encode()).digest()) % len(scales)]


def _concatenate(parts: list[Any], axis: int = 0) -> Any:
    """Put the rows of all samples below each other, as wide as the widest: what has no crop or pixel there is 0.

    Where samples stand one behind another in a single row, along another axis, they do so here.
    """
    if not isinstance(parts[0], torch.Tensor):
        return [row for part in parts for row in part]
    if axis:
        return torch.cat(parts, dim=axis)
    widest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [wide - own for wide, own in zip(widest, part.shape[1:], strict=True)]
        padded.append(F.pad(part, [side for gap in reversed(missing) for side in (0, gap)]))
    return torch.cat(padded)
