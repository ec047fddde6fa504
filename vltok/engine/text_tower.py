"""TextTower: a CLIP model beside the vision-language model, which compares visual tokens with the question.

question   what the user says, as text -> segments of at most 75 words -> text_model, text_projection
tokens     the vision tower's features -> post_layernorm, visual_projection

It is no part of the model: not moved, trained or saved with it, and shared by copies of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from vltok.errors import UnsupportedModelError

HOW = "vltok.apply(model, method, processor=processor, text_tower=(clip_model, clip_tokenizer))"


class TextTower:
    """CLIP's text tower and tokenizer, and what takes features of a vision tower into the same space.

    Args:
        given: A CLIPModel of transformers, and its tokenizer or processor.
        processor: The vision-language model's processor, which knows the words of prompts; None if there is none.

    Raises:
        TypeError: If `given` is no pair of a model and a tokenizer.
        UnsupportedModelError: If the model is no CLIPModel.
        ValueError: If the tokenizer is not that of the model.
    """

    def __init__(self, given: Any, processor: Any) -> None:
        from transformers import CLIPModel

        if not isinstance(given, tuple | list) or len(given) != 2:
            raise TypeError(
                f"text_tower must be a CLIP model and its tokenizer, (clip_model, clip_tokenizer), got "
                f"{type(given).__name__}"
            )
        self.clip, tokenizer = given
        if not isinstance(self.clip, CLIPModel):
            raise UnsupportedModelError(
                "text_tower must begin with a CLIPModel of transformers, whose text and vision towers share a space, "
                f"got {type(self.clip).__name__}"
            )
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.prompt_tokenizer = getattr(processor, "tokenizer", processor)
        config = self.clip.config.text_config
        # Configs of the first releases say 2; their towers look for the largest id.
        end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
        found = getattr(self.tokenizer, "eos_token_id", None)
        if found != end or self.tokenizer.bos_token_id is None:
            raise ValueError(
                f"text_tower must end with the CLIP model's own tokenizer: this model looks for the end of a text at "
                f"id {end}, {type(self.tokenizer).__name__} marks it by {found}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> TextTower:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # what is pickled with a model comes back without a text tower

    def check_tower(self, tower: Any, config: Any) -> None:
        """Raise UnsupportedModelError unless a model's vision tower shows features that this one can read.

        Args:
            tower: The vision tower.
            config: The model's config.
        """
        kind = getattr(getattr(tower, "config", None), "model_type", None)
        if kind != "clip_vision_model":
            raise UnsupportedModelError(
                f"only features of a CLIP vision tower can be compared with texts in CLIP's space, this model has a "
                f"{kind or type(tower).__name__} tower; for CDPruner set relevance='embeddings'"
            )
        levels = getattr(config, "vision_feature_layer", None)
        if isinstance(levels, list | tuple) and len(levels) != 1:
            raise UnsupportedModelError(
                f"this model's projector reads {len(levels)} layers of the vision tower side by side, and CLIP's space "
                "is reached from one; for CDPruner set relevance='embeddings'"
            )
        width, own = tower.config.hidden_size, self.clip.config.vision_config.hidden_size
        if width != own:
            raise UnsupportedModelError(
                f"text_tower must be of the CLIP model that the vision tower is from: this model's has {width} "
                f"channels, that of the given CLIP model {own}"
            )

    def words(self, ids: list[int]) -> str:
        """Ids of a prompt as text, without special tokens."""
        return self.prompt_tokenizer.decode(ids, skip_special_tokens=True).strip()

    @torch.no_grad()
    def of_text(self, text: str) -> torch.Tensor:
        """A text in CLIP's space, (E,), float32: the mean of the unit embeddings of its segments; 0 for no words."""
        config, weight = self.clip.config, self.clip.text_projection.weight
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = config.text_config.max_position_embeddings - 2
        mean = torch.zeros(config.projection_dim, device=weight.device)
        segments = [ids[begin : begin + room] for begin in range(0, len(ids), room)]
        with torch.autocast(weight.device.type, enabled=False):
            for segment in segments:  # one by one, so that none is padded
                whole = [self.tokenizer.bos_token_id, *segment, self.tokenizer.eos_token_id]
                pooled = self.clip.text_model(input_ids=torch.tensor([whole], device=weight.device)).pooler_output
                embedding = self.clip.text_projection(pooled)[0].float()
                mean += embedding / torch.linalg.vector_norm(embedding).clamp_min(1e-12) / len(segments)
        return mean

    @torch.no_grad()
    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the vision tower, (B, N, C), in CLIP's space, (B, N, E), float32."""
        norm, projection = self.clip.vision_model.post_layernorm, self.clip.visual_projection
        x = features.detach().to(norm.weight)
        with torch.autocast(x.device.type, enabled=False):
            weight = projection.weight.float()
            rows = [linear(norm(own).float(), weight) for own in x]  # so that a row doesn't depend on the batch
        return torch.stack(rows).to(features.device)
