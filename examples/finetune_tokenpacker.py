"""Give a LLaVA model a TokenPacker projector, train it on your pictures, and let it answer about one of them."""

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import vltok
from vltok.files import find_model
from vltok.train import PRETRAIN, Collator, Conversations, VltokTrainer, open_image, set_trainable

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder of a LLaVA model")
parser.add_argument("data", type=Path, help="LLaVA JSON file; pictures count from its folder")
parser.add_argument("out", type=Path, help="folder for checkpoints and the trained projector")
parser.add_argument("--scale-factor", type=int, default=2, help="side of the region that becomes one token")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=8)
args = parser.parse_args()

set_seed(42)
folder = find_model(args.model)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32", local_files_only=True)
processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
data = Conversations.from_file(args.data)

handle = vltok.apply(model, vltok.TokenPacker(args.scale_factor, init="pool"), processor=processor)
set_trainable(handle, "projector")
arguments = PRETRAIN.arguments(args.out, per_device_batch=args.batch, grad_accum=1, max_steps=args.steps)
trainer = VltokTrainer(handle, arguments, Collator(processor), data)
trainer.train()
trainer.save_model(str(args.out))

sample = next(sample for sample in data if len(sample.images) == 1)
picture = open_image(sample.images[0], sample.name)
inputs = processor(images=picture, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt").to(model.device)
tokens = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)
print(f"{processor.decode(tokens[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")
handle.report()
print(f"saved: vltok.load(model, {str(args.out / 'adapter')!r}, processor=processor)")
