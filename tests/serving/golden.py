"""Writes what vltok on transformers answers, for tests that run where a server is installed, and not these versions.

    python tests/serving/golden.py FOLDER [NAME ...]

FOLDER gets a folder for each model: the model and its processor as a server reads them, the images, and `golden.json`:
the requests, and for each method what is generated, with log-probabilities and the tokens that were kept; and the same
for longer prompts and several budgets, which a server is asked for in one batch. Where condensers are served, too, each
is saved in a folder, and `condensed.json` has what is generated with it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matrix import FAMILIES
from PIL import Image
from serving.noting import noting
from tiny import TinyFamily, clip, picture, sharpen
from torch import nn

import vltok

NEW_TOKENS = 6
SIZES = [(56, 56), (40, 72), (72, 40), (64, 48), (56, 28), (28, 56)]
# By name of the row; where nothing else is said, positions are kept.
EACH = (
    "divprune,keep_ratio=0.25",
    "random,keep_ratio=0.5",
    "stride,keep_ratio=0.25,regions=(2,2)",
    "fastervlm,keep_ratio=0.25",
    "visionzip,keep_ratio=0.3",
    "scope,keep_ratio=0.25",
    "pool,keep_ratio=0.25",
)
# What looks at no more than one of these does, on a model of one axis and one of several.
METHODS = (
    *EACH,
    "todre,keep_ratio=0.3,relevance=False,pivot=center",
    "holov,num_keep=6",
    "divprune,keep_ratio=0.25,merge=nearest",
    "dart,keep_ratio=0.25,text_pivots=0",
)
# Those that need a grid, which there is none of where an image has several crops or tiles.
GRID = ("stride,keep_ratio=0.25,regions=(2,2)", "pool,keep_ratio=0.25")
RATIOS = (0.1, 0.25, 0.6, 1.0)
BUDGET = "divprune,keep_ratio={}"  # of the requests with budgets of their own
ONE_AXIS = ("divprune,keep_ratio=0.25,positions=reindex", "random,keep_ratio=0.3,positions=stretch")
NO_GRID = (*(each for each in EACH + ONE_AXIS if each not in GRID), "stride,keep_ratio=0.25")
CONDENSERS = (
    "average_pool",
    "pixel_shuffle",
    "tokenpacker",
    "tokenpacker,init=pool,scale_factor=4",
    "tokenpacker,levels=(0,2,3)",
)
VIDEO = ("evs,keep_ratio=0.4", "divprune,keep_ratio=0.25,per=frame", "vidcom2,keep_ratio=0.3")


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        family: Its row among the tiny models of the tests.
        methods: What it is pruned with, as text.
        videos: Whether requests have videos, too.
        sizes: Sizes of the images, (width, height), in turn; () for those of all rows.
        unlike: Requests that transformers and a server answer differently without any method, with the reason.
        condensers: What takes the place of its projector, as text; each is saved in a folder of that name.
    """

    family: TinyFamily
    methods: tuple[str, ...]
    videos: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    unlike: dict[int, str] = field(default_factory=dict)
    condensers: tuple[str, ...] = ()


def widened(family: TinyFamily) -> nn.Module:
    """The tiny model with heads of 32 channels: servers know none of 16."""
    model = family.build("sdpa")
    config = model.config
    text = config.text_config
    text.hidden_size, text.head_dim = 128, 32
    for name, value in (("out_hidden_size", 128), ("hidden_size", 128)):
        if name == "out_hidden_size" and hasattr(config.vision_config, name):
            setattr(config.vision_config, name, value)
        elif name == "hidden_size" and config.model_type == "qwen2_vl":
            config.vision_config.hidden_size = value
    rope = getattr(text, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        text.rope_parameters = {**rope, "mrope_section": [2 * each for each in rope["mrope_section"]]}
    model = sharpen(type(model)(config))
    model.generation_config.suppress_tokens = None
    return model


def timed(family: TinyFamily) -> TinyFamily:
    """The same row with a tokenizer that tells the times of a video's frames apart."""

    def processor() -> Any:
        made = family.processor()
        made.tokenizer.add_tokens(["<0.0", "<0.1", "<0.2", "seconds>"])
        return made

    return replace(family, processor=processor)


def requests(served: Served, folder: Path) -> list[dict[str, Any]]:
    """Prompts with one image or two, some side by side; the images lie in the folder."""
    family, made = served.family, []
    sizes = served.sizes or (SIZES if family.resizes else [family.size])
    for number in range(12):
        picture(number, sizes[number % len(sizes)]).save(folder / f"{number}.png")
    for number in range(24):
        first, second = number % 12, (number + 5) % 12
        if number % 3 == 2:
            between = " " if number % 2 else " w7 w8 "
            made.append({"text": f"<image>{between}<image> w{number} w2 w3", "images": [first, second]})
        else:
            made.append({"text": f"w{number} w5 <image> w1 w{number + 3}", "images": [first]})
    if served.videos:
        for number in range(6):
            made.append({"text": f"w1 <video> w{number} w3", "images": [], "videos": [number]})
        made.append({"text": "w1 <video> w4 <image> w3", "images": [1], "videos": [0]})
        made.append({"text": "w1 <image> w4 <video> w3", "images": [2], "videos": [1]})
    return made


def frames_of(number: int) -> torch.Tensor:
    """The frames of a video, (T, H, W, 3), uint8."""
    return clip(number, SIZES[number % len(SIZES)], frames=4 + 2 * (number % 2))


def long_requests() -> list[dict[str, Any]]:
    """Prompts of which several blocks of a KV cache are alike; the last ones end with an image."""
    head = " ".join(f"w{number}" for number in range(30))
    tail = " ".join(f"w{number}" for number in range(20))
    made = [{"text": f"{head} <image> {tail}", "images": [number]} for number in range(5)]
    made += [{"text": f"{head} <image> <image> {tail}", "images": [number, number + 1]} for number in range(3)]
    return [*made, *({"text": f"{head} <image>", "images": [number]} for number in range(3))]


@torch.no_grad()
def answers(model: nn.Module, family: TinyFamily, processor: Any, asked: list[dict[str, Any]], folder: Path) -> list:
    """What is generated greedily for each request alone: ids, their log-probabilities, and how long the prompt was."""
    rows = []
    for request in asked:
        images = [Image.open(folder / f"{number}.png") for number in request["images"]]
        videos = [frames_of(number) for number in request.get("videos", ())]
        inputs = family.inputs([request["text"]], images, processor=processor, videos=videos)
        output = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        length = inputs["input_ids"].shape[1]
        ids = output.sequences[0, length:].tolist()
        scores = [row.log_softmax(-1)[0, own].item() for row, own in zip(output.logits, ids, strict=True)]
        rows.append({"ids": ids, "scores": scores, "prompt": length})
    return rows


def condensed(model: nn.Module, served: Served, processor: Any, asked: list[dict[str, Any]], folder: Path) -> None:
    """Save each condenser in the folder, and write what is generated with it: `condensed.json`."""
    rows = {}
    for text in served.condensers:
        with vltok.apply(model, text, processor=processor) as handle:
            for module in handle.added_modules:
                sharpen(module)  # as if it had been trained
            vltok.save(handle, folder / text)
            rows[text] = answers(model, served.family, processor, asked, folder)
    (folder / "condensed.json").write_text(json.dumps(rows))


def write(name: str, served: Served, root: Path) -> None:
    """Write the folder of a model."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    family = served.family
    model, processor = widened(family), family.processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    asked, long = requests(served, folder), long_requests()
    for request in (*asked, *long):
        request["prompt"] = request["text"].replace("<image>", family.image).replace("<video>", family.video)
    results = {"": {"rows": answers(model, family, processor, asked, folder), "picked": {}}}
    for method in served.methods:
        picked: dict[str, list[int]] = {}
        with noting(picked), vltok.apply(model, method):
            results[method] = {"rows": answers(model, family, processor, asked, folder), "picked": picked}
    ratios = {}
    for ratio in RATIOS:
        with vltok.apply(model, BUDGET.format(ratio)):
            ratios[ratio] = answers(model, family, processor, long, folder)
    found = {"requests": asked, "results": results, "unlike": served.unlike, "long": long, "ratios": ratios}
    (folder / "golden.json").write_text(json.dumps(found))
    if served.condensers:
        condensed(model, served, processor, asked, folder)


PINPOINTS = [[56, 112], [112, 56], [112, 112], [224, 224]]  # the last one is more than nine crops, which are shrunk
SHRINKS = "anyres_max_9"  # vLLM knows no other


def onevision(attention: str) -> nn.Module:
    """LLaVA-OneVision that shrinks images of more than nine crops."""
    model = FAMILIES["llava_onevision-no-cls"].build(attention)
    model.config.image_grid_pinpoints, model.config.vision_aspect_ratio = PINPOINTS, SHRINKS
    return model


def onevision_processor() -> Any:
    """Its processor."""
    processor = FAMILIES["llava_onevision-no-cls"].processor()
    processor.image_processor.image_grid_pinpoints, processor.vision_aspect_ratio = PINPOINTS, SHRINKS
    return processor


SERVED = {
    "llava": Served(FAMILIES["llava-cls"], METHODS + ONE_AXIS, condensers=CONDENSERS),
    "llava_siglip": Served(FAMILIES["llava-no-cls"], EACH + ONE_AXIS, condensers=CONDENSERS[::2]),
    "llava_next": Served(FAMILIES["llava_next-cls"], NO_GRID, sizes=(*SIZES, (84, 50))),
    "llava_onevision": Served(
        replace(FAMILIES["llava_onevision-no-cls"], build=onevision, processor=onevision_processor),
        # Of four tokens of a frame, the two that are farthest apart are equally good for DivPrune.
        (*NO_GRID, "evs,keep_ratio=0.4", "random,keep_ratio=0.5,per=frame", "vidcom2,keep_ratio=0.3"),
        videos=True,
        sizes=((56, 56), (40, 72), (112, 100), (64, 48), (200, 180)),
    ),
    "internvl": Served(FAMILIES["internvl-cls"], (*NO_GRID, "divprune,keep_ratio=0.25,per=tile")),
    "qwen2_5_vl": Served(FAMILIES["qwen2_5_vl-no-cls"], METHODS + VIDEO, videos=True),
    "qwen2_vl": Served(FAMILIES["qwen2_vl-no-cls"], EACH + VIDEO, videos=True),
    "qwen3_vl": Served(timed(FAMILIES["qwen3_vl-no-cls"]), EACH + VIDEO, videos=True),
}

if __name__ == "__main__":
    for name in sys.argv[2:] or SERVED:
        write(name, SERVED[name], Path(sys.argv[1]))
