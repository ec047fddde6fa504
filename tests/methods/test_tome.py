"""ToMe: matching against published results and a naive twin, whole towers against a loop over their parts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import FAMILIES
from safetensors.torch import load_file
from tap_backbones import FAN, make
from torch import nn
from towers import TOWERS, pixels, shared_tower
from unchanged import unchanged

import vltok
from vltok.errors import EditConflictError, UnsupportedInputError, UnsupportedModelError
from vltok.methods.tome.merging import match_tokens, merge_schedule
from vltok.tokens import mean_by_group, patches_left

DATA = Path(__file__).parents[1] / "data"


def mergeable(*names: str) -> list[str]:
    """Those of the towers whose tokens can be merged in the installed version of transformers."""
    return [name for name in names if TOWERS[name].mergeable]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Matching


def naive_groups(keys: torch.Tensor, num_merge: int, prefix: int = 0) -> list[int]:
    """Pair by pair, for the keys of one picture, (N, d): every even token looks for the odd one most like it."""
    unit = [key / key.norm() if key.norm() > 0 else key for key in keys.double()]
    pairs = []
    for even in range(0, len(keys), 2):
        odd = [each for each in range(1, len(keys), 2) if each >= prefix]
        if even >= prefix and odd:
            best = max(odd, key=lambda each: (round((unit[even] @ unit[each]).item(), 9), -each))
            pairs.append((-round((unit[even] @ unit[best]).item(), 9), even, best))
    target = list(range(len(keys)))
    for _, even, best in sorted(pairs)[:num_merge]:
        target[even] = best
    members = {goal: [each for each in range(len(keys)) if target[each] == goal] for goal in target}
    order = sorted(members, key=lambda goal: members[goal][0])
    return [order.index(goal) for goal in target]


@pytest.mark.parametrize("name", ["tome_t64", "tome_t197_cls"])
def test_matching_is_the_published_one_in_its_order(name):
    golden = load_file(DATA / f"{name}.safetensors")
    length = golden["in.metric"].shape[1]
    prefix = length % 2  # [CLS]
    for key in (key for key in golden if key.endswith(".source")):
        case, left = key.removesuffix(".source"), golden[key].long().amax().item() + 1
        groups = match_tokens(golden["in.metric"], length - left, prefix, parity=True)
        assert torch.equal(groups, golden[key].long())
        ones = torch.ones_like(golden["in.size"][..., 0])
        mean = mean_by_group(golden["in.x"], groups, ones, left)
        torch.testing.assert_close(mean, golden[f"{case}.mean"], rtol=0, atol=1e-6)
        mean = mean_by_group(golden["in.x"], groups, golden["in.size"][..., 0], left)
        torch.testing.assert_close(mean, golden[f"{case}.wavg.x"], rtol=0, atol=2e-6)
        # In the order of the patches the groups are the same, and numbered by their first tokens.
        own = match_tokens(golden["in.metric"], length - left, prefix)
        for row, (ours, theirs) in enumerate(zip(own, groups, strict=True)):
            assert torch.equal(ours[:, None] == ours, theirs[:, None] == theirs), row
            firsts = [(ours == group).nonzero()[0].item() for group in range(left)]
            assert firsts == sorted(firsts)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_matching_is_that_of_the_naive_twin(data):
    length, prefix = data.draw(st.integers(1, 14)), data.draw(st.integers(0, 3))
    prefix = min(prefix, length)
    num_merge = data.draw(st.integers(0, (length - prefix) // 2))
    keys = random(2, length, 4, seed=data.draw(st.integers(0, 2**20)))
    if data.draw(st.booleans()):
        keys = keys.round().clamp(-1, 1)  # with many ties, duplicates and keys of norm zero
        keys[..., 1:] = 0
    found = match_tokens(keys, num_merge, prefix)
    assert found.tolist() == [naive_groups(each, num_merge, prefix) for each in keys]
    assert found.amax(1).tolist() == [length - num_merge - 1] * 2
    assert found[:, :prefix].tolist() == [list(range(prefix))] * 2


def test_rows_of_a_batch_are_matched_as_they_are_alone():
    keys = random(5, 197, 16)
    together = match_tokens(keys, 60, 1)
    assert all(torch.equal(match_tokens(keys[row : row + 1], 60, 1)[0], together[row]) for row in range(5))
    keys[2] = torch.nan  # nobody else's matter
    spoilt = match_tokens(keys, 60, 1)
    assert torch.equal(spoilt[[0, 1, 3, 4]], together[[0, 1, 3, 4]])


def test_low_precision_is_compared_in_float32_also_under_autocast():
    keys = (random(1, 1, 16) + 0.1 * random(2, 64, 16, seed=1)).bfloat16()  # so alike that 8 bits can't tell them apart
    expected = match_tokens(keys.float(), 20)
    assert expected.tolist() == [naive_groups(each, 20) for each in keys]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match_tokens(keys, 20), expected)
        assert torch.equal(match_tokens(keys.float(), 20), expected)


@pytest.mark.parametrize(("length", "prefix", "num_merge"), [(8, 0, 5), (9, 1, 5), (8, 0, -1), (1, 0, 1), (4, 4, 1)])
def test_more_than_half_is_refused(length, prefix, num_merge):
    with pytest.raises(ValueError, match="num_merge must be in"):
        match_tokens(random(1, length, 4), num_merge, prefix)


def test_means_are_weighted_and_leave_lone_tokens_alone_with_gradients():
    tokens, sizes = random(1, 4, 3).requires_grad_(), torch.tensor([[3.0, 1.0, 2.0, 7.0]])
    mean = mean_by_group(tokens, torch.tensor([[0, 1, 0, 2]]), sizes, 3)
    assert torch.equal(mean[0, 1:], tokens[0, [1, 3]])
    torch.testing.assert_close(mean[0, 0], (3 * tokens[0, 0] + 2 * tokens[0, 2]) / 5)
    mean.sum().backward()
    torch.testing.assert_close(tokens.grad[0, :, 0], torch.tensor([0.6, 1, 0.4, 1]))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 13), st.floats(0.001, 1))
def test_schedules_leave_an_exact_number_and_are_even(patches, blocks, ratio):
    keep = max(1, round(ratio * patches))
    fewest = math.ceil(patches / 2**blocks)
    if keep < fewest:
        with pytest.raises(ValueError, match=f"keep at least {fewest}$"):
            merge_schedule(patches, blocks, keep)
        return
    merges = merge_schedule(patches, blocks, keep)
    assert len(merges) == blocks and sum(merges) == patches - keep
    assert patches_left(patches, merges) == keep  # no block is asked for more than it can merge
    assert list(merges) == sorted(merges, reverse=True)
    if patches - keep <= keep:  # no block is full
        assert max(merges) - min(merges) <= 1


# Whole towers


def parts(block: nn.Module) -> SimpleNamespace:
    """A block's own parts: of CLIP or SigLIP, DINOv2, or timm."""
    if hasattr(block, "layer_norm1"):
        own, norms = block.self_attn, (block.layer_norm1, block.layer_norm2)
        layers, heads, scales = (own.q_proj, own.k_proj, own.v_proj, own.out_proj), own.num_heads, (nn.Identity(),) * 2
    elif hasattr(block, "layer_scale1"):
        own, norms = block.attention, (block.norm1, block.norm2)
        layers = (own.q_proj, own.k_proj, own.v_proj, own.o_proj)
        heads, scales = own.num_attention_heads, (block.layer_scale1, block.layer_scale2)
    else:
        own, norms = block.attn, (block.norm1, block.norm2)
        chunk = [lambda x, n=n: own.qkv(x).chunk(3, -1)[n] for n in range(3)]
        layers, heads, scales = (*chunk, own.proj), own.num_heads, (block.ls1, block.ls2)
    return SimpleNamespace(norms=norms, layers=layers, heads=heads, scales=scales, mlp=block.mlp)


def naive_tower(
    blocks: list[nn.Module], x: torch.Tensor, merges: tuple[int, ...], prefix: int, proportional: bool = True
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Block by block, for the tokens of one picture, (N, C): what leaves it, and what each first token went into."""
    sizes, source = torch.ones(len(x), dtype=x.dtype), list(range(len(x)))
    for block, count in zip(blocks, merges, strict=True):
        own = parts(block)
        query, key, value, out = own.layers
        seen = own.norms[0](x[None])
        q, k, v = (layer(seen)[0].unflatten(-1, (own.heads, -1)).transpose(0, 1) for layer in (query, key, value))
        logits = q @ k.mT / q.shape[-1] ** 0.5 + (sizes.log() if proportional else 0)
        attended = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + own.scales[0](out(attended[None]))[0]
        groups = naive_groups(k.mean(0), min(count, (len(x) - prefix) // 2), prefix)
        members = [[n for n, group in enumerate(groups) if group == own_group] for own_group in range(max(groups) + 1)]
        x = torch.stack([sum(sizes[n] * x[n] for n in each) / sum(sizes[n] for n in each) for each in members])
        sizes = torch.stack([sum(sizes[n] for n in each) for each in members])
        source = [groups[goal] for goal in source]
        x = x + own.scales[1](own.mlp(own.norms[1](x[None])))[0]
        yield x, source


def first_tokens(model: nn.Module, blocks: list[nn.Module], call: Callable[[], object]) -> torch.Tensor:
    """What enters the first block."""
    seen: list[torch.Tensor] = []
    hook = blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    call()
    hook.remove()
    return seen[0]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(max((part for part in model.modules() if isinstance(part, nn.ModuleList | nn.Sequential)), key=len))


METHODS = [
    vltok.ToMe(r=3),
    vltok.ToMe(r=(0, 5, 2)),
    vltok.ToMe(r=(8, 0, 1), proportional=False),
    vltok.ToMe(keep_ratio=0.5),
    vltok.ToMe(r=99),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", mergeable("clip", "siglip", "dinov2-registers", "timm-vit", "timm-registers"))
@torch.no_grad()
def test_a_tower_is_the_loop_over_its_parts(name, method):
    tower, model = TOWERS[name], shared_tower(TOWERS[name], "eager")
    model, shown = copy.deepcopy(model).double(), pixels().double()
    blocks = blocks_of(model)
    tokens = first_tokens(model, blocks, lambda: tower.output(model, shown))
    with vltok.apply(model, method) as handle:
        found, merges = [], handle.methods[0].r
        hooks = [block.register_forward_hook(lambda module, args, output: found.append(output)) for block in blocks]
        tower.output(model, shown)
        source = handle.report(file=None).merging.source
        for hook in hooks:
            hook.remove()
    for row in range(len(shown)):
        twin = list(naive_tower(blocks, tokens[row], merges, tower.prefix, method.proportional))
        for block, (expected, _) in zip(found, twin, strict=True):
            torch.testing.assert_close(block[row], expected, rtol=0, atol=1e-6 * expected.abs().max().item())
        went = [goal - tower.prefix for goal in twin[-1][1][tower.prefix :]]
        assert source[row].tolist() == went
    assert found[-1].shape[1] == tower.prefix + patches_left(16, merges)


@pytest.mark.parametrize("name", ["clip", "timm-vit"])
def test_gradients_are_those_of_the_loop(name):
    tower = TOWERS[name]
    model = copy.deepcopy(shared_tower(tower, "eager")).double()
    blocks = blocks_of(model)
    shown = pixels(1).double()
    tokens = first_tokens(model, blocks, lambda: tower.output(model, shown))[0]
    *_, (expected, _) = naive_tower(blocks, tokens, (3, 3, 3), tower.prefix)
    expected.square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen = []
    with vltok.apply(model, vltok.ToMe(r=3)):
        hook = blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))
        tower.output(model, shown)
        hook.remove()
    seen[0].square().sum().backward()
    largest = max(grad.abs().max().item() for grad in wanted.values())
    assert any("patch" in key and grad.abs().max() > 1e-3 * largest for key, grad in wanted.items())
    for key, grad in wanted.items():
        found = dict(model.named_parameters())[key].grad
        torch.testing.assert_close(found, grad, rtol=0, atol=1e-6 * largest, msg=key)


@pytest.mark.parametrize("name", ["clip", "timm-vit"])
def test_a_block_that_is_recomputed_merges_what_it_merged_before(name, monkeypatch):
    matched = []

    def count(keys, *args):
        matched.append(keys.shape)
        return match_tokens(keys, *args)

    monkeypatch.setattr("vltok.methods.tome.method.match_tokens", count)
    model = copy.deepcopy(shared_tower(TOWERS[name])).train()
    TOWERS[name].checkpoint(model, reentrant=False)
    with vltok.apply(model, vltok.ToMe(r=3)):
        TOWERS[name].answer(model, pixels()).square().sum().backward()
    assert [shape[1] - TOWERS[name].prefix for shape in matched] == [16, 13, 10]


@pytest.mark.parametrize("method", [vltok.ToMe(r=0), vltok.ToMe(r=(0, 0, 0)), vltok.ToMe(keep_ratio=1.0)], ids=str)
@torch.no_grad()
def test_nothing_merged_is_the_plain_tower_bit_for_bit(method):
    for name in ("clip", "timm-vit"):
        model = shared_tower(TOWERS[name])
        plain = TOWERS[name].tokens(model, pixels())
        with vltok.apply(model, method):
            assert torch.equal(TOWERS[name].tokens(model, pixels()), plain)


@pytest.mark.parametrize("name", ["clip", "siglip", "timm-vit", "timm-registers"])
@torch.no_grad()
def test_hidden_states_shrink_block_by_block_also_where_they_were_captured_before(name):
    tower, model = TOWERS[name], copy.deepcopy(shared_tower(TOWERS[name]))
    tower.tokens(model, pixels())  # transformers hooks itself in
    with vltok.apply(model, vltok.ToMe(r=(2, 0, 3))):
        last = tower.tokens(model, pixels())
        assert last.shape[1] == tower.prefix + 11
        if tower.is_hf:
            states = tower.output(model, pixels(), output_hidden_states=True).hidden_states
            assert [state.shape[1] - tower.prefix for state in states] == [16, 14, 14, 11]


@pytest.mark.parametrize("name", ["clip", "timm-vit"])
@torch.no_grad()
def test_bfloat16_comes_near(name):
    tower = TOWERS[name]
    with vltok.apply(shared_tower(tower), vltok.ToMe(r=(4, 0, 0))):
        expected = tower.tokens(shared_tower(tower), pixels())
    half = copy.deepcopy(shared_tower(tower)).bfloat16()
    with vltok.apply(half, vltok.ToMe(r=(4, 0, 0))) as handle:
        found = tower.tokens(half, pixels().bfloat16())
        source = handle.report(file=None).merging.source
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert source.amax(1).tolist() == [11] * 3
    # A pair or two of near-equal similarity may be others; [CLS] sees them all.
    assert (found[:, 0].float() - expected[:, 0]).norm() < 0.2 * expected[:, 0].norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", mergeable("clip", "dinov2", "timm-vit"))
@torch.no_grad()
def test_autocast_comes_near(name, attention):
    tower, model = TOWERS[name], shared_tower(TOWERS[name], attention)
    with vltok.apply(model, vltok.ToMe(r=(4, 0, 0))):
        expected = tower.tokens(model, pixels())
        with torch.autocast("cpu", torch.bfloat16):
            found = tower.tokens(model, pixels())
    assert found.shape == expected.shape
    assert (found[:, 0].float() - expected[:, 0]).norm() < 0.2 * expected[:, 0].norm()


def test_it_comes_back_from_a_folder_and_from_text(tmp_path):
    model = copy.deepcopy(shared_tower(TOWERS["clip"]))
    with vltok.apply(model, "tome,keep_ratio=0.4") as handle, torch.no_grad():
        expected = model(pixels()).last_hidden_state
        assert handle.methods == (vltok.ToMe(r=(4, 3, 3)),)  # 16 -> 6
        vltok.save(handle, tmp_path)
    assert not (tmp_path / "vltok.safetensors").exists()
    with unchanged(model), vltok.load(model, tmp_path) as loaded, torch.no_grad():
        assert loaded.methods == (vltok.ToMe(r=(4, 3, 3)),)
        assert torch.equal(model(pixels()).last_hidden_state, expected)


def test_the_report_says_what_became_of_the_patches():
    model = shared_tower(TOWERS["timm-vit"])
    with vltok.apply(model, vltok.ToMe(r=3)) as handle:
        assert str(handle.report(file=None)) == "vision tower: merges tokens; no call yet"
        model(pixels())
        assert str(handle.report(file=None)) == "vision tower: 16 patches merged into 7 tokens (images, crops: 3)"


# What is refused


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ValueError, "give one of r and keep_ratio"),
        ({"r": 1, "keep_ratio": 0.5}, ValueError, "give one of r and keep_ratio"),
        ({"r": -1}, ValueError, "r must be at least 0"),
        ({"r": 1.5}, TypeError, "r must be an integer"),
        ({"r": (1, True)}, TypeError, "r must be an integer"),
        ({"keep_ratio": 0}, ValueError, "keep_ratio is the share"),
        ({"r": 1, "proportional": 1}, TypeError, "proportional must be"),
    ],
)
def test_settings_out_of_range_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        vltok.ToMe(**given)


def test_settings_that_dont_fit_a_tower_are_refused():
    model = shared_tower(TOWERS["clip"])
    with unchanged(model), pytest.raises(ValueError, match="r has 2 numbers, and this vision tower 3 blocks"):
        vltok.apply(model, vltok.ToMe(r=(1, 1)))
    with unchanged(model), pytest.raises(ValueError, match="keep at least 2"):
        vltok.apply(model, vltok.ToMe(keep_ratio=0.05))


@pytest.mark.parametrize(
    "other", [vltok.SOFT(ratio=2), vltok.TAP(num_scales=2), vltok.ADL(), vltok.ToMe(r=1)], ids=lambda each: each.name
)
@pytest.mark.parametrize("name", ["clip", "timm-vit"])
def test_methods_that_need_all_tokens_dont_go_together_with_it(name, other):
    model = copy.deepcopy(shared_tower(TOWERS[name]))
    words = "don't go together"
    for first, second in ((other, vltok.ToMe(r=2)), (vltok.ToMe(r=2), other)):
        with unchanged(model), pytest.raises((ValueError, EditConflictError), match=words):
            vltok.apply(model, [first, second])
        with vltok.apply(model, first), unchanged(model), pytest.raises(ValueError, match=words):
            vltok.apply(model, second)


def test_towers_that_tell_attention_more_than_tokens_are_refused():
    import timm
    from towers import HF
    from transformers import Dinov2Backbone, Dinov2Config

    rotary = timm.create_model("eva02_tiny_patch14_224", depth=2)
    backbone = Dinov2Backbone(Dinov2Config(**HF))
    ordered = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, block_fn=timm.models.vision_transformer.ResPostBlock
    )
    cases = [(rotary, "by rotary positions"), (backbone, "lays its tokens out as maps")]
    cases += [(ordered, "no place to pool or merge"), (make(FAN), "can't be merged|no takes|shows no keys|has no")]
    for model, words in cases:
        with unchanged(model), pytest.raises(UnsupportedModelError, match=words):
            vltok.apply(model, vltok.ToMe(r=1))


@torch.no_grad()
def test_masks_and_other_attention_functions_are_refused():
    from towers import HF
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**HF, attn_implementation="flex_attention")).eval()
    with vltok.apply(model, vltok.ToMe(r=2)), pytest.raises(UnsupportedInputError, match="'flex_attention' adds"):
        model.encoder(random(1, 17, 32))
    model = shared_tower(TOWERS["timm-vit"])
    mask = torch.zeros(1, 1, 17, 17)
    with vltok.apply(model, vltok.ToMe(r=2)), pytest.raises(UnsupportedInputError, match="attn_mask, and tokens are"):
        model.forward_features(pixels(), attn_mask=mask)


def test_attention_without_a_mask_is_refused_unless_sizes_dont_count():
    model = copy.deepcopy(shared_tower(TOWERS["timm-vit"]))

    class Maskless(type(model.blocks[1].attn)):
        def forward(self, x, is_causal=False):
            return super().forward(x)

    model.blocks[1].attn.__class__ = Maskless
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"Maskless, block 1 .* takes no mask"):
        vltok.apply(model, vltok.ToMe(r=1))
    with vltok.apply(model, vltok.ToMe(r=1, proportional=False)) as handle:
        assert handle.is_attached


@torch.no_grad()
def test_a_block_by_itself_knows_nothing_of_sizes():
    model = shared_tower(TOWERS["timm-vit"])
    with vltok.apply(model, vltok.ToMe(r=2)), pytest.raises(UnsupportedInputError, match="what they were merged from"):
        model.blocks[1](random(1, 17, 32))


# In LLaVA

LLAVAS = {family.key: family for family in (tiny.LLAVA, tiny.LLAVA_SIGLIP)}
PROMPTS = ["w1 <image> w2 w3", "<image> w4 w5 w6 w7 <image> w8"]


def naive_logits(family: tiny.TinyFamily, model: nn.Module, inputs: dict, merges: tuple[int, ...]) -> torch.Tensor:
    """The model, with the tower of the naive twin up to the layer that it reads, and the placeholders of the inputs."""
    tower, prefix = model.model.vision_tower, int(family.has_cls)
    blocks = blocks_of(tower)
    tokens = first_tokens(tower, blocks, lambda: tower(inputs["pixel_values"]))
    read = [list(naive_tower(blocks, each, merges, prefix))[1][0][prefix:] for each in tokens]  # hidden state -2 of 3
    features = model.model.multi_modal_projector(torch.cat(read)[None])[0]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == model.config.image_token_id] = features
    return model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits


@pytest.mark.parametrize("method", [vltok.ToMe(r=3), vltok.ToMe(r=(7, 1, 5)), vltok.ToMe(keep_ratio=0.3)], ids=str)
@pytest.mark.parametrize("family", LLAVAS.values(), ids=LLAVAS)
@torch.no_grad()
def test_a_llava_reads_merged_tokens_with_as_many_placeholders(family, method):
    model, processor = tiny.shared_model(family), family.processor()
    images = [tiny.picture(seed) for seed in range(3)]
    plain = family.inputs(PROMPTS, images, processor=processor)
    model(**plain)  # transformers hooks itself in
    with unchanged(model), vltok.apply(model, method, processor=processor) as handle:
        merges = handle.methods[0].r
        assert merges[2] == 0  # nothing reads what it would merge
        left = patches_left(16, merges)
        inputs = family.inputs(PROMPTS, images, processor=processor)
        assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [left, 2 * left]
        found = model(**inputs).logits
        source = handle.report(file=None).merging.source
        assert source.shape == (3, 16) and source.amax(1).tolist() == [left - 1] * 3
        firsts = [[row.tolist().index(token) for token in range(left)] for row in source]
        assert firsts == [sorted(each) for each in firsts]  # in the order of the patches
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    expected = naive_logits(family, model, inputs, merges)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=2e-5 * expected.abs().max().item())
    again = family.inputs(PROMPTS, images, processor=processor)
    assert torch.equal(again["input_ids"], plain["input_ids"])


@pytest.mark.parametrize("family", LLAVAS.values(), ids=LLAVAS)
@torch.no_grad()
def test_a_row_of_a_batch_of_a_llava_equals_the_row_alone(family):
    model, processor = tiny.shared_model(family), family.processor()
    images = [tiny.picture(seed) for seed in range(2)]
    prompts = ["w1 <image> w2 w3", "<image> w4"]
    with vltok.apply(model, vltok.ToMe(r=3), processor=processor):
        inputs = family.inputs(prompts, images, processor=processor)
        together = model(**inputs).logits
        for row, prompt in enumerate(prompts):
            alone = model(**family.inputs([prompt], [images[row]], processor=processor)).logits[0]
            own = together[row, inputs["attention_mask"][row].bool()]
            torch.testing.assert_close(own, alone, rtol=0, atol=2e-5 * alone.abs().max().item())


def test_a_llava_that_was_saved_comes_back(tmp_path):
    family, processor = tiny.LLAVA, tiny.LLAVA.processor()
    model = tiny.shared_model(family)
    with vltok.apply(model, vltok.ToMe(r=2), processor=processor) as handle:
        vltok.save(handle, tmp_path)
        inputs = family.inputs(["<image> w1"], [tiny.picture(0)], processor=processor)
        expected = model(**inputs).logits
    with vltok.load(model, tmp_path, processor=processor) as handle:
        assert handle.methods == (vltok.ToMe(r=(2, 2, 0)),)
        assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_vipllava_merges_before_the_first_level_that_its_projector_reads():
    family = FAMILIES["vipllava-cls"]
    model, processor = family.model(), family.processor()
    levels = [level % 4 for level in model.config.vision_feature_layers]
    with vltok.apply(model, vltok.ToMe(r=2), processor=processor) as handle:
        merges = handle.methods[0].r
        assert sum(map(bool, merges)) == min(levels) > 0
        inputs = family.inputs(["<image> w1"], [tiny.picture(0, family.size)], processor=processor)
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
        assert handle.report(file=None).merging.source.amax() + 1 == family.tokens[0] - sum(merges)


@pytest.mark.parametrize(
    "family", [tiny.LLAVA_NEXT, tiny.LLAVA_ONEVISION, tiny.INTERNVL, tiny.QWEN2_5_VL], ids=lambda each: each.key
)
def test_models_that_need_a_grid_behind_the_tower_are_refused(family):
    model = tiny.shared_model(family)
    words = "lays its tokens out as a grid"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=words):
        vltok.apply(model, vltok.ToMe(r=1), processor=family.processor())


def test_a_llava_that_reads_embeddings_is_refused():
    model = copy.deepcopy(tiny.shared_model(tiny.LLAVA))
    model.config.vision_feature_layer = [0, 2]
    with unchanged(model), pytest.raises(UnsupportedModelError, match="before any block merges tokens"):
        vltok.apply(model, vltok.ToMe(r=1), processor=tiny.LLAVA.processor())


def test_a_llava_needs_its_processor():
    model, processor = tiny.shared_model(tiny.LLAVA), tiny.LLAVA.processor()
    with unchanged(model), pytest.raises(ValueError, match="so it needs the processor"):
        vltok.apply(model, vltok.ToMe(r=1))
    processor.patch_size = 7
    with unchanged(model), pytest.raises(ValueError, match="the processor's patch_size is 7, the model's 14"):
        vltok.apply(model, vltok.ToMe(r=1), processor=processor)


@pytest.mark.parametrize(
    "other",
    [vltok.DivPrune(keep_ratio=0.5), vltok.FasterVLM(keep_ratio=0.5), vltok.TokenPacker()],
    ids=lambda m: m.name,
)
def test_pruning_and_condensing_dont_go_together_with_it(other):
    model, processor = tiny.shared_model(tiny.LLAVA), tiny.LLAVA.processor()
    for methods in ([other, vltok.ToMe(r=2)], [vltok.ToMe(r=2), other]):
        with unchanged(model), pytest.raises(ValueError, match=r"don't go together"):
            vltok.apply(model, methods, processor=processor)
        assert processor.num_additional_image_tokens == 1
