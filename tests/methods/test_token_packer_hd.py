"""TokenPacker-HD: grids, tiles and token order beside vectors of the released code, and as a tiny LLaVA reads them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import LLAVA, picture

import vltok
from vltok.methods.condensing.token_packer.tiles import (
    MAX_TILES,
    candidate_grids,
    choose_grid,
    expand_placeholders,
    picture_ids,
    slice_image,
    tile_layout,
)
from vltok.processing import TokenPackerHDProcessor

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "tokenpacker_hd.json").read_text())
SLICES = load_file(DATA / "tokenpacker_hd_slicing.safetensors")
ASSEMBLY = load_file(DATA / "tokenpacker_hd_assembly.safetensors")
grids = st.sampled_from(candidate_grids(25))
sides = st.integers(1, 300)
budgets = st.sampled_from(MAX_TILES)


def assert_as_exact(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# Grids


@pytest.mark.parametrize("max_tiles", MAX_TILES)
def test_candidates_are_the_released_ones_in_order(max_tiles):
    assert candidate_grids(max_tiles) == [tuple(grid) for grid in GOLDEN["candidates"][str(max_tiles)]]


@pytest.mark.parametrize(("column", "max_tiles"), list(enumerate(MAX_TILES)))
def test_grids_are_those_of_the_released_code_for_all_sizes(column, max_tiles):
    table = GOLDEN["grids"]
    assert len(table) == 200
    chosen = [[*row[:2], choose_grid(row[0], row[1], max_tiles)] for row in table]
    assert chosen == [[*row[:2], tuple(row[2 + column])] for row in table]


@pytest.mark.parametrize(("tile", "max_tiles", "height", "width", "grid"), GOLDEN["grids_of_other_tiles"])
def test_grids_are_those_of_the_released_code_for_other_tiles(tile, max_tiles, height, width, grid):
    assert choose_grid(height, width, max_tiles, tile) == tuple(grid)


def plain_score(height: int, width: int, rows: int, columns: int, tile: int) -> float:
    """The score in Python's float64, written out; sizes too near to half a pixel for float32 are left out."""
    box_height, box_width = rows * tile, columns * tile
    scale = min(box_height / height, box_width / width)
    assume(all(abs(side * scale % 1 - 0.5) > 1e-3 for side in (height, width)))
    filled = round(height * scale) * round(width * scale) / (box_height * box_width)
    overlap = min(box_height, 1.4 * height) * min(box_width, 1.4 * width)
    return filled + 0.1 * overlap / (box_height * box_width + 1.96 * height * width - overlap + 1e-5)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), budgets, st.sampled_from([56, 224, 336]))
def test_no_grid_scores_better_than_the_chosen_one(height, width, max_tiles, tile):
    scores = {grid: plain_score(height, width, *grid, tile) for grid in candidate_grids(max_tiles)}
    assert scores[choose_grid(height, width, max_tiles, tile)] > max(scores.values()) - 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((336, 336, 10), "max_tiles must be one of 9, 16, 25, got 10"),
        ((0, 336, 9), "height, width and tile must be at least 1, got 0, 336 and 336"),
        ((336, 336, 9, 0), "got 336, 336 and 0"),
    ],
)
def test_impossible_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_grid(*arguments)


# Tiles


@pytest.mark.parametrize("case", range(len(GOLDEN["slicing"])))
def test_tiles_are_those_of_the_released_code(case):
    max_tiles, tile, height, width, grid = GOLDEN["slicing"][case]
    image = SLICES[f"c{case}.in.image"]
    assert image.shape == (3, height, width)
    assert choose_grid(height, width, max_tiles, tile) == tuple(grid)
    assert_as_exact(slice_image(image, tuple(grid), tile), SLICES[f"c{case}.out.tiles"])


@pytest.mark.parametrize("case", range(len(GOLDEN["slicing_336"])))
def test_tiles_of_full_size_are_those_of_the_released_code(case):
    max_tiles, height, width, grid, sums, absolute_sums = GOLDEN["slicing_336"][case]
    state = np.random.RandomState(zlib.crc32(f"{GOLDEN['slicing_seed']}:input:real{case}".encode()))
    image = torch.from_numpy(state.standard_normal((1, 3, height, width)).astype(np.float32))[0]
    tiles = slice_image(image, choose_grid(height, width, max_tiles))
    assert choose_grid(height, width, max_tiles) == tuple(grid)
    assert_as_exact(tiles[..., ::24, ::24], SLICES[f"r{case}.out.tiles_strided"])
    expected = torch.tensor([sums, absolute_sums], dtype=torch.float64)
    actual = torch.stack([tiles.double().sum((1, 2, 3)), tiles.double().abs().sum((1, 2, 3))])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * max(absolute_sums))


def joined(tiles: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Lay tiles side by side again, (3, rows * tile, columns * tile)."""
    rows = tiles[: grid[0] * grid[1]].split(grid[1])
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


@settings(max_examples=60, deadline=None)
@given(grids, sides, sides, st.sampled_from(["released", "sound"]))
def test_each_pixel_of_the_resized_picture_is_in_one_tile(grid, height, width, thumbnail):
    tile = 14
    image = torch.rand(3, height, width) + 1  # nowhere 0, so that padding shows
    tiles = slice_image(image, grid, tile, thumbnail)
    assert tiles.shape == (grid[0] * grid[1] + (grid != (1, 1)), 3, tile, tile)
    canvas = joined(tiles, grid)
    filled = canvas[0] > 0
    rows, columns = int(filled.any(1).sum()), int(filled.any(0).sum())
    assert filled[:rows, :columns].all()
    assert filled.sum() == rows * columns
    assert rows == canvas.shape[1] or columns == canvas.shape[2], "the picture fills one side of the grid"
    expected = torch.nn.functional.interpolate(image[None], size=(rows, columns), mode="bilinear")[0]
    torch.testing.assert_close(canvas[:, :rows, :columns], expected, rtol=1e-6, atol=0)
    longer = height * grid[1] > width * grid[0]  # its height fills the grid: the width follows, to the next pixel
    follows = width / height * grid[0] * tile if longer else height / width * grid[1] * tile
    assert abs((columns if longer else rows) - max(1, follows)) <= 0.5 + 1e-6


@settings(max_examples=40, deadline=None)
@given(grids.filter(lambda grid: grid != (1, 1)), sides, sides)
def test_the_sound_thumbnail_is_the_picture_as_a_single_tile(grid, height, width):
    image = torch.randn(3, height, width)
    tiles = slice_image(image, grid, 14, "sound")
    assert torch.equal(tiles[-1], slice_image(image, (1, 1), 14)[0])
    assert torch.equal(tiles[:-1], slice_image(image, grid, 14)[:-1])


def test_the_released_thumbnail_squeezes_the_padding_in():
    image = torch.ones(3, 14, 28)  # fills the upper half of 2 x 2 tiles
    released, sound = (slice_image(image, (2, 2), 14, kind)[-1, 0] for kind in ("released", "sound"))
    assert torch.equal(sound, torch.cat([torch.ones(7, 14), torch.zeros(7, 14)]))
    assert released[:3].eq(1).all()
    assert released[4:].eq(0).all(), "the half that the picture fills is scaled to half of a half"


def test_both_thumbnails_are_equal_without_padding():
    image = torch.randn(3, 28, 42)
    released, sound = (slice_image(image, (2, 3), 14, kind) for kind in ("released", "sound"))
    assert torch.equal(released, sound)


@pytest.mark.parametrize("size", [(1, 900), (900, 1)])
def test_a_thread_of_a_picture_keeps_a_pixel(size):
    tiles = slice_image(torch.ones(3, *size), choose_grid(*size, 9, 14), 14, "sound")
    assert len(tiles) == 10
    assert tiles.flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 8, 8, dtype=torch.uint8), (1, 1)), TypeError, "float dtype, got torch.uint8"),
        ((torch.zeros(1, 8, 8), (1, 1)), ValueError, r"must be \(3, H, W\), got \(1, 8, 8\)"),
        ((torch.zeros(3, 0, 8), (1, 1)), ValueError, r"got \(3, 0, 8\)"),
        ((torch.zeros(3, 8, 8), (0, 1)), ValueError, r"at least 1 each, got \(0, 1\)"),
        ((torch.zeros(3, 8, 8), (1, 1), 0), ValueError, "tile must be at least 1, got 0"),
        (
            (torch.zeros(3, 8, 8), (1, 1), 14, "best"),
            ValueError,
            "thumbnail must be one of 'released', 'sound', got 'best'",
        ),
    ],
)
def test_what_is_no_picture_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        slice_image(*arguments)


# Token order


@pytest.mark.parametrize("case", range(len(GOLDEN["assembly"])))
def test_layouts_are_those_of_the_released_code(case):
    names = GOLDEN["assembly"][case]
    for grid, layout in zip(names["grids"], names["layouts"], strict=True):
        expected = [name.partition("(")[0].replace("\\n", "\n") for name in layout]
        assert tile_layout(tuple(grid)) == expected
        tiles = [name for name in layout if name.startswith("tile")]
        assert tiles == [f"tile({row},{column})" for row in range(grid[0]) for column in range(grid[1])]


@pytest.mark.parametrize("case", range(len(GOLDEN["assembly"])))
def test_embeddings_and_labels_are_those_of_the_released_code(case):
    vectors = {
        name.removeprefix(f"c{case}."): value for name, value in ASSEMBLY.items() if name.startswith(f"c{case}.")
    }
    ids = GOLDEN["assembly_ids"]
    placeholder, separators = ids["image_token_index"], (ids["comma_id"], ids["newline_id"])
    features = iter(vectors["in.features"])
    for index, grid in enumerate(GOLDEN["assembly"][case]["grids"]):
        picture = picture_ids(tuple(grid), ids["tokens_per_tile"], placeholder, separators)
        prompt = vectors["in.input_ids"][index]
        expanded, source = (torch.tensor(part) for part in expand_placeholders(prompt.tolist(), placeholder, [picture]))
        embeddings = vectors["in.embed"][expanded.clamp_min(0)]
        count = int((expanded == placeholder).sum()) // ids["tokens_per_tile"]
        embeddings[expanded == placeholder] = torch.cat([next(features) for _ in range(count)])
        is_picture = prompt[source] == placeholder
        labels = vectors["in.labels"][index][source].masked_fill(is_picture, ids["ignore_index"])
        kept = vectors["in.attention_mask"][index][source].bool()
        length = int(kept.sum())
        assert vectors["out.attention_mask"][index].bool().sum() == length
        assert torch.equal(embeddings[kept], vectors["out.inputs_embeds"][index, :length])
        assert torch.equal(labels[kept], vectors["out.labels"][index, :length])
    assert next(features, None) is None, "all features found their place"


@given(grids, st.integers(1, 9))
def test_a_picture_has_as_many_ids_as_the_formula_says(grid, tokens_per_tile):
    rows, columns = grid
    ids = picture_ids(grid, tokens_per_tile, 4, (5, 6))
    several = rows * columns > 1
    expected = rows * columns * tokens_per_tile + rows * (columns - 1) + rows + several * (tokens_per_tile + 1)
    assert len(ids) == expected
    assert ids.count(4) == (rows * columns + several) * tokens_per_tile
    assert ids.count(5) == rows * (columns - 1)
    assert ids.count(6) == rows + several
    assert ids[-1] == 6


@given(st.lists(st.integers(0, 3)), st.integers(0, 5))
def test_expansion_only_touches_placeholders(ids, start):
    pictures = [[0, 10 + number, 0][: 1 + (start + number) % 3] for number in range(ids.count(0))]
    expanded, source = expand_placeholders(ids, 0, pictures)
    assert source == sorted(source)
    assert [token for token, place in zip(expanded, source, strict=True) if ids[place]] == [x for x in ids if x]
    places = [place for place, token in enumerate(ids) if token == 0]
    for place, ids_of_it in zip(places, pictures, strict=True):
        assert [token for token, origin in zip(expanded, source, strict=True) if origin == place] == ids_of_it


def test_pictures_and_placeholders_must_match():
    with pytest.raises(ValueError, match="2 placeholders, but 1 images"):
        expand_placeholders([0, 1, 0], 0, [[5]])


# With a processor and a model

WIDE, TALL, SMALL = (150, 50), (50, 105), (50, 50)  # (width, height): 1 x 3 tiles, 2 x 1, and one


def hd_processor(**options):
    processor = TokenPackerHDProcessor(LLAVA.processor(), **options)
    processor.tokenizer.add_tokens([",", "\n"])
    return processor


@pytest.mark.parametrize("thumbnail", ["released", "sound"])
@pytest.mark.parametrize("max_tiles", [9, 25])
def test_tiles_are_cut_from_the_normalised_picture_at_its_own_size(thumbnail, max_tiles):
    processor = hd_processor(max_tiles=max_tiles, thumbnail=thumbnail)
    image_mean, image_std = processor.image_processor.image_mean, processor.image_processor.image_std
    pictures = [picture(0, (190, 130)), picture(1, TALL)]
    inputs = processor(pictures, "<image> <image>", return_tensors="pt")
    tiles = []
    for image in pictures:
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (image_mean, image_std))
        grid = choose_grid(image.height, image.width, max_tiles, 56)
        tiles.append(slice_image((pixels - mean) / std, grid, 56, thumbnail))
    torch.testing.assert_close(inputs["pixel_values"], torch.cat(tiles), rtol=0, atol=2e-6)


@pytest.fixture
def packed():
    """A tiny LLaVA with a sharp TokenPacker on, and the processor for it."""
    model, processor = LLAVA.model(), hd_processor()
    handle = vltok.apply(model, vltok.TokenPacker(scale_factor=2), processor=processor.processor)
    for module in handle.added_modules:
        tiny.sharpen(module)
    return model, processor, handle


PROMPTS = ["w1 w2 <image> w3 w4 w5 <image> w6", "<image> w7 w8", "w9 w10 w11", "w12 <image> w13"]
SIZES = [[WIDE, SMALL], [SMALL], [], [TALL]]


def pictures_of(sizes, start: int = 0):
    return [picture(start + seed, size) for seed, size in enumerate(sizes)]


def batch_of(processor, side: str):
    """All prompts in a padded batch, and each alone."""
    pictures = [pictures_of(sizes, 10 * row) for row, sizes in enumerate(SIZES)]
    options = {"return_tensors": "pt", "return_mm_token_type_ids": True}
    batch = processor(pictures, PROMPTS, padding=True, padding_side=side, **options)
    alone = [processor(row or None, prompt, **options) for row, prompt in zip(pictures, PROMPTS, strict=True)]
    types = [inputs.pop("mm_token_type_ids").bool() for inputs in (batch, *alone)]
    return batch, alone, types[0], types[1:]


@pytest.mark.parametrize("given", ["wrapped", "wrapper"])
def test_a_handle_that_comes_or_goes_changes_the_tokens_of_a_tile(given):
    processor = hd_processor()
    sizes = [processor.patch_size, processor.processor.patch_size]
    target = processor if given == "wrapper" else processor.processor
    handle = vltok.apply(LLAVA.model(), vltok.TokenPacker(scale_factor=2), processor=target)
    assert processor(picture(0, WIDE), "<image>")["input_ids"] == [picture_ids((1, 3), 4, 4, (45, 46))]
    handle.remove()
    assert processor(picture(0, WIDE), "<image>")["input_ids"] == [picture_ids((1, 3), 16, 4, (45, 46))]
    assert [processor.patch_size, processor.processor.patch_size] == sizes


@torch.no_grad()
def test_the_model_reads_each_tile_as_one_image(packed):
    model, processor, _ = packed
    inputs = processor(pictures_of([WIDE, SMALL]), PROMPTS[0], return_tensors="pt")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    tiles = [
        model.model.get_image_features(pixel_values=tile[None]).pooler_output[0] for tile in inputs["pixel_values"]
    ]
    assert [len(tokens) for tokens in tiles] == [4] * 5
    embeddings[inputs["input_ids"] == 4] = torch.cat(tiles)
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, model(inputs_embeds=embeddings).logits, rtol=1e-4, atol=1e-5)
    swapped = inputs["pixel_values"][[1, 0, 2, 3, 4]]
    assert (model(**inputs | {"pixel_values": swapped}).logits - logits).abs().max() > 0.1, "order matters"


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_is_the_row_alone(packed, side):
    model, processor, _ = packed
    batch, alone, _, _ = batch_of(processor, side)
    logits = model(**batch).logits
    for row, inputs in enumerate(alone):
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][kept], inputs["input_ids"][0])
        torch.testing.assert_close(logits[row][kept], model(**inputs).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_of_a_padded_batch_is_that_of_each_row(packed):
    model, processor, _ = packed
    batch, alone, _, _ = batch_of(processor, "left")
    length = batch["input_ids"].shape[1]
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(**batch, **options)[:, length:]
    for row, inputs in enumerate(alone):
        single = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert together[row, : len(single)].tolist() == single.tolist()
    assert len({tuple(row) for row in together.tolist()}) == len(alone), "the prompts are answered differently"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_over_the_words_alone(packed, side):
    model, processor, handle = packed
    batch, alone, is_picture, is_picture_alone = batch_of(processor, side)
    is_first = batch["attention_mask"].cumsum(1) <= 1  # nothing comes before it; padding before it, too
    labels = batch["input_ids"].masked_fill(is_picture | is_first | (batch["attention_mask"] == 0), -100)
    texts = ["w2 w3 w4 w5 w6", "w7 w8", "w10 w11", "w13"]
    assert [processor.decode(row[row >= 0]) for row in labels] == texts
    loss = model(**batch, labels=labels).loss
    total, count = 0.0, 0
    for inputs, of_picture in zip(alone, is_picture_alone, strict=True):
        targets = inputs["input_ids"].masked_fill(of_picture, -100)[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        count += int((targets >= 0).sum())
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-5)
    loss.backward()
    gradients = [parameter.grad for module in handle.added_modules for parameter in module.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
