"""Fine-tuning for models with vltok methods on them: data, what trains, the published recipes, and a trainer.

    handle = vltok.apply(model, vltok.TokenPacker(scale_factor=2), processor=processor)
    set_trainable(handle, PRETRAIN.train)
    trainer = VltokTrainer(handle, PRETRAIN.arguments("out"), Collator(processor, style="plain"), data)
    trainer.train()

`python -m vltok.train --help` does it from the command line. Needs the extra vltok[train].
"""

from vltok.train.checkpoint import TrainedWeights
from vltok.train.collator import Collator
from vltok.train.data import BadImageError, Conversations, Sample, SampleError, Turn, open_image, read_sample
from vltok.train.method_loss import add_method_loss
from vltok.train.prompt import PromptWriter
from vltok.train.recipe import FINETUNE, PRETRAIN, RECIPES, Recipe
from vltok.train.trainable import add_lora, parts_of, set_trainable
from vltok.train.trainer import VltokTrainer

__all__ = [
    "FINETUNE",
    "PRETRAIN",
    "RECIPES",
    "BadImageError",
    "Collator",
    "Conversations",
    "PromptWriter",
    "Recipe",
    "Sample",
    "SampleError",
    "TrainedWeights",
    "Turn",
    "VltokTrainer",
    "add_lora",
    "add_method_loss",
    "open_image",
    "parts_of",
    "read_sample",
    "set_trainable",
]
