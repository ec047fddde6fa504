"""Prune a model that transformers doesn't know, of code that lies beside its weights; one call makes it known."""

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

import vltok

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="weights, processor and code; THE CODE IS RUN, so read it first")
parser.add_argument("image", type=Path)
parser.add_argument("prompt", help="with the placeholder of the processor, such as <image>")
parser.add_argument(
    "--image-token-id", type=int, help="what stands for a visual token, where the config doesn't say so"
)
parser.add_argument("--unit", choices=["entry", "run", "row"], help="what an image is, see vltok.register_family")
parser.add_argument("--gap", type=int, help="words between tiles of one image, at most")
args = parser.parse_args()

model = AutoModelForImageTextToText.from_pretrained(args.folder, trust_remote_code=True, local_files_only=True)
processor = AutoProcessor.from_pretrained(args.folder, local_files_only=True)
facts = {"image_token_id": args.image_token_id, "unit": args.unit, "gap": args.gap}
vltok.register_family("vlm", "own", type(model.base_model), **facts)  # the class without the language-model head

inputs = processor(images=load_image(str(args.image)), text=args.prompt, return_tensors="pt")
with vltok.apply(model, vltok.ToDRE(keep_ratio=0.25)) as handle:
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    handle.report()
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
