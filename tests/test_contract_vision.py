"""What `apply` promises, checked for every method that changes a vision tower on every tower."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from towers import EVERY, PAIRS, REFUSED, VisionPair, draw, pixels, shared_tower
from unchanged import unchanged

import vltok
from vltok.errors import CheckpointError, EditConflictError, UnsupportedInputError, UnsupportedModelError
from vltok.nn import SoftmaxFreeAttention

# Of the largest number: float32 sums in another order, through three blocks. Measured: 2e-6 at most.
TOLERANCE = 2e-5


@pytest.fixture(params=PAIRS)
def pair(request) -> VisionPair:
    return EVERY[request.param]


def only(condition) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pair", [name for name, pair in PAIRS.items() if condition(pair)], indirect=True)


weighted = only(lambda pair: pair.brings_weights)
changing = only(lambda pair: pair.changes)
only_soft = only(lambda pair: pair.has(vltok.SOFT))


@pytest.mark.parametrize("pair", REFUSED, indirect=True)
def test_towers_that_are_more_than_softmax_over_one_grid_are_refused_and_stay(pair, model):
    words = r"takes images of several sizes at once|by rotary positions|has further weights, q_norm\.weight"
    words += "|lays its tokens out as maps|takes no mask"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=words):
        pair.apply(model)


@pytest.fixture
def model(pair) -> nn.Module:
    """A model that tests may attach to but must leave as they found it."""
    return shared_tower(pair.tower)


@torch.no_grad()
def answer(pair: VisionPair, model: nn.Module, *size: int, **options) -> torch.Tensor:
    return pair.tower.answer(model, pixels(*size), **options)


@functools.lru_cache
def plain(pair: VisionPair) -> torch.Tensor:
    """What the untouched model answers."""
    return answer(pair, shared_tower(pair.tower))


@functools.lru_cache
def changed(pair: VisionPair) -> torch.Tensor:
    """What it answers with the method on."""
    model = shared_tower(pair.tower)
    with pair.apply(model):
        return answer(pair, model)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_remove_restores_the_model_bit_for_bit(pair, model):
    before = plain(pair)
    with unchanged(model):
        with pair.apply(model) as handle:
            assert handle.family == pair.tower.family
            after = answer(pair, model)
            handle.remove()
        assert not handle.is_attached
    assert pair.has(vltok.ToMe) or after.shape == before.shape
    if pair.changes:
        assert after.shape != before.shape or (after - before).abs().max() > 0.1 * before.abs().max()
    else:
        assert torch.equal(after, before)
    assert torch.equal(answer(pair, model), before)


def test_train_or_eval_mode_goes_with_the_place(pair, model):
    trained = copy.deepcopy(model).train()
    handle = pair.apply(trained)
    assert all(module.training for module in trained.modules())
    trained.eval()
    handle.remove()
    assert not any(module.training for module in trained.modules())


def test_handle_is_a_context_manager_that_detaches_on_an_exception(pair, model):
    with unchanged(model), pytest.raises(KeyError), pair.apply(model) as handle:
        raise KeyError
    assert not handle.is_attached


class Broken(vltok.Method):
    def attach(self, view, edits, run):
        edits.set_attribute(view.host, "stray", 1)
        raise RuntimeError("half-way")


class Watching(vltok.Method):
    """Looks at whatever attends in the second block."""

    def attach(self, view, edits, run):
        edits.after(view.vision.attention_module(1), lambda module, args, kwargs, output: None)


def test_a_failure_half_way_leaves_the_model_as_it_was(pair, model):
    with unchanged(model), pytest.raises(RuntimeError, match="half-way"):
        vltok.apply(model, [*pair.methods, Broken()])


@changing
def test_a_second_handle_of_its_kind_is_refused_and_changes_nothing(pair, model):
    words = "already softmax-free|already has 'dilation_predictor'|tokens are merged in this vision tower"
    with pair.apply(model), unchanged(model), pytest.raises((ValueError, EditConflictError), match=words):
        pair.apply(model)


@only_soft
def test_a_method_that_a_later_handle_watches_cannot_leave_before_it(pair, model):
    refused = pytest.raises(EditConflictError, match="remove the later handle first")
    with unchanged(model), pair.apply(model) as first, vltok.apply(model, Watching()), unchanged(model), refused:
        first.remove()


def test_a_deepcopy_runs_on_its_own_weights(pair, model):
    original = copy.deepcopy(model)
    handle = pair.apply(original)
    expected = answer(pair, original)
    twin = copy.deepcopy(original)
    assert torch.equal(answer(pair, twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    own = answer(pair, twin)
    assert not torch.equal(own, expected)
    assert torch.equal(answer(pair, original), expected)
    handle.remove()
    assert torch.equal(answer(pair, twin), own), "removing the original's handle must not reach its copy"
    assert torch.equal(answer(pair, original), plain(pair))


@changing
def test_two_models_with_different_settings_coexist(pair, model):
    other, expected = copy.deepcopy(model), changed(pair)
    others = vltok.SOFT(ratio=4, blocks=(0, 1)) if pair.tower.replaceable else vltok.TAP(num_scales=5, blocks=(0, 1))
    with draw(vltok.apply(other, others)):
        alone = answer(pair, other)
        with pair.apply(model):
            assert torch.equal(answer(pair, model), expected)
            assert torch.equal(answer(pair, other), alone)
    assert not torch.equal(alone, expected)


def test_a_row_of_a_batch_equals_the_row_alone(pair, model):
    together = changed(pair)
    with pair.apply(model), torch.no_grad():
        for row in range(3):
            assert_near(pair.tower.answer(model, pixels()[row : row + 1]), together[row : row + 1])


def test_eager_and_sdpa_agree(pair):
    eager = shared_tower(pair.tower, "eager")
    with pair.apply(eager):
        assert_near(answer(pair, eager), changed(pair))


@weighted
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bfloat16_answers_nearly_the_same(pair, model, autocast):
    half = copy.deepcopy(model) if autocast else copy.deepcopy(model).to(torch.bfloat16)
    with pair.apply(half) as handle, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dtypes = {parameter.dtype for module in handle.added_modules for parameter in module.parameters()}
        assert dtypes == {torch.float32 if autocast else torch.bfloat16}
        found = pair.tower.answer(half, pixels() if autocast else pixels().to(torch.bfloat16))
    assert_near(found.float(), changed(pair), 0.1)  # numbers have 8 bits, and errors grow from block to block


def gradients(pair: VisionPair, model: nn.Module, **options) -> dict[str, torch.Tensor]:
    """Gradients of all parameters of a copy in train mode."""
    trained = copy.deepcopy(model).train()
    if options:
        pair.tower.checkpoint(trained, **options)
    with pair.apply(trained) as handle:
        loss = pair.tower.tokens(trained, pixels()).square().sum()
        (loss + 100 * handle.loss()).backward()
        added = [name for name, module in trained.named_modules() if module in handle.added_modules]
        grads = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
        missing = [
            name
            for name, parameter in trained.named_parameters()
            if name.startswith(tuple(f"{each}." for each in added))
            and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
        ]
        assert bool(added) == pair.brings_weights and not missing
    return grads


def test_gradients_reach_every_new_parameter_and_the_patches(pair, model):
    grads = gradients(pair, model)
    patches = [name for name in grads if "patch" in name]
    assert patches and all(grads[name].abs().sum() > 0 for name in patches)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(pair, model, reentrant):
    if reentrant and pair.tower.is_hf and pair.has(vltok.ADL):
        with pytest.raises(UnsupportedInputError, match="use_reentrant=False"):
            gradients(pair, model, reentrant=reentrant)
        return
    grads = gradients(pair, model)
    checkpointed = gradients(pair, model, reentrant=reentrant)
    assert checkpointed.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=0, atol=1e-5 * grad.abs().max().item(), msg=name)


@changing
def test_a_saved_method_comes_back_equal(pair, model, tmp_path):
    expected = changed(pair)
    with pair.apply(model) as saved:
        vltok.save(saved, tmp_path)
        names = {module: name for name, module in saved.host.named_modules()}
        added = {f"{names[module]}.{key}" for module in saved.added_modules for key in module.state_dict()}
    assert (load_file(tmp_path / "vltok.safetensors").keys() if added else set()) == added
    with unchanged(model), vltok.load(model, tmp_path) as handle:
        assert handle.methods == saved.methods
        assert torch.equal(answer(pair, model), expected)


@only(lambda pair: pair.tower.is_hf and pair.brings_weights)
def test_a_checkpoint_with_new_weights_loads_with_vltok_and_not_without(pair, model, tmp_path):
    with pair.apply(model) as handle:
        model.save_pretrained(tmp_path, max_shard_size="80KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    guard = (RuntimeError, "negative") if getattr(model.config, "use_swiglu_ffn", False) else (KeyError, "vltok")
    with pytest.raises(guard[0], match=guard[1]):
        type(model).from_pretrained(tmp_path)
    if not pair.tower.loads:
        with pytest.raises(CheckpointError, match="holds no model that transformers can build"):
            vltok.from_pretrained(tmp_path)
        return
    loaded = vltok.from_pretrained(tmp_path)
    assert type(loaded.model) is type(model)
    assert loaded.methods == handle.methods
    assert torch.equal(answer(pair, loaded.model), changed(pair))
    loaded.remove()
    assert settings(loaded.model.config) == settings(model.config)


def settings(config) -> dict:
    """A config as it is saved, without what says when and where."""
    fields = config.to_dict()
    nested = fields.get("vision_config", {}), fields.get("text_config", {})
    for each in (fields, *nested):
        for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
            each.pop(name, None)
    return fields


@only(lambda pair: not pair.tower.is_hf and pair.brings_weights)
def test_a_plain_state_dict_fits_before_and_after_and_not_meanwhile(pair, model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = copy.deepcopy(model)
    with pair.apply(other), pytest.raises(RuntimeError, match=r"Missing key"):
        other.load_state_dict(state, strict=True)
    other.load_state_dict(state, strict=True)
    assert torch.equal(answer(pair, other), plain(pair))


@only(lambda pair: pair.tower.is_hf and pair.changes)
@torch.no_grad()
def test_hidden_states_come_back_at_every_block(pair, model):
    expected = pair.tower.output(model, pixels(), output_hidden_states=True).hidden_states
    with pair.apply(model):
        states = pair.tower.output(model, pixels(), output_hidden_states=True).hidden_states
        assert torch.equal(pair.tower.answer(model, pixels()), pair.tower.answer(model, pixels(), return_dict=True))
    if pair.has(vltok.ToMe):
        assert [state.shape[1] for state in states] == sorted((state.shape[1] for state in states), reverse=True)
        assert len(states) == len(expected) and states[-1].shape[1] < states[0].shape[1]
    else:
        assert [state.shape for state in states] == [state.shape for state in expected]
    assert torch.equal(states[0], expected[0])
    assert not torch.equal(states[-1], expected[-1])


@only(lambda pair: pair.tower.is_hf and pair.has(vltok.SOFT))
@torch.no_grad()
def test_attention_maps_are_all_there_once_it_is_off(pair):
    untouched = shared_tower(pair.tower, "eager")
    model = pair.tower.model("eager")
    handle = pair.apply(model)
    pair.tower.output(model, pixels(), output_hidden_states=True)  # transformers hooks itself in, past what is off
    with pytest.raises(ValueError, match="attention maps are not to be had"):
        pair.tower.output(model, pixels(), output_attentions=True)
    handle.remove()
    maps = pair.tower.output(model, pixels(), output_attentions=True).attentions
    expected = pair.tower.output(untouched, pixels(), output_attentions=True).attentions
    assert len(maps) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


@only(lambda pair: pair.tower.any_size is not None)
def test_pictures_of_other_sizes_pass(pair, model):
    expected = changed(pair)
    with pair.apply(model), torch.no_grad():
        for height, width in ((24, 40), (64, 32), (48, 48)):
            shown, options = pixels(2, height, width), pair.tower.any_size
            found = pair.tower.answer(model, shown, **options)
            assert found.isfinite().all()
            assert_near(pair.tower.answer(model, shown[1:], **options), found[1:])
        assert torch.equal(pair.tower.answer(model, pixels()), expected)


@pytest.mark.parametrize("pair", [name for name in PAIRS if name.startswith(("clip-s", "timm-vit-"))], indirect=True)
def test_a_compiled_model_is_one_graph_and_follows_the_method_on_and_off(pair, model):
    expected, before = changed(pair), plain(pair)
    own = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(lambda shown: pair.tower.answer(own, shown), backend="eager", fullgraph=True)
    with torch.no_grad():
        with pair.apply(own):
            assert torch.equal(compiled(pixels()), expected)
        assert torch.equal(compiled(pixels()), before)


@only_soft
def test_the_attention_branch_carries_weight(pair, model):
    """Guards these tests: where kernels are 0 the convolution is all they see."""
    shares = []

    def measure(module, args, output):
        convolved = module._convolve(*args[1:])
        shares.append(((output - convolved).norm() / convolved.norm()).item())

    with pair.apply(model) as handle:
        for module in handle.added_modules:
            if isinstance(module, SoftmaxFreeAttention):
                module.attn.register_forward_hook(measure)
        answer(pair, model)
    assert shares and min(shares) > 0.2
