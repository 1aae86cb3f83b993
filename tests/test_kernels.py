"""The kernels against plain torch in fp64: fresh random inputs, every shape, outputs poisoned."""

import pytest
import torch

from chatglm.kernels import compiler, ops, products
from chatglm.kernels.compiler import KernelError, compile_source
from chatglm.quantization.linear import (
    QuantizedLinear,
    dequantize_rows,
    quantize_rows,
    unpack_int4,
)
from chatglm.rotary import apply_rotary, rotary_for_positions, rotary_tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ALL_CARDS = [75, 80, 86, 89, 90, 100, 120]
SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]
ROWS = [1, 2, 3, 5, 8, 11, 16, 17, 32]
HALVES = [torch.float16, torch.bfloat16]
WIDTH = 128


def random(*shape, dtype=torch.float16, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def poisoned(*shape, dtype=torch.float16):
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def error(found, expected):
    """Relative, by norms; NaN if anything is."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def packed(out_features, in_features, bits, dtype):
    """Stored weight, scale (None for 16 bits) and the matrix in fp64."""
    weight = random(out_features, in_features, dtype=dtype, scale=0.02)
    if bits == 16:
        return weight, None, weight.double()
    stored, scale = quantize_rows(weight, bits)
    values = unpack_int4(stored) if bits == 4 else stored
    return stored, scale, values.double() * scale.double()[:, None]


@pytest.mark.parametrize("card", ALL_CARDS)
def test_every_kernel_compiles_for_every_card(card):
    if card >= 100 and tuple(map(int, torch.version.cuda.split("."))) < (12, 8):
        pytest.skip("this compiler does not know the card")
    half = ["BF16"] if card >= 80 else []
    around = ("STAGED", "NORM", "BIAS", "GELU", "RESIDUAL")
    sizes = ("IN_FEATURES=4096", "ROWS=1", "UNROLL=4")
    assert compile_source("linear", card, ("BITS=4", *sizes, *around))
    assert compile_source("linear", card, ("BITS=8", *sizes, *half))
    for variant in ((), ("DRAFTS",), ("CACHE8",), ("PAGED",), ("PAGED", "WAITS")):
        assert compile_source("attention", card, (*variant, *half))
    assert compile_source("dequantize", card, ("BITS=8", *half))
    for name in ("sample", "rotate"):
        assert compile_source(name, card, tuple(half))


def test_a_fault_in_a_kernel_is_one_line(monkeypatch):
    monkeypatch.setattr(compiler, "source_of", lambda name: "int x = ;")
    with pytest.raises(KernelError, match=r"linear.cu does not compile for sm_90: .*error") as told:
        compile_source("linear", 90, ())
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_products_are_as_exact_as_the_librarys(out_features, in_features, bits, dtype):
    weight, scale, matrix = packed(out_features, in_features, bits, dtype)
    bias = random(out_features, dtype=dtype)
    for rows in ROWS:
        x, out = random(rows, in_features, dtype=dtype), poisoned(rows, out_features, dtype=dtype)
        products.linear(x, weight, scale=scale, bias=bias, out=out)
        expected = x.double() @ matrix.T + bias.double()
        library = torch.nn.functional.linear(x, matrix.to(dtype), bias)
        assert error(out, expected) < 1.05 * error(library, expected) + 1e-5, rows


def test_the_head_is_as_exact_as_the_librarys():
    weight, _, matrix = packed(130528, 4096, 16, torch.float16)
    for rows in (1, 3, 8):
        x, out = random(rows, 4096), poisoned(rows, 130528)
        products.linear(x, weight, out=out)
        expected = x.double() @ matrix.T
        assert error(out, expected) < 1.05 * error(x @ weight.T, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_norm_gelu_and_residual_around_a_product(bits, rows, dtype):
    weight, scale, matrix = packed(16384, 4096, bits, dtype)
    bias, x = random(16384, dtype=dtype), random(rows, 4096, dtype=dtype, scale=3.0)
    norm = products.Norm(random(4096, dtype=dtype), random(4096, dtype=dtype), 1e-5)
    normed, out = poisoned(rows, 4096, dtype=dtype), poisoned(rows, 16384, dtype=dtype)
    products.linear(x, weight, scale=scale, bias=bias, norm=norm, normed=normed, gelu=True, out=out)
    rounding = 3e-3 if dtype == torch.bfloat16 else 4e-4
    exactly = torch.nn.functional.layer_norm(
        x.double(), (4096,), norm.weight.double(), norm.bias.double(), 1e-5
    )
    assert error(normed, exactly) < rounding
    sums = normed.double() @ matrix.T + bias.double()
    assert error(out, torch.nn.functional.gelu(sums, approximate="tanh")) < rounding

    residual, out = random(rows, 16384, dtype=dtype), poisoned(rows, 16384, dtype=dtype)
    products.linear(x, weight, scale=scale, bias=bias, residual=residual, alpha=7.48, out=out)
    expected = x.double() @ matrix.T + bias.double() + 7.48 * residual.double()
    assert error(out, expected) < rounding


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(9,), (32,), (3, 70), (576,)])
def test_the_library_s_gelu_is_the_one_by_tanh(shape, dtype):
    linear = torch.nn.Linear(4096, 16384, device="cuda", dtype=dtype)
    x = random(*shape, 4096, dtype=dtype, scale=2.0)
    sums = x.double() @ linear.weight.double().T + linear.bias.double()
    out = poisoned(*shape, 16384, dtype=dtype)
    assert products.library_gelu(x, linear, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, products.library_gelu(x, linear))
    by_tanh, by_erf = (
        torch.nn.functional.gelu(sums, approximate=kind) for kind in ("tanh", "none")
    )
    far = (sums > -4) & (sums < -2.5)  # there the two differ by more than rounding
    off = [(out.double() - gelu)[far].abs().mean() for gelu in (by_tanh, by_erf)]
    assert error(out, by_tanh) < (3e-3 if dtype == torch.bfloat16 else 4e-4)
    assert off[0] < off[1] / (1.5 if dtype == torch.bfloat16 else 5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [8, 4])
def test_dequantising_gives_the_very_values_of_plain_torch(bits, dtype):
    stored, scale, _ = packed(4096, 4096, bits, torch.float16)
    values = unpack_int4(stored) if bits == 4 else stored
    expected = values.to(dtype) * scale[:, None].to(dtype)
    assert torch.equal(dequantize_rows(stored, scale, bits, dtype), expected)


@pytest.mark.parametrize("rows", [1, 4, 32, 33])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_linear_gives_one_product_with_and_without_gradient(bits, rows):
    plain = torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.float16)
    packed_linear = QuantizedLinear.from_linear(plain, bits)
    x = random(1, rows, 4096)
    expected = packed_linear(x.requires_grad_())
    with torch.no_grad():
        assert error(packed_linear(x), expected.double()) < 1e-3


def rotary():
    return rotary_tables(2048, WIDTH // 2, half=True, device=torch.device("cuda"))


@pytest.mark.parametrize("dtype", HALVES)
def test_turning_a_prompt_is_what_the_model_does(dtype):
    rows, tokens, heads, offset = 2, 37, 32, 5
    mixed = random(rows, tokens, heads * 3 * WIDTH, dtype=dtype)
    positions = torch.randint(0, 2048, (rows, 2, tokens), device="cuda", dtype=torch.int32)
    keys, values = (poisoned(rows, heads, 64, WIDTH, dtype=dtype) for _ in range(2))
    query = ops.rotate(mixed, positions, keys, values, rotary(), offset=offset)
    q, k, v = mixed.unflatten(-1, (heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    angles = rotary_for_positions(positions.long(), max_length=2048, head_width=WIDTH, half=True)
    bound = 5e-3 if dtype == torch.bfloat16 else 6e-4
    filled = slice(offset, offset + tokens)
    assert error(query, apply_rotary(q.float(), *angles).double()) < bound
    assert error(keys[:, :, filled], apply_rotary(k.float(), *angles).double()) < bound
    assert torch.equal(values[:, :, filled], v)
    assert keys[:, :, :offset].isnan().all() and values[:, :, offset + tokens :].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("room", [64, 512, 1984, 2048, 2176, 4096])
def test_attention_over_the_filled_part_of_a_cache(room, few, dtype):
    heads, capacity = 32, room
    lengths = [0, 1, 63, room // 2, room - 1] * (1 if few else 2)
    assert (len(lengths) <= ops.FEW_ROWS) == few
    lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    rows = len(lengths)
    keys, values = (poisoned(rows, heads, capacity, WIDTH, dtype=dtype) for _ in range(2))
    for row, length in enumerate(lengths.tolist()):
        for tensor in (keys, values):
            tensor[row, :, :length] = random(heads, length, WIDTH, dtype=dtype)
    text = torch.randint(0, 2048, (rows,), device="cuda", dtype=torch.int32)
    first_blocks = (lengths - torch.randint(0, 2048, (rows,), device="cuda")).to(torch.int32)
    mixed = random(rows, heads * 3 * WIDTH, dtype=dtype)
    workspace = ops.AttentionWorkspace(rows, heads, torch.device("cuda"))
    for _ in range(2):  # the counters of the first run must be as they were
        out = poisoned(rows, heads * WIDTH, dtype=dtype)
        ops.attention(mixed, keys, values, rotary(), lengths=lengths, text_positions=text,
                      first_blocks=first_blocks, workspace=workspace, out=out)  # fmt: skip
    positions = torch.stack((text, lengths - first_blocks), dim=1).long()[:, :, None]
    angles = rotary_for_positions(positions, max_length=2048, head_width=WIDTH, half=True)
    q, k, v = mixed.unflatten(-1, (heads, -1))[:, :, None].chunk(3, dim=-1)
    q, k = (apply_rotary(x, *angles).double() for x in (q, k))
    for row, length in enumerate(lengths.tolist()):
        assert error(keys[row, :, length], k[row, :, 0]) < 1e-2
        assert torch.equal(values[row, :, length], v[row, :, 0])
        end = length + 1
        weights = q[row] @ keys[row, :, :end].double().transpose(1, 2) / WIDTH**0.5
        expected = weights.softmax(dim=-1) @ values[row, :, :end].double()
        assert error(out[row].view(heads, 1, WIDTH), expected) < 8e-3, length


def test_a_product_of_a_row_is_the_same_alone_and_among_others():
    for bits in (16, 8, 4):
        weight, scale, _ = packed(12288, 4096, bits, torch.float16)
        x, norm = random(8, 4096), some_norm()
        together = products.linear(x, weight, scale=scale, norm=norm)
        for rows in (1, 2, 5):
            some = products.linear(x[:rows].contiguous(), weight, scale=scale, norm=norm)
            assert torch.equal(some, together[:rows])


def some_norm():
    return products.Norm(random(4096), random(4096), 1e-5)


def quantised(x):
    """int8 values and scales (.., 1) of keys or values (.., D)."""
    scale = x.abs().amax(dim=-1, keepdim=True).float() / 127
    return (x / scale).round().to(torch.int8), scale


def test_attention_over_a_cache_of_int8():
    heads, room = 32, 256
    lengths = torch.tensor([1, 64, 200], dtype=torch.int32, device="cuda")
    rows = len(lengths)
    kept = [quantised(random(rows, heads, room, WIDTH)) for _ in range(2)]
    (keys, _), (values, _) = kept
    scales = torch.stack([scale[..., 0] for _, scale in kept])
    exact_keys, exact_values = (x.double() * scale for x, scale in kept)
    mixed, out = random(rows, heads * 3 * WIDTH), poisoned(rows, heads * WIDTH)
    zeros = torch.zeros(rows, dtype=torch.int32, device="cuda")
    ops.attention(mixed, keys, values, rotary(), lengths=lengths, text_positions=zeros,
                  first_blocks=lengths, workspace=ops.AttentionWorkspace(rows, heads,
                  lengths.device), out=out, scales=scales)  # fmt: skip
    q, k, v = mixed.unflatten(-1, (heads, -1)).double().chunk(3, dim=-1)  # at position 0
    for row, length in enumerate(lengths.tolist()):
        for part, (stored, new) in enumerate(((keys, k), (values, v))):
            found = stored[row, :, length].double() * scales[part, row, :, length, None]
            assert error(found, new[row]) < 8e-3  # 127 steps up to the largest of 128
            (exact_keys, exact_values)[part][row, :, length] = found
        end = length + 1
        weights = exact_keys[row, :, :end] @ q[row, :, :, None] / WIDTH**0.5
        expected = weights.softmax(dim=1).transpose(1, 2) @ exact_values[row, :, :end]
        assert error(out[row].view(heads, 1, WIDTH), expected) < 2e-3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("times", [1, 2])
def test_attention_over_pages_is_that_over_whole_rows(times, dtype):
    heads, room = 32, 512
    lengths = torch.tensor([0, 63, 64, 300, 511] * times, dtype=torch.int32, device="cuda")
    rows, splits = len(lengths), room // 64
    whole = [random(rows, heads, room, WIDTH, dtype=dtype) for _ in range(2)]
    pages = 1 + torch.randperm(rows * splits, device="cuda").view(rows, splits)
    paged = [poisoned(1 + rows * splits, heads, 64, WIDTH, dtype=dtype) for _ in range(2)]
    for to, x in zip(paged, whole, strict=True):
        to[pages] = x.unflatten(2, (splits, 64)).transpose(1, 2)
    mixed = random(rows, heads * 3 * WIDTH, dtype=dtype)
    text = torch.full((rows,), 7, dtype=torch.int32, device="cuda")
    outs = []
    for keys, values, table in ((*whole, None), (*paged, pages.to(torch.int32).contiguous())):
        outs.append(poisoned(rows, heads * WIDTH, dtype=dtype))
        ops.attention(mixed, keys, values, rotary(), lengths=lengths, text_positions=text,
                      first_blocks=torch.zeros_like(lengths), out=outs[-1], pages=table,
                      workspace=ops.AttentionWorkspace(rows, heads, lengths.device),
                      )  # fmt: skip
    assert torch.equal(*outs)
    for to, x in zip(paged, whole, strict=True):  # the new keys and values went to their pages
        assert torch.equal(to[pages].transpose(1, 2).flatten(2, 3), x)
    assert all(torch.isnan(to[0]).all() for to in paged)


def test_in_a_ring_a_row_is_drawn_by_its_length_and_an_empty_place_is_passed_by():
    scores = random(4, 130528)
    plain = Sampler(scores, top_k=50, seed=9)
    expected = plain.tokens_of(20)
    ring = Sampler(scores, top_k=50, seed=9)
    wide = torch.full((8, 6), -1, dtype=torch.int32).pin_memory()
    history = wide[:, 1:5]
    ring.steps.copy_(torch.tensor([30, 30, -1, 30]))
    found = []
    for number in range(20):
        ops.sample(ring.scores, ring.draw, tokens=ring.tokens, lengths=ring.lengths,
                   steps=ring.steps, history=history, embedding=ring.embedding,
                   hidden=ring.hidden, guard_token=5, is_ring=True)  # fmt: skip
        torch.cuda.synchronize()
        found.append(wide[(30 + number) % 8, 1:5].clone())
    found = torch.stack(found)
    assert torch.equal(found[:, [0, 1, 3]], expected[:, [0, 1, 3]])
    assert (found[:, 2] == -1).all() and (wide[:, [0, 5]] == -1).all()
    assert ring.steps.tolist() == [50, 50, -1, 50] and ring.lengths.tolist() == [20, 20, 0, 20]
    assert torch.isnan(ring.hidden[2]).all() and not torch.isnan(ring.hidden[[0, 1, 3]]).any()


class Sampler:
    """Rows of scores, and the buffers that `ops.sample` fills."""

    def __init__(self, scores, *, top_k=1, top_p=1.0, temperature=1.0, penalty=1.0, seed=0):
        rows, vocabulary = scores.shape
        self.scores = scores
        self.draw = ops.Draw(
            seeds=torch.tensor([[seed, row] for row in range(rows)], dtype=torch.int32).cuda(),
            top_k=torch.full((rows,), top_k, dtype=torch.int32, device="cuda"),
            rules=torch.tensor([[top_p, 1 / temperature, penalty]] * rows, device="cuda"),
            seen=torch.zeros(rows, vocabulary // 32, dtype=torch.int32, device="cuda"),
        )
        self.embedding = random(vocabulary, 64, dtype=scores.dtype)
        self.hidden = poisoned(rows, 64, dtype=scores.dtype)
        self.tokens, self.lengths, self.steps = (
            torch.zeros(rows, dtype=torch.int32, device="cuda") for _ in range(3)
        )

    def tokens_of(self, steps):
        """(steps, B) tokens drawn one after the other."""
        history = torch.full((steps, len(self.scores)), -1, dtype=torch.int32).pin_memory()
        for _ in range(steps):
            ops.sample(self.scores, self.draw, tokens=self.tokens, lengths=self.lengths,
                       steps=self.steps, history=history, embedding=self.embedding,
                       hidden=self.hidden, guard_token=5)  # fmt: skip
        torch.cuda.synchronize()
        return history.clone()


@pytest.mark.parametrize("dtype", HALVES)
def test_greedy_takes_the_first_of_the_largest(dtype):
    scores = random(7, 130528, dtype=dtype)
    sampler = Sampler(scores)
    tokens = sampler.tokens_of(1)[0]
    assert torch.equal(tokens.long(), scores.float().argmax(dim=-1).cpu())
    assert torch.equal(sampler.hidden, sampler.embedding[tokens.long().cuda()])
    assert sampler.lengths.tolist() == sampler.steps.tolist() == [1] * 7


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_broken_scores_gets_the_guard_token_and_the_others_do_not(broken):
    scores = random(3, 130528)
    scores[1, 77_777] = broken
    for top_k in (1, 50):
        tokens = Sampler(scores, top_k=top_k, top_p=1e-6).tokens_of(1)[0].tolist()
        assert tokens[1] == 5
        assert tokens[::2] == scores[::2].float().argmax(dim=-1).tolist()


@pytest.mark.parametrize(("top_k", "top_p", "temperature", "penalty"), [
    (50, 0.7, 0.95, 1.0), (50, 1.0, 2.0, 1.0), (3, 0.9, 1.0, 1.3), (1024, 0.95, 1.5, 1.0),
])  # fmt: skip
def test_tokens_are_drawn_as_often_as_transformers_rules_say(top_k, top_p, temperature, penalty):
    from chatglm.sampling import Sampling

    # No two alike: which of equal scores stands at a limit is nobody's rule.
    scores, steps = random(200_000, scale=2.0).unique(), 20_000
    scores = scores[torch.randperm(len(scores), device="cuda")][None, :4096].contiguous()
    sampler = Sampler(scores, top_k=top_k, top_p=top_p, temperature=temperature, penalty=penalty)
    so_far = torch.arange(0, 4096, 3, device="cuda")[None]
    marks = torch.zeros(4096, dtype=torch.int64, device="cuda")
    marks[so_far[0]] = 1
    words = (marks.view(-1, 32) << torch.arange(32, device="cuda")).sum(dim=1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)[None]
    rules = Sampling(True, top_p, temperature, top_k, penalty).processors()
    chances = torch.softmax(rules(so_far, scores.float()), dim=-1)[0].double().cpu()
    counts = torch.zeros(4096, dtype=torch.float64)
    for token in _drawn_with_marks(sampler, words, steps):
        counts[token] += 1
    assert counts[chances == 0].sum() == 0
    expected = chances * steps
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = int(often.sum())
    assert statistic < degrees + 6 * (2 * degrees) ** 0.5  # six deviations


@pytest.mark.parametrize("dtype", HALVES)
def test_equal_scores_beyond_the_room_leave_no_larger_one_out(dtype):
    scores = torch.zeros(2, 130528, dtype=dtype, device="cuda")
    scores[0, 100_000], scores[1, 5::7] = 3.0, 1.0
    tokens = Sampler(scores, top_k=1024, top_p=1e-6).tokens_of(3)
    assert tokens[:, 0].tolist() == [100_000] * 3
    assert tokens[:, 1].tolist() == [5] * 3


def test_a_seed_draws_the_same_among_equal_scores():
    scores = random(1, 130528).mul(4).round()
    drawn = [Sampler(scores, top_k=1000, seed=3).tokens_of(50) for _ in range(2)]
    assert torch.equal(*drawn)


def _drawn_with_marks(sampler, words, steps):
    """Tokens, the marks set back before each, so that every draw is of the same chances."""
    history = torch.full((steps, 1), -1, dtype=torch.int32).pin_memory()
    for _ in range(steps):
        sampler.draw.seen.copy_(words)
        ops.sample(sampler.scores, sampler.draw, tokens=sampler.tokens, lengths=sampler.lengths,
                   steps=sampler.steps, history=history, embedding=sampler.embedding,
                   hidden=sampler.hidden, guard_token=5)  # fmt: skip
    torch.cuda.synchronize()
    return history[:, 0].tolist()


def test_a_seed_draws_the_same_tokens_again_and_rows_of_one_seed_differ():
    scores = random(1, 130528).expand(4, -1).contiguous()
    drawn = [Sampler(scores, top_k=50, seed=3).tokens_of(16) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][:, 0], drawn[0][:, 1])
    alone = Sampler(scores[:1], top_k=50, seed=3).tokens_of(16)
    assert torch.equal(alone[:, 0], drawn[0][:, 0])
