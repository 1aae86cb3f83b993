"""Samples as a person wants to see them: pieces, ids, what is learned, positions, cuts."""

from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .positions import position_rows, token_index
from .strategies import Sample
from .tokenizer import ChatGLMTokenizer

MOST_SHOWN = 160
"""Tokens of a long sample: so many of its beginning, and half as many of its end."""
LEARNED, CONTROL, READ = "bold green", "bold yellow", "dim"


def show_sample(
    sample: Sample, tokenizer: ChatGLMTokenizer, console: Console, *, title: str
) -> None:
    """Print a sample: its text, then its tokens in lines as wide as the console."""
    ids = sample.input_ids.tolist()
    learned = len(ids) - sample.context_length - 1
    cuts = [name for name, is_cut in (("prompt cut", sample.prompt_cut),
                                      ("answer cut, so without <eop>", sample.answer_cut))
            if is_cut]  # fmt: skip
    said = ", ".join(cuts) or "nothing cut"
    console.print(Text(f"{title}: {len(ids)} tokens, {learned} learned; {said}", style="bold"))
    split = sample.context_length + 1
    for part, style in ((ids[:split], READ), (ids[split:], LEARNED)):
        console.print(Text(str(tokenizer.decode(part)), style=style))
    if len(ids) > MOST_SHOWN * 3 // 2:
        left_out = f" (tokens {MOST_SHOWN} to {len(ids) - MOST_SHOWN // 2 - 1} are not shown)"
        console.print(Text(f"the tokens{left_out}", style=READ))
    for table in _tables(sample, tokenizer, console.width):
        console.print(table)


def _tables(sample: Sample, tokenizer: ChatGLMTokenizer, width: int) -> Iterator[Table]:
    columns = _columns(sample, tokenizer)
    if len(columns) > MOST_SHOWN * 3 // 2:
        columns = [*columns[:MOST_SHOWN], *columns[-MOST_SHOWN // 2 :]]
    while columns:
        table, used, taken = Table.grid(padding=(0, 1)), 12, 0
        for column in columns:
            used += max(text.cell_len for text in column) + 1
            if taken and used > width:
                break
            taken += 1
        names = ("piece", "id", "learned", "position", "block")
        for row, name in enumerate(names):
            table.add_row(Text(name, style=READ), *(column[row] for column in columns[:taken]))
        columns = columns[taken:]
        yield table


def _columns(sample: Sample, tokenizer: ChatGLMTokenizer) -> list[list[Text]]:
    """Of every token: piece, id, whether it is learned, and the two positions it is given."""
    ids, context = sample.input_ids.tolist(), sample.context_length
    batch = torch.tensor([ids])
    rows = position_rows(
        token_index(batch, None), torch.tensor([context]), torch.tensor([context - 1])
    )
    columns = []
    for number, (token, text, block) in enumerate(zip(ids, *rows[0].tolist(), strict=True)):
        is_learned = number > context
        piece = tokenizer.sp_model.id_to_piece(token)
        style = READ if not is_learned else LEARNED
        style = CONTROL if tokenizer.sp_model.is_control(token) else style
        cells = (piece, str(token), "#" if is_learned else ".", str(text), str(block))
        columns.append([Text(cell, style=style) for cell in cells])
    return columns
