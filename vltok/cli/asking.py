"""Asking a model about images, with methods and without: what `vltok ask` does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vltok.api import apply
from vltok.files import find_model
from vltok.method import Method
from vltok.methods import StrideTokens
from vltok.report import Report


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: The answer.
        seconds: How long the prompt and all words took.
        words: Number of tokens in the answer.
        report: What the method did.
    """

    text: str
    seconds: float
    words: int
    report: Report


@dataclass(frozen=True)
class Asked:
    """A model with its processor.

    Attributes:
        model: The model, in eval mode.
        processor: Its processor.
    """

    model: Any
    processor: Any

    @classmethod
    def load(cls, model: str, download: bool = False, device: str | None = None) -> Asked:
        """Load a model from its folder, or by a name that was fetched before.

        Raises:
            OSError: If it is not here.
            ValueError: If it takes no images.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        name, here = find_model(model, download), {"local_files_only": not download}
        loaded = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", **here)
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        return cls(loaded, AutoProcessor.from_pretrained(name, **here))

    def prompt(self, question: str, images: int = 1) -> str:
        """The prompt of one turn about some images, by the processor's chat template if it has one."""
        parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        turns = [{"role": "user", "content": parts}]
        if self.processor.chat_template:
            return self.processor.apply_chat_template(turns, add_generation_prompt=True)
        mark = self.processor.image_token
        return f"{mark * images} {question}"

    def answer(
        self, images: Sequence[Image.Image], question: str, method: Method | str | None = None, max_words: int = 64
    ) -> Answer:
        """Ask about images, greedily.

        Args:
            images: The images, in RGB.
            question: The question.
            method: A method, or its text; None keeps all visual tokens, and only counts them.
            max_words: The most tokens of the answer.
        """
        method = StrideTokens(keep_ratio=1.0) if method is None else method
        with apply(self.model, method, processor=self.processor) as handle:
            prompt = self.prompt(question, len(images))
            inputs = self.processor(images=list(images), text=prompt, return_tensors="pt")
            inputs = inputs.to(self.model.device, self.model.dtype)
            began = time.perf_counter()
            tokens = self.model.generate(**inputs, max_new_tokens=max_words, do_sample=False)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            report = handle.report(file=None)
        own = tokens[0, inputs["input_ids"].shape[1] :]
        return Answer(self.processor.decode(own, skip_special_tokens=True).strip(), seconds, len(own), report)
