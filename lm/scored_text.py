"""The text that a model is scored on: a source that the user names, or one that its run was validated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lm.checkpoint import Loaded
from lm.config import EvaluationConfig, InputError
from lm.data.corpus import Corpus, open_corpus
from lm.data.sources.source import parse_named
from lm.data.sources.token_files import TokenFiles
from lm.data.tokenizer import Tokenizer
from lm.evaluation.perplexity import check_eos, check_window
from lm.fields import nearest
from lm.manifest import MANIFEST, read_manifest
from lm.training.texts import Progress, Tokenizers, separator_of, tokens_of, validation_key, validation_of


class ScoredText(NamedTuple):
    """A text, opened, and whether its prompts are scored too: then it can be given to several models."""

    text: Corpus | TokenFiles
    score_prompts: bool


def open_text(run: Loaded, data: str | None, progress: Progress | None = None) -> ScoredText:
    """The text of a source, or of one of the run's validation texts by name; None: the first of these.

    Raises InputError where the run's text is another by now, and where there is none.
    """
    config = run.config
    written = config.data.validation_sources
    names = {parse_named(source)[0] for source in written} - {""}
    if data is not None and data not in names:
        if names and ":" not in data:
            raise InputError(
                f"{run.path} has no validation text {data!r}{nearest(data, names)}: it has {', '.join(sorted(names))}; "
                "another text is a source, as in text:FILE"
            )
        separators = (config.data.document_separator, separator_of(config))
        text = open_corpus(data, document_separator=separators[0], pair_separator=separators[1])
        return ScoredText(text, config.data.prompt_loss)
    provenance = read_manifest(run.path).provenance if (run.path / MANIFEST).is_file() else {}
    name = data or (parse_named(written[0])[0] if written else "")
    then = provenance.get(validation_key(name))
    if then is None:
        raise InputError(f"{run.path} was not trained here, so it has no validation text: name a text with --data")
    text = validation_of(config)[name]
    now = tokens_of(text, Tokenizers(tokenizer_of(run), run.source_tokenizer), config, progress).corpus_sha256
    if now != then:
        raise InputError(
            f"the validation text of {run.path} is not what it was when the run was trained (sha256 {now[:12]} now, "
            f"{then[:12]} then): name a text with --data"
        )
    return ScoredText(text, config.data.prompt_loss)


def window_and_stride(run: Loaded, window: int | None, stride: int | None) -> tuple[int, int]:
    """Those that are given, else those of the run's config; its stride fits only its own window. Checked.

    A run of ours may be scored on more than it was trained on; of a model from elsewhere what its config says holds.
    """
    given = run.config.evaluation if window is None else EvaluationConfig(window=window)
    window = run.config.data.context if given.window is None else given.window
    stride = stride if stride is not None else window if given.stride is None else given.stride
    check_window(run.config.model, window, stride)
    positions = run.config.model.max_positions if run.step is None else None
    if positions is not None and window > positions:
        raise InputError(f"window {window} is more than the {positions} positions of {run.path}: use at most that")
    return window, stride


def check_protocol(run: Loaded, window: int | None, stride: int | None, score_eos: bool) -> None:
    """Raises InputError where a model can't be scored in this way."""
    if not run.config.model.has_encoder:
        window_and_stride(run, window, stride)
        check_eos(tokenizer_of(run), score_eos)
    elif window is not None or stride is not None or score_eos:
        raise InputError(
            f"{run.path} is an encoder_decoder, which scores every target whole, EOS included: leave window, stride "
            "and score_eos out"
        )


def check_together(
    runs: Sequence[Loaded], text: ScoredText | None, *, window: int | None, stride: int | None, score_eos: bool
) -> None:
    """Raises InputError, before any of them is scored, where one of the models can't be on this text in this way."""
    for run in runs:
        check_protocol(run, window, stride, score_eos)
    families = {run.config.model.family: run.path for run in runs}
    if len(families) > 1:
        decoder, pairs = families["decoder"], families["encoder_decoder"]
        raise InputError(
            f"{pairs} scores targets given their sources, and {decoder} texts: compare models of one family, or run "
            "eval.py on each"
        )
    others = [run.path for run in runs if tokenizer_of(run).sha256 != tokenizer_of(runs[0]).sha256]
    if text is not None and isinstance(text.text, TokenFiles) and others:
        raise InputError(
            f"{text.text.source} holds the ids of one tokenizer, and {others[0]} has another than {runs[0].path}: "
            "compare them on text"
        )


def tokenizer_of(run: Loaded) -> Tokenizer:
    """The model's tokenizer. Raises InputError where it has none."""
    if run.tokenizer is None:
        raise InputError(
            f"{run.path} has no tokenizer, so text can't be read or written: put its tokenizer.json or .model there"
        )
    return run.tokenizer
