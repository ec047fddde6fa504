"""Chat templates laid out as those of released models, in the words that the tiny tokenizers know.

Words are cut at blanks, so each special token has blanks around it where its model has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiny import INTERNVL, LLAVA, LLAVA_ONEVISION, QWEN2_5_VL, TinyFamily
from zoo.gemma import GEMMA3_ROW, IDEFICS3, SMOLVLM
from zoo.qwen import QWEN3_VL


@dataclass(frozen=True)
class Chat:
    """A family with its template.

    Attributes:
        family: Its row.
        template: Its template.
        end: What ends its answers.
        answers_by: What says where answers are.
    """

    family: TinyFamily
    template: str
    end: str
    answers_by: str = "marks"

    def processor(self) -> Any:
        found = self.family.processor()
        tokens = [token for token in ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "</s>")]
        tokens += ["<end_of_utterance>"]
        found.tokenizer.add_tokens([token for token in tokens if token in self.template], special_tokens=True)
        found.chat_template = self.template
        return found

    def model(self) -> Any:
        """A model with room for the template's tokens."""
        model = self.family.model()
        assert len(self.processor().tokenizer) <= model.get_input_embeddings().num_embeddings
        return model


_QWEN = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|> system w39 <|im_end|> {% endif %}"
    "<|im_start|> {{ m.role }} {% if m.content is string %}{{ m.content }} <|im_end|> {% else %}"
    "{% for c in m.content %}{% if c.type == 'image' or 'image' in c %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% elif c.type == 'video' or 'video' in c %}<|vision_start|> <|video_pad|> <|vision_end|> "
    "{% elif 'text' in c %}{{ c.text }}{% endif %}{% endfor %} <|im_end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
_INTERN = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<IMG_CONTEXT> {% elif c.type == 'video' %}<video> "
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
_GEMMA = (
    "{{ bos_token }} {% if messages[0].role == 'system' %}{% set prefix = messages[0].content[0].text + ' ' %}"
    "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn> {{ 'model' if m.role == 'assistant' else m.role }} {{ prefix if loop.first else '' }}"
    "{% for c in m.content %}{% if c.type == 'image' %}<start_of_image> {% else %}{{ c.text | trim }}{% endif %}"
    "{% endfor %} <end_of_turn> {% endfor %}{% if add_generation_prompt %}<start_of_turn> model {% endif %}"
)
_IDEFICS = (
    "<|im_start|> {% for m in messages %}{{ m.role | capitalize }} : {% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% elif c.type == 'image' %}<image> {% elif c.type == 'video' %}<video> "
    "{% endif %}{% endfor %} <end_of_utterance> {% endfor %}{% if add_generation_prompt %}Assistant :{% endif %}"
)
# Images of a turn come first, and answers are generated; no token ends them.
_LLAVA = (
    "{% for m in messages %}{{ m.role.upper() }} : {% for c in m.content if c.type == 'image' %}<image> {% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ c.text + ' ' }}{% endgeneration %}{% else %}{{ c.text + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)
# The same in the form of ChatML, its end generated, too.
_ONEVISION = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content if c.type == 'image' %}<image> {% endfor %}"
    "{% for c in m.content if c.type == 'video' %}<video> {% endfor %}{% if m.role == 'assistant' %}{% generation %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %} <|im_end|> {% endgeneration %}{% else %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %} <|im_end|> {% endif %}{% endfor %}"
)

CHATS = [
    Chat(LLAVA, _LLAVA, "</s>", "template"),
    Chat(LLAVA_ONEVISION, _ONEVISION, "<|im_end|>", "template"),
    Chat(QWEN2_5_VL, _QWEN, "<|im_end|>"),
    Chat(QWEN3_VL, _QWEN, "<|im_end|>"),
    Chat(SMOLVLM, _IDEFICS, "<end_of_utterance>"),
    Chat(IDEFICS3, _IDEFICS, "<end_of_utterance>"),
    Chat(GEMMA3_ROW, _GEMMA, "<end_of_turn>"),
    Chat(INTERNVL, _INTERN, "<|im_end|>"),
]
