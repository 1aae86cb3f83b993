"""The kernels' functions in plain torch, in any precision, so that captured steps run on a CPU.

What a step does with its buffers, its cache and its counts is tested without a GPU this way; the
kernels themselves are tested against plain torch on one (test_kernels.py).
"""

import contextlib

import torch
import torch.nn.functional as F

from chatglm import batch_step, decoding, prompt_graphs, steps
from chatglm.kernels import ops, products
from chatglm.quantization.linear import dequantize_rows
from chatglm.rotary import apply_rotary


def linear(x, weight, *, scale=None, bias=None, norm=None, normed=None, gelu=False, residual=None,
           alpha=1.0, out=None):  # fmt: skip
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)
        normed.copy_(x)
    bits = products.bits_of(weight, x.shape[1])
    matrix = weight if bits == 16 else dequantize_rows(weight, scale, bits, x.dtype)
    product = F.linear(x, matrix, bias)
    product = F.gelu(product, approximate="tanh") if gelu else product
    return out.copy_(product if residual is None else product + alpha * residual)


def library_gelu(x, linear, *, out=None):
    found = F.gelu(linear(x), approximate="tanh")
    return found if out is None else out.copy_(found)


def _angles(rotary, text, block):
    """Cosine and sine (.., 1, D) for positions of the two halves (..)."""
    return tuple(torch.cat((table[text], table[block]), dim=-1)[..., None, :] for table in rotary)


def _see(query, keys, values):
    """(H, D) of query (H, D) over keys and values (H, S, D)."""
    weights = (keys @ query[..., None])[..., 0] / query.shape[-1] ** 0.5
    return (weights.softmax(dim=-1)[:, None] @ values)[:, 0]


def attention(mixed, keys, values, rotary, *, lengths, text_positions, first_blocks, workspace,
              out, scales=None, pages=None, keys_are_new=False):  # fmt: skip
    if pages is not None:
        _paged_attention(mixed, keys, values, rotary, lengths, text_positions, first_blocks,
                         workspace, out, pages)  # fmt: skip
        return out
    rows, heads = keys.shape[:2]
    q, k, v = mixed.view(rows, heads, -1).chunk(3, dim=-1)
    angles = _angles(rotary, text_positions.long(), (lengths - first_blocks).long())
    q, k = (apply_rotary(x, *(a for a in angles)) for x in (q, k))
    for row, length in enumerate(lengths.tolist()):
        for part, (stored, new) in enumerate(((keys, k), (values, v))):
            if scales is None:
                stored[row, :, length] = new[row]
            else:
                scale = new[row].abs().amax(dim=-1) / 127
                stored[row, :, length] = (new[row] / scale[:, None]).round().to(torch.int8)
                scales[part, row, :, length] = scale
        seen = [x[row, :, : length + 1].to(q.dtype) for x in (keys, values)]
        if scales is not None:
            seen = [x * scales[part, row, :, : length + 1, None] for part, x in enumerate(seen)]
        out[row] = _see(q[row], *seen).flatten()
    return out


def _paged_attention(mixed, keys, values, rotary, lengths, text, first_blocks, workspace, out,
                     pages):  # fmt: skip
    assert (lengths >= first_blocks).all() and (text >= 0).all()  # or it reads before the tables
    for row, length in enumerate(lengths.tolist()):
        used = pages[row, : length // 64 + 1].long()
        both = (x[used].transpose(0, 1).flatten(1, 2)[None] for x in (keys, values))
        rows_keys, rows_values = both
        one = slice(row, row + 1)
        attention(mixed[one], rows_keys, rows_values, rotary, lengths=lengths[one],
                  text_positions=text[one], first_blocks=first_blocks[one], workspace=workspace,
                  out=out[one])  # fmt: skip
        for stored, new in ((keys, rows_keys), (values, rows_values)):
            stored[used[-1], :, length % 64] = new[0, :, length]


def attention_of_drafts(query, keys, values, *, lengths, workspace, out):
    for row in range(query.shape[2]):
        end = int(lengths[0]) + row + 1
        out[row] = _see(query[0, :, row], keys[0, :, :end], values[0, :, :end]).flatten()
    return out


def rotate(mixed, positions, keys, values, rotary, *, offset):
    rows, tokens = mixed.shape[:2]
    q, k, v = mixed.view(rows, tokens, keys.shape[1], -1).chunk(3, dim=-1)  # (B, T, H, D)
    if offset is None:
        offset, text, first = positions.tolist()
        block = torch.arange(offset, offset + tokens)[None] - first
        text = torch.full_like(block, text)
    else:
        text, block = positions.long().unbind(1)
    angles = _angles(rotary, text, block)
    keys[:, :, offset : offset + tokens] = apply_rotary(k, *angles).transpose(1, 2)
    values[:, :, offset : offset + tokens] = v.transpose(1, 2)
    return apply_rotary(q, *angles).transpose(1, 2).contiguous()


def sample(scores, draw, *, tokens, lengths, steps, history, embedding, hidden, guard_token,
           is_ring=False):  # fmt: skip
    """Greedy only, but for a made-up draw by seed and length."""
    for row, step in enumerate(steps.tolist()):
        if is_ring and step < 0:
            continue
        assert 1 <= draw.top_k[row] <= ops.MOST_TOP_K
        chosen = int(scores[row].argmax())
        if draw.top_k[row] > 1:
            number = int(draw.seeds[row, 0]) + int(lengths[row])
            chosen = int(scores[row].topk(int(draw.top_k[row])).indices[number % draw.top_k[row]])
        tokens[row] = chosen
        history[step % len(history) if is_ring else step, row] = chosen
        hidden[row] = embedding[chosen]
        steps[row] += 1
        lengths[row] += 1


class Stream:
    """Of a machine without one."""

    def synchronize(self):
        pass


class Replay:
    """A graph that is run rather than replayed."""

    def __init__(self, step):
        self.replay = step._step


class Again:
    """The same of a prompt."""

    def __init__(self, work):
        self.replay = work


def use(monkeypatch):
    """Captured steps on a CPU until the test ends."""
    monkeypatch.setattr(products, "linear", linear)
    monkeypatch.setattr(products, "library_gelu", library_gelu)
    for function in (attention, attention_of_drafts, rotate, sample):
        monkeypatch.setattr(ops, function.__name__, function)
    monkeypatch.setattr(products, "supports_norm", lambda *_: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(batch_step, "new_pool", lambda: None)
    monkeypatch.setattr(prompt_graphs, "capture", lambda work, pool: Again(work))
    monkeypatch.setattr(steps.CapturedStep, "_capture", lambda step: Replay(step))
    monkeypatch.setattr(decoding, "reason_against", lambda model: None)
