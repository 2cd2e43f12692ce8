"""Commands about vocabularies: train one, extend one, say how well one fits a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bert_fast.cli._app import Entities, Model, TextField, command, group

if TYPE_CHECKING:
    from rich.console import Console

    from bert_fast.vocabulary.extension import Change, Extension
    from bert_fast.vocabulary.report import Report

vocab = group("vocab", "Train a WordPiece vocabulary, extend one by a domain's words, or see how well one fits a text.")

Files = Annotated[
    list[str], typer.Argument(metavar="FILES...", help="Text files or JSON lines, compressed or not; folders.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="A new folder.")]

#: Lines of a list that are printed.
LISTED = 10


class Lines:
    """The lines of files that are not blank; they can be read again."""

    def __init__(self, inputs: Sequence[str], text_field: str | None) -> None:
        from bert_fast.data.text import find_files

        self.files, self.text_field = find_files(inputs), text_field

    def __iter__(self) -> Iterator[str]:
        from bert_fast.data.text import read_sentences

        for file in self.files:
            yield from filter(None, read_sentences(file, text_field=self.text_field))


@command(into=vocab)
def train(
    files: Files,
    output: Output,
    text_field: TextField = None,
    vocab_size: Annotated[int, typer.Option(min=1, help="The most tokens.")] = 30522,
    min_frequency: Annotated[int, typer.Option(min=1, help="Pieces this often side by side may be joined.")] = 2,
    limit_alphabet: Annotated[
        int, typer.Option(min=1, help="The most characters; Chinese text needs about 6,000.")
    ] = 1000,
    cased: Annotated[bool, typer.Option("--cased", help="Keep capitals and accents.")] = False,
    strip_accents: Annotated[
        bool | None, typer.Option("--strip-accents/--keep-accents", help="Accents.", show_default="kept if cased")
    ] = None,
    chinese_chars: Annotated[
        bool, typer.Option("--chinese-chars/--no-chinese-chars", help="Whether each Chinese character is a word.")
    ] = True,
    model_max_length: Annotated[int, typer.Option(min=3, help="The most tokens of a text, for the model.")] = 512,
) -> None:
    """Find the WordPiece vocabulary of a text, and write a tokenizer that transformers loads, too.

    The same files give the same vocabulary.
    """
    from bert_fast.folders import refuse_existing
    from bert_fast.vocabulary.training import FIRST_TOKENS, train

    refuse_existing(output)
    vocabulary = train(
        Lines(files, text_field),
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        limit_alphabet=limit_alphabet,
        lowercase=not cased,
        strip_accents=strip_accents,
        chinese_characters=chinese_chars,
        model_max_length=model_max_length,
    )
    vocabulary.save(output)
    special, characters, size = len(FIRST_TOKENS), len(vocabulary.alphabet), len(vocabulary.tokens)
    pieces = size - special - characters
    print(f"{output}: {size:,} tokens: {special} special, {characters:,} characters, {pieces:,} pieces")
    if size < vocab_size:
        print(f"fewer than the {vocab_size:,} asked for: no other pieces are {min_frequency} times side by side")
    if vocabulary.left_out:
        listed = " ".join(list(vocabulary.left_out)[:LISTED])
        print(
            f"{len(vocabulary.left_out):,} rarer characters have no token, {sum(vocabulary.left_out.values()):,} times "
            f"in the text: {listed}{' ...' if len(vocabulary.left_out) > LISTED else ''}"
        )


@command(into=vocab)
def extend(
    model: Model,
    output: Output,
    words: Annotated[Path | None, typer.Option(help="The words to add, one a line.")] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Text: its costliest words are added, if --words does not say which. May be given again."),
    ] = None,
    text_field: TextField = None,
    num_words: Annotated[int, typer.Option(min=1, help="The most words taken from the corpus.")] = 1000,
    min_frequency: Annotated[int, typer.Option(min=1, help="The least count of a word taken from the corpus.")] = 5,
) -> None:
    """Give words of a domain their own tokens; each starts as the mean of the pieces it had.

    The costliest words of a corpus are those whose tokens would be saved most: count * (pieces - 1).
    With a corpus, the other words that are cut differently from now on are counted.
    """
    from bert_fast.folders import refuse_existing
    from bert_fast.terminal import progress_bar
    from bert_fast.vocabulary.extension import changes, costly_words, extended
    from bert_fast.vocabulary.extension import extend as extend_checkpoint
    from bert_fast.vocabulary.words import count_words, tokenizer_of

    if words is None and not corpus:
        raise ValueError("neither --words nor --corpus says which words to add")
    refuse_existing(output)
    backend = tokenizer_of(model).backend
    counts = count_words(progress_bar(Lines(corpus or [], text_field), what="counting words", unit=" lines"), backend)
    if words is not None:
        chosen = list(Lines([str(words)], None))
    else:
        chosen = costly_words(counts, backend, num_words, min_frequency)
    extension = extend_checkpoint(model, chosen, output)
    _print_extension(extension, output)
    if corpus:
        after = extended(backend, extension.pieces)
        _print_changes(changes(counts, backend, after, extension.pieces), sum(counts.values()), after.model.unk_token)


def _print_extension(extension: Extension, output: Path) -> None:
    last = extension.first_id + len(extension.pieces) - 1
    print(f"{output}: {_counted(len(extension.pieces), 'word')} added, ids {extension.first_id} to {last}")
    _print_listed(list(extension.pieces))
    if extension.refused:
        print(f"not added: {_counted(len(extension.refused), 'word')}")
        _print_listed([f"{word}: {reason}" for word, reason in extension.refused.items()], sep="\n  ")


def _print_changes(changes: list[Change], num_words: int, unk_token: str) -> None:
    occurrences = sum(change.count for change in changes)
    print(
        f"cut differently, as a new word is their beginning: {_counted(len(changes), 'other word')}, "
        f"{occurrences:,} of the {num_words:,} in the corpus"
    )
    _print_listed([f"{c.word}: {' '.join(c.before)} -> {' '.join(c.after)}" for c in changes], sep="\n  ")
    if lost := [change.word for change in changes if change.after == (unk_token,)]:
        print(f"warning: {unk_token} from now on, as what is left of them has no pieces: {_counted(len(lost), 'word')}")
        _print_listed(lost)


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _print_listed(items: list[str], sep: str = ", ") -> None:
    more = f"{sep}and {len(items) - LISTED:,} more" if len(items) > LISTED else ""
    if items:
        print(f"  {sep.join(items[:LISTED])}{more}")


@command(into=vocab)
def report(
    tokenizer: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a tokenizer, a Hub id, or demo.")],
    files: Files,
    text_field: TextField = None,
    entities: Entities = None,
    num_words: Annotated[int, typer.Option(min=1, help="Words in each list.")] = 20,
) -> None:
    """Say how well a vocabulary fits a text: [UNK], pieces per word, the words that cost most."""
    from bert_fast.ladder import read_entities
    from bert_fast.terminal import progress_bar
    from bert_fast.vocabulary.report import measure
    from bert_fast.vocabulary.words import tokenizer_of

    known = None if entities is None else read_entities(entities)
    texts = progress_bar(Lines(files, text_field), what="reading", unit=" lines")
    _print_report(measure(tokenizer_of(tokenizer), texts, entities=known, num_words=num_words))


def _print_report(report: Report) -> None:
    from rich.console import Console

    words = report.all
    print(f"{report.num_lines:,} lines, {words.num_words:,} words, {words.num_distinct:,} of them different")
    print(f"in the vocabulary as they are: {_share(words.num_whole, words.num_words)} of the words")
    print(f"pieces per word: {words.num_pieces / words.num_words:.3f}")
    print(f"[UNK]: {_share(words.num_unknown, words.num_words)} of the words\n")
    lengths = [
        (
            f"{first}" if first == last else f"{first} to {last}" if last else f"{first} and more",
            f"{row.num_words:,}",
            f"{row.num_distinct:,}",
            _share(row.num_whole, row.num_words),
            f"{row.num_pieces / row.num_words:.2f}",
            _share(row.num_unknown, row.num_words),
        )
        for (first, last), row in report.by_length.items()
    ]
    steps = [
        (
            step.name if step is report.steps[0] else f"+ {step.name}",
            f"{step.num_tokens:,}",
            f"{step.num_unknown:,}",
            _share(step.num_unknown, step.num_tokens),
        )
        for step in report.steps
    ]
    console = Console(highlight=False)
    columns = ["characters", "words", "different", "whole", "pieces/word", "[UNK]"]
    _print_table(console, "Words by length", columns, lengths)
    _print_table(console, "Steps for words without pieces", ["step", "tokens", "[UNK]", "share"], steps)
    if report.unknown:
        unknown = [(word, f"{count:,}") for word, count in report.unknown]
        _print_table(console, "Words that are [UNK]", ["word", "count"], unknown)
    if report.costly:
        costly = [(w.word, f"{w.count:,}", f"{w.saved:,}", " ".join(w.pieces)) for w in report.costly]
        _print_table(console, "Words that cost most", ["word", "count", "tokens too many", "pieces"], costly, (0, 3))
        share = _share(report.saved, words.num_pieces)
        print(f"With these {len(report.costly)} words in the vocabulary: {report.saved:,} tokens fewer, {share}.")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%"


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> None:
    """A table whose columns are numbers but for those in `left`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(Text(title, style="bold"), table)
