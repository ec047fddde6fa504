"""Fine-tune a ViT of timm with token-aware pooling and the attention diversification loss, for corrupted pictures."""

import argparse

import timm
import torch
from PIL.ImageOps import exif_transpose
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch.nn import functional as F
from torch.utils.data import DataLoader

import vltok

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pictures", help="folder with a subfolder of pictures per class")
parser.add_argument("out", help="file for the state dict of the fine-tuned model, .pt")
parser.add_argument("--model", default="deit_small_patch16_224", help="name of a timm model")
parser.add_argument("--weights", default="", help="its weights, .safetensors; random ones without")
parser.add_argument("--download", action="store_true", help="fetch its published weights instead")
parser.add_argument("--steps", type=int, default=1000)
args = parser.parse_args()
torch.manual_seed(0)
data = ImageDataset(args.pictures)
model = timm.create_model(args.model, pretrained=args.download, checkpoint_path=args.weights)
model.reset_classifier(len(data.reader.class_to_idx))
transform = create_transform(**resolve_model_data_config(model), is_training=True)
data.transform = lambda picture: transform(exif_transpose(picture))
loader = DataLoader(data, batch_size=32, shuffle=True, drop_last=len(data) >= 32)
handle = vltok.apply(model, [vltok.TAP(), vltok.ADL(weight=1.0)])
optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
batches = (batch for _ in range(args.steps) for batch in loader)
for step, (pictures, labels) in zip(range(args.steps), batches, strict=False):
    loss = F.cross_entropy(model(pictures), labels) + handle.loss()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss:.3f}")
        handle.report()
torch.save(model.state_dict(), args.out)
