import random
from pathlib import Path

import pytest
import torch

import msp_plugin
from msp_plugin.data.samples import Text, load_split, split_text
from msp_plugin.data.search_text import SearchText
from msp_plugin.errors import DataError


def write_text(path, seed):
    """A text of random letters, in which no stretch comes twice."""
    rng = random.Random(seed)  # noqa: S311 - a text, no secret
    path.write_text("\n".join("".join(rng.choices("abcdefghilmnoprstu ", k=40)) for _ in range(1000)))
    return str(path)


@pytest.fixture
def text_file(tmp_path):
    return write_text(tmp_path / "text.txt", 0)


def rows(samples):
    return {tuple(sample.tolist()) for sample in samples.samples}


def test_calibration_and_test_samples_of_one_text_share_nothing(tokenizer, text_file):
    found = load_split(tokenizer, Text(text_file, samples=8, length=16, test_samples=4))
    assert (len(found.calibration), len(found.test)) == (8, 4)
    assert not rows(found.calibration) & rows(found.test)


def test_search_samples_are_the_last_ones_and_as_many_as_the_tokens_need(tokenizer, text_file, tmp_path):
    other = write_text(tmp_path / "other.txt", 1)
    text = Text(text_file, search=other, samples=8, length=16, test_samples=0)
    found = load_split(tokenizer, text, SearchText(33))
    assert (len(found.calibration), len(found.search), len(found.pruning)) == (8, 3, 8 + 3) and not found.test
    alone = load_split(tokenizer, Text(other, samples=3, length=16, test_samples=0))
    assert rows(alone.calibration) == rows(found.search)
    again = split_text(found.pruning, SearchText(33))
    assert (again.calibration, again.search) == (found.calibration, found.search)


def test_a_search_text_is_left_alone_when_nothing_is_searched(tokenizer, text_file):
    text = Text(text_file, search="/nowhere.txt", samples=2, length=16, test_samples=0)
    assert len(load_split(tokenizer, text).calibration) == 2


def test_a_test_text_that_is_the_calibration_text_is_refused(tokenizer, text_file):
    text = Text(text_file, test=text_file, samples=8, length=16, test_samples=8)
    with pytest.raises(DataError, match="8 of 8 test samples are calibration samples too"):
        load_split(tokenizer, text)


def test_test_samples_that_calibrate_too_are_left_out_of_the_test(tokenizer, text_file, tmp_path, caplog):
    other = write_text(tmp_path / "test.txt", 2)
    part = Path(text_file).read_text()[:400] + Path(other).read_text()
    (tmp_path / "both.txt").write_text(part)
    text = Text(text_file, test=str(tmp_path / "both.txt"), length=16, test_samples=60)
    found = load_split(tokenizer, text)
    assert not rows(found.test) & rows(found.pruning) and found.test.readings[0].samples == len(found.test)
    assert "test samples are calibration samples too, and are left out" in caplog.text


def test_a_path_is_taken_for_its_name(text_file):
    assert Text(Path(text_file), test=Path(text_file)) == Text(str(text_file), test=str(text_file))


@pytest.mark.parametrize("option", ["data", "search", "test"])
@pytest.mark.parametrize("value", [" ", ["a.txt", "b.txt"], 3])
def test_a_source_is_one_name_and_not_the_working_directory(option, value):
    with pytest.raises(DataError, match=f"{option} is ") as error:
        Text(**{"data": "a.txt", option: value})
    assert "one file" in error.value.hint


@pytest.mark.parametrize("value", ["64", 64.0, True, 0])
def test_a_count_is_a_whole_number(value):
    with pytest.raises(DataError, match="samples = ") as error:
        Text("a.txt", samples=value)
    assert "a whole number, at least 1" in error.value.hint


def test_a_seed_moves_the_calibration_samples_and_not_the_test(tokenizer, text_file, tmp_path):
    other = write_text(tmp_path / "test.txt", 2)
    made = [
        load_split(tokenizer, Text(text_file, test=other, samples=4, length=16, test_samples=4, seed=s))
        for s in (0, 1)
    ]
    assert made[0].calibration.fingerprint != made[1].calibration.fingerprint
    assert made[0].test.fingerprint == made[1].test.fingerprint


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"length": 1}, {"test_samples": -1}, {"batch": 0}, {"seed": -1}]
)
def test_counts_out_of_range_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(DataError, match=f"{name} = {value}"):
        Text("x.txt", **options)


def test_the_length_follows_the_model(llama_dir):
    from msp_plugin.models.source import max_length

    most = max_length(llama_dir)
    assert Text("x").for_model(llama_dir).length == min(2048, most)
    assert Text("x", length=7).for_model(llama_dir).length == 7
    with pytest.raises(DataError, match=f"the model takes {most} at most"):
        Text("x", length=most + 1).for_model(llama_dir)


def test_a_token_beyond_the_models_embeddings_fails_before_the_weights_are_read(
    tokenizer, text_file, llama_dir, copied, edit_json
):
    from msp_plugin import allocate

    path = copied(llama_dir)
    edit_json(path / "config.json", lambda config: config.update(vocab_size=50))
    for file in path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match="has token [5-9][0-9], and the model has embeddings for 50 tokens"):
        allocate(path, Text(text_file, samples=16, length=16), sparsity=0.5)


def test_search_and_test_samples_start_as_the_calibration_samples(bos_tokenizer, text_file, tmp_path):
    other = write_text(tmp_path / "other.txt", 1)
    for test in (None, write_text(tmp_path / "test.txt", 2)):
        text = Text(text_file, search=other, test=test, samples=4, length=16, test_samples=2)
        found = load_split(bos_tokenizer, text, SearchText(33))
        samples = [*found.pruning.samples, *found.test.samples]
        assert len(samples) == 4 + 3 + 2 and {int(s[0]) for s in samples} == {bos_tokenizer.bos_token_id}
    readings = [*found.pruning.readings, *found.test.readings]
    assert [(r.source, r.samples, r.bos) for r in readings] == [
        (text_file, 4, "<s>"), (other, 3, "<s>"), (test, 2, "<s>"),
    ]  # fmt: skip
    plain = load_split(bos_tokenizer, Text(text_file, samples=4, length=16, test_samples=0, bos=False))
    assert bos_tokenizer.bos_token_id not in torch.cat(plain.calibration.samples)


def test_without_a_count_a_short_text_gives_what_it_holds_and_says_so(tokenizer, text_file, caplog):
    found = load_split(tokenizer, Text(text_file, length=512))
    calibration, test = len(found.calibration), len(found.test)
    assert 8 < calibration + test < 128 + 32 and test == (calibration + test) // 4
    assert f"fewer than the default of 160: {calibration} calibrate, {test} test" in caplog.text
    with pytest.raises(DataError, match="needed: 128"):
        load_split(tokenizer, Text(text_file, samples=128, length=512, test_samples=0))
    with pytest.raises(DataError, match="needed: 8"):  # fewer than the default do, but not any number
        load_split(tokenizer, Text(text_file, length=16384))


def test_default_test_samples_are_those_that_the_calibration_leaves(tokenizer, text_file, caplog):
    short = load_split(tokenizer, Text(text_file, length=512))
    most = len(short.calibration) + len(short.test)
    for samples, test in ((most - 5, 5), (most, 0)):
        found = load_split(tokenizer, Text(text_file, samples=samples, length=512))
        assert (len(found.calibration), len(found.test)) == (samples, test)
        assert f"{samples} calibrate, {test or 'none'} test" in caplog.text
    with pytest.raises(DataError, match=f"needed: {most + 1}") as error:
        load_split(tokenizer, Text(text_file, samples=most - 5, length=512, test_samples=6))
    assert "for the 6 test samples" in error.value.hint


@pytest.mark.parametrize("asked, expected", [((700, 500), (1, 2)), ((700, 0), (3, 0)), ((1500, 10), (2, 1))])
def test_a_search_text_of_its_own_that_is_shorter_than_the_default_is_taken_whole(
    tokenizer, text_file, tmp_path, caplog, asked, expected
):
    other = tmp_path / "other.txt"
    other.write_text("".join(random.Random(1).choices("abcdefghilmnoprstu ", k=450)))  # noqa: S311
    text = Text(text_file, search=str(other), samples=4, length=128, test_samples=0)
    found = load_split(tokenizer, text, SearchText(*asked, fit_search=True, fit_holdout=True))
    assert (len(found.calibration), len(found.search), len(found.holdout)) == (4, *expected)
    assert f"instead of {asked[0]} and {asked[1]}" in caplog.text
    with pytest.raises(DataError, match="other.txt has 4.. tokens: 3 samples .* needed") as error:
        load_split(tokenizer, text, SearchText(*asked))
    assert "tokens and holdout" in error.value.hint and "fewer" not in error.value.hint


@pytest.mark.parametrize("own", [False, True], ids=["one text", "a text of its own"])
@pytest.mark.parametrize(("fits", "search", "holdout"), [
    ({"fit_search": True}, 1, 4), ({"fit_holdout": True}, 4, 1), ({"fit_search": True, "fit_holdout": True}, 1, 1),
])  # fmt: skip
def test_what_is_asked_for_by_name_stays_while_a_default_fits_the_text(
    tokenizer, text_file, tmp_path, caplog, own, fits, search, holdout
):
    """Eight samples of sixteen tokens are held out where nothing is said; four of one kind are asked for by name."""
    asked = (64 if search == 4 else 4000, 64 if holdout == 4 else 4000)
    other = tmp_path / "other.txt"
    other.write_text("".join(random.Random(1).choices("abcdefghilmnoprstu ", k=8 * 16)))  # noqa: S311
    text = Text(text_file, search=str(other) if own else None, samples=16, length=16, test_samples=0)
    found = load_split(tokenizer, text, SearchText(*asked, **fits))
    assert len(found.calibration) >= 8 and len(found.search) >= search and len(found.holdout) >= holdout
    if len(fits) == 1:
        assert 4 in (len(found.search), len(found.holdout))
    assert f"instead of {asked[0]} and {asked[1]}" in caplog.text


def test_a_long_search_text_of_its_own_is_none_of_the_calibration_text(tokenizer, text_file, tmp_path):
    other = write_text(tmp_path / "other.txt", 1)
    for fit in (False, True):
        text = Text(text_file, search=other, samples=2, length=16, test_samples=0)
        found = load_split(tokenizer, text, SearchText(100, 60, fit_search=fit, fit_holdout=fit))
        assert tuple(map(len, (found.calibration, found.search, found.holdout))) == (2, 7, 4)


def test_a_default_length_is_a_power_of_two_that_suits_the_shortest_text(tokenizer, tmp_path, caplog):
    def text_of(count):
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(random.Random(count).choices("abcdefgh", k=count)))  # noqa: S311
        return str(path)

    def lengths(*args, **options):
        found = load_split(
            tokenizer,
            Text(*args, **options).within(None),
            SearchText(8000, 4000, fit_search=True, fit_holdout=True),
        )
        return {len(s) for part in (found.pruning, found.test) for s in part.samples}

    assert lengths(text_of(2048 * 9)) == {2048} and "instead of" not in caplog.text.split("candidates")[0]
    assert lengths(text_of(12000)) == {1024}
    assert "samples have 1024 tokens instead of the default of 2048" in caplog.text
    assert lengths(text_of(12000), samples=40) == {256}
    assert lengths(text_of(12000), search=text_of(900), test=text_of(700)) == {256}
    for options in ({"length": 2048}, {"samples": 8, "length": 2048}):
        with pytest.raises(DataError, match="tokens: 5 samples of 2048; needed: 8"):
            lengths(text_of(12000), **options)


def test_a_default_length_that_became_shorter_is_in_the_record(tokenizer, llama_dir, tmp_path):
    from msp_plugin.models.source import max_length

    path, most = tmp_path / "short.txt", min(2048, max_length(llama_dir))
    path.write_text("".join(random.Random(0).choices("abcdefgh", k=7 * most)))  # noqa: S311
    run = msp_plugin.prune(
        llama_dir,
        str(path),
        tmp_path / "out",
        sparsity=0.5,
        method="magnitude",
        allocator="uniform",
        baseline=False,
    )
    assert run.record.calibration.length == run.record.test.length == most // 2
