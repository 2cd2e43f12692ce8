"""Sentence vectors: what a sentence-transformers folder describes, computed without padding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bert_fast import engine, ops
from bert_fast.batching import RowBuffer, chunks, map_ahead, plan_batches
from bert_fast.families import model_class
from bert_fast.folders import resolve
from bert_fast.loading import build, parse_device, read_config, read_state_dict
from bert_fast.modules import BertModel
from bert_fast.sentence_folder import Recipe
from bert_fast.terminal import progress_bar
from bert_fast.tokenization import TokenBatch, Tokenizer
from bert_fast.transfer import to_device, to_host

#: The `batch_size` at which a run of the model has as many tokens as suit the device.
DEFAULT_BATCH_SIZE = 32

#: Tokens of such a run on the CPU: at least so many, and more where threads would have too few to share them evenly.
#: Beyond that they gain nothing, outgrow the caches and delay an interrupt.
CPU_TOKENS = 4096
CPU_TOKENS_PER_THREAD = 512

#: And elsewhere.
GPU_TOKENS = 16384


class TruncationWarning(UserWarning):
    """Texts were longer than the model takes, and lost their ends."""


class Embedder:
    """Texts to vectors, as `SentenceTransformer` makes them. Safe to call from several threads.

    Args:
        path_or_id: a sentence-transformers folder or a plain BERT checkpoint; a Hub id; or `demo`.
        device: where the model runs; None for a GPU if there is one. Several GPUs take a process each, every one with a
            part of the texts: `device="cuda:1"`, or CUDA_VISIBLE_DEVICES=1 in its environment.
        dtype: of the model's weights; None keeps the checkpoint's own.
        precision: what the model computes in: "fp32", "bf16" or "int8" on a CPU; "fp32", "fp16", "bf16" or "fp8" on a
            GPU; None for that of the weights.
        free_originals: keep the weights only in that precision; see `accelerate`.
        max_seq_length: the most tokens of a text; None for what the folder says. Longer texts lose their end.
        unknown, entities: what becomes of words that are not in the vocabulary, as `Tokenizer` takes them.
        revision, local_files_only, allow_pickle: as in `from_pretrained`.

    Raises:
        ValueError: the checkpoint is not found, is damaged, or describes something else; the message says what.
    """

    def __init__(
        self,
        path_or_id: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        precision: str | None = None,
        free_originals: bool = False,
        max_seq_length: int | None = None,
        unknown: str = "unk",
        entities: Mapping[str, str] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        self.device = parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        engine.check_precision(precision, self.device, free_originals)
        self.precision = precision
        folder = resolve(path_or_id, revision=revision, local_files_only=local_files_only, allow_pickle=allow_pickle)
        self.recipe = Recipe.read(folder)
        config = read_config(self.recipe.transformer)
        state = read_state_dict(self.recipe.transformer, allow_pickle=allow_pickle)
        self.model: BertModel = build(model_class(config), config, state, dtype=dtype, device=self.device)
        engine.set_precision(self.model, precision, self.model.engine)
        if free_originals:
            engine.release(self.model)
        self.tokenizer = Tokenizer.from_pretrained(
            self.recipe.transformer, lowercase=self.recipe.do_lower_case, unknown=unknown, entities=entities
        )
        positions = config.max_position_embeddings
        if max_seq_length is not None and not 2 < max_seq_length <= positions:
            raise ValueError(
                f"max_seq_length is {max_seq_length}, expected from 3 to {positions}, the model's positions"
            )
        asked = max_seq_length or self.recipe.max_seq_length or self.tokenizer.model_max_length or positions
        #: The most tokens of a text, special tokens included.
        self.max_seq_length = min(asked, positions)
        self.tokenizer.model_max_length = None  # what the folder or the caller says goes, up or down
        #: Length of a vector.
        self.dimension = config.hidden_size * len(self.recipe.pooling_modes)

    def encode(
        self,
        sentences: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        precision: str = "float32",
        **unknown: Any,
    ) -> Any:
        """Vectors of sentences, with the arguments and results of `SentenceTransformer.encode`.

        Texts longer than `max_seq_length` are cut; one `TruncationWarning` per call says how many. Beside the result,
        memory holds a bounded number of texts: a generator may yield millions.

        Args:
            sentences: one text, or any iterable of them, a generator too.
            prompt_name: of the folder's prompts, the one to put before every text.
            prompt: a text to put before every text, whatever `prompt_name` says.
            batch_size: scales the tokens of a run of the model, whatever the number of texts. 32 stands for as many as
                suit the device; fewer take less memory; more make larger runs on a GPU, and nothing on the CPU. The
                vectors do not depend on it beyond rounding.
            show_progress_bar: None shows one on a terminal, for work of more than two seconds.
            convert_to_numpy: return an array; otherwise a list of tensors.
            convert_to_tensor: return one tensor, on the model's device.
            normalize_embeddings: scale the vectors to length 1.
            truncate_dim: keep only the first so many components, before that scaling.
            precision: of the vectors returned: "float32".

        Returns:
            float32 (num_sentences, dimension); (dimension,) for one text. Without sentences, (0, dimension).

        Raises:
            ValueError: an element is not a text (the message gives its index and type), a prompt is unknown, or an
                argument has no meaning here.
        """
        if unknown:
            valid = [name for name in self.encode.__annotations__ if name not in ("return", "unknown")]
            raise ValueError(f"encode does not take {', '.join(unknown)}; it takes {', '.join(valid)}")
        if precision != "float32":
            raise ValueError(f"precision is {precision!r}, expected 'float32'")
        is_one = isinstance(sentences, str)
        texts = _iterable([sentences] if isinstance(sentences, str) else sentences)
        total = len(texts) if isinstance(texts, Sized) else None
        num_truncated = 0
        with progress_bar(total=total, show=show_progress_bar) as progress:
            stream = self.encode_stream(
                texts,
                prompt_name,
                prompt,
                batch_size,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                progress=progress.update,
            )
            rows = RowBuffer(total or 0, truncate_dim or self.dimension)
            for tokens, vectors in to_host(stream):
                rows.append(vectors)
                num_truncated += tokens.num_truncated
        if num_truncated:
            of = f"{num_truncated} of {len(rows)} texts have more than {self.max_seq_length} tokens and were cut"
            warnings.warn(of, TruncationWarning, stacklevel=2)
        array = rows.array()[0] if is_one else rows.array()
        if convert_to_numpy and not convert_to_tensor:
            return array
        result = torch.from_numpy(array).to(self.device)
        return result if convert_to_tensor or is_one else list(result)

    def encode_stream(
        self,
        sentences: Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[tuple[TokenBatch, Tensor]]:
        """The vectors of `encode`, in order and in pieces of up to some thousand texts, beside their tokens.

        Texts are read in the caller's thread, up to two pieces ahead. Another thread tokenises the next piece while the
        model computes the present one; it ends with the iterator, also when that is closed early. On a GPU the vectors
        are still being computed when they come: whoever copies them waits, unless it is done by `to_host`.

        Args:
            sentences: any iterable of texts.
            prompt_name, prompt, batch_size, normalize_embeddings, truncate_dim: as in `encode`.
            progress: called after each run of the model, on a GPU when it is queued, with the number of its texts.

        Yields:
            The tokens of some texts, and float32 (num_texts, dimension) on the model's device.

        Raises:
            ValueError: as `encode`.
        """
        if truncate_dim is not None and not 0 < truncate_dim <= self.dimension:
            raise ValueError(f"truncate_dim is {truncate_dim}, expected from 1 to {self.dimension}")
        chunked = chunks(_iterable(sentences))
        before = self.prompt(prompt, prompt_name)
        prompt_length = 0
        if before and not self.recipe.include_prompt:
            prompt_length = int(self.tokenizer([before]).lengths[0]) - 1  # without its [SEP]
        tokens_of_a_run = token_budget(self.device, batch_size)

        def tokenize(chunk: list[str]) -> TokenBatch:
            return self.tokenizer([before + text for text in chunk] if before else chunk, self.max_seq_length)

        def run(tokens: TokenBatch) -> Tensor:
            vectors = self.embed(tokens, prompt_length)[:, :truncate_dim]
            if progress is not None:
                progress(len(vectors))
            return F.normalize(vectors, dim=1) if normalize_embeddings else vectors

        def stream() -> Iterator[tuple[TokenBatch, Tensor]]:
            for tokens in map_ahead(tokenize, chunked):
                batches = plan_batches(tokens.lengths, tokens_of_a_run)
                if len(batches) == 1:
                    yield tokens, run(tokens)
                    continue
                vectors = torch.cat([run(tokens.select(batch)) for batch in batches])
                yield tokens, vectors[to_device(torch.from_numpy(np.argsort(np.concatenate(batches))), self.device)]

        return stream()

    @torch.inference_mode()
    def embed(self, tokens: TokenBatch, prompt_length: int = 0) -> Tensor:
        """Vectors of tokens: float32 (batch_size, dimension), pooled without the first `prompt_length` of each text."""
        ragged = tokens.to_ragged()
        packed = self.model.engine()
        if packed is not None and not prompt_length:
            return packed.vectors(ragged, self.recipe.pooling_modes, self.recipe.normalize)
        rows = self.model.encode(tokens.to_ragged(self.device) if packed is None else ragged)
        cu_seqlens = ragged.cu_seqlens
        if prompt_length:
            kept = (ragged.position_ids >= prompt_length).nonzero()[:, 0]
            rows = rows[to_device(kept, self.device)]
            cu_seqlens = F.pad((cu_seqlens.diff() - prompt_length).clamp(min=0).cumsum(0), (1, 0)).to(torch.int32)
        cu_seqlens = to_device(cu_seqlens, self.device)
        pooled = [ops.pooling(rows, cu_seqlens, mode=mode).float() for mode in self.recipe.pooling_modes]
        vectors = torch.cat(pooled, dim=1)
        return F.normalize(vectors, dim=1) if self.recipe.normalize else vectors

    def prompt(self, prompt: str | None = None, prompt_name: str | None = None) -> str:
        """The text to put before every sentence; ValueError, with the names there are, for an unknown name."""
        prompts = self.recipe.prompts
        name = self.recipe.default_prompt_name if prompt_name is None else prompt_name
        if prompt is not None or name is None:
            return prompt or ""
        if name not in prompts:
            raise ValueError(f"prompt_name is {name!r}, expected one of {', '.join(prompts) or '(the model has none)'}")
        return prompts[name] or ""

    @staticmethod
    def similarity(a: NDArray[np.float32] | Tensor, b: NDArray[np.float32] | Tensor) -> Tensor:
        """Cosine of every vector of `a` with every one of `b`: (m, dim) or (dim,) and (n, dim) or (dim,) -> (m, n)."""
        a, b = (F.normalize(torch.atleast_2d(torch.as_tensor(vectors)), dim=1) for vectors in (a, b))
        return a @ b.T


def _iterable(sentences: Any) -> Iterable[str]:
    if isinstance(sentences, str) or not isinstance(sentences, Iterable) or getattr(sentences, "shape", None) == ():
        raise ValueError(f"sentences is a {type(sentences).__name__}, expected a str or an iterable of them")
    return sentences


def token_budget(device: torch.device, batch_size: int = DEFAULT_BATCH_SIZE) -> int:
    """Tokens of a run of a model, about; ValueError for a batch size below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    if device.type != "cpu":
        return GPU_TOKENS * batch_size // DEFAULT_BATCH_SIZE
    tokens = max(CPU_TOKENS, CPU_TOKENS_PER_THREAD * torch.get_num_threads())
    return tokens * min(batch_size, DEFAULT_BATCH_SIZE) // DEFAULT_BATCH_SIZE
