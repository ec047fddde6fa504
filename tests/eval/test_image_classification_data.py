"""Pictures of image classification: where they are read from, how they are prepared, in which order they come."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from eval.image_classification.data import UnreadablePictureError, count_classes, open_pictures
from eval.image_classification.models import ModelSpec
from eval.image_classification.preprocess import Task, crop_flip, for_model, parse_augment

SPEC = ModelSpec("vit_tiny_patch16_224", dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2))
PREPROCESS = for_model(SPEC.create(0, 3))
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (12, 16, 16, 3), np.uint8)
LABELS = np.arange(12) % 3


def encoded(image, kind):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def jpeg_arrays(images, prefix=""):
    parts = [encoded(image, "JPEG") for image in images]
    offsets = np.cumsum([0, *map(len, parts)])
    return {f"{prefix}jpeg": np.frombuffer(b"".join(parts), np.uint8), f"{prefix}offsets": offsets}


def write_folder(root, images=IMAGES, labels=LABELS, names="abc"):
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = root / names[label] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image, "PNG"))


def pixels(pictures):
    return [np.asarray(pictures.decode(index)) for index in range(len(pictures))]


def test_arrays_are_read_alone_or_with_prefixes_for_both_splits(tmp_path):
    np.savez(tmp_path / "one.npz", images=IMAGES[8:], labels=LABELS[8:])
    both = dict(train_images=IMAGES[:8], train_labels=LABELS[:8], test_images=IMAGES[8:], test_labels=LABELS[8:])
    np.savez(tmp_path / "both.npz", **both)
    train, test = (open_pictures(str(tmp_path / "both.npz"), split) for split in ("train", "test"))
    assert np.array_equal(pixels(train), IMAGES[:8]) and train.labels.tolist() == LABELS[:8].tolist()
    for found in (test, open_pictures(str(tmp_path / "one.npz"), "test")):
        assert np.array_equal(pixels(found), IMAGES[8:])
    assert count_classes(train, test) == 3 and test.fingerprint != train.fingerprint


def test_jpeg_bytes_are_cut_at_their_offsets(tmp_path):
    np.savez(tmp_path / "j.npz", **jpeg_arrays(IMAGES), labels=LABELS, classes=["x", "y", "z", "w"])
    data = open_pictures(str(tmp_path / "j.npz"), "test")
    for found, image in zip(pixels(data), IMAGES, strict=True):
        assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG")))))
    assert count_classes(None, data) == 4  # as named, though no picture shows the last one


def test_folders_of_classes_are_read_with_either_name_of_the_test_folder(tmp_path):
    for name in ("val", "test"):
        write_folder(tmp_path / name / "train", IMAGES[:8], LABELS[:8])
        write_folder(tmp_path / name / name, IMAGES[8:], LABELS[8:])
        train, test = (open_pictures(str(tmp_path / name), split) for split in ("train", "test"))
        order = np.argsort(LABELS[:8], kind="stable")
        assert np.array_equal(pixels(train), IMAGES[:8][order]) and len(test) == 4
        assert train.labels.tolist() == sorted(LABELS[:8]) and train.classes == ["a", "b", "c"]
    assert len(open_pictures(str(tmp_path / "val" / "train"), "test")) == 8
    write_folder(tmp_path / "val" / "test")
    with pytest.raises(ValueError, match="val, test: say which to test on with --test"):
        open_pictures(str(tmp_path / "val"), "test")
    with pytest.raises(FileNotFoundError, match="has none of val, validation, test"):
        (tmp_path / "x" / "train").mkdir(parents=True)
        open_pictures(str(tmp_path / "x"), "test")


def test_digits_are_those_of_scikit_learn_split_in_five():
    from sklearn.datasets import load_digits

    train, test = open_pictures("digits", "train"), open_pictures("digits", "test")
    assert len(train) == 1437 and test.labels.tolist() == load_digits().target[::5].tolist()
    small = np.asarray(test.decode(3).resize((8, 8), Image.Resampling.BOX)).astype(float).mean(-1)
    assert np.corrcoef(small.ravel(), load_digits().images[15].ravel())[0, 1] > 0.97


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(images=IMAGES), "needs labels and images"),
        (dict(images=IMAGES.astype(np.float32), labels=LABELS), "uint8"),
        (dict(images=IMAGES[..., :2], labels=LABELS), "C = 1, 3 or 4"),
        (dict(images=IMAGES, labels=LABELS[:5]), "12 whole numbers"),
        (dict(images=IMAGES, labels=LABELS / 2), "whole numbers"),
        (dict(images=IMAGES, labels=LABELS - 1), r"got -1\.\.1"),
        (dict(images=IMAGES[:0], labels=LABELS[:0]), "0 whole numbers"),
        (dict(images=IMAGES, labels=LABELS, classes=["x", "y"]), r"0\.\.1, got 0\.\.2"),
        (jpeg_arrays(IMAGES) | dict(offsets=np.arange(13), labels=LABELS), "rise from 0"),
        (dict(images=IMAGES, labels=np.array(list(LABELS), object)), "can't be read"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_pictures(str(tmp_path / "x.npz"), "test")


def test_missing_and_contradicting_data_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a file"):
        open_pictures(str(tmp_path / "none.npz"), "test")
    with pytest.raises(ValueError, match="can't be read as an npz file"):
        open_pictures(str(tmp_path / "text.npz"), "test")
    write_folder(tmp_path / "abc")
    write_folder(tmp_path / "abd", names="abd")
    abc, abd = (open_pictures(str(tmp_path / name), "test") for name in ("abc", "abd"))
    with pytest.raises(ValueError, match="differ in their classes, or in the order: c, d"):
        count_classes(abc, abd)
    abc.classes, abc.labels = None, abc.labels % 2
    with pytest.raises(ValueError, match="labels up to 2, there are 2 classes"):
        count_classes(abc, abd)


def make_task(path, images=IMAGES, augment="none", preprocess=PREPROCESS, **options):
    np.savez(path / "both.npz", train_images=images, train_labels=LABELS, test_images=images, test_labels=LABELS)
    train, test = (open_pictures(str(path / "both.npz"), split) for split in ("train", "test"))
    return Task(train, test, preprocess, augment, **options)


@pytest.mark.parametrize("augment", ["none", "timm"])
@pytest.mark.parametrize("size", [(16, 16), (10, 14), (40, 30)])
def test_test_pictures_go_through_the_transform_of_timm_for_the_model(tmp_path, size, augment):
    images = RANDOM.integers(0, 256, (12, *size, 3), np.uint8)
    task = make_task(tmp_path, images, augment)
    crop_pct = 0.9 if max(size) > 16 else 1.0  # 0.9 is what timm's vit_tiny says; nothing is cut off small pictures
    half = (0.5, 0.5, 0.5)
    transform = create_transform((3, 16, 16), interpolation="bicubic", crop_pct=crop_pct, mean=half, std=half)
    wanted = torch.stack([transform(Image.fromarray(image)) for image in images])
    found = torch.cat([images for images, _ in task.test_batches()])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_gray_pictures_get_three_equal_channels_or_stay_gray(tmp_path):
    gray = IMAGES[..., 0]
    wanted = torch.from_numpy(gray).float()[:, None] / 127.5 - 1
    for images in (gray, gray[..., None]):
        ((found, _),) = make_task(tmp_path, images).test_batches()
        torch.testing.assert_close(found, wanted.expand(-1, 3, -1, -1), rtol=0, atol=1e-6)
    one = ModelSpec(SPEC.name, {**SPEC.kwargs, "in_chans": 1})
    ((found, _),) = make_task(tmp_path, gray, preprocess=for_model(one.create(0, 3), 1)).test_batches()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert one.create(0, 3)(found).shape == (12, 3)
    with pytest.raises(ValueError, match="1 or 3 channels, the model takes 4"):
        for_model(one.create(0, 3), 4)
    assert for_model(ModelSpec("resnet18").create(0, 3)).input_size == (3, 224, 224)


@pytest.mark.parametrize("augment", ["none", "timm"])
def test_a_broken_picture_is_named(tmp_path, augment):
    write_folder(tmp_path)
    (tmp_path / "b" / "04.png").write_bytes(encoded(IMAGES[4], "PNG")[:200])
    broken = open_pictures(str(tmp_path), "test")
    with pytest.raises(UnreadablePictureError, match=r"04\.png can't be decoded"):
        list(Task(None, broken, PREPROCESS, augment).test_batches())
    arrays = jpeg_arrays(IMAGES) | {"labels": LABELS}
    arrays["jpeg"] = arrays["jpeg"].copy()
    arrays["jpeg"][arrays["offsets"][7] : arrays["offsets"][8]] = 0
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UnreadablePictureError, match=r"picture 7 of x\.npz"):
        open_pictures(str(tmp_path / "x.npz"), "test").decode(7)


def take(task, count, seed, batch_size=4):
    return list(itertools.islice(task.training_batches(batch_size, seed), count))


@pytest.mark.parametrize("augment", ["none", "crop-flip", "timm,scale=(0.3,1.0)"])
def test_batches_follow_from_the_seed_whatever_a_model_draws(tmp_path, augment):
    task = make_task(tmp_path, augment=augment)
    first = take(task, 6, seed=3)
    again = []
    for batch in itertools.islice(task.training_batches(4, 3), 6):
        again.append(batch)
        torch.rand(7)
    for (images, labels), (same, those) in zip(first, again, strict=True):
        assert torch.equal(images, same) and torch.equal(labels, those)
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(first, take(task, 6, seed=4), strict=True))
    assert not torch.equal(torch.cat([a for a, _ in first[:3]]), torch.cat([a for a, _ in first[3:]]))


def test_augmentation_of_timm_leaves_the_model_s_draws_alone(tmp_path):
    task = make_task(tmp_path, augment="timm")
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    take(task, 4, seed=1)
    assert torch.equal(torch.rand(3), wanted)


def test_an_epoch_shows_every_picture_once(tmp_path):
    task = make_task(tmp_path)
    ((every, _),) = task.test_batches()
    batches = take(task, 6, seed=0)
    for epoch in (batches[:3], batches[3:]):
        found = torch.cat([images for images, _ in epoch]).flatten(1).double().mean(1).sort().values
        assert torch.equal(found, every.flatten(1).double().mean(1).sort().values)
    with pytest.raises(ValueError, match="there are 12"):
        take(task, 1, seed=0, batch_size=13)


def test_crops_are_shifts_by_up_to_the_padding_some_of_them_mirrored():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5)
    wide = torch.zeros(1, 9, 9, dtype=torch.uint8)
    wide[:, 2:7, 2:7] = image
    windows = {(r, c): wide[:, r : r + 5, c : c + 5] for r in range(5) for c in range(5)}
    known = {(r, c, flip): w.flip(2) if flip else w for (r, c), w in windows.items() for flip in (False, True)}
    found = crop_flip(image.expand(2000, -1, -1, -1), 2, 0.25, torch.Generator().manual_seed(1))
    seen = [next(key for key, window in known.items() if torch.equal(window, each)) for each in found]
    assert set(seen) == set(known) and 0.2 < sum(flip for *_, flip in seen) / 2000 < 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop", "none, crop-flip, timm"),
        ("crop-flip,size=3", "hflip"),
        ("crop-flip,pad=-1", "from 0"),
        ("crop-flip,pad=x", "from 0"),
        ("none,pad=3", "has the settings"),
        ("crop-flip,pad", "key=value"),
    ],
)
def test_augmentation_that_is_unknown_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_augment(text)


def test_settings_that_timm_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="create_loader refuses"):
        take(make_task(tmp_path, augment="timm,shear=3"), 1, seed=0)
