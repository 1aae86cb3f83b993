"""Training at the true size with random weights, beside transformers' own GLM with SDPA and PEFT.

    python benchmarks/train.py                     # the whole table, on a GPU
    python benchmarks/train.py --only lora real
    python benchmarks/train.py --only real --data alpaca_zh_*.json --tokenizer ice_text.model

Tokens/s are those of tokens that are no pads. A step is forward, backward and optimizer; its time
is the median of 8, by CUDA events, after 3 others. GiB are the most that was allocated, weights
included. Both sides have the same samples and as many weights, bf16 and frozen, head and embedding
one tensor, and adapters of rank 8 on query, key and value in fp32. Without a GPU a tiny shape runs
in fp32, samples of one length a sixteenth as long, only to see that everything does.

`real`: lengths of questions and answers as they come, in batches of 32, each timed once after all
have been seen. Here they are packed. There they are padded to the longest: once with layers
recomputed, without which most batches don't fit the card, and once in 4 parts whose gradients are
summed, which have fewer pads and recompute nothing.
"""

import argparse
import gc
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# Batches of many lengths leave holes, and the padded side needs most of the card.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import peft
import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.random_model import random_model
from chatglm.configuration import ChatGLMConfig
from chatglm.corpus import read_paragraphs
from chatglm.loss import learned_tokens
from chatglm.optim import build_optimizer
from chatglm.packed import Packed
from chatglm.pieces import mark_whitespace
from chatglm.settings import LoraSettings, TrainSettings
from chatglm.tuning.adapters import add_lora
from chatglm.tuning.fused_lora import fuse_lora
from chatglm.tuning.prompt import train_prefix
from chatglm.tying import part_head

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
WARM_UP, STEPS, SHORTER = (3, 8, 1) if ON_GPU else (1, 2, 16)
TEXT_IDS = (1000, 100_000) if ON_GPU else (16, 1000)
TINY = {"vocab_size": 1024, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4,
        "inner_hidden_size": 256, "mask_token_id": 4, "gmask_token_id": 6, "bos_token_id": 7,
        "eos_token_id": 8}  # fmt: skip

LONGEST, TOGETHER = 1024, 32
# mu and sigma of the logarithms of tokens, [gMASK], <sop> and <eop> counted: fitted to 7,357
# questions and answers in Chinese (two parts of a translated alpaca, one of Open Assistant) in
# ice_text.model. Samples drawn from this have a mean of 86 tokens and a median of 55, and the
# longest of 32 has 450 on average; the real ones 85, 58 and 422.
CONTEXT, ANSWER = (2.658, 0.562), (3.602, 1.136)

LINES = (  # row, what, asked; of each side what is recomputed, and how many parts a batch has
    ("lora", "4 x 1024", "20,000 tok/s, 28 GiB", ("none", 1), ("none", 1)),
    ("lora-2048", "8 x 2048, selective", "15,000 tok/s, 24 GiB", ("selective", 1), ("full", 1)),
    ("lora-2048", "8 x 2048, full", "", ("full", 1), ("full", 1)),
    ("real", "32, packed; there recomputing", "ratio 3", ("none", 1), ("full", 1)),
    ("real", "32, packed; there 4 parts of 8", "ratio 3", ("none", 1), ("none", 4)),
)
ASKED = {"int4": "4.8 GiB", "int4-ptuning": "4.8 GiB", "full": "9,000 tok/s, 60 GiB",
         "full-8bit": ""}  # one side  # fmt: skip
ROWS = [*dict.fromkeys(line[0] for line in LINES), *ASKED]
PEFT = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.0,
                       target_modules=["q_proj", "k_proj", "v_proj"])  # fmt: skip

Sizes = list[tuple[int, int]]  # of each sample: tokens of its context, and of the whole
Found = tuple[float, float, float]  # tokens/s, GiB, ms a step


def shape(**more: Any) -> ChatGLMConfig:
    """The true one, or a tiny one without a GPU."""
    return ChatGLMConfig(**({} if ON_GPU else TINY), **more)


def equal_sizes(rows: int, length: int) -> list[Sizes]:
    """A batch of samples of one length, half of it context."""
    return [[(length // SHORTER // 2, length // SHORTER)] * rows]


def real_sizes(files: list[str], tokenizer: str | None) -> list[Sizes]:
    """As many batches as steps are timed, of records in random order or of drawn lengths."""
    generator, count = random.Random(0), TOGETHER * STEPS
    if files:
        from sentencepiece import SentencePieceProcessor

        pieces, records = SentencePieceProcessor(tokenizer), read_paragraphs(files, skip_bad=True)
        texts = [[mark_whitespace(text) for text in pair] for rounds in records for pair in rounds]
        pairs = [[len(ids) + n for n, ids in enumerate(pieces.encode(pair), 1)] for pair in texts]
        generator.shuffle(pairs)
    else:
        pairs = [[max(round(generator.lognormvariate(*of)), 3) for of in (CONTEXT, ANSWER)]
                 for _ in range(count)]  # fmt: skip
    sizes = [(min(c, LONGEST - 3), min(c + a, LONGEST)) for c, a in pairs[:count]]
    batches = [list(batch) for batch in zip(*[iter(sizes)] * TOGETHER, strict=False)]
    if not batches:
        raise SystemExit(f"--data: {len(sizes)} samples; a batch needs {TOGETHER}")
    lengths = [[whole for _, whole in batch] for batch in batches]
    mean = statistics.mean(itertools.chain(*lengths))
    print(f"real: mean {mean:.0f} tokens, longest of each {TOGETHER}: {list(map(max, lengths))}")
    return batches


def samples(sizes: Sizes) -> list[list[int]]:
    """Random ids with [gMASK] <sop> where they belong; the same ones for the same sizes."""
    config, generator = shape(), random.Random(0)
    found = [[generator.randrange(*TEXT_IDS) for _ in range(whole)] for _, whole in sizes]
    for ids, (context, _) in zip(found, sizes, strict=True):
        ids[context - 1 : context + 1] = config.gmask_token_id, config.bos_token_id
    return found


def packed_batch(sizes: Sizes) -> dict[str, Any]:
    """One row of sequences side by side, as training makes it."""
    ids, (contexts, lengths) = samples(sizes), zip(*sizes, strict=True)
    packed = Packed.of(contexts, lengths)
    labels = packed.row(
        [[-100] * (c + 1) + one[c + 1 :] for one, c in zip(ids, contexts, strict=True)]
    )[None]
    return {"input_ids": packed.row(ids)[None].to(DEVICE), "labels": labels.to(DEVICE),
            "packed": packed.to(DEVICE), "loss_only": True,
            "learned": tuple(x.to(DEVICE) for x in learned_tokens(labels))}  # fmt: skip


def padded_batch(sizes: Sizes) -> dict[str, Any]:
    """A row for each sequence, pads on the right; no mask where there are none."""
    contexts, lengths = torch.tensor(sizes).T[:, :, None]
    ids = torch.full((len(sizes), int(lengths.max())), shape().pad_token_id)
    columns = torch.arange(ids.shape[1])
    ids[columns < lengths] = torch.tensor(list(itertools.chain(*samples(sizes))))
    learned = (columns > contexts) & (columns < lengths)
    batch = {"input_ids": ids, "labels": ids.where(learned, -100)}
    if lengths.min() < lengths.max():
        batch["attention_mask"] = (columns < lengths).long()
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are."""
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """For adapters and prefixes, which are put into fp32."""
    for parameter in trained(model):
        parameter.data = parameter.data.float()
    return torch.optim.AdamW(trained(model), lr=1e-4, fused=True)


def our_model(**more: Any) -> Any:
    """Frozen."""
    free()
    return random_model(shape(**more), dtype=DTYPE, device=DEVICE).requires_grad_(False).train()


def our_lora(model: Any) -> nn.Module:
    """With adapters, as training adds them."""
    tuned = add_lora(model, LoraSettings(lora_dropout=0.0))
    fuse_lora(tuned)
    return tuned


def their_model() -> Any:
    """transformers' GLM with as many weights; its MLP has three matrices where ours has two."""
    free()
    own = shape()
    config = transformers.GlmConfig(
        vocab_size=own.vocab_size, hidden_size=own.hidden_size, num_hidden_layers=own.num_layers,
        intermediate_size=64 * round(own.inner_hidden_size * 2 / 3 / 64), attention_bias=True,
        num_attention_heads=own.num_attention_heads, num_key_value_heads=own.num_attention_heads,
        head_dim=own.head_width, partial_rotary_factor=0.5, use_cache=False,
        max_position_embeddings=own.max_sequence_length, pad_token_id=own.pad_token_id,
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, tie_word_embeddings=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.GlmForCausalLM(config)
    assert model.config._attn_implementation == "sdpa"
    model = model.to(DTYPE).to_empty(device=DEVICE)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(DEVICE)  # in no state dict
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02)
    return model.train()


def free() -> None:
    """What is no longer held goes back to the card."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def mark() -> Any:
    """A point in time, which a GPU gets to when it has done what came before."""
    if not ON_GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def timed(work: Callable[[int], Any], warm_up: int, steps: int) -> list[float]:
    """Milliseconds of the last calls, each with its number; a GPU is waited for at the end."""
    marks = []
    for number in range(warm_up + steps):
        work(number)
        marks.append(mark())
    pairs = itertools.pairwise(marks[warm_up - 1 :])
    if not ON_GPU:
        return [1e3 * (b - a) for a, b in pairs]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairs]


def measure(
    what: str, model: nn.Module, optimizer: Any, batches: list[Sizes], prepare: Any, parts: int = 1
) -> Found | None:
    """Of steps over the batches in turn; None: out of memory. Told on stderr at once."""
    free()
    count, some = len(batches), len(batches[0]) // parts
    given = [[prepare(b[i : i + some]) for i in range(0, len(b), some)] for b in batches]
    last: list[Tensor] = []

    def step(number: int) -> None:
        for part in given[number % count]:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
                loss = model(**part, use_cache=False).loss
            (loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        last[:] = [loss.detach()]

    try:
        times = timed(step, max(WARM_UP, count), STEPS)
    except torch.OutOfMemoryError as error:
        optimizer.zero_grad()
        print(f"  {what}: {str(error)[:150]}", file=sys.stderr, flush=True)
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else math.nan
    tokens = sum(whole for batch in batches for _, whole in batch)
    each = [statistics.median(times[number::count]) for number in range(count)]
    found, loss = (1e3 * tokens / sum(each), peak, sum(each) / count), last[0].item()
    print(f"  {what}: {cells(found)} loss {loss:.3f}", file=sys.stderr, flush=True)
    assert math.isfinite(loss), f"{what}: the loss is {loss}"
    return found


def measure_lora(lines: list[tuple], batches: dict[str, list[Sizes]], *, ours: bool) -> dict:
    """All rows of a side by row, what is recomputed, and parts."""
    model = our_model() if ours else their_model()
    tuned = our_lora(model) if ours else peft.get_peft_model(model, PEFT)  # as PEFT's users do it
    optimizer, prepare, found = adamw(tuned), packed_batch if ours else padded_batch, {}
    keys = dict.fromkeys((line[0], *line[3 if ours else 4]) for line in lines)
    for row, mode, parts in sorted(keys, key=lambda key: key[1] == "full"):  # there it stays on
        if ours:
            model.recompute(mode)
        elif mode == "full" and not model.is_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        what = f"{row} {'here' if ours else 'there'}, recomputing {mode}, parts {parts}"
        found[row, mode, parts] = measure(what, tuned, optimizer, batches[row], prepare, parts)
    return found


def measure_int4(row: str) -> tuple[str, Found | None]:
    """LoRA or p-tuning v2 on blocks in the released int4."""
    virtual = 32 if row == "int4-ptuning" else None
    model = tuned = our_model(quantization_bit=4, pre_seq_len=virtual)
    if virtual:
        train_prefix(model, pre_seq_len=virtual, prefix_projection=False)
    else:
        tuned = our_lora(model)
    model.recompute("full")
    found = measure(row, tuned, adamw(tuned), equal_sizes(1, 512), packed_batch)
    return "1 x 512, full", found


def measure_full(row: str) -> tuple[str, Found | None]:
    """All weights, their gradients and the optimizer's state in the model's precision, or the state
    in bytes; head and embedding apart."""
    model = our_model().requires_grad_(True)
    part_head(model)
    name = "adamw_8bit" if row == "full-8bit" else "adamw"
    settings = TrainSettings(optimizer=name, learning_rate=1e-6)
    optimizer = build_optimizer(model, settings, total_steps=9, steps_per_epoch=9)["optimizer"]
    found = measure(row, model, optimizer, equal_sizes(4, 1024), packed_batch)
    return f"4 x 1024, {name}", found


def cells(found: Found | None) -> str:
    """Three of the table."""
    return "out of memory | | |" if found is None else "{:,.0f} | {:.2f} | {:,.1f} |".format(*found)


def matmul_rate() -> float:
    """TFLOP/s of a large product in the model's precision."""
    width = 8192 if ON_GPU else 512
    a, b = (torch.randn(width, width, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * width**3 / statistics.median(timed(lambda _: a @ b, 5, 10)) / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--data", nargs="+", default=[], help="files of records, for `real`")
    parser.add_argument("--tokenizer", help="ice_text.model, with --data")
    given = parser.parse_args()
    if given.data and not given.tokenizer:
        parser.error("--data needs --tokenizer")
    print(f"{torch.cuda.get_device_name() if ON_GPU else 'no GPU'}: {matmul_rate():.1f} TFLOP/s in"
          f" {DTYPE}; torch {torch.__version__}, transformers {transformers.__version__},"
          f" peft {peft.__version__}")  # fmt: skip
    batches = {"lora": equal_sizes(4, 1024), "lora-2048": equal_sizes(8, 2048)}
    if "real" in given.only:
        batches["real"] = real_sizes(given.data, given.tokenizer)
    print("| row | here: tokens/s | GiB | ms a step | HF + PEFT: tokens/s | GiB | ms a step | ratio"
          " | asked |\n|---|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    lines = [line for line in LINES if line[0] in given.only]
    ours = measure_lora(lines, batches, ours=True) if lines else {}
    theirs = measure_lora(lines, batches, ours=False) if lines else {}
    for row, what, asked, here, there in lines:
        own, other = ours[row, *here], theirs[row, *there]
        ratio = f"{own[0] / other[0]:.2f}" if own and other else ""
        print(f"| {row}: {what} | {cells(own)} {cells(other)} {ratio} | {asked} |", flush=True)
    for row in [row for row in ASKED if row in given.only]:
        what, found = measure_full(row) if row.startswith("full") else measure_int4(row)
        print(f"| {row}: {what} | {cells(found)} | | | | {ASKED[row]} |", flush=True)


if __name__ == "__main__":
    main()
