"""Checks what a server is asked for while it reads the model's config, before anything is loaded."""

from __future__ import annotations

import logging

import vllm
from vllm.config import VllmConfig
from vllm.config.model import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.methods import Selector
from vltok.serving.architectures import BY_NAME, TESTED
from vltok.serving.options import CONDENSER, FIELD, REQUEST, Pruning, check_positions, reads_of_tower

REACH = 4  # how many times its length a decoder's positions may reach, as vLLM has it for those on several axes
ROPES = ("default", "linear", "llama3")  # those that rotate by the same angles when they are told to reach further
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
        _warn_of_version()
        check_positions(pruning.selector, own.has_axes)
        _check_options(model_config)
        if pruning.selector.positions != "reindex" and not own.has_axes:
            if getattr(model_config.hf_text_config, "sliding_window", None):
                raise UnsupportedInputError(
                    f'positions="{pruning.selector.positions}" counts sliding windows in tokens of the whole prompt, '
                    'and vLLM counts them in those that are left; use positions="reindex"'
                )
            rope = (getattr(model_config.hf_text_config, "rope_parameters", None) or {}).get("rope_type", "default")
            if rope not in ROPES:
                raise UnsupportedInputError(
                    f'positions="{pruning.selector.positions}" needs more positions than the decoder has, and with '
                    f'rope_type="{rope}" the angles of all depend on how many there are; use positions="reindex"'
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


def has_axes(model_config: ModelConfig) -> bool:
    """Whether visual tokens of a model have positions on several axes."""
    return BY_NAME[model_config.architecture].has_axes


def check_reach(model_config: ModelConfig, selector: Selector, ahead: int) -> None:
    """Raise ValueError if a prompt has positions that the decoder doesn't reach: in the model that ends the server.

    Args:
        model_config: That of the model, as `PrunedConfig` left it.
        selector: What prunes.
        ahead: By how much positions are ahead of places behind all images of the prompt.
    """
    if selector.positions == "reindex":
        return
    most = model_config.max_model_len
    reach = model_config.hf_text_config.max_position_embeddings
    if has_axes(model_config):
        reach *= REACH
    if most + ahead > reach:
        raise ValueError(
            f"the images of this prompt move positions by {ahead}, and with its answer it may have {most} tokens, but "
            f"the decoder has positions for {reach}; ask about fewer images, start the server with a smaller "
            'max_model_len, or with positions="reindex" where the model takes it'
        )


def _warn_of_version() -> None:
    if vllm.__version__ not in TESTED:
        logging.getLogger(__name__).warning(
            "vltok was tested with vLLM %s and this is %s, whose insides may differ: compare some answers with "
            "those of vltok on transformers",
            ", ".join(TESTED),
            vllm.__version__,
        )


class CondensedConfig(VerifyAndUpdateConfig):
    """vLLM asks this about a model that has a condenser."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        _warn_of_version()
        from vltok.serving.vllm.projector import make_projector  # loads more than a plugin should

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
