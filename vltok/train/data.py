"""Conversations about images and videos: from LLaVA JSON or a table of the datasets library to samples, checked."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps

from vltok.errors import VltokError

# What stands in a question for each of its images and videos, whatever a model's own placeholders are.
MEDIA = {"image": "<image>", "video": "<video>"}
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
Role = Literal["system", "user", "assistant"]
_SHOWN = 5  # faulty samples that an error lists
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
)  # what PIL raises for bad files


class SampleError(VltokError, ValueError):
    """A sample that can't be trained on. The message names it."""


class BadImageError(SampleError):
    """A picture that is missing or can't be decoded. The message names the file and the sample."""


Picture = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; images stand in its text as "<image>", videos as "<video>"."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One conversation: alternating questions and answers, perhaps a system turn before, and its media in order.

    Attributes:
        name: What errors and warnings call it.
        turns: The turns.
        images: A picture each: a file, the bytes of one, or a PIL image.
        videos: A file each, pictures of its frames, or an array (frames, height, width, 3).
    """

    name: str
    turns: tuple[Turn, ...]
    images: tuple[Picture, ...] = ()
    videos: tuple[Any, ...] = ()

    @property
    def media(self) -> dict[str, tuple[Any, ...]]:
        """Images and videos by their kind."""
        return {"image": self.images, "video": self.videos}


def read_sample(record: Mapping[str, Any], name: str | None = None, images: str | Path | None = None) -> Sample:
    """Read a record as LLaVA writes it, or a row with the columns usual for `datasets`.

    Pictures are in "image" or "images": a file or PIL image, the dict that an undecoded datasets.Image gives, or a list
    of these. Videos are in "video" or "videos": a file, an array of frames, or a list of these, in which a list of
    pictures is a video, too. Turns are in "conversations" ({"from": "human" | "gpt", "value": ...}) or "messages"
    ({"role": "user" | "assistant", "content": a text, or parts of type "text", "image" and "video"}). An answer that no
    question precedes is left out, as LLaVA does.

    Args:
        record: The record.
        name: Its name, if it has no "id".
        images: Folder that paths of images and videos count from.

    Raises:
        SampleError: If something is missing or of another kind, if turns don't alternate, or if there are more or fewer
            "<image>" than images or "<video>" than videos.
    """
    if not isinstance(record, Mapping):
        raise SampleError(f"{name or 'a sample'} must be an object with an image and conversations, got {record!r}")
    name = f"sample {record['id']!r}" if record.get("id") is not None else name or "a sample without id"
    turns = record.get("conversations") or record.get("messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise SampleError(f'{name} has no turns: "conversations" or "messages" must be a list of them, got {turns!r}')
    inline: dict[str, list[Any]] = {kind: [] for kind in MEDIA}
    read = [_read_turn(turn, name, inline) for turn in turns]
    first = next((index for index, turn in enumerate(read) if turn.role != "system"), len(read))
    while first < len(read) and read[first].role == "assistant":
        del read[first]
    _check_order(read, name)
    folder = Path(images) if images is not None else None
    media = {}
    for kind, mark in MEDIA.items():
        given = next((record[key] for key in (kind, f"{kind}s") if record.get(key) is not None), inline[kind])
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        media[kind] = tuple((_source if kind == "image" else _video)(item, name, folder) for item in given)
        count = sum(turn.text.count(mark) for turn in read)
        if count != len(given):
            raise SampleError(
                f"{name} has {len(given)} {kind}s but {count} {mark} in its questions; write one {mark} where each "
                f"{kind} belongs"
            )
    return Sample(name, tuple(read), media["image"], media["video"])


def _read_turn(turn: Any, name: str, inline: dict[str, list[Any]]) -> Turn:
    """Read one turn; media that stand in it are appended to `inline`."""
    if not isinstance(turn, Mapping):
        raise SampleError(f"{name}: a turn must be an object, got {turn!r}")
    who, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if who not in ROLES:
        raise SampleError(f"{name}: a turn is from {who!r}; allowed are {', '.join(map(repr, ROLES))}")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_read_part(part, name, inline) for part in content)
    if not isinstance(content, str):
        raise SampleError(f"{name}: the text of a turn must be a string, got {content!r}")
    for kind, mark in MEDIA.items():
        if mark in content and ROLES[who] != "user":
            raise SampleError(f"{name}: {mark} stands in a turn from {who!r}; {kind}s belong into questions")
    return Turn(ROLES[who], content)


def _read_part(part: Any, name: str, inline: dict[str, list[Any]]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in MEDIA:
        inline[kind] += [part[key] for key in (kind, "path") if part.get(key) is not None][:1]
        return MEDIA[kind]
    raise SampleError(
        f'{name}: a part of a turn must be of type "text" (with a text), "image" or "video", got {part!r}'
    )


def _check_order(turns: Sequence[Turn], name: str) -> None:
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in spoken or any(role != ("user", "assistant")[index % 2] for index, role in enumerate(spoken)):
        raise SampleError(f"{name}: questions and answers must take turns, got {', '.join(roles)}")
    if "assistant" not in spoken:
        raise SampleError(f"{name} has no answer to learn from")


def _source(item: Any, name: str, folder: Path | None) -> Picture:
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, (bytes, Image.Image)):
        return item
    if not isinstance(item, (str, Path)):
        raise SampleError(f"{name}: an image must be a file or a PIL image, got {item!r}")
    return item if folder is None else folder / item


def _video(item: Any, name: str, folder: Path | None) -> Any:
    if isinstance(item, (list, tuple)) and item and not isinstance(item[0], (list, tuple, int)):
        return tuple(_source(frame, name, folder) for frame in item)
    path = item.get("path") if isinstance(item, Mapping) else item
    if isinstance(path, (str, Path)):
        return path if folder is None else folder / path
    if getattr(item, "ndim", 0) == 4:
        return item
    raise SampleError(
        f"{name}: a video must be a file, a list of images or an array (frames, height, width, 3), got {item!r}"
    )


def open_image(source: Picture, name: str) -> Image.Image:
    """Open and decode a picture as RGB, the way up that its EXIF orientation says.

    Raises:
        BadImageError: If it is missing or can't be decoded.
    """
    try:
        if isinstance(source, Image.Image):
            return ImageOps.exif_transpose(source).convert("RGB")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except _UNREADABLE as error:
        file = "an image given as bytes" if isinstance(source, bytes) else str(source)
        raise BadImageError(f"{name}: can't open {file}: {error}") from error


def open_video(source: Any, name: str) -> Any:
    """What a processor takes for a video: the name of its file, from which it picks frames itself, or an array.

    Raises:
        BadImageError: If the file is missing, or a frame can't be decoded.
    """
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise BadImageError(f"{name}: can't open {source}: there is no such file")
        return str(source)
    if isinstance(source, tuple):
        return torch.stack([_pixels(open_image(frame, name)) for frame in source])
    return source


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def pad_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Centre a picture on a square of its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Conversations(torch.utils.data.Dataset):
    """Samples for the trainer, by index. Pictures are opened later, by the collator.

    Args:
        records: A list of records, or a `datasets.Dataset`; see `read_sample`.
        images: Folder that paths of images and videos count from.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], images: str | Path | None = None) -> None:
        if len(records) == 0:
            raise SampleError("there are no samples to train on")
        self.records = records
        self.images = images

    @classmethod
    def from_file(cls, path: str | Path, images: str | Path | None = None) -> Conversations:
        """Open a LLaVA JSON file, all of whose samples are checked, or a table of the datasets library.

        Args:
            path: A JSON list of samples, one as JSON to a line (.jsonl), a table (.parquet), or a folder of
                `Dataset.save_to_disk`.
            images: Folder that paths of images and videos count from; by default the one the file is in.

        Raises:
            FileNotFoundError: If there is no such file.
            SampleError: If a JSON file holds no samples; the first faulty samples are listed.
        """
        path = Path(path)
        if path.is_dir() or path.suffix == ".parquet":
            import datasets

            if path.is_dir():
                return cls(datasets.load_from_disk(str(path)), images)
            return cls(datasets.Dataset.from_parquet(str(path)), path.parent if images is None else images)
        try:
            text = path.read_text(encoding="utf-8")
            is_lines = path.suffix == ".jsonl"
            records = [json.loads(line) for line in text.split("\n") if line.strip()] if is_lines else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{path} is not a JSON file: {error}") from error
        if not isinstance(records, list):
            raise SampleError(f"{path} must hold a list of samples, got {type(records).__name__}")
        data = cls(records, path.parent if images is None else images)
        data.check()
        return data

    def check(self) -> None:
        """Read every sample without its pictures.

        Raises:
            SampleError: If samples are faulty; the first ones are listed.
        """
        faults = []
        for index in range(len(self)):
            try:
                self[index]
            except SampleError as error:
                faults.append(str(error))
        if faults:
            more = f"\n... and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise SampleError(f"{len(faults)} faulty samples:\n" + "\n".join(faults[:_SHOWN]) + more)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return read_sample(self.records[index], f"sample {index}", self.images)
