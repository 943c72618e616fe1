"""python -m lm generate: where prompts come from, where texts go, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import pytest

import lm
from lm import __main__ as commands
from lm import checkpoint
from lm.checkpoint import Loaded
from lm.config import InputError, ModelConfig, RunConfig
from lm.data.tokenizer import ByteTokenizer
from lm.nn import language_model, params

GREEDY = ["--temperature", "0", "--max-tokens", "9"]


def written(folder: Path, **fields) -> Path:
    """A run of random weights, of bytes, some of whose texts have several lines."""
    tokenizer = ByteTokenizer()
    model = ModelConfig(num_layers=1, d_model=32, num_heads=2, init_std=0.3, **fields)
    config = RunConfig(model=model).resolve(tokenizer.vocab_size, None, tokenizer.first_id)
    tree = params.initialize(language_model.model_specs(config.model), jax.random.key(0))
    checkpoint.write(Loaded(config, tree, tokenizer, 7, folder), folder, provenance={})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return written(tmp_path_factory.mktemp("decoder") / "run", positions="rotary")


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("pairs") / "run", family="encoder_decoder", positions="relative")


def expected(run: Path, prompts: list[str], **how) -> list[str]:
    return lm.generate(lm.load(run), prompts, **{"max_tokens": 9, "temperature": 0.0, **how})


def one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def test_a_prompt_and_its_continuation_are_shown_together(run, encoder_decoder, capsys):
    commands.main(["generate", str(run), "--prompt", "ab", *GREEDY])
    assert capsys.readouterr().out == "ab" + expected(run, ["ab"])[0] + "\n"
    commands.main(["generate", str(encoder_decoder), "--prompt", "ab", *GREEDY])
    assert capsys.readouterr().out == expected(encoder_decoder, ["ab"])[0] + "\n"


@pytest.mark.parametrize("name", ["run", "encoder_decoder"])
def test_lines_of_a_file_become_lines_of_another(name, request, tmp_path, capsys):
    run = request.getfixturevalue(name)
    prompts = ["one", "", "a rather longer third line", "four"]
    (tmp_path / "in.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    command = ["generate", str(run), "--input", f"{tmp_path}/in.txt", "--batch-size", "3", *GREEDY]
    commands.main(command)
    assert capsys.readouterr().out.split("\n")[:-1] == [one_line(text) for text in expected(run, prompts)]
    commands.main([*command, "--output", f"{tmp_path}/out.txt"])
    assert "4 texts" in capsys.readouterr().out
    lines = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
    assert lines == [one_line(text) for text in expected(run, prompts)] + [""]


def test_lines_end_as_those_of_data_do(run, tmp_path, capsys):
    """Only before a line feed, with or without a carriage return; what editors put before a text is none of it."""
    text = "\ufeffone\r\na\rb\nc\u0085d"
    (tmp_path / "in.txt").write_text(text, encoding="utf-8", newline="")
    commands.main(["generate", str(run), "--input", f"{tmp_path}/in.txt", *GREEDY])
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert lines == [one_line(text) for text in expected(run, ["one", "a\rb", "c\u0085d"])]


def test_a_command_that_fails_leaves_the_output_as_it_was(run, tmp_path):
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "out.txt").write_text("of an earlier command\n")
    command = ["generate", str(run), "--input", f"{tmp_path}/in.txt", "--output", f"{tmp_path}/out.txt"]
    with pytest.raises(InputError, match="temperature is -1"):
        commands.main([*command, "--temperature", "-1"])
    assert (tmp_path / "out.txt").read_text() == "of an earlier command\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.txt"]


def test_a_conversation_answers_each_line(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ncd\n"))
    commands.main(["generate", str(run), "--interactive", *GREEDY])
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected(run, ["ab", "cd"]))


def test_the_flag_of_a_conversation_may_stand_before_the_model(run, monkeypatch, capsys):
    for flag in (["--interactive"], ["--interactive", "True"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
        commands.main(["generate", *flag, str(run), *GREEDY])
        assert capsys.readouterr().out == expected(run, ["ab"])[0] + "\n"


@pytest.mark.parametrize("flags", [["--interactive"], ["--input", "-"]])
def test_a_closed_standard_input_is_told(flags, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="closed"):
        commands.main(["generate", str(run), *flags, *GREEDY])


@pytest.mark.parametrize("prompt", ["--foo", "None", "-"])
def test_any_word_can_be_a_prompt(prompt, run, capsys):
    commands.main(["generate", str(run), "--prompt", prompt, *GREEDY])
    assert capsys.readouterr().out == prompt + expected(run, [prompt])[0] + "\n"


def test_of_several_prompts_the_one_that_is_too_long_is_named(tmp_path):
    run = written(tmp_path / "run", positions="learned", max_positions=12)
    (tmp_path / "in.txt").write_text("ab\nfar too long for twelve positions\n")
    with pytest.raises(InputError, match="prompt 2, of 34 tokens"):
        commands.main(["generate", str(run), "--input", f"{tmp_path}/in.txt", *GREEDY])


def test_a_link_to_the_output_stays_one(run, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "out.txt")
    for _ in range(2):  # where it leads to nothing yet, and to a file
        commands.main(["generate", str(run), "--prompt", "ab", "--output", f"{tmp_path}/link", *GREEDY])
    assert (tmp_path / "link").is_symlink() and "1 texts" in capsys.readouterr().out
    assert (tmp_path / "folder" / "out.txt").read_text() == one_line(expected(run, ["ab"])[0]) + "\n"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["out.txt"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_error_ends_a_conversation_only_where_nobody_is_there(tmp_path, monkeypatch, capsys):
    run = written(tmp_path / "run", positions="learned", max_positions=12)
    lines = "far too long for twelve positions\nab\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    with pytest.raises(InputError, match="context of 12"):
        commands.main(["generate", str(run), "--interactive", *GREEDY])
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", Terminal(lines))
    commands.main(["generate", str(run), "--interactive", *GREEDY])
    said = capsys.readouterr()
    assert said.out == "> > " + expected(run, ["ab"])[0] + "\n> "
    assert said.err.count("error:") == 1 and "context of 12" in said.err


def test_the_best_few_of_a_search_have_their_scores(encoder_decoder, capsys):
    commands.main(
        ["generate", str(encoder_decoder), "--prompt", "ab", "--num-beams", "3", "--num-return", "2", *GREEDY]
    )
    said = capsys.readouterr()
    [best] = lm.n_best(lm.load(encoder_decoder), ["ab"], num_beams=3, num_return=2, max_tokens=9)
    assert said.out == ("\n" + "-" * 60 + "\n").join(each.text for each in best) + "\n"
    assert said.err.split() == ["scores", *(f"{each.score:.4f}" for each in best)]


def test_a_search_takes_a_repetition_penalty_and_texts_to_stop_at(encoder_decoder, capsys):
    model, search = lm.load(encoder_decoder), ["--num-beams", "3", *GREEDY]
    [plain] = lm.generate(model, ["ab"], num_beams=3, max_tokens=9)
    stop = plain[2]
    for flags, how in (
        (["--repetition-penalty", "3"], {"repetition_penalty": 3.0}),
        (["--stop", stop], {"stop": stop}),
    ):
        commands.main(["generate", str(encoder_decoder), "--prompt", "ab", *flags, *search])
        [text] = lm.generate(model, ["ab"], num_beams=3, max_tokens=9, **how)
        assert capsys.readouterr().out == text + "\n"
        assert text != plain


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--prompt a --input b.txt", "--prompt and --input both say what the prompts are"),
        ("--input b.txt --interactive", "--input and --interactive both"),
        ("--interactive --output out.txt", "leave out --output"),
        ("--interactive --num-beams 4", "leave out --output, --samples and --num-beams"),
        ("--input nowhere.txt", "--input nowhere.txt can't be read"),
        ("--input empty.txt", "empty.txt is empty"),
        ("--input latin.txt", "latin.txt can't be read: it is not UTF-8"),
        ("--temperature 0 --top-k 5", "top_k"),
        ("--top-p 1.5", "top_p is 1.5"),
        ("--min-p -0.1", "min_p is -0.1"),
        ("--repetition-penalty 0", "repetition_penalty is 0"),
        ("--num-beams 4 --temperature 0.7", "--temperature has no effect"),
        ("--num-beams 4 --repetition-penalty -1", "repetition_penalty is -1"),
        ("--num-beams 4 --samples 2", "--samples has no effect"),
        ("--num-beams 4 --seed 1", "--seed has no effect"),
        ("--num-beams 0", "--num-beams is 0"),
        ("--interactive --num-beams 0", "--num-beams is 0"),
        ("--interactive --batch-size 0", "--batch-size is 0"),
        ("--num-beams 2 --num-return 3", "num_return is 3"),
        ("--num-return 2", "--num-return is of a beam search"),
        ("--length-penalty 0.5", "--length-penalty is of a beam search"),
        ("--stop-ids 999", "stop id 999"),
        ("--batch-size 0", "--batch-size is 0"),
        ("--samples 0", "--samples is 0"),
        ("--samples 2 --temperature 0", "would all be the same text"),
        ("--output .", "--output"),
        (f"--output {'n' * 300}", "name a file"),
        ("--output /proc/texts.txt", "name a file, in a folder that is there"),
        ("--input b.txt --output b.txt", "is read by this command, and would be overwritten"),
    ],
)
def test_what_contradicts_itself_is_refused(flags, said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").write_text("a\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError) as error:
        commands.main(["generate", str(run), "--max-tokens", "3", *flags.split()])
    assert said in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "empty.txt", "latin.txt"]


def test_beams_beyond_memory_are_refused_before_they_start(run, monkeypatch):
    monkeypatch.setattr("lm.generation_memory.free_bytes", lambda _: 10**6)
    with pytest.raises(InputError, match="1 prompt x 64 beams.*use fewer beams"):
        commands.main(["generate", str(run), "--num-beams", "64", "--max-tokens", "1000"])
