"""Turn an official LLaVA-TokenPacker checkpoint into a folder that transformers and vltok load.

    python -m vltok.convert tokenpacker OFFICIAL_DIR OUT --vision-tower CLIP_DIR
    handle = vltok.from_pretrained("OUT")

Official checkpoints (https://arxiv.org/abs/2407.02392) have the layout of the LLaVA-1.5 code of 2023: the flat config
of a Llama with fields mm_* on top, and weights named model.layers.*, lm_head.weight, model.mm_projector.* and in some
model.vision_tower.*. A folder that holds mm_projector.bin instead of a whole model, the result of the first training
stage, becomes an adapter for `vltok.load`.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor, PreTrainedTokenizerBase
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from vltok.api import Handle, apply
from vltok.convert import ShardWriter, check_names, new_folder, scan
from vltok.errors import CheckpointError
from vltok.files import Stored, open_weights, read_json, weight_files
from vltok.methods.condensing.token_packer.method import HEAD_DIM, LEVELS, TokenPacker
from vltok.serialization import save

PROJECTOR = "multi_modal_projector."
TOWER = "vision_tower."
TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")  # (tokens, D)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Official names become those that save_pretrained() of a Hugging Face LLaVA writes. Buffers that older versions of
# transformers saved are computed today.
RENAMES = [
    (re.compile(r".*\.(?:rotary_emb\.inv_freq|embeddings\.position_ids)"), None),
    (re.compile(r"(?:model\.)?((?:embed_tokens|layers|norm)\..+)"), r"language_model.model.\1"),
    (re.compile(r"(lm_head\..+)"), r"language_model.\1"),
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)"), rf"{TOWER}\1"),
    (re.compile(r"(?:model\.)?mm_projector\.(.+)"), rf"{PROJECTOR}\1"),
    (re.compile(r"((?:[qkv]_proj_1|ln_[qkv]_1|clip_attn|mlp)\..+)"), rf"{PROJECTOR}\1"),
]
TOWER_RENAMES = [  # of a CLIPVisionModel, or of a CLIPModel, whose text half is of no use here
    (re.compile(r"text_model\..+|(?:visual|text)_projection\.weight|logit_scale|.*embeddings\.position_ids"), None),
    (re.compile(r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..+)"), rf"{TOWER}\1"),
]
SAVED_AS = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.", ""))

KNOWN = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "tie_word_embeddings": False}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
TEXT_FIELDS = (
    *SIZES,
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rope_theta"),
    *("rope_scaling", "attention_bias", "attention_dropout", "mlp_bias", "bos_token_id", "eos_token_id"),
)
CLIP_L_336 = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"image_size": 336, "patch_size": 14, "projection_dim": 768},
}
TOWER_FIELDS = (*CLIP_L_336, "num_channels", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    vision_tower: str | Path | None = None,
    scale_factor: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 2 * 10**9,
    progress: bool = False,
) -> str:
    """Convert an official checkpoint. Nothing is downloaded, and one file of weights at a time is open.

    Args:
        source: The official folder: config.json, weights as pytorch_model*.bin or model*.safetensors, and a tokenizer;
            or mm_projector.bin.
        target: A new folder.
        vision_tower: Folder of the CLIPModel or CLIPVisionModel that the checkpoint was trained with. Its weights are
            taken, as by the official code, even where the checkpoint has some too; with config.json alone it describes
            the checkpoint's. Not needed for a checkpoint that has the weights of CLIP-L/336.
        scale_factor: Side of a region, where the official config doesn't say: 2 for 144 visual tokens, 3 for 64, 4 for
            36.
        dtype: "float32", "bfloat16" or "float16"; by default every weight keeps its own.
        max_shard_bytes: Size of a file of weights.
        progress: Whether to show a progress bar.

    Returns:
        What was made, a few lines to print.

    Raises:
        FileNotFoundError: If a folder, the weights, the tokenizer or the vision tower are missing.
        FileExistsError: If `target` is not empty.
        CheckpointError: If weights are damaged, missing or unexpected.
        ImportError: If the tokenizer is a sentencepiece model and the packages that read it are missing.
        ValueError: If the config is of another model, or an option doesn't fit it.
    """
    source, target = Path(source), Path(target)
    tower_folder = None if vision_tower is None else Path(vision_tower)
    for folder in (source, tower_folder):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; nothing is downloaded, so give a local one")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    wanted = None if dtype is None else DTYPES[dtype]
    files, alone = weight_files(source), source / "mm_projector.bin"
    if not files and not alone.is_file():
        raise FileNotFoundError(f"{source} has no pytorch_model*.bin, model*.safetensors or mm_projector.bin")
    official = _read_config(source, whole=bool(files))
    scale_factor = _choose_scale_factor(official, scale_factor)
    with new_folder(target) as folder:
        entries, unknown = scan(files or [alone], RENAMES)
        if files:
            tower, found_at = _add_tower(source, official, tower_folder, entries, unknown)
            processor, added = _write_processor(source, folder, tower, official, tower_folder)
            config = _model_config(official, tower, processor)
            lines = [f"vision tower: {found_at}", f"tokenizer: added {added or 'none'}"]
            lines += [f"load it by vltok.from_pretrained({str(target)!r})"]
        else:
            tower = CLIPVisionConfig(**CLIP_L_336) if tower_folder is None else _read_tower_config(tower_folder)
            config = _stand_in_config(official, tower, entries)
            added = {}
            lines = ["adapter only: vltok.load(model, folder, processor=processor) puts it on a LLaVA"]
        handle = _apply(config, scale_factor, _embed_dim(source, entries))
        weights = {_saved_as(name): weight for name, weight in handle.model.state_dict().items()}
        expected = {name: weights[name] for name in weights if files or name.startswith(PROJECTOR)}
        if files:
            expected |= {name: expected[name][:1].expand(official["vocab_size"], -1) for name in TABLES}
        check_names(source, entries, expected, unknown)

        writer = ShardWriter(folder, max_shard_bytes)
        grow = partial(_grow, ids=sorted(added.values()), size=config.text_config.vocab_size)
        projector, stored = _copy_weights(entries, writer, grow, wanted, progress)
        handle.added_modules[0].load_state_dict(projector, assign=True)
        save(handle, folder)
        if files:
            writer.close()
            _write_config(folder, handle, wanted or stored)
    patches = (tower.image_size // tower.patch_size) ** 2
    head = f"wrote {target}: {patches} patches of a picture become {patches // scale_factor**2} visual tokens"
    return "\n".join([head, *lines, *_notes(official)])


# The official folder


def _read_config(source: Path, whole: bool) -> dict[str, Any]:
    """Read the official config and refuse another model's; a projector alone may come without."""
    path = source / "config.json"
    if not path.is_file():
        if whole:
            raise FileNotFoundError(f"{source} has no config.json; give the folder of an official checkpoint")
        return {}
    official = read_json(path)
    kind = official.get("model_type")
    if kind not in ("llava", "llava_llama") or "text_config" in official:
        hint = "; this one is in Hugging Face's layout already" if "text_config" in official else ""
        raise ValueError(
            f"{path} has model_type {kind!r}; official TokenPacker checkpoints have 'llava' or 'llava_llama' and the "
            f"flat config of a Llama{hint}"
        )
    for name, value in KNOWN.items():
        if official.get(name, value) != value:
            raise ValueError(f"{path} has {name} {official[name]!r}; only {value!r} is supported, as released")
    if whole and (missing := [name for name in SIZES if name not in official]):
        raise ValueError(f"{path} lacks {', '.join(missing)}; it is no config of a Llama")
    return official


def _choose_scale_factor(official: Mapping[str, Any], given: int | None) -> int:
    named = official.get("scale_factor")
    if named is None and given is None:
        raise ValueError(
            "the official config names no scale_factor; give it: --scale-factor 2 (144 visual tokens of 576 patches), "
            "3 (64) or 4 (36)"
        )
    if named is not None and given is not None and int(named) != given:
        raise ValueError(f"the official config has scale_factor {named}, but {given} was given; leave the option out")
    return int(given if named is None else named)


def _embed_dim(source: Path, entries: Mapping[str, Stored]) -> int:
    """Width inside the projector, E."""
    query = entries.get(f"{PROJECTOR}q_proj_1.weight")
    if query is None:
        names = ", ".join(entry.name for name, entry in entries.items() if name.startswith(PROJECTOR))
        raise CheckpointError(f"{source} has no q_proj_1.weight, so no TokenPacker projector; it has {names or 'none'}")
    return query.shape[0]


def _notes(official: Mapping[str, Any]) -> list[str]:
    notes = []
    if "patch_num" in official or official.get("image_aspect_ratio") == "slice":
        tiles = official.get("patch_num", 9)
        notes.append(
            f"high resolution (patch_num {tiles}): it was trained on tiles of pictures; process them with "
            f"vltok.processing.TokenPackerHDProcessor(processor, max_tiles={tiles})"
        )
    if official.get("mm_use_im_start_end"):
        notes.append("it was trained with <im_start> before and <im_end> after each <image>; prompts need them")
    return notes


# The vision tower


def _read_tower_config(folder: Path) -> CLIPVisionConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a CLIPModel or CLIPVisionModel")
    given = read_json(path)
    kind = given.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"the vision tower must be a 'clip' or 'clip_vision_model'; {path} has model_type {kind!r}")
    given = given.get("vision_config", {}) if kind == "clip" else given
    config = CLIPVisionConfig(**{name: given[name] for name in TOWER_FIELDS if name in given})
    if config.num_hidden_layers != LEVELS[-1] + 1:
        raise ValueError(
            f"TokenPacker reads hidden states {LEVELS} of a vision tower with {LEVELS[-1] + 1} layers; {path} has "
            f"{config.num_hidden_layers}"
        )
    return config


def _add_tower(
    source: Path, official: Mapping[str, Any], folder: Path | None, entries: dict[str, Stored], unknown: list[str]
) -> tuple[CLIPVisionConfig, str]:
    """Find the tower's config, and put its weights into `entries` where they come from a folder of their own."""
    named = str(official.get("mm_vision_tower"))
    own = [name for name in entries if name.startswith(TOWER)]
    files = [] if folder is None else weight_files(folder)
    if not files and not own:
        raise FileNotFoundError(
            f"the weights of the vision tower ({named}) are not in {source}{f' nor in {folder}' if folder else ''}; "
            "give the local folder of the CLIP model it was trained with: --vision-tower DIR"
        )
    if folder is None:
        if "clip-vit-large-patch14-336" not in named:
            raise ValueError(
                f"the weights of the vision tower ({named}) are in the checkpoint, but nothing describes it; give a "
                "folder with its config.json: --vision-tower DIR"
            )
        return CLIPVisionConfig(**CLIP_L_336), "the checkpoint's CLIP-L/336"
    if files:
        found, strangers = scan(files, TOWER_RENAMES)
        for name in own:
            del entries[name]
        entries |= found
        unknown += strangers
    return _read_tower_config(folder), f"from {folder}" if files else "the checkpoint's"


# Tokenizer and processor


def _read_tokenizer(source: Path) -> tuple[PreTrainedTokenizerBase, dict[str, int]]:
    """Read the tokenizer and add the tokens it lacks. Returns it and the ids of those."""
    if not (source / "tokenizer.json").is_file():
        if not (source / "tokenizer.model").is_file():
            raise FileNotFoundError(f"{source} has no tokenizer: neither tokenizer.json nor tokenizer.model")
        if not (is_sentencepiece_available() and is_protobuf_available()):
            raise ImportError(
                f"{source / 'tokenizer.model'} needs two more packages: python -m pip install sentencepiece protobuf"
            )
    with tempfile.TemporaryDirectory() as folder:  # away from config.json, which says "llava" and means another one
        for file in (*source.glob("*token*.json"), *source.glob("tokenizer.model")):
            shutil.copy(file, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    known = set(tokenizer.get_vocab())
    tokenizer.add_tokens([transformers.AddedToken("<image>", normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<image>", tokenizer.pad_token)}
    return tokenizer, {token: index for token, index in ids.items() if token not in known}


def _write_processor(
    source: Path, folder: Path, tower: CLIPVisionConfig, official: Mapping[str, Any], tower_folder: Path | None
) -> tuple[LlavaProcessor, dict[str, int]]:
    """Save the processor of the plain model. Returns it and the ids of the tokens that were added."""
    tokenizer, added = _read_tokenizer(source)
    side = tower.image_size
    options: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    kind = transformers.CLIPImageProcessor
    if official.get("image_aspect_ratio") == "pad":  # trained on pictures padded to a square
        kind, options = transformers.LlavaImageProcessor, {**options, "do_pad": True}
    if tower_folder is not None and (tower_folder / "preprocessor_config.json").is_file():
        image_processor = kind.from_pretrained(tower_folder, local_files_only=True, **options)
    else:
        image_processor = kind(**options)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return processor, added


# Config and weights


def _model_config(official: Mapping[str, Any], tower: CLIPVisionConfig, processor: LlavaProcessor) -> LlavaConfig:
    text = {name: official[name] for name in TEXT_FIELDS if name in official}
    text["vocab_size"] = max(text["vocab_size"], *(index + 1 for index in processor.tokenizer.get_vocab().values()))
    return LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(**text, pad_token_id=processor.tokenizer.pad_token_id),
        image_token_index=processor.image_token_id,
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _stand_in_config(
    official: Mapping[str, Any], tower: CLIPVisionConfig, entries: Mapping[str, Stored]
) -> LlavaConfig:
    """A model as wide as the one that a projector was trained in, and nothing else."""
    output = entries.get(f"{PROJECTOR}mlp.0.weight")
    width = official.get("hidden_size") or (output.shape[0] if output else 1)
    text = LlamaConfig(hidden_size=width, num_attention_heads=1, num_hidden_layers=1, bos_token_id=None)
    return LlavaConfig(vision_config=tower, text_config=text, image_token_index=0)


def _apply(config: LlavaConfig, scale_factor: int, embed_dim: int) -> Handle:
    """Put the method on a model without weights: names, shapes, settings and config are those of a real one."""
    if embed_dim % HEAD_DIM:
        raise CheckpointError(f"the projector's width must be a multiple of {HEAD_DIM}, a head's; got {embed_dim}")
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    model.model.multi_modal_projector.to_empty(device="cpu")
    method = TokenPacker(scale_factor, LEVELS, embed_dim=embed_dim, num_heads=embed_dim // HEAD_DIM)
    processor = SimpleNamespace(
        patch_size=config.vision_config.patch_size,
        image_token_id=config.image_token_id,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    return apply(model, method, processor=processor)


def _saved_as(name: str) -> str:
    """The name in a file of a weight of a LlavaForConditionalGeneration."""
    return next(new + name.removeprefix(old) for old, new in SAVED_AS if name.startswith(old))


def _copy_weights(
    entries: Mapping[str, Stored],
    writer: ShardWriter,
    grow: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype | None,
    progress: bool,
) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """Write all weights but the projector's, file by file. Returns those, and the dtype of the embeddings."""
    projector: dict[str, torch.Tensor] = {}
    stored = torch.float32

    def copy(name: str, tensor: torch.Tensor) -> None:
        nonlocal stored
        stored = tensor.dtype if name == TABLES[0] else stored
        if name.startswith(PROJECTOR):
            projector[name.removeprefix(PROJECTOR)] = tensor.clone()
        else:
            writer.add(name, grow(tensor) if name in TABLES else tensor)

    files = sorted({entry.file for entry in entries.values()})
    for file in tqdm(files, "converting", unit="file", disable=not progress):
        with open_weights(file) as opened:
            for name, entry in entries.items():
                if entry.file == file:
                    copy(name, opened.read(entry.name, dtype))
            writer.flush()
    return projector, stored


def _grow(table: torch.Tensor, ids: list[int], size: int) -> torch.Tensor:
    """Give new tokens, and rows beyond the table, the mean of its rows: (V, D) -> (size, D)."""
    mean = table.mean(0, dtype=torch.float32).to(table.dtype)
    grown = torch.cat([table, mean.expand(size - len(table), -1)])
    grown[ids] = mean
    return grown


def _write_config(folder: Path, handle: Handle, dtype: torch.dtype) -> None:
    config = handle.model.config
    config.architectures, config.dtype = [type(handle.model).__name__], dtype
    config.save_pretrained(folder)
    ids = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    transformers.GenerationConfig(**ids).save_pretrained(folder)
