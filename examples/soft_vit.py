"""Give a ViT of timm attention of linear cost, and teach it to see as before on your pictures, without labels."""

import argparse
import copy

import timm
import torch
from PIL.ImageOps import exif_transpose
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch.nn import functional as F
from torch.utils.data import DataLoader

import vltok

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pictures", help="folder of pictures, in subfolders or not")
parser.add_argument("out", help="folder for the new attention")
parser.add_argument("--model", default="vit_base_patch16_224", help="name of a timm model")
parser.add_argument("--weights", default="", help="its weights, .safetensors; random ones without")
parser.add_argument("--download", action="store_true", help="fetch its published weights instead")
parser.add_argument("--steps", type=int, default=1000)
args = parser.parse_args()
torch.manual_seed(0)
model = timm.create_model(args.model, pretrained=args.download, checkpoint_path=args.weights).eval()
teacher = copy.deepcopy(model).requires_grad_(False)
transform = create_transform(**resolve_model_data_config(model), is_training=True)
data = ImageDataset(args.pictures, transform=lambda picture: transform(exif_transpose(picture)))
loader = DataLoader(data, batch_size=32, shuffle=True)
handle = vltok.apply(model, vltok.SOFT())
handle.report()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for step, (pictures, _) in zip(range(args.steps), (batch for _ in range(args.steps) for batch in loader), strict=False):
    wanted = teacher.forward_features(pictures)
    loss = F.mse_loss(model.forward_features(pictures), wanted) / wanted.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: the features differ by {loss:.1%} of their energy")
vltok.save(handle, args.out)
