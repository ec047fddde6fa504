"""A folder of weights with code beside them, as transformers takes it with trust_remote_code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
from tiny import LLAVA_SIGLIP, TEXT, TOWER

CODE = Path(__file__).parent / "modeling_remote.py"
CLASSES = {"AutoConfig": "RemoteConfig", "AutoModelForImageTextToText": "RemoteForCausalLM"}
CONFIG = {"model_type": "remote_vlm", "vision": {**TOWER, "image_size": 56, "patch_size": 14}, "text": TEXT}
CONFIG |= {"auto_map": {name: f"{CODE.stem}.{own}" for name, own in CLASSES.items()}}  # 16 visual tokens an image


@contextmanager
def saved(folder: Path, cache: Path) -> Iterator[Path]:
    """Weights, code and processor in a new folder; while the block runs, transformers copies code into `cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.setattr(sys, "path", [*sys.path])
        folder.mkdir()
        shutil.copy(CODE, folder)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        made: Any = transformers.AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
        tiny.sharpen(made).save_pretrained(folder)
        LLAVA_SIGLIP.processor().save_pretrained(folder)
        shutil.copy(CODE, folder)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        yield folder
