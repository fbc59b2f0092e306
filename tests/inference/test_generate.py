import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pertoken.errors import RecipeError
from pertoken.folders.weights import save_folder
from pertoken.inference.generate import generate, keep_top_k, keep_top_p, penalize_repetition, stream_text
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig

pytestmark = pytest.mark.numeric

PROMPT = [5, 17, 3, 40]


@pytest.fixture(scope="module")
def model():
    """Random weights, large enough that the choice of token depends on the whole past."""
    config = ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=False,
        max_position_embeddings=48,
    )
    model = CausalLM(config.resolve(61), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model


def random_logits(seed, size=61):
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_transformers(model, use_cache, tmp_path):
    save_folder(model, tmp_path, eos_token_id=None)
    reference = Qwen3ForCausalLM.from_pretrained(tmp_path)
    expected = reference.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=30)[0, len(PROMPT) :]
    got = list(generate(model, PROMPT, max_new_tokens=30, use_cache=use_cache))
    assert len(set(got)) > 5, "a constant answer would prove little"
    assert got == expected.tolist()


@pytest.mark.parametrize("keys", [{}, {"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.4}], ids=str)
def test_sampling_is_deterministic_by_seed_with_and_without_cache(model, keys):
    def run(seed, **more):
        return list(generate(model, PROMPT, max_new_tokens=25, temperature=1.5, seed=seed, **keys, **more))

    torch.manual_seed(0)
    first, state = run(3), torch.get_rng_state()
    assert run(3) == run(3, use_cache=False) == first
    assert run(4) != first
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"


def test_a_tiny_temperature_is_greedy(model):
    greedy = list(generate(model, PROMPT, max_new_tokens=10))
    assert list(generate(model, PROMPT, max_new_tokens=10, temperature=1e-30)) == greedy


def test_a_repetition_penalty_changes_greedy_too(model):
    plain = list(generate(model, PROMPT, max_new_tokens=40))
    penalized = list(generate(model, PROMPT, max_new_tokens=40, repetition_penalty=100.0))
    assert len(set(penalized + PROMPT)) > len(set(plain + PROMPT))


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(model):
    answer = list(generate(model, PROMPT, max_new_tokens=20))
    stop = answer[7]
    assert list(generate(model, PROMPT, max_new_tokens=20, stop_ids={stop})) == answer[: answer.index(stop)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompt_and_answer_together_end_at_max_position_embeddings(model, use_cache):
    assert len(list(generate(model, PROMPT, max_new_tokens=1000, use_cache=use_cache))) == 48 - len(PROMPT)
    assert len(list(generate(model, [1] * 47, max_new_tokens=1000, use_cache=use_cache))) == 1


def test_tokens_come_one_at_a_time_and_the_mode_of_the_model_returns(model):
    model.train()
    tokens = generate(model, PROMPT, max_new_tokens=5)
    assert model.training
    next(tokens)
    assert not model.training
    tokens.close()
    assert model.training
    assert len(list(generate(model, PROMPT, max_new_tokens=3))) == 3
    assert model.training


@pytest.mark.parametrize("keys", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_the_narrowest_filter_is_greedy(model, keys):
    greedy = list(generate(model, PROMPT, max_new_tokens=8))
    assert list(generate(model, PROMPT, max_new_tokens=8, temperature=1.0, **keys)) == greedy


@pytest.mark.parametrize(
    ("prompt", "keys", "named"),
    [
        ([], {}, "prompt=0 tokens"),
        ([1] * 48, {}, "prompt=48 tokens"),
        ([1, 61], {}, "token 61"),
        ([-1], {}, "token -1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"temperature": -0.1}, "temperature=-0.1"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"temperature": float("inf")}, "temperature=inf"),
        ([1], {"top_k": -1}, "top_k=-1"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"top_p": 1.1}, "top_p=1.1"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(model, prompt, keys, named):
    with pytest.raises(RecipeError, match=named):
        generate(model, prompt, **{"max_new_tokens": 5} | keys)


# The processors, against transformers'


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((lambda x, p=p: penalize_repetition(x, PROMPT, p), RepetitionPenaltyLogitsProcessor(p)) for p in (1.3, 0.7)),
        *((lambda x, k=k: keep_top_k(x, k), TopKLogitsWarper(k)) for k in (1, 5, 61, 100)),
        *((lambda x, p=p: keep_top_p(x, p), TopPLogitsWarper(p)) for p in (1e-6, 0.3, 0.9, 0.999)),
    ],
)
def test_each_processor_equals_transformers(ours, theirs, seed):
    logits = random_logits(seed)
    assert torch.equal(ours(logits.clone()), theirs(torch.tensor([PROMPT]), logits[None].clone())[0])


@pytest.mark.parametrize("size", [2, 61])
def test_neutral_values_change_nothing(size):
    logits = random_logits(0, size)
    assert keep_top_k(logits, 0) is logits
    assert keep_top_p(logits, 1.0) is logits
    assert penalize_repetition(logits, PROMPT, 1.0) is logits


def test_sampling_frequencies_follow_transformers_order_of_processors(model, monkeypatch):
    """One step drawn many times: repetition penalty, temperature, top-k, top-p, in this order."""
    keys = {"temperature": 2.0, "top_k": 8, "top_p": 0.8, "repetition_penalty": 1.5}
    logits = random_logits(5)
    monkeypatch.setattr(model, "decode", lambda ids, cache: logits)
    scores = logits[None]
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.5),
        TemperatureLogitsWarper(2.0),
        TopKLogitsWarper(8),
        TopPLogitsWarper(0.8),
    ):
        scores = processor(torch.tensor([PROMPT]), scores)
    expected = scores[0].softmax(-1)
    draws = [next(generate(model, PROMPT, max_new_tokens=1, seed=seed, **keys)) for seed in range(3000)]
    frequencies = torch.bincount(torch.tensor(draws), minlength=61) / len(draws)
    assert set(draws) == set(expected.nonzero().flatten().tolist())
    assert float((frequencies - expected).abs().max()) < 4 * (0.25 / len(draws)) ** 0.5


# Text

TEXTS = [
    "Hello, world!",
    "naïve café — déjà vu",
    "你好，世界！我们一起学习。",
    "a 👩‍👩‍👧‍👦 family 🎉",
    "tab\tnew\nline  two",
    "",
]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:2], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def metaspace():
    """As SentencePiece models have it: a word starts with a space that the first word of a text loses."""
    words = ["<unk>", "▁", *sorted({c for text in TEXTS for c in text if c != " "}), "▁Hello", "▁world", "▁family"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_streamed_pieces_join_to_the_text_and_hold_no_broken_character(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "�" not in "".join(pieces)
    assert "" not in pieces


def test_text_is_streamed_as_soon_as_it_is_whole():
    tokenizer = byte_level()
    ids = tokenizer.encode("é你!", add_special_tokens=False)
    taken = 0

    def counted():
        nonlocal taken
        for taken, token in enumerate(ids, start=1):  # noqa: B007
            yield token

    shown = [(piece, taken) for piece in stream_text(tokenizer, counted())]
    assert [piece for piece, _ in shown] == ["é", "你", "!"]
    for piece, after in shown:
        assert tokenizer.decode(ids[:after]).endswith(piece), "a piece came later than its last token"


def test_an_answer_cut_inside_a_character_still_ends():
    tokenizer = byte_level()
    ids = tokenizer.encode("ab你", add_special_tokens=False)[:-1]
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_special_tokens_are_not_shown():
    tokenizer = byte_level()
    ids = [*tokenizer.encode("ab", add_special_tokens=False), tokenizer.eos_token_id]
    assert "".join(stream_text(tokenizer, ids)) == "ab"
