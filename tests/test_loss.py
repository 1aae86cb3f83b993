"""The shifted loss against a loop."""

import pytest
import torch

from chatglm.loss import IGNORE, next_token_loss


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
