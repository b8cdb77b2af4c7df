"""Chat messages and images to token ids and patches, and completions back to text, without torchvision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from cpt_lightning.types import Completions, Prompts

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchEncoding

TINY = Path(__file__).parent / "tiny" / "base"
"""The embedded base: a real, small Qwen2.5-VL folder."""

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


class PromptProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor with a tokenizer and a PIL image processor only.

    The one in transformers also wants a video processor, and that wants torchvision, of which there is no build for
    every torch. Called as ``processor(text=..., images=...)`` it is the one users of transformers know.

    Args:
        image_processor: Turns images into patches.
        tokenizer: Qwen tokenizer with the vision tokens.
        chat_template: Jinja template; the tokenizer's own by default.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template: str | None = None, **kwargs):
        self.image_token = "<|image_pad|>"
        self.video_token = "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        template = chat_template or tokenizer.chat_template
        # Past Qwen2_5_VLProcessor's constructor, which insists on a video processor.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=template)

    @classmethod
    def load(cls, path: str, min_pixels: int | None = None, max_pixels: int | None = None) -> Self:
        """Loads the processor that belongs to a backbone.

        Args:
            path: Folder, hub id, or ``"tiny"``.
            min_pixels: Smaller images are enlarged to this area; the folder's setting by default.
            max_pixels: Larger images are reduced to this area; the folder's setting by default.
        """
        folder = resolve_path(path)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        given = {name: pixels for name, pixels in bounds.items() if pixels is not None}
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, **given)
        smallest, largest = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
        if smallest > largest:
            raise ValueError(f"min_pixels={smallest} is more than max_pixels={largest} of {path!r}; set both")
        return cls(image_processor, tokenizer)

    @property
    def pad_token_id(self) -> int:
        """Fills up ragged batches."""
        return self.tokenizer.pad_token_id

    @property
    def eos_token_id(self) -> int:
        """Ends the assistant's turn."""
        return self.tokenizer.convert_tokens_to_ids(STOP_TOKENS[0])

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Tokens after which sampling of a completion ends."""
        return self._known_ids(STOP_TOKENS)

    @cached_property
    def banned_token_ids(self) -> list[int]:
        """Tokens that must never be sampled: a placeholder without an image crashes the next forward."""
        return self._known_ids(VISION_TOKENS)

    def _known_ids(self, tokens: Sequence[str]) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary[token] for token in tokens if token in vocabulary]

    def encode(
        self,
        messages: Sequence[list[dict]],
        images: Sequence[list[Image]] | None = None,
        row_ids: Sequence[str] | None = None,
    ) -> Prompts:
        """Encodes chats up to where the assistant begins to speak.

        Args:
            messages: B chats; an image stands as ``{"type": "image"}`` in a message's content.
            images: The B chats' images in order; none by default.
            row_ids: Names for error messages.

        Returns:
            B left-padded prompts, without examples.

        Raises:
            TypeError: One chat where there should be a list of them, or one image.
            ValueError: No chats, or lists of images for another number of them; a chat holds another number of image
                places than images, or an image that cannot be cut into patches; names the row.
        """
        if any(isinstance(chat, str | dict) for chat in messages):
            raise TypeError("messages is one chat, or texts; give a list of chats, each a list of turns")
        if not messages:
            raise ValueError("messages=[]: there is nothing to encode")
        images = images if images is not None else [[] for _ in messages]
        if len(images) != len(messages):
            raise ValueError(f"{len(images)} lists of images for {len(messages)} chats; give each chat one, if empty")
        names = row_ids if row_ids is not None else [f"prompt {index}" for index in range(len(messages))]
        texts, patches, grids = [], [], []
        for chat, pictures, name in zip(messages, images, names, strict=True):
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            pixels, grid = self._patches(pictures, name)
            texts.append(self._expand_placeholders(text, grid, name))
            patches.append(pixels)
            grids.append(grid)
        encoded = self._encode_texts(texts)
        has_images = any(len(grid) for grid in grids)
        return Prompts(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            images_per_prompt=[len(grid) for grid in grids],
            pixel_values=torch.cat(patches) if has_images else None,
            image_grid_thw=torch.cat(grids) if has_images else None,
        )

    def reworded(self, prompts: Prompts, messages: Sequence[list[dict]]) -> Prompts:
        """Other words about the same images, which are not cut into patches again.

        Args:
            prompts: B prompts.
            messages: B chats with the images of the prompts.
        """
        grids: Sequence[Tensor] = [torch.zeros(0, 3)] * len(prompts)
        if prompts.image_grid_thw is not None:
            grids = prompts.image_grid_thw.split(prompts.images_per_prompt)
        texts = [
            self._expand_placeholders(
                self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
                grid,
                example.row_id,
            )
            for chat, grid, example in zip(messages, grids, prompts.examples, strict=True)
        ]
        encoded = self._encode_texts(texts).to(prompts.device)
        return replace(prompts, input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], state=None)

    def _encode_texts(self, texts: list[str]) -> BatchEncoding:
        return self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)

    def _patches(self, images: Sequence[Image], name: str) -> tuple[Tensor, Tensor]:
        """``[num_patches, patch_dim]`` and ``[num_images, 3]`` of one chat's images."""
        if not isinstance(images, Sequence) or any(isinstance(image, str | PathLike) for image in images):
            raise TypeError(f"{name}: its images are {images!r:.80}; give a list of PIL images")
        if not images:
            return torch.zeros(0, self._patch_dim), torch.zeros(0, 3, dtype=torch.long)
        try:
            features = self.image_processor(images=list(images), return_tensors="pt")
        except ValueError as error:
            sizes = [image.size for image in images]
            raise ValueError(f"{name}: images of sizes {sizes} cannot be cut into patches: {error}") from error
        return features["pixel_values"], features["image_grid_thw"]

    @property
    def _patch_dim(self) -> int:
        return 3 * self.image_processor.temporal_patch_size * self.image_processor.patch_size**2

    def _expand_placeholders(self, text: str, grid: Tensor, name: str) -> str:
        """One ``<|image_pad|>`` per image becomes as many as the image has merged patches."""
        places = text.count(self.image_token)
        if places != len(grid):
            raise ValueError(
                f"{name}: {places} places for an image in the prompt, but {len(grid)} images; "
                "each image needs one {'type': 'image'} part (or <image> marker), "
                f"and text must not hold {self.image_token}"
            )
        counts = iter((grid.prod(dim=1) // self.image_processor.merge_size**2).tolist())
        return re.sub(re.escape(self.image_token), lambda _: self.image_token * next(counts), text)

    def count_tokens(self, messages: list[dict], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Tokens of a prompt and how many of them are its images', from the images' sizes alone: no pixel is touched.

        Args:
            messages: A chat, as :meth:`encode` takes it.
            sizes: Width and height of each image.
        """
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        num_tokens = len(self.tokenizer.encode(text, add_special_tokens=False))
        patches = [self.image_processor.get_number_of_image_patches(height, width) for width, height in sizes]
        num_image_tokens = sum(count // self.image_processor.merge_size**2 for count in patches)
        return num_tokens - len(sizes) + num_image_tokens, num_image_tokens

    def encode_targets(
        self,
        texts: Sequence[str],
        ids: Sequence[list[int] | None] | None = None,
        row_ids: Sequence[str] | None = None,
    ) -> Completions:
        """Reference completions, right-padded.

        Args:
            texts: N completions, each of which gets the end-of-turn token.
            ids: What they were sampled as, in place of the text; the same text has several spellings in tokens.
            row_ids: Names for error messages.

        Raises:
            ValueError: Ids that spell another text, as those of another tokenizer do; names the row.
        """
        # Special tokens in a target are text to learn, not commands: a data set must not be able to end the turn early.
        rows = [
            [*self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), self.eos_token_id]
            for text in texts
        ]
        for row, given in enumerate(ids or []):
            if given is not None:
                self._check_spelling(given, texts[row], row_ids[row] if row_ids else f"target {row}")
                rows[row] = list(given)
        length = max(map(len, rows))
        padded = torch.tensor([row + [self.pad_token_id] * (length - len(row)) for row in rows])
        mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
        return Completions(padded, mask)

    def encode_prefix(self, text: str) -> list[int]:
        """Tokens that a reply is made to begin with.

        Raises:
            ValueError: It ends the turn, or has a token that is never sampled, such as one of an image.
        """
        if not text:
            return []
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if commands := {*self.stop_token_ids, *self.banned_token_ids, self.pad_token_id}.intersection(ids):
            named = self.tokenizer.convert_ids_to_tokens(sorted(commands))
            raise ValueError(f"the prefix {text!r} has {', '.join(named)}, which no reply can go on behind")
        return ids

    def _check_spelling(self, ids: list[int], text: str, name: str) -> None:
        row = torch.tensor([ids])
        known = bool(ids) and min(ids) >= 0 and max(ids) < len(self.tokenizer)
        if not known or self.decode(Completions(row, torch.ones_like(row, dtype=torch.bool))) != [text]:
            raise ValueError(
                f"{name}: its token ids do not spell its reply {text!r:.60}: another tokenizer sampled it, or one of "
                "the two was edited; take the column of ids out of the file, and the text is learned"
            )

    def decode(self, completions: Completions) -> list[str]:
        """N completions as text, without the tokens that end a turn."""
        ends = {*self.stop_token_ids, self.pad_token_id}
        rows = zip(completions.ids.tolist(), completions.mask.tolist(), strict=True)
        kept = [
            [token for token, real in zip(ids, mask, strict=True) if real and token not in ends] for ids, mask in rows
        ]
        return self.tokenizer.batch_decode(kept, clean_up_tokenization_spaces=False)


def resolve_path(path: str) -> str:
    """The folder or hub id behind a backbone's path; ``"tiny"`` is the embedded base."""
    return str(TINY) if path == "tiny" else path
