"""Collator: samples to a padded batch with labels on the answers alone, pictures whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Value
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch.nn import functional as F

from vltok.train.data import BadImageError, Sample, SampleError, open_image, pad_square, read_sample
from vltok.train.labels import IGNORE, AlignmentError, PictureRun, label_tokens, tokens_in
from vltok.train.prompt import PromptText, PromptWriter, Style

logger = logging.getLogger(__name__)
OnFault = Literal["raise", "drop"]
TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # one entry per token
GREY_SIZE = (224, 224)  # of pictures that stand in for others


@dataclass
class _Encoded:
    """One sample in tokens: what the processor returned, its labels, (T,), and where its pictures are."""

    features: dict[str, torch.Tensor]
    labels: torch.Tensor
    runs: list[PictureRun]

    def cut(self, length: int) -> None:
        """Leave out the tokens from `length` on."""
        self.labels = self.labels[:length]
        for key in TOKEN_KEYS:
            if key in self.features:
                self.features[key] = self.features[key][:, :length]


class Collator:
    """Makes batches: prompts in the model's style, labels -100 on everything but answers and their end-of-turn tokens.

    Works with any processor that replaces each placeholder in the text by the picture's tokens. A conversation longer
    than `max_length` loses its end; a picture that would be cut through goes with it. A dropped sample stays in the
    batch without labels, and with grey pictures for its own if one can't be opened: it trains nothing, and the batch
    keeps its shape on every process. `dropped` counts these.

    A batch of texts gets a grey picture behind its shortest text, where causal attention lets nothing learn from it. So
    every process calls vision tower and projector in every step, as distributed training expects.

    Args:
        processor: The model's processor, as the methods on the model have set it.
        style: How prompts look, see `PromptWriter`.
        max_length: Most tokens of a sample, visual tokens included.
        on_bad_image: "raise" for an error about a picture that can't be opened, or "drop" to warn and drop the sample.
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

    @property
    def dropped(self) -> dict[str, int]:
        """How often a sample was dropped so far, for each reason: once per epoch that it came up in."""
        return {reason: count.value for reason, count in self._dropped.items()}

    def __call__(self, samples: Sequence[Sample | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch: the processor's tensors, padded on the right, and labels, (B, T).

        Raises:
            SampleError: If a sample can't be trained on, and is not to be dropped.
        """
        encoded = [self._encode(item if isinstance(item, Sample) else read_sample(item)) for item in samples]
        if self.always_picture and not any(item.runs for item in encoded):
            self._append_picture(min(encoded, key=lambda item: len(item.labels)))
        length = max(len(item.labels) for item in encoded)
        padding = self.processor.tokenizer.pad_token_id
        fill = {"input_ids": self.processor.tokenizer.eos_token_id if padding is None else padding}
        batch = {"labels": torch.stack([F.pad(e.labels, (0, length - len(e.labels)), value=IGNORE) for e in encoded])}
        for key in dict.fromkeys(key for item in encoded for key in item.features):
            parts = [item.features[key] for item in encoded if key in item.features]
            if key in TOKEN_KEYS:
                parts = [F.pad(part, (0, length - part.shape[1]), value=fill.get(key, 0)) for part in parts]
            batch[key] = _concatenate(parts)
        return batch

    def _encode(self, sample: Sample) -> _Encoded:
        """Tokenise one sample, within `max_length`."""
        prompt = self.write(sample)
        try:
            images, is_good = [open_image(source, sample.name) for source in sample.images], True
        except BadImageError as error:
            if self.on_bad_image == "raise":
                raise
            self._drop("bad image", str(error))
            images, is_good = [self._grey_picture()] * len(sample.images), False
        if self.pad_to_square:
            images = [pad_square(image, self._background()) for image in images]
        encoded = self._fit(prompt, images, sample.name)
        if not is_good:
            encoded.labels.fill_(IGNORE)
        elif (encoded.labels == IGNORE).all():
            message = f"{sample.name} has no answer within max_length={self.max_length} tokens; raise max_length"
            if self.on_too_long == "raise":
                raise SampleError(f'{message}, or leave such samples out with on_too_long="drop"')
            self._drop("too long", message)
        return encoded

    def _fit(self, prompt: PromptText, images: list[Image.Image], name: str) -> _Encoded:
        encoded = self._tokenise(prompt, images, name)
        if len(encoded.labels) <= self.max_length:
            return encoded
        over = [run for run in encoded.runs if run.stop > self.max_length]
        if over:  # the processor must not see the pictures that don't fit: tokens and pixels go together
            keep = sum(run.pictures for run in encoded.runs if run.stop <= self.max_length)
            stop = _find(prompt.text, self.processor.image_token, keep)
            places = tuple((first, min(last, stop)) for first, last in prompt.answers if first < stop)
            before = prompt.text[:stop] if prompt.text[:stop].strip() else self.processor.tokenizer.eos_token
            encoded = self._tokenise(PromptText(before, places), images[:keep], name)
        encoded.cut(self.max_length)
        return encoded

    def _tokenise(self, prompt: PromptText, images: list[Image.Image], name: str) -> _Encoded:
        processor, tokenizer = self.processor, self.processor.tokenizer
        has_bos = tokenizer.bos_token is not None and prompt.text.startswith(tokenizer.bos_token)
        options = {"add_special_tokens": False} if has_bos else {}
        plain = tokenizer(prompt.text, return_offsets_mapping=True, **options)
        try:
            features = dict(processor(text=[prompt.text], images=images or None, return_tensors="pt", **options))
            labels, runs = label_tokens(
                plain["input_ids"],
                tokens_in(plain["offset_mapping"], prompt.answers),
                features["input_ids"][0].tolist(),
                processor.image_token_id,
                getattr(processor, "image_token_ids", None) or (),
                getattr(processor, "separator_ids", ()),
            )
        except AlignmentError as error:
            raise SampleError(f"{name}: its answers can't be found among the processor's tokens: {error}") from error
        except (ValueError, TypeError) as error:
            raise SampleError(f"{name}: {type(processor).__name__} refuses it: {error}") from error
        return _Encoded(features, torch.tensor(labels), runs)

    def _append_picture(self, encoded: _Encoded) -> None:
        """Put a grey picture behind a text."""
        grey = self._tokenise(PromptText(self.processor.image_token, ()), [self._grey_picture()], "the grey picture")
        (run,) = grey.runs
        for key, value in grey.features.items():
            own = value[:, run.start : run.stop] if key in TOKEN_KEYS else value
            encoded.features[key] = torch.cat([encoded.features[key], own], dim=1) if key in TOKEN_KEYS else own
        encoded.labels = F.pad(encoded.labels, (0, run.stop - run.start), value=IGNORE)

    def _grey_picture(self) -> Image.Image:
        return Image.new("RGB", GREY_SIZE, self._background())

    def _background(self) -> tuple[int, int, int]:
        return tuple(round(255 * mean) for mean in self.processor.image_processor.image_mean)

    def _drop(self, reason: str, message: str) -> None:
        with self._dropped[reason].get_lock():
            self._dropped[reason].value += 1
        logger.warning("dropped (%s): %s", reason, message)


def _find(text: str, word: str, index: int) -> int:
    """Where the word stands that has `index` others of its kind before it."""
    start = -1
    for _ in range(index + 1):
        start = text.index(word, start + 1)
    return start


def _concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    """Put the rows of all samples below each other; AnyRes pictures get as many crops as the largest has."""
    crops = max(part.shape[1] for part in parts) if parts[0].dim() == 5 else 0
    return torch.cat([F.pad(part, (*[0] * 7, crops - part.shape[1])) if crops else part for part in parts])
