"""The shifted loss against a loop, and the chunked one against the plain one."""

import pytest
import torch
from torch import nn

from chatglm.loss import CHUNK, IGNORE, chunked_loss, learned_tokens, next_token_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_predict_the_next_label_and_ignored_ones_do_not_count(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator).to(dtype)
    labels = torch.tensor([[IGNORE, IGNORE, 3, 1, 6], [2, IGNORE, IGNORE, 4, IGNORE]])
    losses = [
        -torch.log_softmax(logits[row, t].float(), dim=-1)[labels[row, t + 1]]
        for row in range(2)
        for t in range(4)
        if labels[row, t + 1] != IGNORE
    ]
    loss = next_token_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.stack(losses).mean())
    assert torch.allclose(next_token_loss(logits, labels, 8), torch.stack(losses).sum() / 8)


class Heads:
    """The same hidden states and head twice, and the gradients of both."""

    def __init__(self, tokens, *, ignored):
        generator = torch.Generator().manual_seed(tokens)
        self.hidden = torch.randn(3, tokens, 16, generator=generator).requires_grad_()
        self.head = nn.Linear(16, 50, bias=False)
        nn.init.normal_(self.head.weight, generator=generator)
        self.labels = torch.randint(50, (3, tokens), generator=generator)
        self.labels[torch.rand(3, tokens, generator=generator) < ignored] = IGNORE

    def gradients(self, loss):
        return torch.autograd.grad(loss, [self.hidden, self.head.weight])


@pytest.mark.parametrize("num_items", [None, 12.5, torch.tensor(40)], ids=["mean", "float", "int"])
@pytest.mark.parametrize("tokens", [2, 40, CHUNK], ids=["one", "some", "many"])
def test_the_chunked_loss_and_its_gradients_are_those_of_all_logits(tokens, num_items):
    both = Heads(tokens, ignored=0.0 if tokens == 2 else 0.3)
    if tokens == CHUNK:
        assert (both.labels[:, 1:] != IGNORE).sum() > 2 * CHUNK
    plain = next_token_loss(both.head(both.hidden), both.labels, num_items)
    chunked = chunked_loss(both.hidden, learned_tokens(both.labels), both.head, num_items)
    torch.testing.assert_close(chunked, plain)
    for found, expected in zip(both.gradients(chunked), both.gradients(plain), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_items", [None, 7.0])
def test_a_batch_that_learns_nothing_has_a_loss_of_0_and_gradients_of_0(num_items):
    both = Heads(5, ignored=1.0)
    loss = chunked_loss(both.hidden, learned_tokens(both.labels), both.head, num_items)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in both.gradients(loss))


def test_no_more_than_a_chunk_of_logits_exists_at_a_time():
    both, seen = Heads(CHUNK, ignored=0.0), []

    def head(rows):
        seen.append(rows.shape)
        return both.head(rows)

    chunked_loss(both.hidden, learned_tokens(both.labels), head).backward()
    assert len(seen) == 2 * 3 and max(shape[0] for shape in seen) == CHUNK
