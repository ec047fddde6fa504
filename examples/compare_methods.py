"""Ask about an image with several methods: their answers, and a picture of which visual tokens each of them kept."""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

import vltok

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image", type=Path)
parser.add_argument("question")
parser.add_argument("--model", default=Path(__file__).parents[1] / "eval/canvas/model", help="folder of a model")
parser.add_argument("--methods", default="todre;divprune;visionzip;cdpruner;stride", help="as text, with semicolons")
parser.add_argument("--keep-ratio", type=float, default=0.1)
parser.add_argument("--out", type=Path, default=Path("compared.png"))
args = parser.parse_args()
model = AutoModelForImageTextToText.from_pretrained(args.model, local_files_only=True)
processor = AutoProcessor.from_pretrained(args.model, local_files_only=True)
picture = load_image(str(args.image))
turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
template = processor.chat_template or "<image> {{ messages[0].content[1].text }}"
prompt = processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True)
inputs, names = processor(images=picture, text=prompt, return_tensors="pt"), args.methods.split(";")
figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3.4), squeeze=False, layout="constrained")
for axis, name in zip(axes[0], names, strict=True):
    with vltok.apply(model, f"{name},keep_ratio={args.keep_ratio}", processor=processor) as handle:
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        report = handle.report(file=None)
    answer, kept = processor.decode(tokens, skip_special_tokens=True), report.keep_indices[0][0]
    _, height, width = report.grids[0][0] or parser.error("the visual tokens of this model form no grid to draw on")
    gone = torch.ones(height * width).index_fill(0, kept[kept < height * width], 0).view(height, width)
    axis.imshow(picture, extent=(0, width, height, 0))
    axis.imshow(gone, alpha=0.75 * gone, cmap="gray_r", extent=(0, width, height, 0))
    axis.set(title=f"{name}: {answer}", xticks=[], yticks=[])
    print(f"{name}: {answer}")
figure.savefig(args.out)
