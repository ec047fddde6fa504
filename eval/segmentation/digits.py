"""Scenes of scikit-learn's digits with their masks, and a small SegFormer that learns them: what the command runs on
where nothing else is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.utils import random_seed
from tqdm import trange
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from eval.image_classification.data import digits

SIDE, INK = 64, 60  # pixels of a scene, and from which value on a digit covers what is behind it


def scene(random: np.random.Generator, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Three digits, each of one colour, before noise: picture (64, 64, 3) and mask (64, 64), 0 for the background."""
    pixels = random.normal(random.integers(40, 120), 20, (SIDE, SIDE, 3))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for index in random.integers(0, len(images), 3):
        top, left = random.integers(0, SIDE - images.shape[1], 2)
        place = np.s_[top : top + images.shape[1], left : left + images.shape[2]]
        covers = images[index] > INK
        pixels[place][covers] = random.integers(130, 256, 3)
        mask[place][covers] = labels[index] + 1
    return np.clip(pixels, 0, 255).astype(np.uint8), mask


def scenes(count: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, 64, 64, 3) and masks (count, 64, 64) of the digits of a split, always the same."""
    source, random = digits(split), np.random.default_rng(0)
    made = [scene(random, source.images, source.labels) for _ in range(count)]
    return tuple(np.stack(each) for each in zip(*made, strict=True))


def write_scenes(folder: Path, count: int) -> None:
    """Write test scenes as images/ and masks/."""
    for name, arrays in zip(("images", "masks"), scenes(count, "test"), strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, array in enumerate(arrays):
            Image.fromarray(array).save(folder / name / f"{number:03}.png")


def train(folder: Path, steps: int, device: str) -> None:
    """Train a SegFormer of 0.3 million parameters on training scenes, and save it with its image processor."""
    random_seed(0)
    names = dict(enumerate(["background", *"0123456789"]))
    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 48, 64, 64], "num_attention_heads": [1, 2, 2, 2]}
    config = SegformerConfig(
        id2label=names, decoder_hidden_size=64, strides=[2, 2, 2, 2], sr_ratios=[4, 2, 1, 1], **sizes
    )
    model = SegformerForSemanticSegmentation(config).to(device).train()
    processor = SegformerImageProcessor(size={"height": SIDE, "width": SIDE})
    images, masks = (torch.from_numpy(each) for each in scenes(512, "train"))
    mean, std = (torch.tensor(each) for each in (processor.image_mean, processor.image_std))
    inputs = ((images / 255 - mean) / std).movedim(-1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in trange(steps, desc="training on scenes of digits", disable=None):
        chosen = torch.randint(len(inputs), (16,))
        scores = model(pixel_values=inputs[chosen].to(device)).logits
        scores = F.interpolate(scores, (SIDE, SIDE), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(scores, masks[chosen].long().to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
