"""Training batches of canvas VQA: pictures, dense targets for the tower, several question blocks per sequence."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from eval.canvas.data import GRID, KINDS, PATCH, QUADRANTS, SHOWS, SIZE, Canvas, Canvases, Question
from eval.canvas.model import PIXEL_MEAN, PIXEL_STD

NUM_VISUAL = GRID * GRID
PREFIX = 1 + NUM_VISUAL  # <s> and the picture
IGNORE = -100
CROP = 8  # side of a crop, patches


@dataclass
class Batch:
    """Tensors of B canvases. T is the sequence length, N = 256 the visual tokens; of crops N = 64."""

    pixels: torch.Tensor  # (B, 3, 128, 128) float32, normalised; crops are (B, 3, 64, 64)
    patch_index: torch.Tensor  # (B, N) int64: which patches of the canvas these are
    patch_label: torch.Tensor  # (B, N) int64: item label, number of labels for background, IGNORE on faint edges
    patch_quadrant: torch.Tensor  # (B, N) int64: quadrant of the centre of the item that the patch shows, else IGNORE
    patch_centre: torch.Tensor  # (B, N, 2) float32 in -1..1: the centre of the item that it shows, else its own
    patch_is_centre: torch.Tensor  # (B, N) float32: 1 where an item has its centre
    patch_box: torch.Tensor  # (B, N, 4) int64: the box of the item that it shows, in patches, else IGNORE
    present: torch.Tensor  # (B, labels) float32
    count: torch.Tensor  # (B,) int64: items minus one
    input_ids: torch.Tensor  # (B, T) int64
    position_ids: torch.Tensor  # (B, T) int64: each question's go on from the picture's
    block: torch.Tensor  # (B, T) int64: 0 in the prefix, -1 in padding, 1.. in the questions
    target: torch.Tensor  # (B, T) int64: the next token where one of an answer or the </s> behind is due, else IGNORE
    kind: torch.Tensor  # (B, T) int64: the question's kind where a token of its answer is due, else IGNORE

    def attention_mask(self) -> torch.Tensor:
        """Additive mask, (B, 1, T, T): every token sees the prefix, and causally its own block."""
        length = self.block.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = self.block[:, :, None] == self.block[:, None, :]
        in_prefix = (self.block == 0)[:, None, :]
        allowed = causal & (same | in_prefix)
        return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]

    def condensed(self, num_visual: int) -> "Batch":
        """The same pictures and questions in sequences with `num_visual` visual tokens; the dense targets stay."""
        cut = NUM_VISUAL - num_visual
        fields = ("input_ids", "position_ids", "block", "target", "kind")
        shorter = {name: getattr(self, name)[:, cut:].clone() for name in fields}
        shorter["input_ids"][:, 0] = self.input_ids[:, 0]  # <s>
        shorter["position_ids"] -= cut
        return replace(self, **shorter)


class BatchStream(Dataset):
    """Batch number k of a stream is always the same, so a resumed run sees the batches it would have seen."""

    def __init__(
        self,
        canvases: Canvases,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int,
        num_batches: int,
        blocks: int,
        crops: bool = False,
    ) -> None:
        self.canvases, self.batch_size, self.num_batches, self.blocks = canvases, batch_size, num_batches, blocks
        self.crops = crops
        self.ids = tokenizer.get_vocab()

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> Batch:
        num_labels = len(self.canvases.items.names)
        if self.crops:  # two windows of each canvas, no questions
            half = self.batch_size // 2
            pictures = 2 * [self.canvases.canvas(index) for index in range(number * half, (number + 1) * half)]
            return self._crop(collate(pictures, [[] for _ in pictures], self.ids, num_labels), pictures, number)
        indices = range(number * self.batch_size, (number + 1) * self.batch_size)
        pictures = [self.canvases.canvas(index) for index in indices]
        asked = [self._pick(index, canvas) for index, canvas in zip(indices, pictures, strict=True)]
        return collate(pictures, asked, self.ids, num_labels)

    def _crop(self, batch: Batch, pictures: list[Canvas], number: int) -> Batch:
        """Per canvas the window with the most ink out of four random ones."""
        rng = self.canvases.rng(number, stream=3)
        windows, seen = [], torch.zeros_like(batch.present)
        for row, canvas in enumerate(pictures):
            best = (-1.0, 0, 0, None)
            for top, left in rng.integers(0, GRID - CROP + 1, size=(4, 2)):
                inside = canvas.ink[:, top : top + CROP, left : left + CROP].sum(axis=(1, 2))
                best = max(best, (float(inside.sum()), top, left, inside), key=lambda entry: entry[0])
            windows.append(best[1:3])
            most = best[3] > 0.7 * canvas.ink.sum(axis=(1, 2))
            seen[row, torch.from_numpy(canvas.labels[most])] = 1
        return crop(batch, torch.tensor(np.array(windows)), seen)

    def _pick(self, index: int, canvas: Canvas) -> list[Question]:
        """Up to `blocks` questions.

        A third are readings and boxes; then every quadrant and where, the count, and as many present as absent items.
        """
        asked = self.canvases.all_questions(index, canvas, 2, 5)
        long = (asked["read"][:2] + asked["box"])[: self.blocks // 3]
        blocks = self.blocks - len(long)
        others = (asked["quadrant"] + asked["where"])[: blocks - 3] + asked["count"]
        pairs = max(1, (blocks - len(others)) // 2)
        pairs = min(pairs, len(asked["no"]))
        yes = [asked["yes"][k % len(asked["yes"])] for k in range(pairs)]
        return yes + asked["no"][:pairs] + others + long


def collate(pictures: list[Canvas], asked: list[list[Question]], ids: dict[str, int], num_labels: int) -> Batch:
    """Put canvases and their questions into one batch; `ids` maps words to token ids."""
    size = len(pictures)
    pixels = torch.from_numpy(np.stack([canvas.image for canvas in pictures])).permute(0, 3, 1, 2)
    pixels = ((pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD).contiguous()
    dense = [_dense_targets(canvas, num_labels) for canvas in pictures]
    present = torch.zeros(size, num_labels)
    for row, canvas in enumerate(pictures):
        present[row, torch.from_numpy(canvas.labels)] = 1
    count = torch.tensor([len(canvas.labels) - 1 for canvas in pictures])

    rows = [_sequence(questions, ids) for questions in asked]
    length = max(len(row[0]) for row in rows)
    fills = (ids["<pad>"], PREFIX, -1, IGNORE, IGNORE)
    padded = [
        torch.tensor([row[k] + [fill] * (length - len(row[k])) for row in rows], dtype=torch.int64)
        for k, fill in enumerate(fills)
    ]
    dense_columns = (torch.from_numpy(np.stack(column)) for column in zip(*dense, strict=True))
    every = torch.arange(NUM_VISUAL).expand(size, -1)
    return Batch(pixels, every, *dense_columns, present, count, *padded)


def _sequence(questions: list[Question], ids: dict[str, int]) -> tuple[list[int], ...]:
    """Token ids, positions, block numbers, targets and kinds of one picture's sequence."""
    tokens = [ids["<s>"]] + [ids["<image>"]] * NUM_VISUAL
    positions, block = list(range(PREFIX)), [0] * PREFIX
    target, kind = [IGNORE] * PREFIX, [IGNORE] * PREFIX
    for number, question in enumerate(questions, start=1):
        words, answer = ([ids[word] for word in text.split()] for text in (question.text, question.answer))
        length = len(words) + len(answer)
        tokens += words + answer
        positions += range(PREFIX, PREFIX + length)
        block += [number] * length
        target += [IGNORE] * (len(words) - 1) + [*answer, ids["</s>"]]
        kind += [IGNORE] * (len(words) - 1) + [KINDS.index(question.kind)] * len(answer) + [IGNORE]
    return tokens, positions, block, target, kind


def _dense_targets(canvas: Canvas, num_labels: int) -> tuple[np.ndarray, ...]:
    """What each patch shows: label, quadrant, centre, whether it holds a centre, box."""
    ink = canvas.ink.reshape(len(canvas.labels), NUM_VISUAL)
    owner, most = ink.argmax(axis=0), ink.max(axis=0)
    shows = most >= SHOWS
    label = np.where(shows, canvas.labels[owner], num_labels)
    label[(most > 0.01) & ~shows] = IGNORE
    centres = canvas.centres
    quadrant_of = 2 * (centres[:, 1] > SIZE / 2) + (centres[:, 0] > SIZE / 2)
    quadrant = np.where(shows, quadrant_of[owner], IGNORE).astype(np.int64)
    rows, columns = np.divmod(np.arange(NUM_VISUAL), GRID)
    own = np.stack([columns, rows], axis=1) * PATCH + PATCH / 2
    centre = np.where(shows[:, None], centres[owner], own)
    is_centre = np.zeros(NUM_VISUAL, np.float32)
    cell = np.minimum(centres // PATCH, GRID - 1).astype(np.int64)
    is_centre[cell[:, 1] * GRID + cell[:, 0]] = 1
    box = np.where(shows[:, None], canvas.patch_boxes[owner], IGNORE)
    return label.astype(np.int64), quadrant, (centre / (SIZE / 2) - 1).astype(np.float32), is_centre, box


def crop(batch: Batch, windows: torch.Tensor, seen: torch.Tensor) -> Batch:
    """Cut one square window of patches out of each canvas.

    Args:
        batch: Whole canvases.
        windows: Row and column of each window's first patch, (B, 2).
        seen: (B, labels): labels with most of their ink inside the window; patches of other items are not scored.
    """
    inside = torch.arange(CROP)
    rows = windows[:, :1] + inside  # (B, CROP)
    columns = windows[:, 1:] + inside
    index = (rows[:, :, None] * GRID + columns[:, None]).flatten(1)  # (B, CROP * CROP)
    span = torch.arange(CROP * PATCH)
    y, x = windows[:, :1] * PATCH + span, windows[:, 1:] * PATCH + span
    pixels = batch.pixels[
        torch.arange(len(windows))[:, None, None, None],
        torch.arange(3)[:, None, None],
        y[:, None, :, None],
        x[:, None, None],
    ]
    label = batch.patch_label.gather(1, index)
    items = (label >= 0) & (label < seen.shape[1])
    hidden = items & (seen.gather(1, label.clamp(0, seen.shape[1] - 1)) == 0)
    return replace(
        batch,
        pixels=pixels,
        patch_index=index,
        patch_label=label.masked_fill(hidden, IGNORE),
        patch_quadrant=batch.patch_quadrant.gather(1, index).masked_fill(hidden, IGNORE),
        patch_centre=batch.patch_centre.gather(1, index[..., None].expand(-1, -1, 2)),
        patch_is_centre=batch.patch_is_centre.gather(1, index),
        patch_box=batch.patch_box.gather(1, index[..., None].expand(-1, -1, 4)),
        present=seen,
        count=torch.full_like(batch.count, IGNORE),
    )


def quadrant_word_ids(ids: dict[str, int]) -> torch.Tensor:
    """Token ids of the four quadrant words, (4,)."""
    return torch.tensor([ids[word] for word in QUADRANTS])
