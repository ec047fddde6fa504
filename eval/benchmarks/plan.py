"""What is compared: the unpruned model, floors at equal cost, and methods, each at every budget; and who they are."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltok import Method

# Always there, as are the unpruned model and smaller images. Each tile is pooled by itself: it has a grid of its own.
FLOORS = {"pool": "pool,per=tile", "random": "random", "stride": "stride"}
SMALL = "resize"
UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Row:
    """One row of the table: a method at one budget, the model as it is, or the model on smaller images.

    Attributes:
        name: In the table.
        keep_ratio: Share of the visual tokens that is asked for; None for a method that has budgets of its own.
        method: What is put on the model, or None.
    """

    name: str
    keep_ratio: float | None = 1.0
    method: Method | None = None

    @property
    def shrinks(self) -> bool:
        """Whether images are made smaller, by `vltok.resize`."""
        return self.name == SMALL

    @property
    def is_floor(self) -> bool:
        """Whether it is there to be beaten; left out where the model can't have it."""
        return self.shrinks or self.name in FLOORS

    @property
    def label(self) -> str:
        """Name and budget, for people and files."""
        has_budget = self.keep_ratio is not None and self.name != UNPRUNED
        return f"{self.name} {100 * self.keep_ratio:g} %" if has_budget else self.name

    def settings(self) -> dict[str, Any]:
        """All that decides what it does."""
        return {
            "method": None if self.method is None else self.method.to_dict(),
            "resize": self.keep_ratio if self.shrinks else None,
        }


def plan_rows(methods: str, keep_ratios: Sequence[float]) -> list[Row]:
    """The rows of a comparison: unpruned, then for each budget smaller images, floors, and the methods.

    Args:
        methods: Such as "divprune,todre;relevance=False": names with commas between them, their settings behind
            semicolons. One with a budget in its settings, or that takes no `keep_ratio`, has no other; it is one row.
        keep_ratios: Shares of the visual tokens, in (0, 1).

    Raises:
        ValueError: If a method or a setting is unknown, or a share out of range.
    """
    if not all(0 < ratio < 1 for ratio in keep_ratios):
        raise ValueError(f"--keep must be shares in (0, 1), the unpruned model is there anyway, got {keep_ratios}")
    parts = re.split(r",(?![^(\[]*[)\]])", methods)  # not at commas inside brackets
    words = [word.strip() for word in parts if word.strip()]
    own = [(word, Method.from_text(word.replace(";", ","))) for word in dict.fromkeys(words) if has_own_budget(word)]
    others = [word for word in dict.fromkeys((*FLOORS, *words)) if not has_own_budget(word)]
    rows = [Row(UNPRUNED)]
    for ratio in sorted(set(keep_ratios), reverse=True):
        rows.append(Row(SMALL, ratio))
        for word in others:
            text = FLOORS.get(word, word).replace(";", ",")
            rows.append(Row(word, ratio, Method.from_text(f"{text},keep_ratio={ratio!r}")))
    return rows + [Row(word, None, method) for word, method in own]


def has_own_budget(word: str) -> bool:
    """Whether a method, written as above, has a budget already, or takes none that is a share.

    Raises:
        ValueError: If the method or a setting is unknown.
    """
    text = word.replace(";", ",")
    try:
        Method.from_text(f"{text},keep_ratio=0.5")
    except ValueError:
        try:
            Method.from_text(text)
        except ValueError as error:
            raise ValueError(f"--methods: {error}") from error
        return True
    return False


def fingerprint(model: str) -> str:
    """What tells a model from all others: a digest of a folder's files, or the commit of a cached one's snapshot.

    Raises:
        ValueError: If there is neither such a folder nor such a snapshot.
    """
    folder = Path(model)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()
    from transformers import AutoConfig  # a server of weights may be asked here, with its own rules

    try:
        commit = getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)
    except OSError as error:
        raise ValueError(f"--model {model} is no folder, and no model that can be had: {error}") from error
    if commit is None:
        raise ValueError(f"--model {model} has no commit that tells its versions apart; give a folder")
    return commit
