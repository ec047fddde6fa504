"""Pictures of image classification: where they are read from, how they are prepared, in which order they come."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from eval.image_classification.augment import Augment, crop_flip, parse_augment, training_batches
from eval.image_classification.data import open_data
from eval.image_classification.models import ModelSpec
from eval.image_classification.pictures import UnreadablePictureError
from eval.image_classification.preprocess import for_model
from eval.image_classification.randomness import generator, seeded
from eval.image_classification.sources import hold_out
from eval.image_classification.task import prepare

SPEC = ModelSpec("vit_tiny_patch16_224", dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2))
CPU = torch.device("cpu")
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


def pixels(source):
    return [np.asarray(source.open(index).convert("RGB")) for index in range(len(source))]


def test_arrays_are_read_from_two_files_or_from_one_with_prefixes(tmp_path):
    np.savez(tmp_path / "train.npz", images=IMAGES[:8], labels=LABELS[:8])
    np.savez(tmp_path / "test.npz", images=IMAGES[8:], labels=LABELS[8:])
    both = dict(train_images=IMAGES[:8], train_labels=LABELS[:8], test_images=IMAGES[8:], test_labels=LABELS[8:])
    np.savez(tmp_path / "both.npz", **both)
    for data in (open_data(tmp_path / "train.npz", tmp_path / "test.npz"), open_data(tmp_path / "both.npz")):
        assert np.array_equal(pixels(data.train), IMAGES[:8]) and np.array_equal(pixels(data.test), IMAGES[8:])
        assert data.train.labels.tolist() == LABELS[:8].tolist() and data.num_classes == 3
    assert np.array_equal(pixels(open_data(tmp_path / "test.npz", trains=False).test), IMAGES[8:])
    assert np.array_equal(pixels(open_data(tmp_path / "both.npz", trains=False).test), IMAGES[8:])


def test_jpeg_bytes_are_cut_at_their_offsets(tmp_path):
    arrays = jpeg_arrays(IMAGES[:8], "train_") | jpeg_arrays(IMAGES[8:], "test_")
    np.savez(
        tmp_path / "j.npz", **arrays, train_labels=LABELS[:8], test_labels=LABELS[8:], classes=["x", "y", "z", "w"]
    )
    data = open_data(tmp_path / "j.npz")
    for found, image in zip(pixels(data.train) + pixels(data.test), IMAGES, strict=True):
        assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG")))))
    assert data.num_classes == 4  # as named, though no picture shows the last one


def test_folders_of_classes_are_read_with_either_name_of_the_test_folder(tmp_path):
    for name in ("val", "test"):
        write_folder(tmp_path / name / "train", IMAGES[:8], LABELS[:8])
        write_folder(tmp_path / name / name, IMAGES[8:], LABELS[8:])
        data = open_data(tmp_path / name)
        order = np.argsort(LABELS[:8], kind="stable")
        assert np.array_equal(pixels(data.train), IMAGES[:8][order]) and len(data.test) == 4
        assert data.train.labels.tolist() == sorted(LABELS[:8]) and data.train.classes == ["a", "b", "c"]
    assert len(open_data(tmp_path / "val" / "train", trains=False).test) == 8
    write_folder(tmp_path / "val" / "test")
    with pytest.raises(ValueError, match="val, test: say which to test on with --test"):
        open_data(tmp_path / "val")
    assert len(open_data(tmp_path / "val", tmp_path / "val" / "test").test) == 12


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(images=IMAGES), "needs the arrays labels"),
        (dict(images=IMAGES.astype(np.float32), labels=LABELS), "uint8"),
        (dict(images=IMAGES[..., :2], labels=LABELS), "C = 1, 3 or 4"),
        (dict(images=IMAGES, labels=LABELS[:5]), "12 whole numbers"),
        (dict(images=IMAGES, labels=LABELS / 2), "whole numbers"),
        (dict(images=IMAGES, labels=LABELS - 1), r"got -1\.\.1"),
        (dict(images=IMAGES[:0], labels=LABELS[:0]), "no pictures"),
        (dict(images=IMAGES, labels=LABELS, classes=["x", "y"]), r"0\.\.1, got 0\.\.2"),
        (jpeg_arrays(IMAGES) | dict(offsets=np.arange(13), labels=LABELS), "rise from 0"),
        (dict(images=IMAGES, labels=np.array(list(LABELS), object)), "can't be read"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path / "x.npz", trains=False)


def test_missing_and_contradicting_data_are_refused(tmp_path):
    np.savez(tmp_path / "train.npz", images=IMAGES, labels=LABELS % 2)
    np.savez(tmp_path / "test.npz", images=IMAGES, labels=LABELS)
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a file"):
        open_data(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="not an npz file"):
        open_data(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="no test_labels: name the file of test pictures with --test"):
        open_data(tmp_path / "train.npz")
    with pytest.raises(ValueError, match="labels up to 2, training pictures only up to 1"):
        open_data(tmp_path / "train.npz", tmp_path / "test.npz")
    with pytest.raises(FileNotFoundError, match="no train/ folder"):
        open_data(tmp_path)
    write_folder(tmp_path / "f" / "train")
    with pytest.raises(FileNotFoundError, match="none of val, validation, test"):
        open_data(tmp_path / "f")
    write_folder(tmp_path / "f" / "val", names="abd")
    with pytest.raises(ValueError, match="only one has c, d"):
        open_data(tmp_path / "f")


def test_held_out_pictures_are_none_that_are_trained_on(tmp_path):
    np.savez(tmp_path / "train.npz", images=IMAGES, labels=LABELS)
    data = open_data(tmp_path / "train.npz", holdout=0.25)
    names = [[split.name(index) for index in range(len(split))] for split in (data.train, data.test)]
    assert list(map(len, names)) == [9, 3] and len(set(names[0] + names[1])) == 12
    again = hold_out(open_data(tmp_path / "train.npz", trains=False).test, 0.25)
    assert [split.fingerprint for split in again] == [data.train.fingerprint, data.test.fingerprint]
    assert again[0].fingerprint != again[1].fingerprint
    with pytest.raises(ValueError, match="leaves none"):
        open_data(tmp_path / "train.npz", holdout=0.01)


def npz_task(path, images=IMAGES, augment="none", spec=SPEC, **options):
    np.savez(path / "both.npz", train_images=images, train_labels=LABELS, test_images=images, test_labels=LABELS)
    return prepare(spec, open_data(path / "both.npz"), parse_augment(augment), CPU, **options)


@pytest.mark.parametrize("size", [(16, 16), (10, 14), (40, 30)])
def test_test_pictures_go_through_the_transform_of_timm_for_the_model(tmp_path, size):
    images = RANDOM.integers(0, 256, (12, *size, 3), np.uint8)
    task = npz_task(tmp_path, images)
    crop_pct = 0.9 if max(size) > 16 else 1.0  # 0.9 is what timm's vit_tiny says; nothing is cut off small pictures
    half = (0.5, 0.5, 0.5)
    transform = create_transform((3, 16, 16), interpolation="bicubic", crop_pct=crop_pct, mean=half, std=half)
    wanted = torch.stack([transform(Image.fromarray(image)) for image in images])
    assert task.preprocess.crop_pct == crop_pct
    torch.testing.assert_close(task.preprocess.normalise(task.test.images), wanted, rtol=0, atol=1e-6)


def test_the_options_for_side_and_crop_win(tmp_path):
    task = npz_task(tmp_path, side=32, crop_pct=0.5)
    assert task.train.images.shape == (12, 3, 32, 32) and task.preprocess.crop_pct == 0.5
    cut = create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.5, normalize=False)
    assert torch.equal(task.test.images[0], cut(Image.fromarray(IMAGES[0])))
    assert not torch.equal(task.test.images, task.train.images)


def test_gray_pictures_get_three_equal_channels_or_stay_gray(tmp_path):
    gray = IMAGES[..., 0]
    for images in (gray, gray[..., None]):
        found = npz_task(tmp_path, images).train.images
        assert torch.equal(found, torch.from_numpy(gray)[:, None].expand(-1, 3, -1, -1))
    one = ModelSpec(SPEC.name, {**SPEC.kwargs, "in_chans": 1})
    task = npz_task(tmp_path, gray, spec=one)
    assert torch.equal(task.train.images, torch.from_numpy(gray)[:, None])
    assert one.create(0, 3)(task.preprocess.normalise(task.train.images)).shape == (12, 3)
    with pytest.raises(ValueError, match="1 or 3 channels, the model takes 4"):
        npz_task(tmp_path, gray, spec=ModelSpec(SPEC.name, {**SPEC.kwargs, "in_chans": 4}))


def test_a_model_without_a_size_of_its_own_gets_the_published_one(tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=LABELS)
    test = open_data(tmp_path / "x.npz", trains=False).test
    assert for_model(ModelSpec("resnet18").create(0, 3), test).input_size == (3, 224, 224)


def broken_folder(root):
    write_folder(root / "train")
    write_folder(root / "val")
    (root / "train" / "b" / "04.png").write_bytes(encoded(IMAGES[4], "PNG")[:200])
    (root / "val" / "c" / "02.png").write_bytes(b"no picture")
    return open_data(root)


@pytest.mark.parametrize("memory", [4.0, 0.0])
def test_a_broken_picture_is_named_or_counted(tmp_path, memory):
    data = broken_folder(tmp_path)
    with pytest.raises(UnreadablePictureError, match=r"04\.png can't be decoded"):
        list(prepare(SPEC, data, Augment("none"), CPU, memory=memory).train.batches(torch.arange(12), 5))
    task = prepare(SPEC, data, Augment("none"), CPU, memory=memory, drops=True)
    left = sum(len(labels) for _, labels in task.test.batches(torch.arange(len(task.test)), 5))
    assert left == 11 and [message.partition(" ")[0][-8:] for message in task.test.dropped] == ["c/02.png"]


def test_a_broken_jpeg_is_named_by_file_and_number(tmp_path):
    arrays = jpeg_arrays(IMAGES) | {"labels": LABELS}
    arrays["jpeg"] = arrays["jpeg"].copy()
    arrays["jpeg"][arrays["offsets"][7] : arrays["offsets"][8]] = 0
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UnreadablePictureError, match=r"picture 7 of x\.npz"):
        prepare(SPEC, open_data(tmp_path / "x.npz", trains=False), Augment("none"), CPU)
    arrays["jpeg"][:] = 0
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UnreadablePictureError, match="none of 12 pictures"):
        prepare(SPEC, open_data(tmp_path / "x.npz", trains=False), Augment("none"), CPU, drops=True)


def take(task, count, seed, batch_size=4):
    return list(itertools.islice(training_batches(task.train, task.augment, batch_size, seed), count))


@pytest.mark.parametrize("augment", ["none", "crop-flip", "timm,scale=(0.3,1.0)"])
def test_batches_follow_from_the_seed_wherever_pictures_are_held(tmp_path, augment):
    held, streamed = (npz_task(tmp_path, augment=augment, memory=memory) for memory in (4.0, 0.0))
    assert streamed.train.images is None and (held.train.images is None) == augment.startswith("timm")
    first = take(held, 6, seed=3)
    torch.rand(7)  # whatever a model draws meanwhile
    for (images, labels), (again, same) in zip(first, take(streamed, 6, seed=3), strict=True):
        assert torch.equal(images, again) and torch.equal(labels, same)
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(first, take(held, 6, seed=4), strict=True))
    assert not torch.equal(torch.cat([a for a, _ in first[:3]]), torch.cat([a for a, _ in first[3:]]))


def test_workers_change_nothing(tmp_path):
    one, two = (npz_task(tmp_path, augment="timm,color_jitter=0.2", workers=workers) for workers in (0, 2))
    for (images, _), (again, _) in zip(take(one, 4, seed=0), take(two, 4, seed=0), strict=True):
        assert torch.equal(images, again)


def test_an_epoch_shows_every_picture_once(tmp_path):
    task = npz_task(tmp_path)
    batches = take(task, 6, seed=0)
    for epoch in (batches[:3], batches[3:]):
        found = torch.cat([images for images, _ in epoch]).flatten(1).double().mean(1).sort().values
        assert torch.equal(found, task.train.images.flatten(1).double().mean(1).sort().values)
    with pytest.raises(ValueError, match="there are 12"):
        take(task, 1, seed=0, batch_size=13)


def test_crops_are_shifts_by_up_to_the_padding_some_of_them_mirrored():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5)
    wide = torch.zeros(1, 9, 9, dtype=torch.uint8)
    wide[:, 2:7, 2:7] = image
    windows = {(r, c): wide[:, r : r + 5, c : c + 5] for r in range(5) for c in range(5)}
    known = {(r, c, flip): w.flip(2) if flip else w for (r, c), w in windows.items() for flip in (False, True)}
    found = crop_flip(image.expand(2000, -1, -1, -1), 2, 0.25, generator(1))
    seen = [next(key for key, window in known.items() if torch.equal(window, each)) for each in found]
    assert set(seen) == set(known)
    assert 0.2 < sum(flip for *_, flip in seen) / 2000 < 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop", "crop-flip, timm or none"),
        ("crop-flip,size=3", "pad, hflip"),
        ("crop-flip,pad=-1", "number from 0"),
        ("crop-flip,pad=x", "number from 0"),
        ("none,pad=3", "no settings"),
        ("crop-flip,pad", "key=value"),
    ],
)
def test_augmentation_that_is_unknown_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_augment(text)


def test_settings_that_timm_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="create_transform refuses"):
        npz_task(tmp_path, augment="timm,shear=3")


def test_seeding_leaves_the_generators_as_they_were():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    with seeded(5):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), wanted)
    with seeded(5):
        assert torch.equal(torch.rand(3), first)
