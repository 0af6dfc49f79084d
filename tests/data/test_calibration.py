import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.data.calibration import CalibrationSet, join
from msp_plugin.data.chats import Chat
from msp_plugin.data.sources import load_texts
from msp_plugin.data.tokenize import check_ids, from_dataloader, leading_tokens, tokenize
from msp_plugin.errors import DataError


def of_lengths(lengths):
    return CalibrationSet(tuple(torch.arange(n) + 100 * i for i, n in enumerate(lengths)), "made")


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(1, 40))
def test_batches_hold_every_sample_once_in_order(lengths, batch_tokens):
    data = of_lengths(lengths)
    rows = []
    for batch in data.batches(batch_tokens):
        assert batch.shape[0] == 1 or batch.numel() <= batch_tokens
        rows += list(batch)
    assert len(rows) == len(data) and all(torch.equal(a, b) for a, b in zip(rows, data.samples, strict=True))


def test_batches_are_as_full_as_they_may_be():
    assert [tuple(b.shape) for b in of_lengths([4] * 5).batches(8)] == [(2, 4), (2, 4), (1, 4)]
    assert [tuple(b.shape) for b in of_lengths([4, 4, 5, 4]).batches(100)] == [(2, 4), (1, 5), (1, 4)]


def test_the_fingerprint_is_that_of_the_token_ids():
    data = of_lengths([4, 5])
    assert data.fingerprint == CalibrationSet(data.samples, "elsewhere").fingerprint
    changed = (data.samples[0], data.samples[1] + 1)
    assert len({s.fingerprint for s in (
        data, CalibrationSet(changed, "made"), CalibrationSet(data.samples[::-1], "made"),
        CalibrationSet(data.samples[:1], "made"), CalibrationSet((torch.cat(data.samples),), "made"),
    )}) == 5  # fmt: skip


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(1, 60))
def test_the_tail_is_the_shortest_that_is_long_enough(lengths, tail_tokens):
    data = of_lengths(lengths)
    cuts = [
        c for c in range(len(lengths)) if sum(lengths[c:]) >= tail_tokens and c >= (len(lengths) + 1) // 2
    ]
    if not cuts:
        with pytest.raises(DataError, match=f"asks for {tail_tokens:,} held-out tokens") as error:
            data.split(tail_tokens)
        if most := sum(lengths[(len(lengths) + 1) // 2 :]):
            assert f"{most:,} or less" in error.value.hint
            assert data.split(most)  # the advice is taken
        else:
            assert "at least 2 samples" in error.value.hint
        return
    head, tail = data.split(tail_tokens)
    assert len(head) == max(cuts) and head.samples + tail.samples == data.samples
    assert head.source == f"made [:{len(head)}]" and tail.source == f"made [{len(head)}:]"


def test_parts_are_joined_in_order():
    a, b = of_lengths([3]), CalibrationSet((torch.arange(4),), "other")
    joined = join([a, b])
    assert joined.samples == a.samples + b.samples and joined.source == "made + other" and joined.tokens == 7


def test_samples_are_cut_from_the_joined_documents(tokenizer):
    texts = ["the cat sat", "", "on the mat"]
    stream = []
    for text in (texts[0], texts[2]):
        stream += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    data = tokenize(tokenizer, texts, samples=len(stream) // 4, length=4, source="x")
    assert [s.tolist() for s in data.samples] == [
        stream[i : i + 4] for i in range(0, len(stream) // 4 * 4, 4)
    ]
    assert data.source == "x" and all(s.dtype == torch.int64 for s in data.samples)


def test_samples_are_spread_over_a_longer_text(tokenizer):
    text = ["the cat sat on the mat " * 40]
    all_of_it = tokenize(tokenizer, text, samples=1000, length=5, source="x", at_least=1)
    some = tokenize(tokenizer, text, samples=4, length=5, source="x")
    found = len(all_of_it)
    expected = [all_of_it.samples[i * found // 4] for i in range(4)]
    assert found > 8 and all(torch.equal(a, b) for a, b in zip(some.samples, expected, strict=True))


def test_a_seed_moves_each_sample_within_its_share(tokenizer):
    def cut(samples, seed=0, at_least=None):
        text = ["the cat sat on the mat, and the dog sat on the log " * 20]
        found = tokenize(tokenizer, text, samples=samples, length=3, source="x", at_least=at_least, seed=seed)
        return [sample.tolist() for sample in found.samples]

    everything = cut(10_000, at_least=1)
    shares = [everything[i * len(everything) // 5 : (i + 1) * len(everything) // 5] for i in range(5)]
    assert cut(5, 1) == cut(5, 1) and len({str(cut(5, seed)) for seed in range(6)}) > 3
    for seed in range(6):
        assert all(sample in share for sample, share in zip(cut(5, seed), shares, strict=True))


def test_no_more_text_is_read_than_is_useful(tokenizer):
    read = []

    def endless():
        while True:
            read.append(1)
            yield "the cat sat on the mat"

    assert len(tokenize(tokenizer, endless(), samples=3, length=4, source="x")) == 3
    assert len(read) < 500


def test_too_short_a_text_says_how_much_there_is(tokenizer):
    text = "the cat sat"
    count = len(tokenizer(text).input_ids) + 1
    with pytest.raises(DataError) as error:
        tokenize(tokenizer, [text], samples=9, length=2, source="a.txt")
    assert f"a.txt has {count} tokens: {count // 2} samples of 2; needed: 9" in error.value.message
    assert "fewer or shorter samples" in error.value.hint
    assert len(tokenize(tokenizer, [text], samples=9, length=2, source="a.txt", at_least=1)) == count // 2


@pytest.mark.parametrize("samples, length", [(0, 8), (4, 1)])
def test_no_sample_or_one_token_is_refused(tokenizer, samples, length):
    with pytest.raises(DataError, match=f"{samples} samples of {length} tokens"):
        tokenize(tokenizer, ["text"], samples=samples, length=length, source="x")


def stream_of(tokenizer, *texts):
    """The joined tokens of texts, each closed by the end-of-text token."""
    found = []
    for text in texts:
        found += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return found


def cut_samples(tokenizer, texts, length=6, **options):
    data = tokenize(tokenizer, texts, samples=999, length=length, source="x", at_least=1, **options)
    assert all(len(sample) == length for sample in data.samples)
    return data


TEXTS = ["the cat sat on the mat", "and the dog sat on the log"]


def test_each_sample_starts_as_the_tokenizer_starts_a_text(bos_tokenizer):
    data = cut_samples(bos_tokenizer, TEXTS)
    assert all(sample[0] == bos_tokenizer.bos_token_id for sample in data.samples)
    stream = stream_of(bos_tokenizer, *TEXTS)
    rest = [token for sample in data.samples for token in sample[1:].tolist()]
    assert rest == stream[: len(rest)] and len(stream) - len(rest) < 5
    assert data.readings[0].bos == "<s>"


def test_a_tokenizer_that_starts_no_text_adds_nothing(tokenizer, bos_tokenizer):
    for made, bos in ((tokenizer, None), (tokenizer, False), (bos_tokenizer, False)):
        data = cut_samples(made, TEXTS, bos=bos)
        stream = stream_of(tokenizer, *TEXTS)
        assert torch.cat(data.samples).tolist() == stream[: data.tokens]
        assert data.readings[0].bos is None


def test_a_start_that_the_tokenizer_does_not_add_can_be_asked_for(tokenizer, bos_tokenizer):
    from transformers import PreTrainedTokenizerFast

    never = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="</s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    )
    assert leading_tokens(never) == () and leading_tokens(never, True) == (never.eos_token_id,)
    assert (
        leading_tokens(bos_tokenizer, True) == leading_tokens(bos_tokenizer) == (bos_tokenizer.bos_token_id,)
    )
    with pytest.raises(DataError, match="no beginning-of-text token"):
        leading_tokens(tokenizer, True)


def test_a_sample_is_longer_than_its_start(bos_tokenizer):
    assert len(cut_samples(bos_tokenizer, TEXTS, length=2)) == len(stream_of(bos_tokenizer, *TEXTS))


USER, REPLY = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}


@pytest.mark.parametrize("bos", [None, False])
def test_a_conversation_is_what_the_chat_template_writes_with_one_start(bos_tokenizer, bos):
    data = cut_samples(bos_tokenizer, [Chat((USER, REPLY), "here")] * 2, bos=bos)
    written = "user: the cat</s>assistant: sat on</s>"
    stream = bos_tokenizer(written * 2, add_special_tokens=False).input_ids
    rest = [token for sample in data.samples for token in sample[bos is None :].tolist()]
    assert rest == stream[: len(rest)]


def test_a_conversation_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(DataError, match="a.jsonl, line 1 is a conversation, and .* no chat template"):
        cut_samples(tokenizer, [Chat((USER,), "a.jsonl, line 1")])


def test_a_conversation_that_the_template_refuses_is_named(bos_tokenizer):
    strict = copy.deepcopy(bos_tokenizer)
    strict.chat_template = "{{ raise_exception('roles must [red]alternate') }}"
    with pytest.raises(DataError, match="line 3: .*refuses the conversation.*must .red.alternate"):
        cut_samples(strict, [Chat((USER,), "a.jsonl, line 3")])


def test_samples_say_what_was_read_for_them(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": "the cat sat on the mat"},
        {"text": None},
        {"text": ""},
        {"text": "the dog sat on the log"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = tokenize(tokenizer, load_texts(str(path)), samples=2, length=4, source="mine")
    assert [reading.record().to_dict() for reading in join([data, data]).readings] == 2 * [
        {"source": "mine", "samples": 2, "columns": ["text"], "rows": 4, "skipped": 2, "bos": None}
    ]


@pytest.mark.parametrize("token, known", [(96, 96), (-1, 96)])
def test_tokens_that_the_model_has_no_embedding_for_are_refused(token, known):
    data = CalibrationSet((torch.tensor([1, 2]), torch.tensor([95, token])), "mine")
    with pytest.raises(DataError, match=f"mine has token {token}, .* embeddings for {known} tokens, 0 to 95"):
        check_ids(data, known)
    check_ids(CalibrationSet((torch.tensor([0, 95]),), "mine"), 96)


def test_a_loaders_padding_is_removed_on_either_side():
    batch = {"input_ids": torch.tensor([[9, 9, 1, 2], [3, 4, 5, 9], [9, 9, 9, 7]]),
             "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]])}  # fmt: skip
    data = from_dataloader([batch, {"input_ids": [[6, 7]]}])
    assert [s.tolist() for s in data.samples] == [[1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize(
    "batch, found", [({"labels": 1}, "'labels'"), (torch.zeros(2, 2), "Tensor"), ([1], "list")]
)
def test_a_batch_without_token_ids_is_named(batch, found):
    with pytest.raises(DataError, match="no input_ids") as error:
        from_dataloader([batch])
    assert found in error.value.message and "tokenize" in error.value.hint


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.tensor([[1]])}]])
def test_a_loader_without_a_usable_sample_is_refused(batches):
    with pytest.raises(DataError, match="no sample of two tokens"):
        from_dataloader(batches)


@pytest.mark.parametrize("ids, found", [
    ([[1, 2], [3]], "not a table of numbers"), (torch.tensor([1, 2, 3]), r"int64\[3\]"),
    (torch.ones(2, 3), r"float32\[2, 3\]"), (torch.ones(1, 2, 3, dtype=torch.int64), r"int64\[1, 2, 3\]"),
])  # fmt: skip
def test_token_ids_that_are_no_table_are_refused(ids, found):
    with pytest.raises(DataError, match=f"the input_ids of a calibration batch are {found}"):
        from_dataloader([{"input_ids": ids}])


def test_a_mask_of_who_sees_whom_is_no_padding():
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 1, 3, 3).tril()}
    assert [s.tolist() for s in from_dataloader([batch]).samples] == [[1, 2, 3]]


def test_a_start_that_only_the_template_writes_is_there_once_or_not_at_all(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.bos_token = made.eos_token
    made.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    for bos, count in ((True, 1), (False, 0)):
        (sample,) = cut_samples(made, [Chat((USER, REPLY), "here")], length=5, bos=bos).samples
        assert sample.tolist().count(made.bos_token_id) == count


def test_a_template_that_writes_the_date_gives_equal_samples_every_day(bos_tokenizer):
    dated = copy.deepcopy(bos_tokenizer)
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0]['content'] }}"
    chat = Chat(({"role": "user", "content": "hi"},), "row 1")
    assert chat.text(dated) == "2024-07-26 hi"
