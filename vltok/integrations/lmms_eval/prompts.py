"""From a request of lmms-eval to what a processor takes: a text, images, and frames of videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.protocol import ChatMessages
from PIL import Image

from vltok.errors import UnsupportedInputError
from vltok.integrations.lmms_eval.settings import Settings
from vltok.integrations.lmms_eval.videos import read


@dataclass
class Sample:
    """A request, ready for the processor.

    Attributes:
        number: Its place among the requests.
        task: The task's name.
        doc_id: Number of its document in the task.
        text: The prompt, with placeholders.
        images: In RGB.
        videos: Frames of each, (T, height, width, 3), uint8.
        metadata: What is known of each video, as transformers' video processors take it.
    """

    number: int
    task: str
    doc_id: int
    text: str = ""
    images: list[Image.Image] = field(default_factory=list)
    videos: list[np.ndarray] = field(default_factory=list)
    metadata: list[Any] = field(default_factory=list)

    @property
    def kinds(self) -> tuple[bool, bool]:
        """Whether it has images, and videos. Processors take batches in which all prompts have the same kinds."""
        return bool(self.images), bool(self.videos)


class Prompter:
    """Writes prompts for a model.

    Args:
        processor: The model's processor.
        settings: Those of the model.
    """

    def __init__(self, processor: Any, settings: Settings) -> None:
        self.processor = processor
        self.settings = settings
        self.template = _template(processor, settings.chat_template)

    def fill(self, sample: Sample, messages: list[dict[str, Any]]) -> None:
        """Read the conversation of a request into its sample.

        Raises:
            UnsupportedInputError: If it has audio, or pictures of a kind that the processor doesn't take.
        """
        chat = ChatMessages(messages=messages).to_hf_messages()
        if self.settings.system_prompt:
            system = {"role": "system", "content": [{"type": "text", "text": self.settings.system_prompt}]}
            chat = [system, *(turn for turn in chat if turn["role"] != "system")]
        for content in (content for turn in chat for content in turn["content"]):
            if content["type"] == "image":
                sample.images.append(_image(content["image"]))
            elif content["type"] == "video":
                frames, metadata = self._video(content)
                sample.videos.append(frames)
                sample.metadata.append(metadata)
            elif content["type"] != "text":
                raise UnsupportedInputError(
                    f"{content['type']} is no input of vltok's models; they take text and pictures"
                )
        sample.text = self._text(chat)

    def inputs(self, samples: Sequence[Sample]) -> Any:
        """What the model is called with: tensors, padded on the left.

        Args:
            samples: All with images or none, and all with videos or none.
        """
        has_images, has_videos = samples[0].kinds
        given: dict[str, Any] = {}
        if has_images:
            given["images"] = [sample.images for sample in samples]
        if has_videos:
            given["videos"] = [video for sample in samples for video in sample.videos]
            given["video_metadata"] = [each for sample in samples for each in sample.metadata]
            given["do_sample_frames"] = False  # they have been picked
        begin = self.processor.tokenizer.bos_token
        if begin and samples[0].text.startswith(begin):
            given["add_special_tokens"] = False  # the template wrote them
        texts = [sample.text for sample in samples]
        return self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **given)

    def _text(self, chat: list[dict[str, Any]]) -> str:
        if self.template is not None:
            return self.processor.apply_chat_template(chat, chat_template=self.template, add_generation_prompt=True)
        parts = [
            content["text"] if content["type"] == "text" else self._placeholder(content["type"])
            for turn in chat
            for content in turn["content"]
        ]
        return "\n".join(parts)

    def _placeholder(self, kind: str) -> str:
        token = getattr(self.processor, f"{kind}_token", None)
        if token is None:
            raise UnsupportedInputError(
                f"{type(self.processor).__name__} has no {kind}_token and no chat template, so vltok doesn't know how "
                f"a prompt shows where a picture is; give chat_template=FILE"
            )
        return str(token)

    def _video(self, content: dict[str, Any]) -> tuple[np.ndarray, Any]:
        """Decode the frames that are wanted of a video."""
        if getattr(self.processor, "video_processor", None) is None:
            raise UnsupportedInputError(f"{type(self.processor).__name__} takes no videos; choose tasks of images")
        source = content["video"]
        if isinstance(source, dict):  # as tasks give a part of a video
            content = {**source, "video": source.get("url") or source.get("path") or source.get("video")}
        span = content.get("video_start"), content.get("video_end")
        return read(str(content["video"]), self.settings.max_num_frames, self.settings.fps, *span)


def _template(processor: Any, given: str | None) -> str | None:
    """The chat template to use, if there is one."""
    if given is None:
        return processor.chat_template or processor.tokenizer.chat_template
    return Path(given).read_text() if Path(given).is_file() else given


def _image(source: Any) -> Image.Image:
    image = source if isinstance(source, Image.Image) else Image.open(source)
    return image.convert("RGB")
