"""Ask about an image with vLLM's offline engine: every question under several budgets, all in one batch."""

import argparse
from pathlib import Path

from PIL import Image
from transformers import AutoProcessor

from vltok.serving import vllm_overrides

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image", type=Path)
parser.add_argument("questions", nargs="+")
parser.add_argument("--model", default="eval/canvas/model", help="folder of a model")
parser.add_argument("--method", default="divprune", help="a selector as text, without its budget")
parser.add_argument("--keep-ratios", type=float, nargs="+", default=[1.0, 0.25])


def main(args: argparse.Namespace) -> None:
    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError:
        raise SystemExit("this example needs vLLM: python -m pip install 'vltok[vllm]'") from None
    overrides = vllm_overrides(args.model, f"{args.method},keep_ratio={max(args.keep_ratios)}")  # requests: no more
    llm = LLM(args.model, hf_overrides=overrides, limit_mm_per_prompt={"image": 1})
    processor = AutoProcessor.from_pretrained(args.model, local_files_only=True)
    template = processor.chat_template or "<image> {{ messages[0].content[1].text }}"
    data, asked = {"image": Image.open(args.image).convert("RGB")}, []
    for question in args.questions:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(turn, chat_template=template, add_generation_prompt=True)
        budgets = [{"mm_processor_kwargs": {"visual_keep_ratio": ratio}} for ratio in args.keep_ratios]
        asked += [{"prompt": prompt, "multi_modal_data": data, **budget} for budget in budgets]
    for request, output in zip(asked, llm.generate(asked, SamplingParams(temperature=0, max_tokens=32)), strict=True):
        length, budget = len(output.prompt_token_ids), request["mm_processor_kwargs"]
        print(f"{request['prompt']} {budget}, {length} tokens: {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main(parser.parse_args())
