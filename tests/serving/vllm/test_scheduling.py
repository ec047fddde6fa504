"""Prompts in pieces, requests that lose their place, and how much goes through the tower at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from serving.vllm.serving import BOTH, check_agrees, counted, engine, generate, golden, request

from vltok.serving.vllm.tower import attention_layers

PREEMPTED = "vllm:num_preemptions"
PIECE = 32  # tokens of a prompt in one step; images begin before the end of the first piece
LONG = 90  # tokens of an answer


@pytest.mark.parametrize("name", BOTH)
def test_prompts_in_pieces_and_requests_that_lose_their_place_are_answered_as_alone(name):
    asked = [request(name, each) for each in golden(name)["long"]]
    narrow = {"max_num_batched_tokens": PIECE, "block_size": 32, "num_gpu_blocks_override": 12, "max_model_len": 256}
    off = {"enable_prefix_caching": False, "disable_log_stats": False}
    with engine(name, "divprune,keep_ratio=0.25", **narrow, **off) as llm:
        alone = [row for each in asked for row in generate(llm, [each], LONG)]
        assert counted(llm, PREEMPTED) == 0
        together = generate(llm, asked, LONG)
        assert counted(llm, PREEMPTED) > 0
    assert min(row["prompt"] for row in alone) > PIECE
    check_agrees(together, alone, f"{name}, {PIECE} tokens at once")
    first = [{**row, "ids": row["ids"][:6], "scores": row["scores"][:6]} for row in alone]
    check_agrees(first, golden(name)["ratios"]["0.25"], f"{name}, {PIECE} tokens at once")


FAR = ({"visual_keep_ratio": 1.0}, {"visual_num_keep": 1})


def noise(seed: int) -> Image.Image:
    """A picture of noise."""
    pixels = torch.randint(0, 256, (168, 168, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def count_rows(model: Any, rows: list[list[int]]) -> None:
    """Note how many rows each run of the tower has, by call of the encoder."""
    encode = model.embed_multimodal

    def noted(**kwargs):
        rows.append([])
        return encode(**kwargs)

    model.embed_multimodal = noted

    def see(module, args, kwargs):
        query = args[0] if args else kwargs["query"]
        rows[-1].append(query.shape[0] * query.shape[1])

    attention_layers(model)[0].register_forward_pre_hook(see, with_kwargs=True)


@pytest.mark.parametrize("name", BOTH)
def test_no_more_goes_through_the_tower_at_once_than_unpruned(name):
    prompt = golden(name)["requests"][0]["prompt"]
    asked = [{"prompt": prompt, "multi_modal_data": {"image": noise(number)}} for number in range(16)]
    rows: list[list[int]] = []  # of each call of the encoder, by run of the tower
    small = {"max_num_batched_tokens": 128}
    with engine(name, {"method": "divprune", "keep_ratio": 0.1, "max_keep_ratio": 1.0}, **small) as llm:
        whole, least = (generate(llm, [{**asked[0], "mm_processor_kwargs": own}], 1)[0]["prompt"] for own in FAR)
        llm.llm.apply_model(lambda model: count_rows(model, rows))
        generate(llm, [{**asked[0], "mm_processor_kwargs": {"visual_num_keep": 2}}], 1)  # in no cache
        ((alone,),) = rows
        rows.clear()
        generate(llm, asked, 1)
        budget = llm.llm.llm_engine.engine_core.engine_core.scheduler.max_num_encoder_input_tokens
    per_token = alone / (whole - least + 1)
    most = budget * per_token
    assert max(sum(call) for call in rows) > most  # so many images were in one step
    assert max(max(call) for call in rows) <= most
