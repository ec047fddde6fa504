"""What `apply` promises, checked for every method on every family."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from matrix import EVERY, PAIRS, REFUSED, Pair
from prompts import CACHE
from tiny import LLAVA_ONEVISION, TinyFamily, picture, shared_model

import vltok
from vltok.errors import EditConflictError, UnsupportedModelError

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
PROMPTS = ["w1 <image> w2 w3", "w4 <image> w5 w6 w7 <image> w8 w9 w1", "w3 w4"]
ALONE = [0, 1, 1]  # the row each picture belongs to


@pytest.fixture(params=PAIRS)
def pair(request) -> Pair:
    return PAIRS[request.param]


PRUNING = [name for name, pair in PAIRS.items() if pair.prunes]
TRAINED = [name for name in PAIRS if name not in PRUNING]
only_pruning = pytest.mark.parametrize("pair", PRUNING, indirect=True)
only_trained = pytest.mark.parametrize("pair", TRAINED, indirect=True)


@pytest.fixture
def model(pair) -> torch.nn.Module:
    """A model that tests may attach to but must leave as they found it."""
    return shared_model(pair.family)


@functools.lru_cache
def pictures(family: TinyFamily):
    return [picture(0, family.size), picture(1, family.other_size), picture(2, family.size)]


@functools.lru_cache
def plain(family: TinyFamily):
    """The prompts for the untouched model."""
    return family.inputs(PROMPTS, pictures(family))


@functools.lru_cache
def batch(pair: Pair, side: str = "left"):
    return pair.inputs(PROMPTS, pictures(pair.family), padding_side=side)


@functools.lru_cache
def single(pair: Pair, row: int):
    return pair.inputs(
        [PROMPTS[row]], [p for p, owner in zip(pictures(pair.family), ALONE, strict=True) if owner == row]
    )


@functools.lru_cache
def saved_files(family: TinyFamily) -> dict[str, bytes]:
    """What save_pretrained writes of the untouched model."""
    with tempfile.TemporaryDirectory() as folder:
        shared_model(family).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@torch.no_grad()
def logits(model, inputs, **options):
    return model(**inputs, **options).logits


@torch.no_grad()
def generate(model, inputs, **options):
    # A random model may write the image placeholder, which transformers then takes for an image.
    placeholder = [model.config.image_token_id]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "suppress_tokens": placeholder} | options
    tokens = model.generate(**inputs, **options)
    return tokens[:, inputs["input_ids"].shape[1] :]


def fingerprint(model) -> dict[str, object]:
    """Everything of a model that a method could leave behind."""
    modules = dict(model.named_modules())
    return {
        "children": list(modules),
        "classes": [type(module) for module in modules.values()],
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for name, module in modules.items()
        },
        "modes": [module.training for module in modules.values()],
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
    }


def test_remove_restores_the_model_bit_for_bit(pair, model):
    inputs = plain(pair.family)
    before = generate(model, inputs), logits(model, inputs)  # first, as transformers adds hooks of its own lazily
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mark = fingerprint(model)
    handle = pair.apply(model)
    if pair.method.training_free:
        assert list(model.state_dict()) == list(state), "a training-free method must not add weights"
    generate(model, batch(pair))
    handle.remove()
    handle.remove()
    assert fingerprint(model) == mark
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(generate(model, inputs), before[0])
    assert torch.equal(logits(model, inputs), before[1])


@only_pruning
def test_pruning_changes_the_answer_and_shortens_the_sequence(pair, model):
    inputs = batch(pair)
    before = logits(model, inputs)
    with pair.apply(model) as handle:
        after = logits(model, inputs)
        report = handle.report(file=None)
    assert before.shape == after.shape
    real = inputs["attention_mask"].bool()
    assert not torch.allclose(before[real], after[real], atol=1e-3)
    assert (report.tokens_per_layer[:, -1] < real.sum(1))[:2].all()


def test_handle_is_a_context_manager_that_detaches_on_an_exception(pair, model):
    mark = fingerprint(model)
    with pytest.raises(KeyError), pair.apply(model) as handle:
        raise KeyError
    assert not handle.is_attached
    assert fingerprint(model) == mark


def test_a_failure_half_way_leaves_the_model_as_it_was(pair, model):
    class Broken(vltok.Method):
        def attach(self, view, edits, run):
            edits.set_attribute(model, "stray", 1)
            raise RuntimeError("half-way")

    mark = fingerprint(model)
    with pytest.raises(RuntimeError, match="half-way"):
        vltok.apply(model, [pair.method, Broken()], processor=pair.family.processor())
    assert fingerprint(model) == mark


def test_a_second_handle_of_its_kind_is_refused_and_changes_nothing(pair, model):
    with pair.apply(model):
        mark = fingerprint(model)
        with pytest.raises((ValueError, EditConflictError), match=r"already (pruned|condensed|softmax-free|has)"):
            pair.apply(model)
        assert fingerprint(model) == mark


def test_a_deepcopy_runs_on_its_own_weights(pair, model):
    inputs = batch(pair)
    original = copy.deepcopy(model)
    handle = pair.apply(original)
    expected = logits(original, inputs)
    twin = copy.deepcopy(original)
    assert torch.equal(logits(twin, inputs), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    changed = logits(twin, inputs)
    assert torch.equal(logits(original, inputs), expected)
    handle.remove()
    fresh = copy.deepcopy(original)
    with pair.apply(fresh):
        fresh.load_state_dict(twin.state_dict())
        assert torch.equal(logits(fresh, inputs), changed)
    assert torch.equal(logits(twin, inputs), changed), "removing the original's handle must not reach its copy"


def another(model, family) -> vltok.Handle:
    """A method with other settings than any of the matrix."""
    if family is LLAVA_ONEVISION:
        return vltok.apply(model, vltok.TokenPacker(scale_factor=1), processor=family.processor())
    return vltok.apply(model, vltok.StrideTokens(num_keep=2))


def test_two_models_with_different_settings_coexist(pair, model):
    inputs = batch(pair)
    other = copy.deepcopy(model)
    with pair.apply(model):
        expected = logits(model, inputs)
    with pair.apply(model), another(other, pair.family):
        strided = logits(other, plain(pair.family))
        assert torch.equal(logits(model, inputs), expected)
        assert torch.equal(logits(other, plain(pair.family)), strided)


def test_text_only_prompts_pass_through_unchanged(pair, model):
    inputs = pair.family.inputs(["w1 w2 w3", "w4"])
    expected = generate(model, inputs), logits(model, inputs)
    with pair.apply(model):
        assert torch.equal(generate(model, inputs), expected[0])
        assert torch.equal(logits(model, inputs), expected[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_equals_the_row_alone(pair, model, side):
    inputs = batch(pair, side)
    real = inputs["attention_mask"].bool()
    with pair.apply(model) as handle:
        together = logits(model, inputs)
        report = handle.report(file=None)
        for row in range(len(PROMPTS)):
            alone = logits(model, single(pair, row))
            torch.testing.assert_close(together[row][real[row]], alone[0], **TOLERANCE)
            if row in ALONE and pair.prunes:
                mine = handle.report(file=None)
                assert mine.kept_tokens == [report.kept_tokens[row]]
                for a, b in zip(mine.keep_indices[0], report.keep_indices[row], strict=True):
                    assert torch.equal(a, b)
                assert torch.equal(mine.tokens_per_layer[0], report.tokens_per_layer[row])


def test_generation_of_a_row_does_not_depend_on_the_batch(pair, model):
    with pair.apply(model):
        together = generate(model, batch(pair))
        for row in range(len(PROMPTS)):
            assert torch.equal(together[row], generate(model, single(pair, row))[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generation_with_and_without_a_cache_agrees(pair, model, options):
    with pair.apply(model):
        cached = generate(model, batch(pair), use_cache=True, **options)
        assert torch.equal(cached, generate(model, batch(pair), use_cache=False, **options))


def test_sampling_follows_the_seed(pair, model):
    options = {"do_sample": True, "num_return_sequences": 2}
    with pair.apply(model):
        torch.manual_seed(0)
        first = generate(model, batch(pair), **options)
        torch.manual_seed(0)
        assert torch.equal(generate(model, batch(pair), **options), first)
    assert first.shape == (2 * len(PROMPTS), 5)


def test_eager_and_sdpa_agree(pair, model):
    inputs, eager = batch(pair), shared_model(pair.family, "eager")
    assert model.config._attn_implementation == "sdpa" and eager.config._attn_implementation == "eager"
    real = inputs["attention_mask"].bool()
    with pair.apply(model), pair.apply(eager):
        torch.testing.assert_close(logits(eager, inputs)[real], logits(model, inputs)[real], **TOLERANCE)


def test_bfloat16_generates_and_keeps_the_budget(pair, model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    with pair.apply(half) as handle, pair.apply(model) as reference:
        inputs = batch(pair)
        pixels = {"pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
        assert generate(half, {**inputs, **pixels}).shape == (len(PROMPTS), 5)
        logits(model, inputs)
        assert handle.report(file=None).kept_tokens == reference.report(file=None).kept_tokens


def test_labels_give_the_loss_of_the_kept_sequence_and_gradients(pair, model):
    inputs = batch(pair, "right")
    trained = copy.deepcopy(model).train()
    placeholder = inputs["input_ids"] == model.config.image_token_id
    labels = inputs["input_ids"].masked_fill(placeholder | ~inputs["attention_mask"].bool(), -100)
    with pair.apply(trained) as handle:
        output = trained(**inputs, labels=labels)
        output.loss.backward()
        new = set(handle.added_modules)
        hosts = [host for host in trained.modules() if new & set(host.children())]
        read = [host for host in hosts if any(p.grad is not None for p in host.parameters())]  # LLaVA: not block -1
        added = [p for host in read for module in new & set(host.children()) for p in module.parameters()]
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    # Each labelled token is predicted from the last kept token before it, which is where the logits stand.
    scores, target = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(scores[target != -100], target[target != -100])
    torch.testing.assert_close(output.loss, expected)
    missing = [
        name for name, p in trained.named_parameters() if "layers" in name and "language" in name and p.grad is None
    ]
    assert not missing
    assert not new or added
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in added)
    tower = [p.grad for name, p in trained.named_parameters() if "patch_embed" in name and p.grad is not None]
    assert tower and all(grad.abs().sum() > 0 for grad in tower)


def test_gradient_checkpointing_gives_the_same_gradients(pair, model):
    inputs = batch(pair, "right")
    grads = []
    for reentrant in (None, False, True):
        trained = copy.deepcopy(model).train()
        if reentrant is not None:
            trained.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            trained.enable_input_require_grads()
        with pair.apply(trained):
            trained(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in trained.named_parameters() if p.grad is not None})
    for checkpointed in grads[1:]:
        assert checkpointed.keys() == grads[0].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(checkpointed[name], grad, rtol=1e-3, atol=1e-5)


def test_hidden_states_come_back_at_the_length_of_the_prompt(pair, model):
    inputs = batch(pair)
    with pair.apply(model), torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == model.config.get_text_config().num_hidden_layers + 1
    assert all(state.shape[:2] == inputs["input_ids"].shape for state in states)


@only_pruning
def test_report_tells_what_the_cache_holds(pair, model):
    inputs = batch(pair)
    with pair.apply(model) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        report = handle.report(file=None)
    method = pair.method
    keys = [layer.keys for layer in cache.layers]
    assert report.kv_entries == [key.shape[-2] for key in keys]
    assert report.kv_bytes == sum(2 * key.numel() * key.element_size() for key in keys)
    assert report.tokens_per_layer.max(0).values.tolist() == report.kv_entries
    placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert [sum(row) for row in report.visual_tokens] == placeholders
    for row, kept in zip(report.visual_tokens, report.kept_tokens, strict=True):
        budgets = {"keep_ratio": method.keep_ratio, "num_keep": method.num_keep}
        if budgets == {"keep_ratio": None, "num_keep": None}:
            assert kept == row
        else:
            assert kept == [vltok.tokens.keep_count(n, **budgets) for n in row]


@only_pruning
def test_saving_the_base_model_is_unaffected(pair, model, tmp_path):
    with pair.apply(model):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == saved_files(pair.family)


def test_a_saved_method_comes_back_equal(pair, model, tmp_path):
    with pair.apply(model) as saved:
        expected = logits(model, batch(pair))
        vltok.save(saved, tmp_path)
    with vltok.load(model, tmp_path, processor=pair.family.processor()) as handle:
        assert handle.methods == saved.methods
        assert not pair.prunes or handle.methods == (pair.method,)
        assert torch.equal(logits(model, batch(pair)), expected)


@only_trained
def test_a_checkpoint_with_new_weights_loads_with_vltok_and_not_without(pair, model, tmp_path):
    with pair.apply(model) as handle:
        expected = logits(model, batch(pair))
        model.save_pretrained(tmp_path)
        handle.processor.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match=r"vltok\.from_pretrained"):
        type(model).from_pretrained(tmp_path)
    loaded = vltok.from_pretrained(tmp_path)
    assert loaded.methods == handle.methods
    inputs = pair.family.inputs(PROMPTS, pictures(pair.family), processor=loaded.processor)
    assert torch.equal(logits(loaded.model, inputs), expected)
    loaded.remove()
    config, expected = loaded.model.config.to_dict(), model.config.to_dict()
    fields = config.keys() - {"_name_or_path", "dtype", "text_config", "vision_config"}
    assert {name: config[name] for name in fields} == {name: expected[name] for name in fields}
    assert config["vision_config"] | {"dtype": "float32"} == expected["vision_config"] | {"dtype": "float32"}


@only_trained
def test_new_weights_take_dtype_and_mode_of_their_place(pair, model):
    half = copy.deepcopy(model).to(torch.bfloat16).train()
    with pair.apply(half) as handle:
        for module in handle.added_modules:
            assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
            assert module.training


@pytest.mark.parametrize(("method", "family"), sorted(REFUSED))
def test_a_family_that_has_no_place_for_a_method_says_so_and_is_left_alone(method, family):
    pair = EVERY[method, family]
    model = shared_model(pair.family)
    mark = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match="families that can: llava"):
        pair.apply(model)
    assert fingerprint(model) == mark


def test_methods_are_frozen_hashable_and_printable(pair):
    method = pair.method
    assert hash(method) == hash(copy.deepcopy(method))
    with pytest.raises(AttributeError):
        method.anything = 1.0
    assert repr(method).startswith(type(method).__name__)
