"""The released tokenizer (see pieces.py) as transformers knows tokenizers.

Text never turns into a control token here. transformers splits texts at every special token it
knows, so a user who types `<eop>` would end the model's reading; the released tokenizer reads it
as five characters, and so does this one. Control tokens enter only as ids.
"""

import functools
import io
import itertools
import os
import shutil

import numpy as np
import sentencepiece
from transformers import PreTrainedTokenizer
from transformers.utils import PaddingStrategy

from .errors import ToolkitError
from .pieces import (
    LONGEST_BLANK,
    NEWLINE,
    TAB,
    VOCAB_FILE,
    Pieces,
    blank_token,
    mark_whitespace,
    unmark_whitespace,
)


class ChatGLMTokenizer(PreTrainedTokenizer):
    """`ice_text.model` as the released ChatGLMTokenizer reads it.

    Raises:
        ToolkitError: if the vocabulary file can't be read, or is of the first release
            (`num_image_tokens` above 0).
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 0,
        **kwargs,
    ):
        if num_image_tokens:
            raise ToolkitError(
                f"{vocab_file}: num_image_tokens {num_image_tokens} is the tokenizer of the first"
                " ChatGLM-6B (vocabulary 150528): take the current tokenizer files (v1.1)"
            )
        self.vocab_file = vocab_file
        self.end_token, self.gmask_token = end_token, gmask_token
        self.pieces = Pieces(vocab_file)
        self.sp_model = self.pieces.processor
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            end_token=end_token,
            mask_token=mask_token,
            gmask_token=gmask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            **kwargs,
        )

    @property
    def gmask_token_id(self) -> int:
        """Id of [gMASK]."""
        return self.sp_model.piece_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        """Id of </s>."""
        return self.sp_model.piece_to_id(self.end_token)

    @property
    def vocab_size(self) -> int:
        """Number of pieces; the model's embedding may have more rows."""
        return self.sp_model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Every piece with its id."""
        return {self.sp_model.id_to_piece(i): i for i in range(self.vocab_size)}

    def encode_texts(self, texts: list[str], *, num_threads: int = -1) -> list[list[int]]:
        """Ids of many texts, without control tokens."""
        return self.pieces.encode(texts, num_threads=num_threads)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt ready for an answer: text, [gMASK], <sop>."""
        return self.build_inputs_with_special_tokens(self.encode_texts([text])[0])

    def tokenize(self, text: str, **kwargs) -> list[str]:  # type: ignore[override]
        """Pieces of a text; nothing in it is taken for a control token."""
        return self.sp_model.encode(mark_whitespace(text), out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.id_to_piece(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces."""
        return unmark_whitespace(self.sp_model.decode(tokens))

    def _decode(  # type: ignore[override]
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs
    ) -> str:
        """Text of ids. Control tokens have no text, whether skipped or not, as in the released
        tokenizer; neither have the embedding rows past the last piece."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        limit, controls = self.vocab_size, self._control_ids
        return unmark_whitespace(
            self.sp_model.decode([i for i in ids if i < limit and i not in controls])
        )

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        ids = range(self.vocab_size)
        return frozenset(itertools.compress(ids, self.sp_model.is_control(list(ids))))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """prompt [gMASK] <sop>, or with an answer: prompt [gMASK] <sop> answer <eop>."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def _pad(
        self,
        encoded_inputs,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict:
        """Pad on the left, with the released mask (1, T, T) and positions (2, T).

        The mask is True where attention is forbidden. Without padding nothing is added: the model
        finds mask and positions itself.
        """
        if (padding_side or self.padding_side) != "left":
            raise ToolkitError("ChatGLM-6B is padded on the left; padding_side 'right' is not used")
        ids = encoded_inputs["input_ids"]
        if padding_strategy == PaddingStrategy.LONGEST:
            max_length = len(ids)
        if padding_strategy == PaddingStrategy.DO_NOT_PAD or max_length is None:
            return encoded_inputs
        if pad_to_multiple_of:
            max_length = -(-max_length // pad_to_multiple_of) * pad_to_multiple_of
        num_pads = max(max_length - len(ids), 0)
        forbidden, positions = self._mask_and_positions(list(ids))
        encoded_inputs["input_ids"] = [self.pad_token_id] * num_pads + list(ids)
        encoded_inputs["attention_mask"] = np.pad(
            forbidden, ((0, 0), (num_pads, 0), (num_pads, 0)), constant_values=True
        )
        encoded_inputs["position_ids"] = np.pad(positions, ((0, 0), (num_pads, 0)))
        return encoded_inputs

    def _mask_and_positions(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        length = len(ids)
        context = ids.index(self.bos_token_id) if self.bos_token_id in ids else length
        allowed = np.tril(np.ones((1, length, length), dtype=bool))
        allowed[:, :, :context] = True
        text = np.arange(length, dtype=np.int64)
        mask_id = self.mask_token_id if self.mask_token_id in ids else self.gmask_token_id
        if mask_id in ids:
            text[context:] = ids.index(mask_id)
        block = np.clip(np.arange(length) - context + 1, 0, None)
        return ~allowed, np.stack((text, block))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Copy the SentencePiece model into a folder."""
        name = f"{filename_prefix}-{VOCAB_FILE}" if filename_prefix else VOCAB_FILE
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)


def train_tokenizer(texts: list[str], folder: str, *, vocab_size: int) -> ChatGLMTokenizer:
    """A small tokenizer of the released kind, trained on texts; the same texts give the same file.

    Unigram over NFKC text with bytes for rare characters, control tokens first, as released. The
    vocabulary may come out smaller than vocab_size when the texts hold little.

    Raises:
        ToolkitError: if the texts are too few or hold more characters than vocab_size has room for.
    """
    os.makedirs(folder, exist_ok=True)
    path, model = os.path.join(folder, VOCAB_FILE), io.BytesIO()
    whitespace = [NEWLINE, TAB, *(blank_token(k) for k in range(2, LONGEST_BLANK + 1))]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,  # model_prefix would write the folder's name into the file
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            split_digits=True,
            byte_fallback=True,
            pad_id=3,
            control_symbols=["[MASK]", "<unused_0>", "[gMASK]", "<sop>", "<eop>"],
            user_defined_symbols=whitespace,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ToolkitError(
            f"no tokenizer of {vocab_size} pieces can be trained on {len(lines)} lines ({error});"
            " change vocab_size in the config, or name weights with their own tokenizer"
        ) from None
    with open(f"{path}.part", "wb") as file:
        file.write(model.getvalue())
    os.replace(f"{path}.part", path)
    return ChatGLMTokenizer(path)
