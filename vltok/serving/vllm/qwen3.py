"""Qwen3-VL in vLLM, with pruned images and videos.

In a prompt, the frames of a video stand apart, each behind its time in words. Which frame keeps how many tokens is not
known when the prompt is written. So it gets as many placeholders as there are words and kept tokens, and the encoder
gives what stands there, words too. Two frames of 1 x 2 tokens, of which the first one and the last two are kept:

    prompt       v  v  v  v  v  v  v  v  v        v: <|video_pad|>
    filled in    t  (  a  )  t  (  c  d  )        t: the time; ( and ): <|vision_start|> and <|vision_end|>
    position     0  1  2  4  5  6  7  7  9        frame and row
                 0  1  2  4  5  6  7  8  9        column
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.processing.processor import PromptUpdateDetails

from vltok.serving.options import Pruning
from vltok.serving.positions import Media, prompt_positions
from vltok.serving.vllm.model import Item
from vltok.serving.vllm.processing import PrunedInfo
from vltok.serving.vllm.qwen import GRIDS, PrunedQwen, QwenProcessor, merged
from vltok.tokens import Grid3

LONGEST_TIME = "<9999.9 seconds>"


class Qwen3Processor(QwenProcessor, Qwen3VLMultiModalProcessor):
    """Prompts of Qwen3-VL."""

    def written(self, details: PromptUpdateDetails, kind: str) -> PromptUpdateDetails:
        if kind == "image":
            return details
        return PromptUpdateDetails.from_seq([self.info.get_hf_config().video_token_id] * len(details.full))


class Qwen3Info(PrunedInfo, Qwen3VLProcessingInfo):
    """Sizes of Qwen3-VL, with the words between the frames of a video: the encoder gives these, too."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        if most is None or "video" not in most or Pruning.of_config(self.get_hf_config()) is None:
            return most
        videos = self.get_video_processor()
        words = len(self.get_tokenizer().encode(LONGEST_TIME, add_special_tokens=False)) + 2
        return {**most, "video": most["video"] + words * (videos.max_frames // videos.temporal_patch_size)}


@MULTIMODAL_REGISTRY.register_processor(Qwen3Processor, info=Qwen3Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class PrunedQwen3VL(PrunedQwen, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, with features of several layers of the tower, and words between the frames of videos."""

    def before_merger(self) -> nn.Module:
        return self.visual.merger.norm

    def split(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return encoded[:, : self.visual_dim], encoded[:, self.visual_dim :]

    def placed(self, item: Item, indices: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        if item.kind == "image":
            return super().placed(item, indices, kept)
        ids, positions, span = self._whole_video(self.grid(item), item.arguments["timestamps"][0])
        is_visual = ids == self.config.video_token_id
        stays = ~is_visual
        stays[is_visual.nonzero().squeeze(1)[indices]] = True
        words = self.language_model.embed_input_ids(ids[stays].to(kept.device))
        rows = torch.nn.functional.pad(words, (0, kept.shape[1] - words.shape[1])).to(kept.dtype)
        rows[is_visual[stays].to(rows.device)] = kept
        return rows, positions[:, stays], span

    def media(self, feature: MultiModalFeatureSpec) -> Media:
        if feature.modality == "image":
            return super().media(feature)
        place, data = feature.mm_position, feature.data
        _, _, span = self._whole_video(merged(data[GRIDS["video"]].data, self.merge), data["timestamps"].data)
        return Media(place.offset, place.offset + place.length, span)

    def _whole_video(
        self, grid: Grid3, times: Sequence[float] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Ids of all words and tokens of a video, (T,); their positions from its start, (3, T); how many it takes."""
        frames, rows, columns = grid
        config, size = self.config, rows * columns
        whole = Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[size] * frames,
            timestamps=times,
            tokenizer=self._tokenizer,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
        )
        ids = torch.tensor(whole.full)
        is_visual = ids == config.video_token_id
        offsets, side = self._offsets((1, rows, columns), None)
        begins = is_visual.nonzero().squeeze(1)[::size].tolist()
        positions, more = prompt_positions(len(ids), [Media(begin, begin + size, side) for begin in begins])
        positions[:, is_visual] = offsets.repeat(1, frames) - 1 - positions[:, is_visual]
        return ids, positions, len(ids) + more
