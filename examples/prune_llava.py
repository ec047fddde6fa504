"""Ask a vision-language model about a picture, with all of its visual tokens and with a tenth of them."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

import vltok
from vltok.files import find_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image", type=Path)
parser.add_argument("question")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder of a model, or its name on the hub")
parser.add_argument("--download", action="store_true", help="fetch the model from the hub if it is not on this machine")
parser.add_argument("--keep-ratio", type=float, default=0.1)
args = parser.parse_args()
if not args.image.is_file():
    parser.error(f"there is no picture {args.image}")
try:
    name = find_model(args.model, args.download)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", local_files_only=not args.download)
    processor = AutoProcessor.from_pretrained(name, local_files_only=not args.download)
except (OSError, ValueError) as error:
    raise SystemExit(f"{args.model} is not here: give one with --model or get it with --download.\n({error})") from None
model.to("cuda" if torch.cuda.is_available() else "cpu")

turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
template = processor.chat_template or "<image> {{ messages[0].content[1].text }}"
prompt = processor.apply_chat_template(turn, chat_template=template, add_generation_prompt=True)
inputs = processor(images=load_image(str(args.image)), text=prompt, return_tensors="pt").to(model.device, model.dtype)

full = model.generate(**inputs, max_new_tokens=64, do_sample=False)
with vltok.apply(model, vltok.ToDRE(keep_ratio=args.keep_ratio)) as handle:
    pruned = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    handle.report()
for name, tokens in (("all visual tokens", full), (f"keep_ratio={args.keep_ratio}", pruned)):
    print(f"{name}: {processor.decode(tokens[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")
