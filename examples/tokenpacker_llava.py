"""Ask a LLaVA about a picture, with all of its visual tokens and with fewer that TokenPacker condensed."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vltok

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image", type=Path)
parser.add_argument("question")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder of a model, or its name on the hub")
parser.add_argument("--download", action="store_true", help="fetch the model from the hub if it is not on this machine")
parser.add_argument("--adapter", type=Path, help="trained weights written by vltok.save; without, regions are averaged")
parser.add_argument("--scale-factor", type=int, default=2, help="side of a region, without --adapter")
args = parser.parse_args()
try:
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto", local_files_only=not args.download)
    processor = AutoProcessor.from_pretrained(args.model, local_files_only=not args.download)
except (OSError, ValueError) as error:
    raise SystemExit(f"{args.model} is not here: give a FOLDER, or fetch it with --download.\n({error})") from None
model.to("cuda" if torch.cuda.is_available() else "cpu")


def answer() -> str:
    prompt = f"USER: <image>\n{args.question} ASSISTANT:"
    inputs = processor(images=Image.open(args.image).convert("RGB"), text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print(f"all visual tokens: {answer()}")
untrained = vltok.TokenPacker(args.scale_factor, init="pool")
put_on, what = (vltok.load, args.adapter) if args.adapter else (vltok.apply, untrained)
handle = put_on(model, what, processor=processor)
print(f"condensed: {answer()}")
handle.report()
