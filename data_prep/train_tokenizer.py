"""Train a small BPE tokenizer on the sample corpora, and write its exact Hugging Face twin next to it.

    python data_prep/train_tokenizer.py --corpora runs/demo/corpora --output runs/demo/tokenizer \\
        --vocab-size 2048

writes `tokenizer.model` (sentencepiece), `tokenizer.json` and `tokenizer_config.json`. Byte fallback makes
every text encodable; text is not normalised; digits stand alone; there is an EOS and no BOS. One loss is
known: the sign U+2581, with which sentencepiece marks spaces, comes back as a space.
"""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import sentencepiece
import tyro
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers

from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import SOURCES, find_files
from data_prep.errors import UserError, run_cli
from data_prep.output_files import new_folder, write_json_whole
from data_prep.text_tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
UNKNOWN_TOKEN, EOS_TOKEN = "<unk>", "</s>"
BYTE_AND_SPECIAL_TOKENS = 258
LONGEST_DOCUMENT_BYTES = 1 << 20
# Characters rarer than one in 2,000 are left to byte fallback.
CHARACTER_COVERAGE = 0.9995
TWIN_CHECK_DOCUMENTS = 200
LONGEST_CHECKED_RUN = 80


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Train a sentencepiece BPE tokenizer with byte fallback, and its exact Hugging Face twin."""

    corpora: Path
    """Folder with one subfolder a source (slimpajama, starcoder, proof_pile_2, wudao)."""
    output: Path
    """Folder to make."""
    vocab_size: int = 2048
    """Number of tokens, 256 byte tokens and 2 special ones included."""
    sample_mb_per_source: float = 2.5
    """Text taken from each source, in megabytes: equal shares, so that no language is starved."""
    seed: int = 0
    """Seed of the draw of documents."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a folder that an earlier run of this command made."""


def sample_texts(config: TrainTokenizerConfig) -> list[str]:
    """Draw about the same amount of text from every source, only from what may be trained on.

    Raises:
        UserError: a source is missing or not in its format.
    """
    if not config.corpora.is_dir():
        raise UserError(
            f"--corpora {config.corpora} is not a folder; make it with data_prep/sample_corpus.py"
        )
    sample: list[str] = []
    for source, source_format in SOURCES.items():
        files = [file for file in find_files(source, config.corpora / source) if file.split != "validation"]
        texts = [
            text for file in files for batch in read_batches(file, source_format) for text in batch.texts
        ]
        random.Random(f"{config.seed} {source}").shuffle(texts)
        room_bytes = config.sample_mb_per_source * 1e6
        for text in texts:
            if room_bytes <= 0:
                break
            sample.append(text)
            room_bytes -= len(text.encode())
    return sample


def train_sentencepiece(texts: list[str], vocab_size: int) -> bytes:
    """Return a serialised sentencepiece BPE model. Raises UserError when the vocabulary fits not the text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            split_digits=True,
            character_coverage=CHARACTER_COVERAGE,
            max_sentence_length=LONGEST_DOCUMENT_BYTES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            unk_piece=UNKNOWN_TOKEN,
            eos_piece=EOS_TOKEN,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1]
        raise UserError(f"--vocab-size {vocab_size} does not fit the sample: {reason}") from error
    return model.getvalue()


def merge_order(pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the merge pairs under which Hugging Face's BPE does what sentencepiece does.

    Sentencepiece ranks a merge by the piece it makes, and takes the leftmost of equals; Hugging Face ranks
    pairs. So every way to make a piece becomes a merge, in the order of the pieces. Two ways to make the same
    piece compete only where they overlap, as in x y z with xy = yz; then (x, y), the left one, has to come
    first.
    """
    known = set(pieces)

    def has_period(piece: str, period: int) -> bool:
        return piece[period:] == piece[:-period]

    for piece in pieces:
        cuts = [cut for cut in range(1, len(piece)) if piece[:cut] in known and piece[cut:] in known]
        for cut in sorted(
            cuts, key=lambda cut: has_period(piece, len(piece) - cut) and not has_period(piece, cut)
        ):
            yield piece[:cut], piece[cut:]


def build_twin(model_bytes: bytes) -> Tokenizer:
    """Return the Hugging Face tokenizer that agrees with a model of `train_sentencepiece`."""
    model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    ids = range(model.vocab_size())
    vocabulary = {model.id_to_piece(index): index for index in ids}
    pieces = [
        model.id_to_piece(index)
        for index in ids
        if not (model.is_byte(index) or model.is_control(index) or model.is_unknown(index))
    ]
    pieces.sort(key=lambda piece: -model.get_score(vocabulary[piece]))
    twin = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=list(merge_order(pieces)), unk_token=UNKNOWN_TOKEN, byte_fallback=True
        )
    )
    twin.normalizer = normalizers.Replace(" ", SPACE_MARK)
    twin.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    twin.add_special_tokens([UNKNOWN_TOKEN, EOS_TOKEN])
    return twin


def check_twin(folder: Path, texts: list[str]) -> None:
    """Make sure that both files give the same ids, on documents and on runs of one character.

    Raises:
        UserError: they differ, so the tokenizer must not be used.
    """
    original = SentencePieceTokenizer(folder / "tokenizer.model")
    twin = HuggingFaceTokenizer(folder / "tokenizer.json")
    runs = [sign * length for sign in " -=#*_\n\t.0" for length in range(1, LONGEST_CHECKED_RUN)]
    step = max(1, len(texts) // TWIN_CHECK_DOCUMENTS)
    for text in [*texts[::step], *runs]:
        if original.encode(text) != twin.encode(text):
            raise UserError(
                f"tokenizer.json disagrees with tokenizer.model on {text[:60]!r}; try another --vocab-size"
            )


def train_tokenizer(config: TrainTokenizerConfig) -> None:
    """Train, convert, check and write.

    Raises:
        UserError: bad corpora or vocabulary size, or the output exists and may not be replaced.
    """
    if config.vocab_size <= BYTE_AND_SPECIAL_TOKENS:
        raise UserError(
            f"--vocab-size {config.vocab_size} leaves no room beside {BYTE_AND_SPECIAL_TOKENS} byte tokens"
        )
    with new_folder(
        config.output, overwrite=config.overwrite, is_ours=lambda path: (path / "tokenizer.model").is_file()
    ) as folder:
        texts = sample_texts(config)
        model_bytes = train_sentencepiece(texts, config.vocab_size)
        (folder / "tokenizer.model").write_bytes(model_bytes)
        build_twin(model_bytes).save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS_TOKEN,
            "unk_token": UNKNOWN_TOKEN,
            "pad_token": EOS_TOKEN,
            "clean_up_tokenization_spaces": False,
        }
        write_json_whole(folder / "tokenizer_config.json", settings)
        check_twin(folder, texts)


def main() -> None:
    """Entry point."""
    config = tyro.cli(TrainTokenizerConfig, description=__doc__)
    train_tokenizer(config)
    Console().print(f"tokenizer with {config.vocab_size} tokens in {config.output}")


if __name__ == "__main__":
    run_cli(main)
