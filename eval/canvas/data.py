"""Canvas VQA data: real handwritten digits blended at any position on crops of real photos, and questions about them.

Everything comes from installed packages, the digits and two photos from scikit-learn, nine photos from scikit-image;
nothing is downloaded.
A canvas is a pure function of (split, seed, index), so any of them can be drawn again on its own.
Test canvases use digits and photo regions that no training or validation canvas uses.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128  # canvas side, pixels
PATCH = 8  # patch side, pixels
GRID = SIZE // PATCH
MIDLINE_MARGIN = 5.0  # an asked item's centre is at least this many pixels from both midlines
MAX_ITEMS = 6
SPLITS = ("train", "val", "test")
ONE_WORD = ("exist", "quadrant", "where", "count")  # kinds of question by the length of their answers
KINDS = (*ONE_WORD, "read", "box")
QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = {
    "exist": ("is there {}", "do you see {}"),
    "quadrant": ("what is in the {}", "which item is in the {}"),
    "where": ("where is the {}", "where do you see the {}"),
    "count": ("how many items are there", "how many items do you see"),
    "box": ("box the {}", "draw a box around the {}"),
    "read": ("read the {}", "read along the {}"),
}
SIDES = {"top": (0, 1), "bottom": (2, 3), "left": (0, 2), "right": (1, 3)}  # of read: its two quadrants, in order
SHOWS = 0.08  # a patch shows an item that covers at least this much of it

# Regions are shares of a photo's width, left to right. The photos ship inside the wheels; each has its credit here.
REGIONS = {"train": (0.0, 0.58), "val": (0.58, 0.74), "test": (0.74, 1.0)}
PHOTOS = {
    "china.jpg": ("sklearn", "danielbuechele (flickr.com/photos/danielbuechele), CC BY 2.0"),
    "flower.jpg": ("sklearn", "vultilion (flickr.com/photos/vultilion), CC BY 2.0"),
    "astronaut.png": ("skimage", "NASA, public domain"),
    "camera.png": ("skimage", "Lav Varshney, CC0"),
    "chelsea.png": ("skimage", "Stefan van der Walt, CC0"),
    "coffee.png": ("skimage", "Rachel Michetti, CC0"),
    "rocket.jpg": ("skimage", "SpaceX, public domain"),
    "hubble_deep_field.jpg": ("skimage", "NASA, public domain"),
    "brick.png": ("skimage", "CC0Textures, CC0"),
    "grass.png": ("skimage", "linolafett (DeviantArt), CC0"),
    "gravel.png": ("skimage", "CC0Textures, CC0"),
}
TEST_ONLY_PHOTOS = ("coffee.png",)


@dataclass(frozen=True)
class Items:
    """Item pictures and their names: images (N, h, w) uint8, bright on dark; labels (N,) int64 into names."""

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Canvas:
    """One picture and what is on it.

    Attributes:
        image: (128, 128, 3) uint8.
        labels: (n,) int64, one per item.
        boxes: (n, 4) int64, x0, y0, x1, y1 in pixels, ends excluded.
        ink: (n, 16, 16) float32 in 0..1: how much of each patch the item covers.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    ink: np.ndarray

    @property
    def centres(self) -> np.ndarray:
        """Item centres in pixels, (n, 2), x before y."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @property
    def patch_boxes(self) -> np.ndarray:
        """First column, first row, last column and last row of the patches that show each item, (n, 4) int64."""
        shown = self.ink >= SHOWS
        sides = []
        for along in (shown.any(axis=1), shown.any(axis=2)):  # (n, columns), then (n, rows)
            sides.append((along.argmax(axis=1), GRID - 1 - along[:, ::-1].argmax(axis=1)))
        (left, right), (top, bottom) = sides
        return np.stack([left, top, right, bottom], axis=1)


@dataclass(frozen=True)
class Question:
    """A question about one canvas with its answer: four words for a box, two for a reading, else one."""

    kind: str
    text: str
    answer: str
    canvas: int


@cache
def digits() -> Items:
    """The 1,797 handwritten digits bundled with scikit-learn (UCI, CC BY 4.0), 8x8."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return Items(images, bunch.target.astype(np.int64), NUMBERS)


def load_items(path: str | Path) -> Items:
    """Read other item pictures from an .npz file.

    Args:
        path: File with arrays `images` (N, h, w) uint8, bright items on black; `labels` (N,) integers from 0; and
            optionally `names`, one word per label. Without names the labels 0..9 are called zero..nine.

    Raises:
        ValueError: If an array is missing or has another shape or type than said above.
    """
    with np.load(path, allow_pickle=False) as file:
        data = dict(file)
    if not {"images", "labels"} <= set(data):
        raise ValueError(f"{path} needs the arrays 'images' and 'labels', it holds {sorted(data)}")
    images, labels, names = data["images"], data["labels"], tuple(map(str, data.get("names", NUMBERS)))
    if images.ndim != 3 or images.dtype != np.uint8 or min(images.shape) == 0:
        raise ValueError(f"images must be (N, h, w) uint8, got {images.shape} {images.dtype}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be ({len(images)},) integers, got {labels.shape} {labels.dtype}")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels must be in 0..{len(names) - 1} (one name each), got {labels.min()}..{labels.max()}")
    if any(len(name.split()) != 1 for name in names) or len(set(names)) != len(names):
        raise ValueError(f"names must be different single words, got {names}")
    return Items(images, labels.astype(np.int64), names)


def split_items(labels: np.ndarray, split: str) -> np.ndarray:
    """Sample numbers of one split, ascending: per label two thirds train, a ninth val, the rest test.

    Of the 1,797 digits 1,198 train, 200 val, 399 test. The split depends on the labels alone, never on a seed.
    """
    chosen = []
    for label in np.unique(labels):
        order = np.random.default_rng([2718, int(label)]).permutation(np.flatnonzero(labels == label))
        first, second = round(len(order) * 0.667), round(len(order) * 0.778)
        chosen.append({"train": order[:first], "val": order[first:second], "test": order[second:]}[split])
    return np.sort(np.concatenate(chosen))


@cache
def photo(name: str) -> Image.Image:
    """A bundled photo as RGB."""
    if PHOTOS[name][0] == "sklearn":
        import sklearn.datasets as package

        path = Path(package.__file__).parent / "images" / name
    else:
        import skimage.data as package

        path = Path(package.__file__).parent / name
    return Image.open(path).convert("RGB")


def photo_regions(split: str) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Photo regions of one split: (file, (x0, y0, x1, y1) in pixels). Regions of different splits do not overlap."""
    regions = []
    for name in PHOTOS:
        width, height = photo(name).size
        if name in TEST_ONLY_PHOTOS:
            if split == "test":
                regions.append((name, (0, 0, width, height)))
            continue
        low, high = REGIONS[split]
        regions.append((name, (round(low * width), 0, round(high * width), height)))
    return regions


class Canvases:
    """The canvases of one split and seed, and their questions.

    Args:
        split: "train", "val" or "test".
        seed: Another seed gives other canvases from the same digits and photo regions.
        items: Item pictures; the digits when None.
        min_items: Fewest items on a canvas, 1..6. More items give denser training signal.
        kinds: Which kinds of question are asked. Pictures and other questions do not depend on it.
    """

    def __init__(
        self,
        split: str,
        seed: int = 0,
        items: Items | None = None,
        min_items: int = 1,
        kinds: Sequence[str] = ONE_WORD,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if not 1 <= min_items <= MAX_ITEMS:
            raise ValueError(f"min_items must be in 1..{MAX_ITEMS}, got {min_items}")
        if not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds must be of {KINDS}, got {kinds!r}")
        self.split, self.seed, self.min_items, self.kinds = split, seed, min_items, kinds
        self.items = digits() if items is None else items
        self.pool = split_items(self.items.labels, split)
        if len(self.pool) == 0:
            raise ValueError(f"no item picture falls into the {split} split: give at least 10 pictures per label")
        self.regions = photo_regions(split)

    def rng(self, index: int, stream: int = 0) -> np.random.Generator:
        """Random numbers of one canvas; stream 0 draws the picture, others draw questions."""
        return np.random.default_rng([self.seed, SPLITS.index(self.split), self.min_items, index, stream])

    def canvas(self, index: int) -> Canvas:
        """Draw canvas `index`."""
        rng = self.rng(index)
        background = self._background(rng)
        count = int(rng.integers(self.min_items, MAX_ITEMS + 1))
        boxes = _place(rng, count)
        chosen = rng.choice(self.pool, size=count)
        ink = np.zeros((count, SIZE, SIZE), np.float32)
        for k, (number, (x0, y0, x1, y1)) in enumerate(zip(chosen, boxes, strict=True)):
            alpha = _stretch(self.items.images[number], x1 - x0, y1 - y0, rng.uniform(-8, 8))
            under = background[y0:y1, x0:x1]
            colour = _contrasting_colour(rng, under)
            alpha = alpha * rng.uniform(0.85, 1.0)
            background[y0:y1, x0:x1] = under + alpha[..., None] * (colour - under)
            ink[k, y0:y1, x0:x1] = alpha
        image = np.clip(np.round(background), 0, 255).astype(np.uint8)
        per_patch = ink.reshape(count, GRID, PATCH, GRID, PATCH).mean(axis=(2, 4))
        return Canvas(image, self.items.labels[chosen], boxes, per_patch)

    def questions(self, index: int) -> list[Question]:
        """The evaluation questions of canvas `index`.

        One about a present and one about an absent item, one of each other kind where it has one right answer.
        """
        asked = self.all_questions(index, self.canvas(index), 1, 4)
        return [questions[0] for questions in asked.values() if questions]

    def all_questions(self, index: int, canvas: Canvas, stream: int, long_stream: int) -> dict[str, list[Question]]:
        """Every question with one right answer, in random order and wording.

        The keys are "yes" and "no" (both of kind exist), and the other kinds. Those with answers of several words are
        drawn from `long_stream`, so that a question is the same whatever else is asked.
        """
        names, labels = self.items.names, canvas.labels.tolist()
        near = [_quadrants_near(x, y) for x, y in canvas.centres]
        touching = [[k for k, touched in enumerate(near) if q in touched] for q in range(len(QUADRANTS))]
        # Quadrants that hold one item and are near no other.
        alone = {q: ks[0] for q, ks in enumerate(touching) if len(ks) == 1 and len(near[ks[0]]) == 1}
        once = [k for k, label in enumerate(labels) if labels.count(label) == 1]

        rng = self.rng(index, stream)

        def ask(kind: str, word: str, answer: str) -> Question:
            return Question(kind, TEMPLATES[kind][int(rng.integers(2))].format(word), answer, index)

        present = sorted(set(labels))
        absent = sorted(set(range(len(names))) - set(present))
        asked = {
            "yes": [ask("exist", _with_article(names[label]), "yes") for label in rng.permutation(present)],
            "no": [ask("exist", _with_article(names[label]), "no") for label in rng.permutation(absent)],
            "quadrant": [],
            "where": [],
            "count": [ask("count", "", NUMBERS[len(labels)])],
            "box": [],
            "read": [],
        }
        for q in rng.permutation(len(QUADRANTS)):
            if q in alone:
                asked["quadrant"].append(ask("quadrant", QUADRANTS[q], names[labels[alone[q]]]))
        for k in rng.permutation(len(labels)):
            if k in once and len(near[k]) == 1:
                asked["where"].append(ask("where", names[labels[k]], QUADRANTS[near[k][0]]))
        rng = self.rng(index, long_stream)
        for k in rng.permutation(len(labels)):
            if k in once and canvas.ink[k].max() >= SHOWS:
                asked["box"].append(ask("box", names[labels[k]], " ".join(map(str, canvas.patch_boxes[k]))))
        for side in rng.permutation(list(SIDES)).tolist():
            if set(SIDES[side]) <= set(alone):
                asked["read"].append(ask("read", side, " ".join(names[labels[alone[q]]] for q in SIDES[side])))
        return {key: [question for question in each if question.kind in self.kinds] for key, each in asked.items()}

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """A photo crop of random size and place, (128, 128, 3) float32, its contrast reduced by a random factor."""
        name, (x0, y0, x1, y1) = self.regions[int(rng.integers(len(self.regions)))]
        longest = min(x1 - x0, y1 - y0)
        side = rng.uniform(min(64, longest), min(192, longest))
        left, top = rng.uniform(x0, x1 - side), rng.uniform(y0, y1 - side)
        # Whole pixels: a fractional box would let the filter reach into a neighbouring split's region.
        box = (int(np.ceil(left)), int(np.ceil(top)), int(left + side), int(top + side))
        crop = photo(name).crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pixels = np.asarray(crop, np.float32)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        mean = pixels.mean(axis=(0, 1))
        return mean + (pixels - mean) * np.float32(rng.uniform(0.35, 0.8))


def vocabulary(names: Sequence[str]) -> list[str]:
    """Every word that a question or an answer can hold, without repeats: those of one-word answers first, each sorted.

    A model that was trained without boxes and readings therefore has the same numbers for the words it knows.
    """
    short = {"yes", "no", "a", "an", *QUADRANTS, *names, *NUMBERS[1 : MAX_ITEMS + 1]}
    short |= {word for kind in ONE_WORD for word in _template_words(kind)}
    long = {*SIDES, *_template_words("box"), *_template_words("read")} - short
    return [*sorted(short), *sorted(long), *map(str, range(GRID))]


def kinds_known(words: Container[str]) -> tuple[str, ...]:
    """The kinds of question that a model can be asked and can answer, by the words that it knows."""
    answers = {"box": [str(number) for number in range(GRID)], "read": list(SIDES)}
    return tuple(k for k in KINDS if all(w in words for w in (*_template_words(k), *answers.get(k, ()))))


def _template_words(kind: str) -> list[str]:
    return [word for template in TEMPLATES[kind] for word in template.replace("{}", "").split()]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _place(rng: np.random.Generator, count: int) -> np.ndarray:
    """Boxes (count, 4) int64 at any pixel, no two overlapping.

    Items of one canvas are of about one size, so the area they cover tells less about their number.
    """
    while True:
        base = rng.uniform(20, 32)
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(60 * count):
            width, height = (int(np.clip(round(base * rng.uniform(0.9, 1.1)), 20, 32)) for _ in range(2))
            x0, y0 = int(rng.integers(0, SIZE - width + 1)), int(rng.integers(0, SIZE - height + 1))
            x1, y1 = x0 + width, y0 + height
            if all(x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0 for a0, b0, a1, b1 in boxes):
                boxes.append((x0, y0, x1, y1))
                if len(boxes) == count:
                    return np.array(boxes, np.int64)


def _stretch(item: np.ndarray, width: int, height: int, degrees: float) -> np.ndarray:
    """An item picture as an opacity map, (height, width) in 0..1."""
    picture = Image.fromarray(item).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture.rotate(degrees, Image.Resampling.BILINEAR), np.float32) / 255


def _contrasting_colour(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A colour (3,) at least 95 grey levels lighter or darker than the pixels below, either way where both fit."""
    mean = float(under.mean())
    signs = [sign for sign in (-1, 1) if 0 <= mean + sign * 95 <= 255]
    sign = signs[int(rng.integers(len(signs)))]
    room = 255 - mean if sign > 0 else mean
    value = mean + sign * rng.uniform(95, max(95, min(room, 200)))
    return np.clip(value + rng.uniform(-25, 25, size=3), 0, 255).astype(np.float32)


def _quadrants_near(x: float, y: float) -> list[int]:
    """Quadrants that a point lies in or within the margin of: one number when the point is clear of both midlines."""
    half, margin = SIZE / 2, MIDLINE_MARGIN
    rows = [r for r, inside in ((0, y < half + margin), (1, y > half - margin)) if inside]
    columns = [c for c, inside in ((0, x < half + margin), (1, x > half - margin)) if inside]
    return [2 * r + c for r in rows for c in columns]
