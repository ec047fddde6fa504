"""Ask a LLaVA about a picture, with all of its visual tokens and with fewer that TokenPacker condensed."""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

import vltok
from vltok.files import find_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image")
parser.add_argument("question")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder of a model, or its name on the hub")
parser.add_argument("--download", action="store_true", help="fetch the model from the hub if it is not on this machine")
parser.add_argument("--adapter", help="trained weights written by vltok.save; without, regions are averaged")
parser.add_argument("--scale-factor", type=int, default=2, help="side of a region, without --adapter")
args = parser.parse_args()
try:
    name = find_model(args.model, args.download)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", local_files_only=not args.download)
    processor = AutoProcessor.from_pretrained(name, local_files_only=not args.download)
except (OSError, ValueError) as error:
    raise SystemExit(f"{args.model} is not here: give a FOLDER, or fetch it with --download.\n({error})") from None
model.to("cuda" if torch.cuda.is_available() else "cpu")


def answer() -> str:
    prompt = f"USER: <image>\n{args.question} ASSISTANT:"
    inputs = processor(images=load_image(args.image), text=prompt, return_tensors="pt").to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print(f"all visual tokens: {answer()}")
what = args.adapter or vltok.TokenPacker(args.scale_factor, init="pool")
handle = (vltok.load if args.adapter else vltok.apply)(model, what, processor=processor)
print(f"condensed: {answer()}")
handle.report()
