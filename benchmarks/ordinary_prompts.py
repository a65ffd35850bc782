"""Sample ordinary prompts from the embedded model itself, for `sample_answers.py` and `train_guards.py`.

    python benchmarks/ordinary_prompts.py --out ordinary.jsonl

An instruction-tuned model that is given an opened user turn and nothing in it writes what its users usually ask
(Xu et al. 2024, "Magpie"): ordinary prompts of many kinds, under the licence of the model. Prompts that did not
end, that are too short or too long, that repeat another or that name harm are dropped. No text is printed.
"""

import argparse
import json
import re
import time
from pathlib import Path

BATCH = 128
TOKENS = 64
SHORTEST, LONGEST = 15, 300  # characters
TEMPERATURE, TOP_K = 1.0, 60
# A prompt with one of these is dropped: whether it is ordinary is what the label would have to say.
HARM = re.compile(
    r"kill|murder|suicid|weapon|bomb|explos|poison|drug|hack|steal|theft|crime|criminal|illegal|sex|porn|nude|racis|hate|"
    r"terror|violen|abus|attack|fraud|scam|launder|shoot|gun\b|torture|slave|rape|porno|genocid|harm|threat|stalk|phish|malware",
    re.IGNORECASE,
)


def main() -> None:
    """Parse the command line and sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--count", type=int, default=1500, help="prompts that are kept")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompts = sample(args.count, args.seed)
    rows = [{"prompt": prompt, "kind": "ordinary", "source": "own"} for prompt in prompts]
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} prompts")


def sample(count: int, seed: int) -> list[str]:
    """`count` usable prompts, each once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ballast.models import embedded_model

    folder = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torch.manual_seed(seed)
    marker = "prompt goes here"
    whole = tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
    opened = tokenizer(whole.split(marker)[0], return_tensors="pt", add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    kept, drawn, began = dict[str, str](), 0, time.perf_counter()
    while len(kept) < count:
        with torch.inference_mode():
            ids = model.generate(
                opened.expand(BATCH, -1), max_new_tokens=TOKENS, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K,
                top_p=1.0, eos_token_id=end, pad_token_id=end, attention_mask=torch.ones_like(opened).expand(BATCH, -1),
            )  # fmt: skip
        drawn += BATCH
        for answer in ids[:, opened.shape[1] :].tolist():
            text = tokenizer.decode(
                answer[: answer.index(end)] if end in answer else [], skip_special_tokens=True
            ).strip()
            if SHORTEST <= len(text) <= LONGEST and not HARM.search(text):
                kept.setdefault(re.sub(r"\W+", " ", text.lower())[:60], text)
        print(f"{len(kept)} of {drawn} kept, {time.perf_counter() - began:.0f} s", flush=True)
    return list(kept.values())[:count]


if __name__ == "__main__":
    main()
