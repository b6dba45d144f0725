"""Prompt and answer to token ids and labels: the project's one template.

    [bos] before  <image_patch> × K  after ⏎  answer  eos
    ───────────── no loss ──────────────────  ── loss ──

`before` and `after` are the prompt's text on either side of its `<image>`, so that the image stands
where the data has it. A newline ends the prompt. The four pieces are tokenized apart: no token
spans a border, the labels start exactly at the answer, and the ids of a prompt do not depend on its
answer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from vlm_composer.data.schema import IMAGE_PLACEHOLDER
from vlm_composer.models.ignore_index import IGNORE_INDEX

IMAGE_TOKEN = "<image_patch>"


@dataclass(frozen=True)
class TokenizedSample:
    """One sample as the model reads it.

    Attributes:
        input_ids: Token ids, length T.
        labels: Length T; the token id at answer positions, -100 elsewhere.
        num_cut: Answer tokens (the end-of-text among them) cut off by `max_seq_len`.
    """

    input_ids: list[int]
    labels: list[int]
    num_cut: int


def check_token_ids(
    tokenizer: PreTrainedTokenizerBase, rows: int, *, name: str, language_model: str
) -> None:
    """Refuse a tokenizer of another model: only `<image_patch>` may lack a row in the table.

    Args:
        tokenizer: Of the run.
        rows: Of the language model's own embedding table.
        name: What messages call the tokenizer.
        language_model: What messages call the language model.

    Raises:
        ValueError: Another token's id is beyond the table.
    """
    ids = {id: token for token, id in tokenizer.get_vocab().items() if token != IMAGE_TOKEN}
    added = [*tokenizer.all_special_ids, *tokenizer("a").input_ids]  # as a post-processor adds
    ids |= {id: tokenizer.convert_ids_to_tokens(id) for id in added if id not in ids}
    ids.pop(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), None)
    beyond = sorted(id for id in ids if id >= rows)
    if beyond:
        raise ValueError(
            f"the tokenizer {name} has {len(ids):,} tokens with ids up to {beyond[-1]:,} "
            f"({ids[beyond[-1]]!r}), and {language_model} has {rows:,} rows for them: "
            f"{len(beyond):,} have none; set language_model.tokenizer to the model's own"
        )


class Template:
    """Turns prompts and answers into token ids and labels.

    Args:
        tokenizer: A Hugging Face tokenizer; `<image_patch>` is added to it where it is missing.
        num_image_tokens: `<image_patch>` tokens an image (K).
        max_seq_len: Longest sample in tokens; longer answers are cut.
        add_bos: Begin every sample with the tokenizer's start token. None does what the tokenizer
            itself does.

    Raises:
        ValueError: The tokenizer has no end-of-text token, or no start token where one is asked
            for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_image_tokens: int,
        max_seq_len: int,
        add_bos: bool | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-text token (eos_token): set one and save it"
            )
        if add_bos and tokenizer.bos_token_id is None:
            raise ValueError("add_bos: true, but the tokenizer has no start token (bos_token)")
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [IMAGE_TOKEN]}, replace_additional_special_tokens=False
        )
        if add_bos is None:
            begins_with = tokenizer("a").input_ids[:1]
            add_bos = tokenizer.bos_token_id is not None and begins_with == [tokenizer.bos_token_id]
        self.tokenizer = tokenizer
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        others = {id for token, id in tokenizer.get_vocab().items() if token != IMAGE_TOKEN}
        if self.image_token_id in others:
            raise ValueError(
                f"{IMAGE_TOKEN} would have id {self.image_token_id}, which another token of the "
                f"tokenizer has; add {IMAGE_TOKEN} to it with an id of its own and save it"
            )
        self.num_image_tokens = num_image_tokens
        self.max_seq_len = max_seq_len
        self._start = [tokenizer.bos_token_id] if add_bos else []
        # A data set has about a dozen prompts: each is tokenized once a process.
        self.encode_prompt = functools.lru_cache(maxsize=1024)(self._encode_prompt)

    def encode(self, prompt: str, answer: str) -> TokenizedSample:
        """Tokenize one sample.

        Args:
            prompt: Text with exactly one `<image>`.
            answer: Text that follows it.

        Returns:
            Ids and labels, at most `max_seq_len` long. An answer that was cut has no end-of-text:
            it did not end there.

        Raises:
            ValueError: The prompt has not exactly one `<image>`, or leaves no room for an answer.
        """
        return self.join(prompt, self.tokenize([answer])[0])

    def join(self, prompt: str, answer: Sequence[int]) -> TokenizedSample:
        """Do what `encode` does where the answer is tokenized already (`tokenize`)."""
        prompt_ids = self.encode_prompt(prompt)
        room = self.max_seq_len - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"the prompt is {len(prompt_ids)} tokens with its image and max_seq_len is "
                f"{self.max_seq_len}: no token is left for the answer; raise max_seq_len"
            )
        answer_ids = [*answer, self.tokenizer.eos_token_id]
        kept = answer_ids[:room]
        return TokenizedSample(
            input_ids=[*prompt_ids, *kept],
            labels=[IGNORE_INDEX] * len(prompt_ids) + kept,
            num_cut=len(answer_ids) - len(kept),
        )

    def _encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """Token ids of everything before the answer, the image's among them."""
        pieces = prompt.split(IMAGE_PLACEHOLDER)
        if len(pieces) != 2:
            raise ValueError(
                f"a prompt has one {IMAGE_PLACEHOLDER}, this one has {len(pieces) - 1}: {prompt!r}"
            )
        before, after = self.tokenize([pieces[0], pieces[1] + "\n"])
        return (*self._start, *before, *[self.image_token_id] * self.num_image_tokens, *after)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the token ids of texts; of several at once in a third of the time.

        Special tokens in the data are text: a caption cannot end the text or pose as an image.
        """
        return self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True
        ).input_ids
