"""Write a selector that merges: it keeps the means of strips of visual tokens."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vltok


@vltok.register("strips")  # its name in saved files
@dataclass(frozen=True)
class Strips(vltok.Selector):
    """Cut the visual tokens into strips, and keep the mean of each in the place of its first token."""

    merges = True  # what it keeps isn't what stood there

    def select(self, visual: vltok.VisualTokens, num_keep: int) -> vltok.Selection:
        batch, length, _ = visual.embeddings.shape
        starts = torch.arange(num_keep) * length // num_keep
        means = [strip.mean(1) for strip in visual.embeddings.tensor_split(starts[1:], dim=1)]
        return vltok.Selection(starts.to(visual.embeddings.device).expand(batch, -1), torch.stack(means, 1))


if __name__ == "__main__":
    folder = Path(__file__).parents[1] / "eval/canvas/model"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(
        images=Image.new("RGB", (128, 128)), text="<image> how many items are there", return_tensors="pt"
    )
    with vltok.apply(model, Strips(keep_ratio=0.1)) as handle:
        print(processor.decode(model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, -2:]))
        handle.report()
