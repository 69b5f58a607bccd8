"""What tasks ask of a model equals what plain full forwards say, at every level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsla.errors import ConfigError, DataError, PlanError
from dsla.evals import subject as module
from dsla.evals.subject import Subject
from tests.evals.tiny import subject, tokens

LEVELS = (0, 2, 4)
SETTINGS = [(level, "on") for level in LEVELS] + [(2, "off"), (4, "one"), (4, "untrained")]


@pytest.fixture(scope="module")
def model() -> Subject:
    return subject()


def choose(model: Subject, level: int, states: str) -> None:
    off = {"on": frozenset[int](), "one": frozenset([1])}.get(states, model.all_states)
    model.set(level, off, untrained=states == "untrained")


def plain(model: Subject, ids: list[int]) -> Tensor:
    """Log-probabilities after every token, from the model as it is, without a cache."""
    with torch.no_grad():
        return model.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def plain_likelihood(model: Subject, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    log_probs = plain(model, context + continuation)[len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    return float(log_probs.gather(1, wanted[:, None]).sum()), bool((log_probs.argmax(-1) == wanted).all())


@pytest.mark.parametrize(("level", "states"), SETTINGS)
def test_log_probs_of_a_text(model: Subject, monkeypatch: pytest.MonkeyPatch, level: int, states: str) -> None:
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 7 * model.model.config.vocab_size)
    choose(model, level, states)
    ids = tokens(50)
    expected = plain(model, ids)
    torch.testing.assert_close(model.logits(ids).log_softmax(-1), expected)
    found = model.token_log_probs(ids)
    torch.testing.assert_close(found, expected[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1))
    assert model.token_log_probs(ids[:1]).shape == (0,)


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize(("level", "states"), SETTINGS)
def test_likelihoods_of_continuations(
    model: Subject, monkeypatch: pytest.MonkeyPatch, level: int, states: str, rows: int
) -> None:
    choose(model, level, states)
    context = tokens(30)
    monkeypatch.setattr(module, "_CACHED_TOKENS_AT_ONCE", rows * 39)
    best = model.generate(context, 6)
    continuations = [tokens(5, 1), tokens(1, 2), best, [*best[:3], 9], tokens(9, 3), best[:1]]
    found = model.log_likelihoods(context, continuations)
    for one, continuation in zip(found, continuations, strict=True):
        expected = plain_likelihood(model, context, continuation)
        assert one[0] == pytest.approx(expected[0], abs=1e-9)
        assert one[1] == expected[1]
    assert found[2][1] and not found[3][1]


@pytest.mark.parametrize(("level", "states"), SETTINGS)
def test_a_context_read_in_parts_is_the_context(model: Subject, level: int, states: str) -> None:
    choose(model, level, states)
    ids, continuations = tokens(40), [tokens(4, 1), tokens(2, 2)]
    first = model.read(ids[:23])
    whole = model.read(ids[23:], first)
    assert whole.ids == ids
    torch.testing.assert_close(whole.log_probs, plain(model, ids)[-1])
    expected = [plain_likelihood(model, ids, c)[0] for c in continuations]
    for _ in range(2):
        # Nothing that goes on from a context changes it.
        assert [x for x, _ in model.log_likelihoods(whole, continuations)] == pytest.approx(expected)
        assert model.generate(whole, 5) == model.generate(ids, 5)
    torch.testing.assert_close(model.read(ids[23:], first).log_probs, whole.log_probs)


@pytest.mark.parametrize(("level", "states"), SETTINGS)
def test_generation_is_greedy(model: Subject, level: int, states: str) -> None:
    choose(model, level, states)
    ids = tokens(20)
    written = model.generate(ids, 12)
    for token in written:
        assert int(plain(model, ids)[-1].argmax()) == token
        ids.append(token)
    assert len(written) == 12 or int(plain(model, ids)[-1].argmax()) in model.ends


def test_generation_ends_at_a_stop_text_or_an_end_token(model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set(0)
    ids = tokens(20)
    written = model.generate(ids, 10)
    pieces = [model.tokenizer.decode(written[: i + 1]) for i in range(10)]
    stop = pieces[4][-1]
    at = next(i for i, text in enumerate(pieces) if stop in text)
    assert model.generate(ids, 10, (stop, "never")) == written[: at + 1]
    assert model.generate_text(ids, 10, (stop,)) == pieces[at][: pieces[at].index(stop)]
    monkeypatch.setattr(model, "ends", frozenset([written[3]]))
    assert model.generate(ids, 10) == written[: written.index(written[3])]


def test_floor_is_window_and_sinks_of_the_teachers_own_attention(model: Subject) -> None:
    ids = tokens(40)
    model.set(4, model.all_states, untrained=True)
    floor = model.token_log_probs(ids)
    model.set(0)
    teacher = model.token_log_probs(ids)
    torch.testing.assert_close(floor[:3], teacher[:3])
    assert not torch.allclose(floor[20:], teacher[20:])
    model.set(4)
    trained = model.token_log_probs(ids)
    model.set(4, model.all_states)
    without = model.token_log_probs(ids)
    assert not torch.allclose(trained[20:], without[20:]) and not torch.allclose(without[20:], floor[20:])
    model.set(0)
    assert torch.equal(model.token_log_probs(ids), teacher)


def test_teacher_for_a_while(model: Subject) -> None:
    model.set(3, frozenset([0]))
    with model.teacher():
        assert model.setting == (0, frozenset(), False)
    assert model.setting == (3, frozenset([0]), False)


def test_what_cannot_be_is_refused(model: Subject) -> None:
    model.set(2)
    short = model.read(tokens(4090))
    with pytest.raises(DataError, match="4097 tokens are more than the model's context of 4096"):
        model.token_log_probs(tokens(4097))
    with pytest.raises(DataError, match="4100 tokens are more"):
        model.read(tokens(10), short)
    with pytest.raises(DataError, match="4100 tokens are more"):
        model.log_likelihoods(short, [tokens(1), tokens(10)])
    with pytest.raises(DataError, match="4090 tokens and 7 to write"):
        model.generate(short, 7)
    with pytest.raises(DataError, match="no tokens"):
        model.log_likelihoods(short, [[]])
    with pytest.raises(DataError, match="no tokens"):
        model.generate([], 3)
    model.set(1)
    for call in (lambda: model.generate(short, 3), lambda: model.log_likelihoods(short, [[1]])):
        with pytest.raises(ConfigError, match="read at another level"):
            call()
    with pytest.raises(PlanError, match="levels 0 to 4"):
        model.set(5)
    with pytest.raises(ConfigError, match="no state 2"):
        model.set(1, frozenset([2]))
    with pytest.raises(ConfigError, match="leave all of them out"):
        model.set(1, untrained=True)
    assert model.setting == (1, frozenset(), False)


def test_a_model_without_an_adapter_has_level_0_alone() -> None:
    whole = subject()
    del whole.model.dsla
    bare = Subject(whole.model, whole.tokenizer)
    assert bare.max_level == 0
    assert len(bare.token_log_probs(tokens(5))) == 4
    with pytest.raises(ConfigError, match="without one"):
        bare.set(1)
