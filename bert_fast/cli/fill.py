"""Commands that ask a masked language model for words."""

from __future__ import annotations

from typing import Annotated

import typer

from bert_fast.cli._app import Device, Dtype, command

MaskedModel = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder or a Hub id, with a masked-language-model head; demo has none."),
]


@command()
def fill(
    model: MaskedModel,
    text: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Texts with [MASK] where a word is missing.")],
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Words for each mask.")] = 5,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Say which words fit the masks of a text, and how probable they are.

    The model must have been pre-trained to do so, as by `bert-fast pretrain`. Of several masks in a text it says the
    words for each while the others stay hidden, and then the best ways to fill them together.
    """
    from bert_fast.tasks.filling import MaskFiller

    said = MaskFiller(model, dtype=dtype, device=device).fill(text, top_k)
    for number, (one, filled) in enumerate(zip(text, said, strict=True)):
        print("\n" * (number > 0) + one)
        blocks = [(f"mask {index}", ways) for index, ways in enumerate(filled.masks, 1)]
        if filled.together:
            blocks.append(("together", filled.together))
        for title, ways in blocks:
            if filled.together:
                print(f"  {title}")
            words = [" ".join(way.tokens) for way in ways]
            width = max(map(len, words))
            for word, way in zip(words, ways, strict=True):
                print(f"  {way.score:8.4f}  {word:{width}}  {way.text}")


@command()
def generate(
    model: MaskedModel,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the text begins with.")] = "",
    length: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 12,
    method: Annotated[
        str,
        typer.Option(
            help="gibbs: fill all, then draw each anew given the others; mask_predict: fill all at once, then the "
            "least certain again; left_to_right: fill each once."
        ),
    ] = "gibbs",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Of gibbs and mask_predict: how often tokens are filled again.", show_default="10"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Above 1 bolder, below 1 safer; 0 takes the most probable word.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", "-k", min=1, help="Draw among so many words.", show_default="all")
    ] = None,
    suffix: Annotated[str, typer.Option(help="What the text ends with, such as a full stop.")] = "",
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1, help="How many texts.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same texts.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Write text by filling masks again and again; do not expect much of it.

    A BERT is an encoder: it was taught to fill gaps in a text that is there, not to write one, and nobody told it to
    stay true or on the subject. What comes out holds together over a few words at best, and depends on the length that
    is asked for. For free text take a language model made for it.
    """
    from bert_fast.tasks.filling import MaskFiller
    from bert_fast.tasks.generation import generate

    filler = MaskFiller(model, dtype=dtype, device=device)
    texts = generate(
        filler,
        prompt,
        length,
        method=method.replace("-", "_"),
        steps=steps,
        temperature=temperature,
        top_k=top_k,
        suffix=suffix,
        num_samples=num_samples,
        seed=seed,
    )
    print("\n".join(texts))
