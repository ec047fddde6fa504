"""Checks what a server is asked for while it reads the model's config, before anything is loaded."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.config.model import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.serving.architectures import BY_NAME
from vltok.serving.condenser import CONDENSER
from vltok.serving.options import FIELD, REQUEST, Pruning, check_positions, reads_of_tower
from vltok.serving.vllm.projector import make_projector

REACH = 4  # how many times its length a decoder's positions may reach, as vLLM has it for those on several axes
SECTIONS = "mrope_section"  # where vLLM reads that a model has positions on several axes


class PrunedConfig(VerifyAndUpdateConfig):
    """vLLM asks this about a model whose architecture is one of ours."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        config = model_config.hf_config
        own = BY_NAME[model_config.architecture]
        if getattr(config, CONDENSER, None) is not None:
            raise UnsupportedModelError(
                f"{own.name} prunes, and knows no {CONDENSER}; let vltok.serving.vllm_overrides(model, folder) "
                "write both"
            )
        pruning = Pruning.of_config(config)
        if pruning is None:
            return
        check_positions(pruning.selector, own.has_axes)
        _check_options(model_config)
        if pruning.selector.positions != "reindex" and not own.has_axes:
            if getattr(model_config.hf_text_config, "sliding_window", None):
                raise UnsupportedInputError(
                    f'positions="{pruning.selector.positions}" counts sliding windows in tokens of the whole prompt, '
                    'and vLLM counts them in those that are left; use positions="reindex"'
                )
            # All axes agree. The decoder gets one of them: its rotary embedding stays what it is, but reaches further,
            # as positions count what was dropped.
            setattr(config, SECTIONS, [1, 1, 1])
            model_config.hf_text_config.max_position_embeddings *= REACH

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        pruning = Pruning.of_config(vllm_config.model_config.hf_config)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        if pruning is not None and ranks > 1 and reads_of_tower(pruning.selector) - {"features"}:
            raise UnsupportedModelError(
                f"{pruning.selector.name} reads attention in the vision tower, whose heads are spread over {ranks} "
                "ranks here; serve with one, or choose a method that needs none, such as divprune"
            )


class CondensedConfig(VerifyAndUpdateConfig):
    """vLLM asks this about a model that has a condenser."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        make_projector(model_config.hf_config)  # refuses what it can't be made for


def _check_options(model_config: ModelConfig) -> None:
    multimodal = model_config.multimodal_config
    given = sorted({*REQUEST} & {*(multimodal.mm_processor_kwargs or {})}) if multimodal is not None else []
    if given:
        raise ValueError(f"{', '.join(given)} is for single requests; a server's own budget stands in {FIELD}")
    if multimodal is not None and multimodal.get_video_pruning_spec() is not None:
        raise ValueError(
            f"vLLM's own pruning of videos (video_pruning_rate) and {FIELD} exclude each other; leave one of them out"
        )
