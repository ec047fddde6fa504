"""`python -m eval.segmentation`: mIoU against a loop over pixels, the layouts, corruptions, going on, faults."""

import json
from functools import partial

import commands
import imagecorruptions
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from eval.robustness.bench import Setup
from eval.robustness.corruptions import picture_seed
from eval.segmentation import __main__ as command
from eval.segmentation import digits, masks
from eval.segmentation.layouts import CITYSCAPES, Pair, find_pairs

RANDOM = np.random.default_rng(0)
CLASSES, COUNT, HEIGHT, WIDTH = 5, 4, 40, 48
WAVES = np.cumsum(RANDOM.normal(0, 12, (COUNT, HEIGHT, WIDTH, 3)), axis=1)
IMAGES = np.clip(WAVES + RANDOM.integers(60, 200, (COUNT, 1, 1, 3)), 0, 255).astype(np.uint8)
MASKS = RANDOM.integers(0, CLASSES - 1, (COUNT, HEIGHT // 8, WIDTH // 8)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
MASKS[:, :3] = 255


def slow_ious(predicted, true, num_classes):
    """IoU of each class with a loop over classes, pixels of value 255 apart."""
    predicted, true = np.concatenate([p.ravel() for p in predicted]), np.concatenate([t.ravel() for t in true])
    ious = []
    for number in range(num_classes):
        here = [(p == number, t == number) for p, t in zip(predicted, true, strict=True) if t != 255]
        union = sum(p or t for p, t in here)
        ious.append(sum(p and t for p, t in here) / union if union else None)
    return ious


def save_model(folder, num_labels=CLASSES, seed=0, **settings):
    config = SegformerConfig(
        num_labels=num_labels,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=8,
    )
    model = tiny.sharpen(SegformerForSemanticSegmentation(config), seed)
    model.save_pretrained(folder)
    processor = SegformerImageProcessor(size={"height": 32, "width": 32}, **settings)
    processor.save_pretrained(folder)
    return model, processor


def predict(model, processor, pixels, **settings):
    scores = model(processor(images=pixels, return_tensors="pt", **settings)["pixel_values"]).logits
    return interpolate(scores, pixels.shape[:2], mode="bilinear", align_corners=False)[0].argmax(0).numpy()


def write_pairs(root, images=IMAGES, true=MASKS):
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number, (image, mask) in enumerate(zip(images, true, strict=True)):
        Image.fromarray(image).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of pairs and a model in m/; the model and its processor."""
    root = tmp_path_factory.mktemp("made")
    write_pairs(root)
    return root, *save_model(root / "m")


def mean_iou(ious):
    return np.mean([each for each in ious if each is not None])


call, refused = partial(commands.call, command), partial(commands.refused, command)


def cells(out, name="m"):
    rows = json.loads((out / "results.json").read_text())["arms"]
    return next(row["cells"] for row in rows if row["arm"] == name)


FEW = ["--corruptions", "snow,glass_blur", "--severities", "2,5"]


def test_counts_and_overlaps_are_those_of_a_loop():
    draw = np.random.default_rng(1)
    for _ in range(5):
        predicted, true = draw.integers(0, 4, (2, 3, 6, 7)), draw.integers(0, 3, (2, 3, 6, 7)).astype(np.uint8)[0]
        predicted, true = predicted[0], true.copy()
        true[draw.uniform(size=true.shape) < 0.2] = 255
        overlap = masks.Overlap(5, Setup())
        for number in range(3):
            answer = torch.from_numpy(predicted[number])
            pair = Pair(None, None, group="" if number else "fog")
            overlap.update(lambda pixels, size, answer=answer: answer, (None, true[number], pair))
        found, expected = overlap.compute(), slow_ious(predicted, true, 5)
        assert found["iou"] == pytest.approx(expected) and expected[4] is None and found["tested"] == 3
        assert found["miou"] == pytest.approx(mean_iou(expected))
        fog = slow_ious(predicted[:1], true[:1], 5)
        assert found["groups"] == {"fog": pytest.approx(mean_iou(fog))}
    empty = masks.Overlap(5, Setup())
    empty.update(lambda *a: torch.zeros(2, 2).long(), (None, np.full((2, 2), 255, np.uint8), Pair(None, None)))
    with pytest.raises(ValueError, match="every pixel of every mask is 255"):
        empty.compute()


def test_clean_and_corrupted_miou_are_those_of_one_picture_at_a_time(made, tmp_path):
    root, model, processor = made
    call("--data", root, "--model", root / "m", *FEW, "--out", tmp_path)
    printed, found = (tmp_path / "results.md").read_text(), cells(tmp_path)
    predicted = [predict(model, processor, image) for image in IMAGES]
    expected = slow_ious(predicted, MASKS, CLASSES)
    assert found["clean"]["iou"] == pytest.approx(expected)
    assert found["clean"]["miou"] == pytest.approx(mean_iou(expected)) and len(set(np.concatenate(predicted).flat)) > 2
    values = {}
    for name in ("snow", "glass_blur"):
        for severity in (2, 5):
            predicted = []
            for index, image in enumerate(IMAGES):
                seed = picture_seed(0, index, name, severity)
                np.random.seed(seed)
                extra = {"seed": seed} if name == "glass_blur" else {}
                corrupted = imagecorruptions.corrupt(image, severity, name, **extra)
                predicted.append(predict(model, processor, corrupted))
            values[name, severity] = mean_iou(slow_ious(predicted, MASKS, CLASSES))
            assert found[f"corruption/{name}/{severity}"]["miou"] == pytest.approx(values[name, severity])
    row = json.loads((tmp_path / "results.json").read_text())["arms"][0]
    assert row["corrupted"] == pytest.approx(np.mean(list(values.values())))
    assert row["by_severity"]["5"]["mean"] == pytest.approx(np.mean([values["snow", 5], values["glass_blur", 5]]))
    assert f"{100 * row['clean']:.1f}" in printed and "4 pictures" in printed and len(set(values.values())) == 4


def test_a_second_call_computes_nothing_and_workers_change_nothing(made, tmp_path, monkeypatch):
    root, *_ = made
    save_model(tmp_path / "other", seed=1)
    both = ["--data", root, "--model", root / "m", "--model", f"b={tmp_path}/other", *FEW]
    call(*both, "--out", tmp_path / "one")
    call(*both, "--workers", "2", "--out", tmp_path / "two")
    for name in ("m", "b"):
        assert cells(tmp_path / "one", name) == cells(tmp_path / "two", name)
    assert cells(tmp_path / "one")["clean"]["iou"] != cells(tmp_path / "one", "b")["clean"]["iou"]
    monkeypatch.setattr(masks, "corrupt", lambda *a: pytest.fail("a picture was corrupted"))
    monkeypatch.setattr(masks.Network, "forward", lambda *a: pytest.fail("a model was asked"))
    before = (tmp_path / "one/results.md").read_text()
    call(*both, "--out", tmp_path / "one")
    assert (tmp_path / "one/results.md").read_text() == before


def test_without_resizing_the_model_sees_the_picture_s_own_size(made, tmp_path):
    root, model, processor = made
    call("--data", root, "--model", root / "m", "--no-resize", "--corruptions", "none", "--out", tmp_path)
    predicted = [predict(model, processor, image, do_resize=False) for image in IMAGES]
    assert cells(tmp_path)["clean"]["iou"] == pytest.approx(slow_ious(predicted, MASKS, CLASSES))


def test_zero_is_no_class_where_the_processor_or_the_option_says_so(made, tmp_path):
    root, *_ = made
    model, processor = save_model(tmp_path / "ade", do_reduce_labels=True)
    reduced = np.where((MASKS == 0) | (MASKS == 255), 255, MASKS - 1)
    expected = slow_ious([predict(model, processor, image) for image in IMAGES], reduced, CLASSES)
    quick = ["--data", root, "--corruptions", "none"]
    call(*quick, "--model", tmp_path / "ade", "--out", tmp_path / "ade-out")
    call(*quick, "--model", root / "m", "--reduce-labels", "--out", tmp_path / "out")
    assert cells(tmp_path / "ade-out", "ade")["clean"]["iou"] == pytest.approx(expected)
    assert cells(tmp_path / "out", "m")["clean"]["iou"] == pytest.approx(expected)  # the same weights
    printed = refused(*quick, "--model", tmp_path / "ade", "--model", root / "m", "--out", tmp_path / "no")
    assert "differ in do_reduce_labels" in printed


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_cityscapes_ids_become_the_nineteen_classes(tmp_path):
    ids = np.random.default_rng(2).integers(0, 34, (2, HEIGHT, WIDTH)).astype(np.uint8)
    by_id = {number: train for train, number in enumerate(CITYSCAPES.values())}
    true = np.vectorize(lambda number: by_id.get(number, 255))(ids)
    for number in range(2):
        city, base = "ulm" if number else "bonn", f"x_{number:06}"
        save(tmp_path / "leftImg8bit" / "val" / city / f"{base}_leftImg8bit.png", IMAGES[number])
        end = "labelTrainIds" if number else "labelIds"
        values = true[number].astype(np.uint8) if number else ids[number]
        save(tmp_path / "gtFine" / "val" / city / f"{base}_gtFine_{end}.png", values)
        save(tmp_path / "gtFine" / "val" / city / f"{base}_gtFine_instanceIds.png", ids[0])
    save(tmp_path / "leftImg8bit" / "train" / "ulm" / "y_leftImg8bit.png", IMAGES[0])
    pairs = find_pairs(tmp_path)
    assert pairs.layout == "cityscapes" and len(pairs.classes) == 19
    assert [np.array_equal(pair.read_mask(), mask) for pair, mask in zip(pairs.pairs, true, strict=True)] == [
        True,
        True,
    ]
    with pytest.raises(FileNotFoundError, match=r"y_leftImg8bit\.png has no mask"):
        find_pairs(tmp_path, split="train")
    model, processor = save_model(tmp_path / "m", 19)
    call("--data", tmp_path, "--model", tmp_path / "m", "--corruptions", "none", "--out", tmp_path / "out")
    printed = (tmp_path / "out/results.md").read_text()
    expected = slow_ious([predict(model, processor, image) for image in IMAGES[:2]], true, 19)
    assert cells(tmp_path / "out")["clean"]["iou"] == pytest.approx(expected) and "traffic light" in printed
    save_model(tmp_path / "five")
    printed = refused("--data", tmp_path, "--model", tmp_path / "five", "--out", tmp_path / "out")
    assert "five has 5 classes; cityscapes is tested with 19" in printed


def test_the_cityscapes_classes_are_the_published_ones():
    published = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert list(CITYSCAPES.values()) == published and list(CITYSCAPES)[:2] == ["road", "sidewalk"]


def test_acdc_is_also_summarised_by_condition(tmp_path):
    true = {}
    for number, condition in enumerate(("fog", "night", "night")):
        name = f"rgb_anon/{condition}/val/GP01/GP01_{number}_rgb_anon.png"
        save(tmp_path / name, IMAGES[number])
        true[number] = np.random.default_rng(number).integers(0, 19, (HEIGHT, WIDTH)).astype(np.uint8)
        save(tmp_path / f"gt/{condition}/val/GP01/GP01_{number}_gt_labelTrainIds.png", true[number])
    model, processor = save_model(tmp_path / "m", 19)
    call("--data", tmp_path, "--model", tmp_path / "m", "--corruptions", "none", "--out", tmp_path / "out")
    printed = (tmp_path / "out/results.md").read_text()
    predicted = [predict(model, processor, image) for image in IMAGES[:3]]
    found = cells(tmp_path / "out")["clean"]
    assert found["miou"] == pytest.approx(mean_iou(slow_ious(predicted, list(true.values()), 19)))
    assert found["groups"]["fog"] == pytest.approx(mean_iou(slow_ious(predicted[:1], [true[0]], 19)))
    assert found["groups"]["night"] == pytest.approx(mean_iou(slow_ious(predicted[1:], [true[1], true[2]], 19)))
    assert "night" in printed and find_pairs(tmp_path).layout == "acdc"


def test_pictures_without_masks_and_unknown_layouts_are_named(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "masks" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files .* no partner of the same name, such as images/2"):
        find_pairs(tmp_path)
    save(tmp_path / "images" / "1.jpg", IMAGES[0])
    with pytest.raises(ValueError, match="differ in their endings alone"):
        find_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="none of the folders leftImg8bit, rgb_anon, images"):
        find_pairs(tmp_path / "images")
    with pytest.raises(ValueError, match="no layout 'voc'; there are auto, folder, cityscapes, acdc"):
        find_pairs(tmp_path, "voc")


def test_unreadable_files_stop_the_bench_by_name(made, tmp_path):
    root, *_ = made
    write_pairs(tmp_path)
    (tmp_path / "masks" / "0.png").write_bytes(b"no picture")
    printed = refused("--data", tmp_path, "--model", root / "m", "--corruptions", "none", "--out", tmp_path / "out")
    assert "masks/0.png can't be decoded" in printed


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASKS[0][:, :-2], "46 x 40 pixels, its picture"),
        (np.stack([MASKS[0]] * 3, axis=2), "a mask has one channel of bytes with class numbers, this one is RGB"),
        (np.full_like(MASKS[0], CLASSES), "0.png: a mask has the value 5, the model 5 classes"),
    ],
)
def test_masks_that_don_t_fit_are_explained(made, tmp_path, mask, message):
    root, *_ = made
    write_pairs(tmp_path, IMAGES[:1], [mask])
    assert message in refused("--data", tmp_path, "--model", root / "m", "--corruptions", "none", "--out", tmp_path)


def test_models_need_names_weights_and_processors(made, tmp_path):
    root, *_ = made
    assert "every name once" in refused("--data", root, "--model", root / "m", "--model", root / "m")
    printed = refused("--data", root, "--model", tmp_path / "gone", "--out", tmp_path)
    assert "can't be read by transformers'" in printed


def test_scenes_are_digits_before_noise_and_the_command_runs_on_them(tmp_path):
    images, true = digits.scenes(5, "test")
    assert images.shape == (5, 64, 64, 3) and set(np.unique(true)) <= set(range(11)) and true.any((1, 2)).all()
    for image, mask in zip(images, true, strict=True):
        for label in np.unique(mask)[1:]:  # a digit has one colour, or two where two digits are alike
            assert len(np.unique(image[mask == label], axis=0)) <= 3
    assert np.array_equal(digits.scenes(5, "test")[0], images)
    call("--quick", "--steps", "2", "--limit", "2", "--corruptions", "none", "--out", tmp_path)
    assert list(json.loads((tmp_path / "results.json").read_text())["arms"][0]["iou"])[:2] == ["background", "0"]
