"""`python -m eval.robustness` as a command: every figure against a slow version, folders, going on, faults."""

import csv
import json
from functools import partial

import commands
import cv2
import imagecorruptions
import numpy as np
import pytest
import timm
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import vltok
from eval.robustness import __main__ as command
from eval.robustness import pictures as cells_of
from eval.robustness.corruptions import picture_seed

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
MODEL = ["--model", "vit_tiny_patch16_224", "--model-kwargs", ",".join(f"{k}={v}" for k, v in KWARGS.items())]
NAMES = [f"n{number:02}" for number in range(7)]
RANDOM = np.random.default_rng(0)
COUNT = 21
IMAGES = np.clip(RANDOM.integers(0, 256, (COUNT, 1, 1, 3)) + RANDOM.normal(0, 40, (COUNT, 32, 32, 3)), 0, 255).astype(
    np.uint8
)


def make_model(seed=0):
    """Sharp weights, two draws of which the answers to the pictures below are of several classes."""
    return tiny.sharpen(timm.create_model("vit_tiny_patch16_224", num_classes=7, **KWARGS), (3, 1)[seed])


def answers(model, pictures, allowed=None):
    """One picture at a time, scaled by hand as the model's config says: mean and deviation are a half."""
    found = []
    for picture in pictures:
        scores = model(((torch.tensor(picture).float() / 255 - 0.5) / 0.5).permute(2, 0, 1)[None])[0]
        outputs = range(7) if allowed is None else allowed
        found.append(max(outputs, key=lambda output: scores[output]))
    return found


# Labels that the model mostly, but not always, hits: then every corruption costs something.
LABELS = np.array([(a + (i % 4 == 0)) % 7 for i, a in enumerate(answers(make_model(), IMAGES))])


def write_folder(root, pictures, labels, names=NAMES):
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        path = root / names[label] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with pictures in x.npz and weights of two seeds, plain-0.safetensors and plain-1.safetensors."""
    root = tmp_path_factory.mktemp("made")
    np.savez(root / "x.npz", images=IMAGES, labels=LABELS, classes=NAMES)
    for seed in (0, 1):
        save_file(make_model(seed).state_dict(), root / f"plain-{seed}.safetensors")
    return root


call, refused = partial(commands.call, command), partial(commands.refused, command)


def cells(out, name="plain", seed=0):
    runs = json.loads((out / "results.json").read_text())["runs"]
    return next(run["cells"] for run in runs if run["name"] == f"{name}-seed{seed}")


def options(made, *more):
    return [*MODEL, "--data", made / "x.npz", "--arm", f"plain@{made}/plain-{{seed}}.safetensors=", *more]


def slow_error(model, name, severity, seed=0, indices=range(COUNT)):
    corrupted = []
    for index in indices:
        number = picture_seed(seed, index, name, severity)
        np.random.seed(number)
        extra = {"seed": number} if name in ("impulse_noise", "glass_blur") else {}
        corrupted.append(imagecorruptions.corrupt(IMAGES[index], severity, name, **extra))
    found = answers(model, corrupted)
    return sum(a != LABELS[i] for a, i in zip(found, indices, strict=True)) / len(corrupted)


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """A complete bench of two seeds with a batch size that doesn't divide the pictures."""
    out = tmp_path_factory.mktemp("out")
    call(*options(made, "--seeds", "0,1", "--batch-size", 8, "--out", out))
    return out


def test_errors_are_those_of_one_picture_at_a_time(finished):
    row = json.loads((finished / "results.json").read_text())["arms"][0]
    for seed in (0, 1):
        model = make_model(seed)
        clean = np.mean(np.array(answers(model, IMAGES)) == LABELS)
        assert cells(finished, seed=seed)["clean"]["top1"] == pytest.approx(clean)
        assert row["clean"]["values"][seed] == pytest.approx(clean)
        for name, severity in (("shot_noise", 2), ("glass_blur", 5), ("fog", 1), ("jpeg_compression", 3)):
            found = cells(finished, seed=seed)[f"corruption/{name}/{severity}"]
            assert 1 - found["top1"] == pytest.approx(slow_error(model, name, severity))
    assert row["clean"]["values"][0] > 0.5 and len({each["top1"] for each in cells(finished).values()}) > 5


def test_the_summary_is_made_of_all_seventy_five_cells(finished):
    row = json.loads((finished / "results.json").read_text())["arms"][0]
    means = []
    for seed in (0, 1):
        found = {name: 1 - each["top1"] for name, each in cells(finished, seed=seed).items() if name != "clean"}
        assert len(found) == 75
        means.append(np.mean(list(found.values())))
        fog = np.mean([found[f"corruption/fog/{severity}"] for severity in range(1, 6)])
        assert row["by_corruption"]["fog"]["values"][seed] == pytest.approx(fog)
        third = np.mean([error for name, error in found.items() if name.endswith("/3")])
        assert row["by_severity"]["3"]["values"][seed] == pytest.approx(third)
    assert row["mean_error"]["values"] == pytest.approx(means) and row["mce"]["mean"] > 0
    printed = (finished / "results.md").read_text()
    assert f"{100 * np.mean(means):.1f} ± {100 * np.std(means, ddof=1):.2f}" in printed
    assert "mCE" in printed and "21 clean pictures" in printed


def test_results_are_written_as_robustbench_and_timm_write_them(finished):
    row = json.loads((finished / "results.json").read_text())["arms"][0]
    for seed in (0, 1):
        info = json.loads((finished / "robustbench" / f"plain-seed{seed}.json").read_text())
        assert info["clean_acc"] == f"{100 * row['clean']['values'][seed]:.2f}"
        assert info["corruptions_acc_2d"] == f"{100 - 100 * row['mean_error']['values'][seed]:.2f}"
        assert info["corruptions_mce_2d"] == f"{100 * row['mce']['values'][seed]:.2f}"
        assert (info["architecture"], info["number_forward_passes"]) == ("vit_tiny_patch16_224", 1)
    with (finished / "results-clean.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["plain-seed0", "plain-seed1"]
    for seed, line in enumerate(lines):
        found = cells(finished, seed=seed)["clean"]
        assert float(line["top1"]) == pytest.approx(100 * found["top1"], abs=1e-3) == 100 - float(line["top1_err"])
        assert float(line["top5"]) == pytest.approx(100 * found["top5"], abs=1e-3) and line["img_size"] == "32"


def test_a_second_call_computes_nothing_and_a_lost_cell_alone_is_made_again(finished, made, monkeypatch):
    first = (finished / "results.md").read_text()
    corrupt, asked = cells_of.corrupt, []
    monkeypatch.setattr(cells_of, "corrupt", lambda *a: asked.append(a[1:3]) or corrupt(*a))
    call(*options(made, "--seeds", "0,1", "--out", finished))
    assert not asked and (finished / "results.md").read_text() == first
    next((finished / "runs").glob("plain-seed1-corruption-snow-4-*")).unlink()
    call(*options(made, "--seeds", "0,1", "--out", finished))
    assert set(asked) == {("snow", 4)} and (finished / "results.md").read_text() == first


def test_an_interrupted_bench_has_kept_what_was_finished(made, tmp_path, monkeypatch):
    few = options(made, "--corruptions", "fog,snow", "--severities", "1", "--out", tmp_path)
    asked, real = [], cells_of.answer

    def breaks(*arguments):
        asked.append(arguments)
        if len(asked) > 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(cells_of, "answer", breaks)
    with pytest.raises(KeyboardInterrupt):
        call(*few)
    kept = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "runs").iterdir())
    assert kept == ["plain-seed0-clean", "plain-seed0-corruption-snow-1"]
    monkeypatch.setattr(cells_of, "answer", lambda *a: asked.append(a) or real(*a))
    call(*few)
    assert len(asked) == 4 and list(cells(tmp_path)) == ["clean", "corruption/snow/1", "corruption/fog/1"]


@pytest.mark.parametrize(
    "change", [["--corruption-seed", "1"], ["--limit", "5"], ["--corrupt", "picture"], ["--amp"]], ids=str
)
def test_other_settings_are_measured_anew(made, tmp_path, change):
    few = options(made, "--corruptions", "snow", "--severities", "1", "--out", tmp_path)
    call(*few)
    before = set((tmp_path / "runs").iterdir())
    call(*few, *change)
    added = {path.name.rsplit("-", 1)[0] for path in set((tmp_path / "runs").iterdir()) - before}
    assert "plain-seed0-corruption-snow-1" in added


def test_other_weights_under_the_same_name_are_noticed(made, tmp_path):
    few = ["--data", made / "x.npz", *MODEL, "--corruptions", "none", "--weights", tmp_path / "w.safetensors"]
    found = []
    for seed in (0, 1):
        save_file(make_model(seed).state_dict(), tmp_path / "w.safetensors")
        call(*few, "--arm", "x=", "--out", tmp_path / "out")
        found.append(cells(tmp_path / "out", "x")["clean"]["top1"])
    assert found == [pytest.approx(np.mean(np.array(answers(make_model(seed), IMAGES)) == LABELS)) for seed in (0, 1)]


def test_figures_depend_neither_on_workers_nor_batches_nor_on_who_is_tested_together(finished, made, tmp_path):
    few = ["--corruptions", "motion_blur,glass_blur", "--severities", "2,5", "--workers", "2", "--batch-size", "5"]
    call(*options(made, *few, "--seeds", "1,0", "--out", tmp_path))
    for seed in (0, 1):
        for name, figures in cells(tmp_path, seed=seed).items():
            assert figures == cells(finished, seed=seed)[name]


def test_a_limit_takes_pictures_from_everywhere_with_their_own_seeds(made, tmp_path):
    few = ["--corruptions", "gaussian_noise", "--severities", "4", "--limit", "4", "--out", tmp_path]
    call(*options(made, *few))
    printed = (tmp_path / "results.md").read_text()
    error = slow_error(make_model(), "gaussian_noise", 4, indices=[0, 5, 10, 15])
    assert 1 - cells(tmp_path)["corruption/gaussian_noise/4"]["top1"] == pytest.approx(error)
    assert cells(tmp_path)["clean"]["tested"] == 4 and "no mCE: it is defined by all 15" in printed


def test_arms_with_methods_take_trained_weights_and_saved_folders(made, tmp_path):
    model = make_model()
    handle = vltok.apply(model, vltok.TAP(num_scales=2, init="published"))
    torch.nn.init.normal_(model.blocks[0].dilation_predictor.proj[2].weight)
    save_file(model.state_dict(), tmp_path / "tap-3.safetensors")
    vltok.save(handle, tmp_path / "adapter")
    model.eval()
    expected = np.mean(np.array(answers(model, IMAGES)) == LABELS)
    save_file(make_model().state_dict(), tmp_path / "folder-3.safetensors")
    arms = ["--arm", "tap=tap,num_scales=2", "--arm", f"file@{tmp_path}/tap-{{seed}}.safetensors=tap,num_scales=2"]
    arms += ["--arm", f"folder@{tmp_path}/adapter=", "--weights", f"{tmp_path}/{{arm}}-{{seed}}.safetensors"]
    few = ["--data", made / "x.npz", *MODEL, "--corruptions", "none", "--seeds", "3", "--out", tmp_path / "out"]
    call(*few, *arms)
    printed = (tmp_path / "out/results.md").read_text()
    found = {name: cells(tmp_path / "out", name, 3)["clean"]["top1"] for name in ("tap", "file", "folder")}
    assert list(found.values()) == [pytest.approx(expected)] * 3 and "tap(num_scales=2)" in printed
    assert expected != pytest.approx(np.mean(np.array(answers(make_model(), IMAGES)) == LABELS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "x="], "arm 'x' has no trained weights"),
        (["--arm", "x@nowhere.safetensors="], "no file of weights nowhere.safetensors, of arm 'x'"),
        (["--arm", "x@nowhere="], "has no trained weights"),
        (["--arm", "x@{made}/plain-0.safetensors=", "--seeds", "0,1"], "put {seed} into the weights' names"),
        (["--arm", "x@{made}/plain-0.safetensors=", "--arm", "X=tap"], "a name of its own"),
        (["--arm", "x@{made}/plain-0.safetensors=", "--corruptions", "rain"], "no corruption 'rain'"),
        (["--arm", "x@{made}/plain-0.safetensors=", "--subset", "a"], "--subset is written NAME=FOLDER"),
        (["--arm", "x@{made}/plain-0.safetensors=", "--imagenet-c", "gone"], "no folder gone/gaussian_noise/1"),
        (["--arm", "x@{made}/plain-0.safetensors=", "--imagenet-p", "gone"], "gone"),
    ],
)
def test_options_that_can_t_work_are_explained(made, arguments, message):
    arguments = [each.replace("{made}", str(made)) for each in arguments]
    assert message in refused(*MODEL, "--data", made / "x.npz", *arguments, "--out", made / "no")
    assert not (made / "no").exists()


def test_an_imagenet_c_folder_is_read_as_it_lies(made, tmp_path):
    root = tmp_path / "c"
    expected = {}
    for place, name in ((root / "blur" / "zoom_blur", "zoom_blur"), (root / "fog", "fog")):
        for severity in (1, 3):
            pictures = np.random.default_rng(severity).permutation(IMAGES)[:9]
            write_folder(place / str(severity), pictures, LABELS[:9])
            found = np.array(answers(make_model(), pictures)) != LABELS[:9]
            expected[f"corruption/{name}/{severity}"] = found.mean()
    few = ["--corruptions", "zoom_blur,fog", "--severities", "1,3", "--imagenet-c", root, "--out", tmp_path / "out"]
    call(*options(made, *few))
    found = {name: 1 - figures["top1"] for name, figures in cells(tmp_path / "out").items() if name != "clean"}
    assert found == pytest.approx(expected)
    few[3] = "1,2"
    assert "no folder" in refused(*options(made, *few))


def test_a_subset_is_answered_among_its_own_classes(made, tmp_path):
    labels = np.array([1, 4, 6])[np.random.default_rng(0).integers(0, 3, COUNT)]
    write_folder(tmp_path / "a", IMAGES, labels)
    few = options(made, "--corruptions", "none", "--subset", f"imagenet-a={tmp_path}/a", "--out", tmp_path / "out")
    call(*few)
    printed = (tmp_path / "out/results.md").read_text()
    model = make_model()
    restricted = np.array(answers(model, IMAGES, allowed=[1, 4, 6])) == labels
    free = np.array(answers(model, IMAGES)) == labels
    figures = cells(tmp_path / "out")["subset/imagenet-a"]
    assert figures["top1"] == pytest.approx(restricted.mean()) and restricted.mean() != free.mean()
    assert "imagenet-a" in printed and "top5" not in figures
    assert (tmp_path / "out/results-imagenet-a.csv").read_text().count("plain-seed0") == 1
    write_folder(tmp_path / "a", IMAGES[:1], [0], names=["n99"])
    assert "1 classes that are none of the model's 7: n99" in refused(*few)


def test_outputs_are_named_by_a_file_or_a_reference_folder(made, tmp_path):
    write_folder(tmp_path / "r", IMAGES, LABELS)
    (tmp_path / "names.txt").write_text("\n".join(f"{name} word" for name in NAMES))
    for name in NAMES:
        (tmp_path / "val" / name).mkdir(parents=True)
    expected = np.mean(np.array(answers(make_model(), IMAGES, sorted(set(LABELS)))) == LABELS)
    few = [
        *MODEL,
        "--weights",
        made / "plain-0.safetensors",
        "--subset",
        f"r={tmp_path}/r",
        "--arm",
        "plain=",
    ]
    for classes in ("names.txt", "val"):
        call(*few, "--classes", tmp_path / classes, "--out", tmp_path / "out" / classes)
        assert cells(tmp_path / "out" / classes)["subset/r"]["top1"] == pytest.approx(expected)
    seven = [*few[:3], f"{few[3]},num_classes=7", *few[4:]]
    assert "nothing says which is which" in refused(*seven, "--out", tmp_path / "x")


def write_frames(folder, frames):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{number}.png")  # frame10 must come after frame9


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    write_frames(tmp_path / "s", IMAGES[:12])
    assert all(np.array_equal(a, b) for a, b in zip(cells_of.read_frames(tmp_path / "s"), IMAGES[:12], strict=True))


def test_flip_rates_of_frames_and_videos_are_those_of_a_loop(made, tmp_path):
    root, model, expected = tmp_path / "p", make_model(), {}
    draw = np.random.default_rng(0)
    for name in ("gaussian_noise", "tilt"):
        shares = []
        for sequence in range(3):
            frames = IMAGES[draw.integers(0, COUNT, 12)]
            if sequence == 2:  # a video without loss
                path = root / name / "n01" / "clip.avi"
                video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 10, (32, 32))
                assert video.isOpened()
                for frame in frames:
                    video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
                video.release()
                frames = [np.array(frame) for frame in cells_of.read_frames(path)]
                assert len(frames) == 12
            else:
                write_frames(root / name / "n01" / f"s{sequence}", frames)
            found = answers(model, frames)
            flipped, reference = 0, found[0]
            for answer in found[1:]:
                flipped += answer != reference
                reference = reference if name == "gaussian_noise" else answer
            shares.append(flipped / 11)
        expected[name] = np.mean(shares)
    few = [*MODEL, "--weights", made / "plain-0.safetensors", "--arm", "plain=", "--imagenet-p", root]
    few += ["--corruptions", "none"]
    few[3] += ",num_classes=7"
    call(*few, "--batch-size", 5, "--workers", 1, "--out", tmp_path / "out")
    printed = (tmp_path / "out/results.md").read_text()
    found = {name: cells(tmp_path / "out")[f"flips/{name}"]["flip_rate"] for name in expected}
    assert found == pytest.approx(expected) and 0 < found["tilt"] < 1
    assert "no mFR: it is defined by all 10" in printed and f"{100 * expected['tilt']:.1f}" in printed
    write_frames(root / "tilt" / "n02" / "short", IMAGES[:1])
    assert "short holds 1 frames, it takes 2 to compare" in refused(*few, "--out", tmp_path / "broken")


def test_unreadable_pictures_stop_the_bench_by_name(made, tmp_path):
    write_folder(tmp_path / "x", IMAGES, LABELS)
    bad = tmp_path / "x" / NAMES[LABELS[0]] / "00.png"
    bad.write_bytes(bad.read_bytes()[:100])
    few = [*MODEL, "--weights", made / "plain-0.safetensors", "--arm", "plain=", "--data", tmp_path / "x"]
    few[3] += ",num_classes=7"
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    few += ["--classes", tmp_path / "names.txt", "--corruptions", "none", "--out", tmp_path / "out"]
    for workers in ("0", "1"):
        assert f"{bad} can't be decoded" in refused(*few, "--workers", workers)


def test_what_image_classification_trained_is_tested_without_further_options(tmp_path):
    trained, out = tmp_path / "trained", tmp_path / "out"
    few = ["--arm", "plain=", "--arm", "soft=soft,ratio=2", "--epochs", "0.05", "--seeds", "0,1", "--out", trained]
    runs = command.training.main(["--quick", *map(str, few)])
    call("--trained", trained, "--quick", "--limit", "360", "--corruptions", "none", "--out", out)
    for run in runs:
        assert cells(out, run["arm"], run["seed"])["clean"]["top1"] == pytest.approx(run["top1"])


def test_hugging_face_folders_are_tested_as_their_processor_says(made, tmp_path):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=36,
        patch_size=12,
        id2label=dict(enumerate(NAMES)),
    )
    model = tiny.sharpen(ViTForImageClassification(config), 3)
    model.save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessor(size={"height": 36, "width": 36}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(tmp_path / "vit")
    few = ["--model", tmp_path / "vit", "--data", made / "x.npz", "--corruptions", "contrast", "--severities", "2"]
    call(*few, "--arm", "plain=", "--arm", "tap=tap", "--out", tmp_path / "out")
    found = [int(model(**processor(images=image, return_tensors="pt")).logits.argmax()) for image in IMAGES]
    figures = cells(tmp_path / "out")
    assert figures["clean"]["top1"] == pytest.approx(np.mean(np.array(found) == LABELS)) and len(set(found)) > 2
    assert cells(tmp_path / "out", "tap")["clean"]["top1"] == figures["clean"]["top1"]  # it starts as the identity
    ViTConfig().save_pretrained(tmp_path / "empty")
    printed = refused(*few[2:], "--model", tmp_path / "empty", "--out", tmp_path / "no")
    assert "can't be read by transformers' AutoImageProcessor" in printed


def test_inputs_too_small_to_corrupt_are_refused_at_once(made, tmp_path):
    few = ["--data", made / "x.npz", "--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=16,patch_size=8"]
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=16, patch_size=8).state_dict(),
        tmp_path / "w.safetensors",
    )
    few += ["--weights", tmp_path / "w.safetensors", "--arm", "plain="]
    assert "16 x 16, corruptions need 32 x 32: with --corrupt picture" in refused(*few, "--out", tmp_path)
