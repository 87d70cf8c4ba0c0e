"""Anchored preference optimization in one flat script, on nothing but PyTorch and transformers.

    python examples/apo_loop.py MODEL_FOLDER PAIRS.jsonl [OUT_FOLDER]

A line of PAIRS.jsonl: {"prompt": [messages], "chosen": [message], "rejected": [message]}, as `anchored create` and TRL
write them. This is the idea of `anchored train` without what makes that fast (shared prefixes, packing) and safe
(resume, checks): one answer at a time, everything in sight.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BETA = 0.1  # the paper's settings; a tiny model wants beta 1 and a learning rate of 1e-4
LEARNING_RATE = 2e-7
EPOCHS = 18
PAIRS_PER_STEP = 16
MAX_TOKENS = 512  # of a prompt, and of an answer

model_folder, pairs_file, out_folder = (*sys.argv[1:], "aligned")[:3]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(model_folder)
# float32 weights: an update of 2e-7 would vanish in bfloat16; eval: no dropout
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device).eval()


def token_ids(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(prompt, answer):
    """Token ids of a prompt (its end, if it is too long) and of an answer with its end-of-turn token (its start)."""
    # the answers come without thoughts; templates that know no thinking ignore the switch
    options = {"tokenize": False, "enable_thinking": False}
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    # the newline that some templates put after the end-of-turn token is nothing that the model should learn
    whole = tokenizer.apply_chat_template(prompt + answer, **options).rstrip()
    if not whole.startswith(before):
        sys.exit(f"the chat template does not put the answer after its generation prompt {before[-40:]!r}")
    prompt_ids, ids = token_ids(before), token_ids(whole)
    merged = ids[: len(prompt_ids)] != prompt_ids  # across the border, where generation cannot
    answer_ids = token_ids(whole.removeprefix(before)) if merged else ids[len(prompt_ids) :]
    return prompt_ids[-MAX_TOKENS:], answer_ids[:MAX_TOKENS]


def answer_logp(prompt_ids, answer_ids):
    """log pi(answer | prompt): the sum over the answer's tokens, each predicted from the position before it."""
    ids = torch.tensor([prompt_ids + answer_ids], device=device)
    logits = model(ids).logits[0, len(prompt_ids) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, ids[0, len(prompt_ids) :, None]).sum()


def apo_zero(reward_chosen, reward_rejected):
    """Equation 7 of the paper, plus 1: winners up, losers down, each against the model as it was at the start."""
    return 1 - torch.sigmoid(reward_chosen) + torch.sigmoid(reward_rejected)


# 1. Render every pair, and let the model before training, the reference, score both answers once.
pairs = []
for line in Path(pairs_file).read_text("utf-8").splitlines():
    row = json.loads(line)
    chosen, rejected = render(row["prompt"], row["chosen"]), render(row["prompt"], row["rejected"])
    if chosen != rejected:
        with torch.no_grad():
            pairs.append((chosen, rejected, answer_logp(*chosen), answer_logp(*rejected)))

# 2. Train: a gradient over the pairs of each step, RMSprop, a learning rate that falls to 0.
optimizer = torch.optim.RMSprop(model.parameters(), lr=LEARNING_RATE)
steps = EPOCHS * -(-len(pairs) // PAIRS_PER_STEP)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
step = 0
for epoch in range(EPOCHS):
    random.Random(epoch).shuffle(pairs)
    for first in range(0, len(pairs), PAIRS_PER_STEP):
        batch = pairs[first : first + PAIRS_PER_STEP]
        loss_sum = margin_sum = 0.0
        for chosen, rejected, reference_chosen, reference_rejected in batch:
            reward_chosen = BETA * (answer_logp(*chosen) - reference_chosen)
            reward_rejected = BETA * (answer_logp(*rejected) - reference_rejected)
            loss = apo_zero(reward_chosen, reward_rejected)
            (loss / len(batch)).backward()
            loss_sum += loss.item()
            margin_sum += (reward_chosen - reward_rejected).item()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        step += 1
        print(f"step {step}/{steps}  loss {loss_sum / len(batch):.6f}  margin {margin_sum / len(batch):+.6f}")

# 3. A Hugging Face folder, like the one it came from.
model.save_pretrained(out_folder)
tokenizer.save_pretrained(out_folder)
print(f"saved to {out_folder}")
