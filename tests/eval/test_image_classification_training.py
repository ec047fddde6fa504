"""Training, testing and distilling in image classification, on pictures that a tiny ViT can tell apart."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vltok
from eval.image_classification.augment import Augment
from eval.image_classification.data import open_data
from eval.image_classification.distill import Distillation, Teacher, feature_error, kl_divergence
from eval.image_classification.models import ModelSpec
from eval.image_classification.recipe import Recipe
from eval.image_classification.task import prepare
from eval.image_classification.training import evaluate, fit

SPEC = ModelSpec("vit_tiny_patch16_224", dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2))
RECIPE = Recipe(steps=6, batch_size=8, lr=3e-3)
SOFT = vltok.SOFT(ratio=2)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Six colours, with noise."""
    random = np.random.default_rng(0)
    labels = np.arange(48) % 6
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
    images = (60 + 120 * colours[labels][:, None, None] + random.normal(0, 15, (48, 16, 16, 3))).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "x.npz"
    np.savez(path, train_images=images[:36], train_labels=labels[:36], test_images=images[36:], test_labels=labels[36:])
    return prepare(SPEC, open_data(path), Augment("crop-flip", {"pad": 1}), torch.device("cpu"))


def test_arms_of_a_seed_share_the_weights_that_both_have():
    plain, soft = (SPEC.build(1, 6, methods)[0].state_dict() for methods in ((), (SOFT,)))
    shared = plain.keys() & soft.keys()
    assert len(shared) > 10 and plain.keys() - shared and soft.keys() - shared
    assert all(torch.equal(plain[name], soft[name]) for name in shared)
    again, other = (SPEC.build(seed, 6, (SOFT,))[0].state_dict() for seed in (1, 2))
    assert all(torch.equal(soft[name], again[name]) for name in soft)
    assert not torch.equal(other["head.weight"], again["head.weight"])


def test_a_run_learns_and_its_curve_ends_with_its_result(task):
    model, _ = SPEC.build(0, 6)
    result = fit(model, None, task, Recipe(steps=40, batch_size=12, lr=5e-3), 0, eval_every=15, eval_first=True)
    assert [point["step"] for point in result["curve"]] == [0, 15, 30, 40]
    assert result["top1"] == result["curve"][-1]["top1"] >= 0.75 > 0.4 > result["curve"][0]["top1"]
    assert result["curve"][-1]["train_loss"] < result["curve"][1]["train_loss"]
    assert result["top1"] == evaluate(model, task)["top1"] and model.training
    assert result["images_per_second"] > 0 and 0 < result["data_share"] < 1


@pytest.mark.parametrize("methods", [(), (SOFT,)], ids=["plain", "soft"])
def test_a_seed_decides_a_run(task, methods):
    def run(seed, noise):
        model, handle = SPEC.build(seed, 6, methods)
        torch.manual_seed(noise)
        fit(model, handle, task, RECIPE, seed)
        return nn.utils.parameters_to_vector(model.parameters())

    first = run(0, 11)
    assert torch.equal(first, run(0, 12)) and not torch.equal(first, run(1, 11))


def test_losses_that_methods_leave_are_added(task):
    class FiveMore:
        def loss(self):
            return torch.tensor(5.0)

    plain, more = (fit(SPEC.build(0, 6)[0], handle, task, RECIPE, 0)["curve"][-1] for handle in (None, FiveMore()))
    assert more["train_loss"] == pytest.approx(plain["train_loss"] + 5, abs=1e-5)


def test_evaluation_counts_what_is_right_among_one_and_among_five(task):
    labels = torch.cat([labels for _, labels in task.test.batches(torch.arange(12), 12)])
    ranks = torch.tensor([0, 0, 0, 1, 4, 4, 4, 5, 5, 2, 3, 0])  # of the true class among the six logits
    logits = torch.zeros(12, 6)
    for row, label, rank in zip(logits, labels, ranks, strict=True):
        others = [k for k in range(6) if k != label]
        for place, k in enumerate([*others[:rank], int(label), *others[rank:]]):
            row[k] = -float(place)

    class Known(nn.Module):
        at = 0

        def forward(self, x):
            assert not self.training
            self.at += len(x)
            return logits[self.at - len(x) : self.at]

    figures = evaluate(Known(), task, batch_size=5)
    assert figures["top1"] == 4 / 12 and figures["top5"] == 10 / 12 and figures["tested"] == 12
    assert figures["loss"] == pytest.approx(float((logits.logsumexp(1) + ranks).mean()), rel=1e-6)


def test_the_rate_warms_up_to_its_peak_and_falls_to_a_hundredth():
    model = nn.Linear(2, 2)
    recipe = Recipe(steps=100, lr=1.0, warmup=0.1)
    optimizer = recipe.make_optimizer(model)
    schedule = recipe.make_schedule(optimizer, 100)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 101):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01) and rates[5] == pytest.approx(0.505)
    assert rates[10] == max(rates) and rates[10] == pytest.approx(1, abs=0.03)
    assert rates[55] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * 0.55)) / 2)
    assert rates[100] == pytest.approx(0.01)
    decays = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    assert decays == {0.05: 4, 0.0: 2}


def test_epochs_are_counted_in_whole_batches():
    assert Recipe(epochs=2, batch_size=10).total_steps(39) == 6
    assert Recipe(epochs=0.5, batch_size=10).total_steps(39) == 2
    assert Recipe(steps=7, batch_size=10).total_steps(39) == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(epochs=1, steps=1), "either epochs or steps"),
        (dict(), "either epochs or steps"),
        (dict(epochs=-1), "above 0"),
        (dict(steps=1, lr=0), "rate must be above 0"),
        (dict(steps=1, warmup=1), "in \\[0, 1\\)"),
        (dict(steps=1, mixup=0.2, batch_size=7), "even batch size"),
        (dict(steps=1, clip_grad=0), "above 0"),
        (dict(steps=1, weight_decay=-1), "from 0"),
    ],
)
def test_budgets_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)
    with pytest.raises(ValueError, match="can't make the optimizer 'adamx'"):
        Recipe(steps=1, optimizer="adamx").make_optimizer(nn.Linear(2, 2))


def test_mixup_and_limited_gradients_change_a_run(task):
    plain, mixed, cut = (
        fit(SPEC.build(0, 6)[0], None, task, recipe, 0)["curve"][-1]["train_loss"]
        for recipe in (
            RECIPE,
            Recipe(steps=6, batch_size=8, lr=3e-3, mixup=1.0),
            Recipe(steps=6, batch_size=8, lr=3e-3, optimizer="sgd", clip_grad=1e-6),
        )
    )
    assert len({plain, mixed, cut}) == 3


def test_autocast_multiplies_in_bfloat16(task):
    seen = []
    model, _ = SPEC.build(0, 6)
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    amp = prepare_like(task, amp=True)
    fit(model, None, amp, Recipe(steps=1, batch_size=8), 0)
    assert set(seen) == {torch.bfloat16}


def prepare_like(task, **changes):
    return type(task)(**{**vars(task), **changes})


def test_a_loss_that_is_not_finite_stops_the_run(task):
    model, _ = SPEC.build(0, 6)
    nn.init.constant_(model.head.bias, torch.inf)
    with pytest.raises(FloatingPointError, match="smaller --lr"):
        fit(model, None, task, RECIPE, 0)


def test_divergence_is_that_of_the_definition():
    logits, wanted = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = ((x / 3).softmax(1) for x in (wanted, logits))
    slow = sum(9 * p[i, k] * (p[i, k] / q[i, k]).log() for i in range(4) for k in range(6)) / 4
    torch.testing.assert_close(kl_divergence(logits, wanted, 3.0).double(), slow, rtol=1e-5, atol=0)


def test_the_error_of_features_is_a_share_of_their_mean_square():
    wanted = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[2.0]])}
    found = {"a": torch.tensor([[3.0, 3.0]]), "b": torch.tensor([[4.0]])}
    assert feature_error(found, wanted) == pytest.approx((1 / 25 + 4 / 4) / 2)
    with pytest.raises(ValueError, match="a gives"):
        feature_error({"a": torch.zeros(1, 3)}, {"a": torch.ones(1, 2)})


def test_a_student_follows_its_teacher_and_not_the_labels(task):
    teacher_model, _ = SPEC.build(5, 6)
    with torch.no_grad():
        teacher_model.head.weight.mul_(40)
    distillation = Distillation(weight=1.0, temperature=1.0, features=0.5)
    student, _ = SPEC.build(5, 6, (SOFT,))
    images = task.preprocess.normalise(task.test.images)
    before = [p.clone() for p in teacher_model.parameters()]

    def count_hooks():
        return sum(len(module._forward_hooks) for model in (student, teacher_model) for module in model.modules())

    hooks = count_hooks()

    def agreement():
        with torch.no_grad():
            return kl_divergence(student.eval()(images), teacher_model(images), 1.0)

    apart = agreement()
    fit(student, None, task, Recipe(steps=40, batch_size=12, lr=3e-3), 0, teacher=Teacher(teacher_model, distillation))
    assert agreement() < 0.5 * apart
    assert all(torch.equal(a, b) for a, b in zip(before, teacher_model.parameters(), strict=True))
    assert count_hooks() == hooks


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(task):
    model, _ = SPEC.build(0, 6)
    teacher = Teacher(SPEC.build(0, 6)[0], Distillation(weight=1.0, features=1.0))
    images = task.preprocess.normalise(task.test.images)
    with teacher.watch(model.eval()) as features:
        assert teacher.loss(images, model(images), features, torch.tensor(7.0)).item() == pytest.approx(0, abs=1e-6)


def test_models_that_name_no_features_can_only_distil_logits():
    with pytest.raises(ValueError, match="names no features"):
        Teacher(nn.Linear(2, 2), Distillation(features=1.0))
    for wrong in (dict(weight=2.0), dict(temperature=0.0), dict(features=-1.0)):
        with pytest.raises(ValueError, match="must be"):
            Distillation(**wrong)


def test_weights_are_of_the_model_without_methods_or_with_them(tmp_path):
    plain, (soft, _) = SPEC.build(0, 6)[0], SPEC.build(0, 6, (SOFT,))
    with torch.no_grad():
        plain.head.weight.add_(1)
        soft.blocks[0].attn.W_q.weight.add_(1)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    save_file(soft.state_dict(), tmp_path / "soft.safetensors")
    for name in ("plain.safetensors", "plain.pth"):
        model, _ = SPEC.build(1, 6, (SOFT,), tmp_path / name)
        assert torch.equal(model.head.weight, plain.head.weight)
        # queries start from the mean of queries and keys of the file, so the file was read before the method came
        torch.testing.assert_close(
            model.blocks[0].attn.W_q.weight, plain.blocks[0].attn.qkv.weight[:32].unflatten(0, (2, 16)).mean(0)
        )
    model, _ = SPEC.build(1, 6, (SOFT,), tmp_path / "soft.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in soft.state_dict().items())
    new = ModelSpec(SPEC.name, SPEC.kwargs, new_head=True).build(1, 4, (), tmp_path / "plain.safetensors")[0]
    assert torch.equal(new.pos_embed, plain.pos_embed) and new.head.weight.shape == (4, 16)
    assert torch.equal(new.head.weight, SPEC.create(1, 4).head.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file(SPEC.build(0, 6)[0].state_dict(), tmp_path / "plain.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing")
    (tmp_path / "text.pth").write_text("nothing")
    torch.save({"f": nn.Linear(1, 1)}, tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"2 of another shape: head\.bias, head\.weight; with --weights, --new-head"):
        SPEC.build(0, 4, (), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"missing: .*1 unknown: x"):
        SPEC.build(0, 6, (), tmp_path / "x.safetensors")
    for name in ("text.safetensors", "text.pth", "module.pth"):
        with pytest.raises(ValueError, match="no file of weights that can be read safely"):
            SPEC.build(0, 6, (), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file of weights"):
        SPEC.build(0, 6, (), tmp_path / "none.pth")


def test_unknown_models_and_arguments_are_refused_and_known_ones_near_are_named():
    with pytest.raises(ValueError, match=r"near it: .*vit_tiny_patch16_224"):
        ModelSpec("vit_tiny_patch16_22").create(0, 2)
    with pytest.raises(ValueError, match="can't make vit_tiny_patch16_224"):
        ModelSpec("vit_tiny_patch16_224", {"colour": 3}).create(0, 2)
    with pytest.raises(ValueError, match="no model 'hf-hub:timm/x'"):
        ModelSpec("hf-hub:timm/x").create(0, 2)


def test_backbones_of_vltok_are_among_the_models():
    assert type(ModelSpec("soft_tiny").create(0, 3)).__module__.startswith("vltok.models")
