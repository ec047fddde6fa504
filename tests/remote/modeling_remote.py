"""A vision-language model that transformers doesn't know, as people put it beside their weights: code of its own.

Its parts go by other names than those of transformers' models, its config names no image_token_id, and its features are
a plain tensor. Tests copy this file into a folder of weights and load it with trust_remote_code.
"""

from torch import nn
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)


class RemoteConfig(PreTrainedConfig):
    model_type = "remote_vlm"

    def __init__(self, vision=None, text=None, mark=4, **kwargs):
        self.vision, self.text, self.mark = vision or {}, text or {}, mark
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        return LlamaConfig(**self.text)


class RemotePreTrained(PreTrainedModel):
    config_class = RemoteConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ()


class RemoteModel(RemotePreTrained):
    def __init__(self, config):
        super().__init__(config)
        attention = config._attn_implementation
        vision = SiglipVisionConfig(**config.vision, vision_use_head=False)
        text = LlamaConfig(**config.text)
        vision._attn_implementation = text._attn_implementation = attention
        self.vision_model = SiglipVisionModel(vision)
        self.connector = nn.Linear(vision.hidden_size, text.hidden_size)
        self.language_model = LlamaModel(text)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def get_image_features(self, pixel_values):
        return self.connector(self.vision_model(pixel_values).last_hidden_state)

    def forward(self, input_ids=None, pixel_values=None, inputs_embeds=None, attention_mask=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values)
            mask = (input_ids == self.config.mark).unsqueeze(-1).expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features.to(inputs_embeds.dtype))
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


class RemoteForCausalLM(RemotePreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = RemoteModel(config)
        self.lm_head = nn.Linear(config.text["hidden_size"], config.text["vocab_size"], bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **kwargs):
        output = self.model(input_ids, pixel_values, attention_mask=attention_mask, **kwargs | {"return_dict": True})
        output["logits"] = self.lm_head(output.last_hidden_state)
        return output

    def prepare_inputs_for_generation(self, *args, pixel_values=None, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        return inputs | {"pixel_values": pixel_values if is_first_iteration else None}


__all__ = ["RemoteConfig", "RemoteForCausalLM", "RemoteModel"]
