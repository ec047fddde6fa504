"""The plugin for vLLM: models whose visual tokens are pruned or condensed where they are encoded.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. It names
architectures of its own, so models of other users of vLLM are not touched. Nothing is loaded before one is asked for.
"""

from __future__ import annotations

from vltok.serving.architectures import ARCHITECTURES, CONDENSED


def register() -> None:
    """Make the architectures known to vLLM, as often as it likes; do nothing where vLLM is not installed."""
    try:
        from vllm import ModelRegistry
    except ImportError:
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vltok.serving.vllm.config import CondensedConfig, PrunedConfig

    known = ModelRegistry.get_supported_archs()
    for table, checks in ((ARCHITECTURES, PrunedConfig), (CONDENSED, CondensedConfig)):
        for own in table.values():
            MODELS_CONFIG_MAP.setdefault(own.name, checks)
            if own.name not in known:
                ModelRegistry.register_model(own.name, f"vltok.serving.vllm.{own.module}:{own.cls}")
