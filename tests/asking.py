"""Asking the canvas model one question, word by word, with no cache and nothing of transformers' generation."""

from typing import Any

import torch

from eval.canvas.data import Canvases, Question


@torch.no_grad()
def said(model: torch.nn.Module, processor: Any, canvases: Canvases, question: Question) -> str:
    """The model's likeliest words, as many as the right answer has."""
    inputs = processor(
        images=[canvases.canvas(question.canvas).image], text=[f"<image> {question.text}"], return_tensors="pt"
    )
    ids, words = inputs["input_ids"], []
    for _ in question.answer.split():
        token = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits[0, -1].argmax()
        words.append(processor.decode(token))
        ids = torch.cat([ids, token[None, None]], dim=1)
    return " ".join(words)
